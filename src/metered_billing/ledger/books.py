"""The ledger's rows in SQLite: the tables, and every statement over them."""
# ruff: noqa: S608  (only column names of ours go into a statement; values are bound)

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger.failures import LedgerNotOpened
from metered_billing.ledger.rules import Entry, Held, Remembered, Voided

SCHEMA_VERSION = 1

# No user is '': a primary key of NULLs would let one account have two rows.
_SCHEMA = f"""
CREATE TABLE accounts (
    tenant_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    balance INTEGER NOT NULL CHECK (typeof(balance) = 'integer' AND balance >= 0),
    granted INTEGER NOT NULL CHECK (typeof(granted) = 'integer' AND granted BETWEEN balance AND {MAX_AMOUNT}),
    PRIMARY KEY (tenant_id, user_id)
) WITHOUT ROWID;

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
);
CREATE INDEX entries_by_tenant ON entries (tenant_id, seq);
CREATE INDEX entries_by_account ON entries (tenant_id, user_id, seq);
CREATE INDEX returned_by_transaction ON entries (transaction_id, amount) WHERE kind IN ('refund', 'void');

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
) WITHOUT ROWID;

CREATE TABLE voids (
    tenant_id TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    user_id TEXT NOT NULL,
    refunded INTEGER NOT NULL CHECK (typeof(refunded) = 'integer' AND refunded >= 0),
    created_at TEXT NOT NULL,
    PRIMARY KEY (tenant_id, idempotency_key)
) WITHOUT ROWID;

PRAGMA user_version = {SCHEMA_VERSION};
"""

_APPEND_ONLY = """
CREATE TRIGGER {table}_are_not_{verb}d BEFORE {verb} ON {table} BEGIN
    SELECT RAISE(ABORT, '{table} are append-only: correct one by writing another');
END
"""

_ENTRY = (
    "id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance, created_at, reason, "
    "request_id, metadata, items"
)

_RETURNED = "FROM entries WHERE transaction_id = ? AND kind IN ('refund', 'void')"

_VOID = "tenant_id, idempotency_key, user_id, refunded, created_at"


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables where there are none. Within a transaction, and repeatable.

    Raises:
        LedgerNotOpened: The file is another version's, or no ledger at all.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version != 0:
        raise LedgerNotOpened(
            f"this ledger has schema version {version}, and this metered-billing knows version "
            f"{SCHEMA_VERSION}: use the metered-billing that wrote it, or a newer one"
        )
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise LedgerNotOpened("this is a SQLite database, but not a ledger: name another file")
    # One by one: `executescript` would commit the transaction that we are in.
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    for table in ("entries", "keys", "voids"):
        for verb in ("update", "delete"):
            connection.execute(_APPEND_ONLY.format(table=table, verb=verb))


class SqliteBooks:
    """The `Books` of one transaction on a connection."""

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
        row = self._execute(f"SELECT {_ENTRY} FROM entries WHERE id = ?", (entry_id,)).fetchone()
        return _entry(row) if row else None

    def write(self, entry: Entry) -> None:
        self._execute(
            f"INSERT INTO entries ({_ENTRY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.id,
                entry.kind,
                entry.transaction_id,
                entry.idempotency_key,
                entry.tenant_id,
                entry.user_id or "",
                entry.amount,
                entry.balance,
                entry.created_at,
                entry.reason,
                entry.request_id,
                _to_json(dict(entry.metadata)) if entry.metadata is not None else None,
                _to_json(entry.items) if entry.items else None,
            ),
        )

    def refunded(self, transaction_id: str) -> int:
        (refunded,) = self._execute(
            f"SELECT coalesce(sum(amount), 0) {_RETURNED}",
            (transaction_id,),
        ).fetchone()
        return int(refunded)

    def returns(self, transaction_id: str) -> list[Entry]:
        """All refunds and the void of a deduction, oldest first."""
        rows = self._execute(
            f"SELECT {_ENTRY} {_RETURNED} ORDER BY seq",
            (transaction_id,),
        )
        return [_entry(row) for row in rows]

    def remembered(self, tenant_id: str, key: str) -> Remembered | None:
        row = self._execute(
            "SELECT kind, user_id, payload_hash, status, body, entry_id FROM keys "
            "WHERE tenant_id = ? AND idempotency_key = ?",
            (tenant_id, key),
        ).fetchone()
        if row is None:
            return None
        kind, user_id, payload_hash, status, body, entry_id = row
        return Remembered(kind, user_id or None, payload_hash, status, json.loads(body), entry_id)

    def remember(self, tenant_id: str, key: str, what: Remembered) -> None:
        self._execute(
            "INSERT INTO keys (tenant_id, idempotency_key, kind, user_id, payload_hash, status, body, "
            "entry_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                tenant_id,
                key,
                what.kind,
                what.user_id or "",
                what.payload_hash,
                what.status,
                _to_json(dict(what.body)),
                what.entry_id,
            ),
        )

    def voided(self, tenant_id: str, key: str) -> Voided | None:
        row = self._execute(
            "SELECT user_id, refunded FROM voids WHERE tenant_id = ? AND idempotency_key = ?",
            (tenant_id, key),
        ).fetchone()
        return Voided(row[0] or None, row[1]) if row else None

    def mark_voided(self, tenant_id: str, key: str, what: Voided, at: str) -> None:
        self._execute(
            f"INSERT INTO voids ({_VOID}) VALUES (?, ?, ?, ?, ?)",
            (tenant_id, key, what.user_id or "", what.refunded, at),
        )

    def position(self, tenant_id: str, entry_id: str) -> int | None:
        """An entry's sequence number; None if the tenant has no such entry."""
        row = self._execute("SELECT seq FROM entries WHERE id = ? AND tenant_id = ?", (entry_id, tenant_id)).fetchone()
        return row[0] if row else None

    def page(self, tenant_id: str, user_id: str | None, before: int | None, limit: int) -> list[Entry]:
        """Entries, newest first.

        Args:
            user_id: "" for the tenant's shared pool, None for all of the tenant's accounts.
            before: Only entries older than this sequence number.
        """
        where: list[str] = ["tenant_id = ?"]
        values: list[str | int] = [tenant_id]
        if user_id is not None:
            where.append("user_id = ?")
            values.append(user_id)
        if before is not None:
            where.append("seq < ?")
            values.append(before)
        rows = self._execute(
            f"SELECT {_ENTRY} FROM entries WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?",
            (*values, limit),
        )
        return [_entry(row) for row in rows]


def entry_body(entry: Entry) -> dict[str, Any]:
    """An entry as JSON has it."""
    return {
        "id": entry.id,
        "kind": entry.kind,
        "transaction_id": entry.transaction_id,
        "idempotency_key": entry.idempotency_key,
        "tenant_id": entry.tenant_id,
        "user_id": entry.user_id,
        "amount": entry.amount,
        "balance": entry.balance,
        "created_at": entry.created_at,
        "reason": entry.reason,
        "request_id": entry.request_id,
        "metadata": dict(entry.metadata or {}),
        "items": list(entry.items),
    }


def _entry(row: tuple[Any, ...]) -> Entry:
    metadata: Mapping[str, str] | None = json.loads(row[11]) if row[11] else None
    items = tuple(json.loads(row[12])) if row[12] else ()
    return Entry(
        id=row[0],
        kind=row[1],
        transaction_id=row[2],
        idempotency_key=row[3],
        tenant_id=row[4],
        user_id=row[5] or None,
        amount=row[6],
        balance=row[7],
        created_at=row[8],
        reason=row[9],
        request_id=row[10],
        metadata=metadata,
        items=items,
    )


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
