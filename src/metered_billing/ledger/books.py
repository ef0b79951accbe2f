"""The ledger's rows in SQLite: the tables, and every statement over them."""
# ruff: noqa: S608  (only column names of ours go into a statement; values are bound)

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger.commands import Command
from metered_billing.ledger.grouped import GroupedBooks, Pair, Row
from metered_billing.ledger.rows import ENTRY, KEY, VOID, entry_of
from metered_billing.ledger.rules import Entry
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
    # Nothing is ever deleted, so that numbers grow without AUTOINCREMENT too.
    """
    CREATE TABLE entries (
        seq INTEGER PRIMARY KEY,
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
    # A void of a key that was never seen has a row here too, of kind 'void'.
    """
    CREATE TABLE keys (
        tenant_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        kind TEXT NOT NULL,
        user_id TEXT NOT NULL,
        payload_hash BLOB NOT NULL,
        status INTEGER NOT NULL,
        body TEXT,
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

_MOST_AT_ONCE = 64
"""Rows in one statement: SQLite before 3.32 binds 999 values, and an entry has 13."""


class SqliteBooks(GroupedBooks):
    """The `Rows` of one transaction on a connection.

    Args:
        commands: What is going to be decided.
    """

    def __init__(self, connection: sqlite3.Connection, commands: Sequence[Command] = ()) -> None:
        self._execute = connection.execute
        super().__init__(commands)

    # What people read.

    def returns(self, transaction_id: str) -> list[Entry]:
        self.flush()
        rows = self._execute(f"SELECT {ENTRY} {_RETURNED} ORDER BY seq", (transaction_id,))
        return [entry_of(row) for row in rows]

    def position(self, tenant_id: str, entry_id: str) -> int | None:
        self.flush()
        row = self._execute("SELECT seq FROM entries WHERE id = ? AND tenant_id = ?", (entry_id, tenant_id)).fetchone()
        return row[0] if row else None

    def page(self, tenant_id: str, user_id: str | None, before: int | None, limit: int) -> list[Entry]:
        self.flush()
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

    # What a group reads and writes.

    def _read_accounts(self, accounts: Sequence[Pair]) -> Iterator[Row]:
        return self._ask(
            "WITH asked (tenant, user) AS (VALUES {rows}) SELECT tenant, user, balance, granted"
            " FROM asked CROSS JOIN accounts ON tenant_id = tenant AND user_id = user",
            accounts,
        )

    def _read_keys(self, keys: Collection[Pair]) -> Iterator[Row]:
        return self._ask(
            "WITH asked (tenant, key) AS (VALUES {rows})"
            " SELECT tenant, key, kind, keys.user_id, payload_hash, status, body, entry_id, voids.user_id, refunded"
            " FROM asked CROSS JOIN keys ON keys.tenant_id = tenant AND keys.idempotency_key = key"
            " LEFT JOIN voids ON voids.tenant_id = keys.tenant_id AND voids.idempotency_key = keys.idempotency_key",
            list(keys),
        )

    def _read_entries(self, ids: Sequence[str]) -> Iterator[Row]:
        return self._ask(
            f"WITH asked (entry_id) AS (VALUES {{rows}}) SELECT {ENTRY} FROM asked CROSS JOIN entries ON id = entry_id",
            [(entry_id,) for entry_id in ids],
        )

    def _read_refunded(self, transaction_ids: Sequence[str]) -> Iterator[Row]:
        return self._ask(
            "WITH asked (deduction) AS (VALUES {rows}) SELECT deduction, sum(amount) FROM asked CROSS JOIN entries"
            " ON transaction_id = deduction WHERE kind IN ('refund', 'void') GROUP BY deduction",
            [(transaction_id,) for transaction_id in transaction_ids],
        )

    def _write(self, accounts: list[Row], entries: list[Row], keys: list[Row], voids: list[Row]) -> None:
        for statement, rows in (
            (_HOLD, accounts),
            (f"INSERT INTO entries ({ENTRY}) VALUES {{rows}}", entries),
            (f"INSERT INTO keys ({KEY}) VALUES {{rows}}", keys),
            (f"INSERT INTO voids ({VOID}) VALUES {{rows}}", voids),
        ):
            for each, values in _statements(statement, rows):
                self._execute(each, values)

    def _ask(self, question: str, rows: Sequence[Row]) -> Iterator[Row]:
        for statement, values in _statements(question, rows):
            yield from self._execute(statement, values)


_HOLD = (
    "INSERT INTO accounts (tenant_id, user_id, balance, granted) VALUES {rows} ON CONFLICT (tenant_id, user_id)"
    " DO UPDATE SET balance = excluded.balance, granted = excluded.granted"
)


def _statements(statement: str, rows: Sequence[Row]) -> Iterator[tuple[str, list[Any]]]:
    """The statement over all the rows, in their order, as few of them as will do, and their values.

    Numbers of rows are powers of two, so that there are few different texts: each is parsed once a connection.
    """
    done = 0
    while (left := len(rows) - done) > 0:
        size = min(_MOST_AT_ONCE, 1 << (left.bit_length() - 1))
        yield _of(statement, size, len(rows[0])), list(chain.from_iterable(rows[done : done + size]))
        done += size


@cache
def _of(statement: str, rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return statement.format(rows=", ".join([row] * rows))
