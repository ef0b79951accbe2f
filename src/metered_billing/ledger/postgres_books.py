"""The ledger's rows in PostgreSQL: the tables, and every statement over them.

A group of commands costs four round trips, whether it is one command or sixty: BEGIN; locks and what is known of
the keys; all that is written; COMMIT. Refunds, and what was done before, cost one or two more.
"""
# ruff: noqa: S608  (only column names of ours go into a statement; values are bound)

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger.commands import Command
from metered_billing.ledger.grouped import GroupedBooks, Pair, Row
from metered_billing.ledger.rows import ENTRY, KEY, VOID, entry_of
from metered_billing.ledger.rules import Entry, Held
from metered_billing.postgres import BeginAgain, Connection, Cursor
from metered_billing.schemas import Schema

# COLLATE "C", so that the order in which rows are locked is the same everywhere.
_TABLES = (
    f"""
    CREATE TABLE accounts (
        tenant_id text COLLATE "C" NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        balance bigint NOT NULL CHECK (balance >= 0),
        granted bigint NOT NULL CHECK (granted BETWEEN balance AND {MAX_AMOUNT}),
        PRIMARY KEY (tenant_id, user_id)
    )
    """,
    """
    CREATE TABLE entries (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        id text COLLATE "C" NOT NULL UNIQUE,
        kind text NOT NULL,
        transaction_id text COLLATE "C" NOT NULL,
        idempotency_key text NOT NULL,
        tenant_id text COLLATE "C" NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        amount bigint NOT NULL,
        balance bigint NOT NULL CHECK (balance >= 0),
        created_at text NOT NULL,
        reason text,
        request_id text,
        metadata text,
        items text,
        CHECK (CASE kind WHEN 'deduction' THEN amount < 0
                         WHEN 'grant' THEN amount > 0
                         WHEN 'refund' THEN amount > 0
                         WHEN 'void' THEN amount > 0 ELSE false END)
    )
    """,
    "CREATE INDEX entries_by_tenant ON entries (tenant_id, seq)",
    "CREATE INDEX entries_by_account ON entries (tenant_id, user_id, seq)",
    "CREATE INDEX returned_by_transaction ON entries (transaction_id, amount) WHERE kind IN ('refund', 'void')",
    # A void of a key that was never seen has a row here too (kind 'void'): it and a deduction for another user,
    # which no account's lock keeps apart, must not both win.
    """
    CREATE TABLE keys (
        tenant_id text COLLATE "C" NOT NULL,
        idempotency_key text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        user_id text NOT NULL,
        payload_hash bytea NOT NULL,
        status integer NOT NULL,
        body text,
        entry_id text,
        PRIMARY KEY (tenant_id, idempotency_key)
    )
    """,
    """
    CREATE TABLE voids (
        tenant_id text COLLATE "C" NOT NULL,
        idempotency_key text COLLATE "C" NOT NULL,
        user_id text NOT NULL,
        refunded bigint NOT NULL CHECK (refunded >= 0),
        created_at text NOT NULL,
        PRIMARY KEY (tenant_id, idempotency_key)
    )
    """,
)

_REFUSE = """
CREATE FUNCTION are_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% are append-only: correct one by writing another', TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$
"""

SCHEMA = Schema(
    "ledger",
    (
        (
            *_TABLES,
            _REFUSE,
            *(
                f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION are_append_only()"
                for table in ("entries", "keys", "voids")
            ),
        ),
    ),
)

_RETURNED = "FROM entries WHERE transaction_id = %s AND kind IN ('refund', 'void')"


