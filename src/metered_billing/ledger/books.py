"""The ledger's rows in SQLite: the tables, and every statement over them."""
# ruff: noqa: S608  (only column names of ours go into a statement; values are bound)

import sqlite3

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger.rows import ENTRY, KEY, VOID, entry_of, entry_values, key_values, remembered_of
from metered_billing.ledger.rules import Entry, Held, Remembered, Voided
from metered_billing.schemas import Schema

_TABLES = (
    f"""
    CREATE TABLE accounts (
        tenant_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        balance INTEGER NOT NULL CHECK (typeof(balance) = 'integer' AND balance >= 0),
        granted INTEGER NOT NULL CHECK (typeof(granted) = 'integer' AND granted BETWEEN balance AND {MAX_AMOUNT}),
        PRIMARY KEY (tenant_id, user_id)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE entries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        transaction_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        tenant_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        amount INTEGER NOT NULL CHECK (typeof(amount) = 'integer'),
        balance INTEGER NOT NULL CHECK (typeof(balance) = 'integer' AND balance >= 0),
        created_at TEXT NOT NULL,
        reason TEXT,
        request_id TEXT,
        metadata TEXT,
        items TEXT,
        CHECK (CASE kind WHEN 'deduction' THEN amount < 0
                         WHEN 'grant' THEN amount > 0
                         WHEN 'refund' THEN amount > 0
                         WHEN 'void' THEN amount > 0 ELSE 0 END)
    )
    """,
    "CREATE INDEX entries_by_tenant ON entries (tenant_id, seq)",
    "CREATE INDEX entries_by_account ON entries (tenant_id, user_id, seq)",
    "CREATE INDEX returned_by_transaction ON entries (transaction_id, amount) WHERE kind IN ('refund', 'void')",
    """
    CREATE TABLE keys (
        tenant_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        kind TEXT NOT NULL,
        user_id TEXT NOT NULL,
        payload_hash BLOB NOT NULL,
        status INTEGER NOT NULL,
        body TEXT NOT NULL,
        entry_id TEXT,
        PRIMARY KEY (tenant_id, idempotency_key)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE voids (
        tenant_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        user_id TEXT NOT NULL,
        refunded INTEGER NOT NULL CHECK (typeof(refunded) = 'integer' AND refunded >= 0),
        created_at TEXT NOT NULL,
        PRIMARY KEY (tenant_id, idempotency_key)
    ) WITHOUT ROWID
    """,
)

_APPEND_ONLY = """
CREATE TRIGGER {table}_are_not_{verb}d BEFORE {verb} ON {table} BEGIN
    SELECT RAISE(ABORT, '{table} are append-only: correct one by writing another');
END
"""

SCHEMA = Schema(
    "ledger",
    (
        (
            *_TABLES,
            *(
                _APPEND_ONLY.format(table=table, verb=verb)
                for table in ("entries", "keys", "voids")
                for verb in ("update", "delete")
            ),
        ),
    ),
)

_RETURNED = "FROM entries WHERE transaction_id = ? AND kind IN ('refund', 'void')"


class SqliteBooks:
    """The `Rows` of one transaction on a connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def held(self, tenant_id: str, user_id: str | None) -> Held:
        row = self._execute(
            "SELECT balance, granted FROM accounts WHERE tenant_id = ? AND user_id = ?",
            (tenant_id, user_id or ""),
        ).fetchone()
        return Held(*row) if row else Held(0, 0)

    def hold(self, tenant_id: str, user_id: str | None, held: Held) -> None:
        self._execute(
            "INSERT INTO accounts (tenant_id, user_id, balance, granted) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (tenant_id, user_id) DO UPDATE "
            "SET balance = excluded.balance, granted = excluded.granted",
            (tenant_id, user_id or "", held.balance, held.granted),
        )

    def entry(self, entry_id: str) -> Entry | None:
        row = self._execute(f"SELECT {ENTRY} FROM entries WHERE id = ?", (entry_id,)).fetchone()
        return entry_of(row) if row else None

    def write(self, entry: Entry) -> None:
        self._execute(
            f"INSERT INTO entries ({ENTRY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            entry_values(entry),
        )

    def refunded(self, transaction_id: str) -> int:
        (refunded,) = self._execute(
            f"SELECT coalesce(sum(amount), 0) {_RETURNED}",
            (transaction_id,),
        ).fetchone()
        return int(refunded)

    def returns(self, transaction_id: str) -> list[Entry]:
        rows = self._execute(
            f"SELECT {ENTRY} {_RETURNED} ORDER BY seq",
            (transaction_id,),
        )
        return [entry_of(row) for row in rows]

    def remembered(self, tenant_id: str, key: str) -> Remembered | None:
        row = self._execute(
            "SELECT kind, user_id, payload_hash, status, body, entry_id FROM keys "
            "WHERE tenant_id = ? AND idempotency_key = ?",
            (tenant_id, key),
        ).fetchone()
        return remembered_of(row) if row else None

    def remember(self, tenant_id: str, key: str, what: Remembered) -> None:
        self._execute(f"INSERT INTO keys ({KEY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", key_values(tenant_id, key, what))

    def voided(self, tenant_id: str, key: str) -> Voided | None:
        row = self._execute(
            "SELECT user_id, refunded FROM voids WHERE tenant_id = ? AND idempotency_key = ?",
            (tenant_id, key),
        ).fetchone()
        return Voided(row[0] or None, row[1]) if row else None

    def mark_voided(self, tenant_id: str, key: str, what: Voided, at: str) -> None:
        self._execute(
            f"INSERT INTO voids ({VOID}) VALUES (?, ?, ?, ?, ?)",
            (tenant_id, key, what.user_id or "", what.refunded, at),
        )

    def position(self, tenant_id: str, entry_id: str) -> int | None:
        row = self._execute("SELECT seq FROM entries WHERE id = ? AND tenant_id = ?", (entry_id, tenant_id)).fetchone()
        return row[0] if row else None

    def page(self, tenant_id: str, user_id: str | None, before: int | None, limit: int) -> list[Entry]:
        where: list[str] = ["tenant_id = ?"]
        values: list[str | int] = [tenant_id]
        if user_id is not None:
            where.append("user_id = ?")
            values.append(user_id)
        if before is not None:
            where.append("seq < ?")
            values.append(before)
        rows = self._execute(
            f"SELECT {ENTRY} FROM entries WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?",
            (*values, limit),
        )
        return [entry_of(row) for row in rows]