class PostgresBooks(GroupedBooks):
    """The `Rows` of one transaction on a connection.

    Args:
        commands: What is going to be decided. Their accounts are locked, in the order of accounts, until the
            transaction ends; nothing else can be moved.
    """

    def __init__(self, connection: Connection, commands: Sequence[Command] = ()) -> None:
        self._connection = connection
        super().__init__(commands)

    def hold(self, tenant_id: str, user_id: str | None, held: Held) -> None:
        self._require_lock(tenant_id, user_id)
        super().hold(tenant_id, user_id, held)

    def write(self, entry: Entry) -> None:
        self._require_lock(entry.tenant_id, entry.user_id)
        super().write(entry)

    # What people read.

    def returns(self, transaction_id: str) -> list[Entry]:
        self.flush()
        return [entry_of(row) for row in self._ask(f"SELECT {ENTRY} {_RETURNED} ORDER BY seq", transaction_id)]

    def position(self, tenant_id: str, entry_id: str) -> int | None:
        self.flush()
        for row in self._ask("SELECT seq FROM entries WHERE id = %s AND tenant_id = %s", entry_id, tenant_id):
            return int(row[0])
        return None

    def page(self, tenant_id: str, user_id: str | None, before: int | None, limit: int) -> list[Entry]:
        self.flush()
        where: list[str] = ["tenant_id = %s"]
        values: list[str | int] = [tenant_id]
        if user_id is not None:
            where.append("user_id = %s")
            values.append(user_id)
        if before is not None:
            where.append("seq < %s")
            values.append(before)
        rows = self._ask(
            f"SELECT {ENTRY} FROM entries WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT %s", *values, limit
        )
        return [entry_of(row) for row in rows]

    # What a group reads and writes.

    def _require_lock(self, tenant_id: str, user_id: str | None) -> None:
        if (tenant_id, user_id or "") not in self._held:
            # A refund whose deduction was committed after we had looked which accounts to lock.
            raise BeginAgain("an account that is not locked cannot be moved")

    def _lock(self, accounts: Sequence[Pair], keys: Collection[Pair]) -> None:
        asked = _columns(accounts)
        done = self._send(_LOCK, *asked, *asked, *_columns(keys))
        done.nextset()
        self._held = {(tenant, user): Held(balance, granted) for tenant, user, balance, granted in done.fetchall()}
        done.nextset()
        self._note_keys(keys, done.fetchall())

    def _read_accounts(self, accounts: Sequence[Pair]) -> list[Row]:
        return self._ask(_ACCOUNTS.format(""), *_columns(accounts))

    def _read_keys(self, keys: Collection[Pair]) -> list[Row]:
        return self._ask(_KEYS, *_columns(keys))

    def _read_entries(self, ids: Sequence[str]) -> list[Row]:
        if not ids:
            return []
        return self._ask(_ENTRIES, _array(ids))

    def _read_refunded(self, transaction_ids: Sequence[str]) -> list[Row]:
        if not transaction_ids:
            return []
        return self._ask(_REFUNDED, _array(transaction_ids))

    def _write(self, accounts: list[Row], entries: list[Row], keys: list[Row], voids: list[Row]) -> None:
        written = [
            (statement, rows)
            for statement, rows in (
                (_HOLD, accounts),
                (_WRITE_ENTRIES, entries),
                (_WRITE_KEYS, keys),
                (_WRITE_VOIDS, voids),
            )
            if rows
        ]
        # As one statement. The parts of a WITH are done whether or not anything reads them.
        *others, last = [statement for statement, _ in written]
        first = ", ".join(f"part_{number} AS ({statement})" for number, statement in enumerate(others))
        self._send(
            f"WITH {first} {last}" if others else last, *chain.from_iterable(_columns(rows) for _, rows in written)
        )

    def _ask(self, question: str, *values: str | int) -> list[Row]:
        if any("\x00" in value for value in values if isinstance(value, str)):
            return []  # no text here has one, and PostgreSQL refuses to be asked for it
        return self._send(question, *values).fetchall()

    def _send(self, statement: str, *values: str | int) -> Cursor:
        return self._connection.execute(statement.encode(), values)


# Each row by its index, whatever the planner thinks. It was told little of a table that grows from nothing to thousands
# of rows in a second, and where it takes it for small it reads all of it: a group then costs more with every other one.

_MISSING = (
    "INSERT INTO accounts (tenant_id, user_id, balance, granted) SELECT tenant_id, user_id, 0, 0"
    " FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS missing (tenant_id, user_id, n) ORDER BY n"
    " ON CONFLICT DO NOTHING"
)

_ACCOUNTS = (
    "SELECT asked.tenant_id, asked.user_id, balance, granted"
    " FROM unnest(%s::text[], %s::text[]) AS asked (tenant_id, user_id) CROSS JOIN LATERAL"
    " (SELECT balance, granted FROM accounts"
    " WHERE accounts.tenant_id = asked.tenant_id AND accounts.user_id = asked.user_id LIMIT 1 {}) AS held"
)
"""In the order in which they are asked for, which is the order in which they are locked."""

_KEYS = (
    "SELECT asked.tenant_id, asked.key, kind, used.user_id, payload_hash, status, body, entry_id,"
    " voided.user_id, refunded FROM unnest(%s::text[], %s::text[]) AS asked (tenant_id, key) CROSS JOIN LATERAL"
    " (SELECT * FROM keys WHERE tenant_id = asked.tenant_id AND idempotency_key = asked.key LIMIT 1) AS used"
    " LEFT JOIN LATERAL (SELECT * FROM voids"
    " WHERE tenant_id = asked.tenant_id AND idempotency_key = asked.key LIMIT 1) AS voided ON true"
)

_LOCK = f"{_MISSING}; {_ACCOUNTS.format('FOR UPDATE')}; {_KEYS}"
"""Three statements, one round trip. Rows are never deleted, so that whoever is past the first finds all of its own, and
waits for their locks in order; the last sees what was committed while the one before waited."""

_ENTRIES = (
    f"SELECT {ENTRY} FROM unnest(%s::text[]) AS asked (entry_id)"
    " CROSS JOIN LATERAL (SELECT * FROM entries WHERE id = entry_id LIMIT 1) AS entry"
)

_REFUNDED = (
    "SELECT deduction, refunded FROM unnest(%s::text[]) AS asked (deduction) CROSS JOIN LATERAL"
    " (SELECT sum(amount) AS refunded FROM entries WHERE transaction_id = deduction"
    " AND kind IN ('refund', 'void')) AS returned WHERE refunded > 0"
)

_HOLD = (
    "INSERT INTO accounts (tenant_id, user_id, balance, granted)"
    " SELECT * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[])"
    " ON CONFLICT (tenant_id, user_id) DO UPDATE SET balance = excluded.balance, granted = excluded.granted"
)


def _insert(table: str, columns: str, *types: str) -> str:
    arrays = ", ".join(f"%s::{type_}[]" for type_ in types)
    # In their order, which the entries' numbers keep.
    return (
        f"INSERT INTO {table} ({columns}) SELECT {columns}"
        f" FROM unnest({arrays}) WITH ORDINALITY AS new ({columns}, n) ORDER BY n"
    )


_WRITE_ENTRIES = _insert("entries", ENTRY, *("text",) * 6, "bigint", "bigint", *("text",) * 5)
_WRITE_KEYS = _insert("keys", KEY, *("text",) * 4, "bytea", "integer", "text", "text")
_WRITE_VOIDS = _insert("voids", VOID, *("text",) * 3, "bigint", "text")


def _columns(rows: Collection[Row]) -> list[str]:
    """The rows' columns as PostgreSQL writes arrays."""
    return [_array(column) for column in zip(*rows, strict=True)]


def _array(values: Sequence[Any]) -> str:
    # By hand: psycopg takes ten times as long over a list.
    if type(values[0]) is int:
        return f"{{{','.join(map(str, values))}}}"
    try:
        joined = '","'.join(values)
    except TypeError:  # NULLs, or bytes
        return f"{{{','.join(map(_element, values))}}}"
    if "\\" in joined or joined.count('"') > 2 * (len(values) - 1):
        return f"{{{','.join(map(_element, values))}}}"
    return f'{{"{joined}"}}'


def _element(value: str | bytes | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f'"\\\\x{value.hex()}"'
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
