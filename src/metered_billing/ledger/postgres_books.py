"""The ledger's rows in PostgreSQL: the tables, and every statement over them.

What a group of commands needs is locked and read at once before the first of them is decided, and what they
write goes out at once after the last: a group costs a dozen round trips, whether it is one command or sixty.
"""
# ruff: noqa: S608  (only column names of ours go into a statement; values are bound)

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger.commands import Command, Deduct, Refund, Void
from metered_billing.ledger.rows import ENTRY, KEY, VOID, entry_of, entry_values, key_values, remembered_of
from metered_billing.ledger.rules import Entry, Held, Remembered, Voided
from metered_billing.postgres import BeginAgain, Connection
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
        body text NOT NULL,
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

_TOMBSTONE = Remembered(Void.kind, None, b"", 200, {}, None)

Pair = tuple[str, str]


class PostgresBooks:
    """The `Rows` of one transaction on a connection.

    Args:
        commands: What is going to be decided. Their accounts are locked, in the order of accounts, until the
            transaction ends; nothing else can be moved.
    """

    def __init__(self, connection: Connection, commands: Sequence[Command] = ()) -> None:
        self._connection = connection
        self._held: dict[Pair, Held] = {}  # the accounts that are locked
        self._keys: dict[Pair, Remembered | None] = {}
        self._voids: dict[Pair, Voided | None] = {}
        self._entries: dict[str, Entry] = {}
        self._refunded: dict[str, int] = {}
        self._moved: set[Pair] = set()
        self._new_entries: list[tuple[Any, ...]] = []
        self._new_keys: list[tuple[Any, ...]] = []
        self._new_voids: list[tuple[Any, ...]] = []
        if commands:
            self._foresee(commands)

    # What the rules decide on.

    def held(self, tenant_id: str, user_id: str | None) -> Held:
        account = (tenant_id, user_id or "")
        if account in self._held:
            return self._held[account]
        for row in self._ask("SELECT balance, granted FROM accounts WHERE tenant_id = %s AND user_id = %s", *account):
            return Held(*row)
        return Held(0, 0)

    def hold(self, tenant_id: str, user_id: str | None, held: Held) -> None:
        account = self._locked(tenant_id, user_id)
        self._held[account] = held
        self._moved.add(account)

    def entry(self, entry_id: str) -> Entry | None:
        if entry_id not in self._entries:
            self._entries |= _by_id(self._ask(f"SELECT {ENTRY} FROM entries WHERE id = %s", entry_id))
        return self._entries.get(entry_id)

    def write(self, entry: Entry) -> None:
        self._locked(entry.tenant_id, entry.user_id)
        self._entries[entry.id] = entry
        if entry.kind == Deduct.kind:
            self._refunded[entry.id] = 0
        elif entry.transaction_id != entry.id:
            self._refunded[entry.transaction_id] = self.refunded(entry.transaction_id) + entry.amount
        self._new_entries.append(entry_values(entry))

    def refunded(self, transaction_id: str) -> int:
        if transaction_id not in self._refunded:
            (row,) = self._ask(f"SELECT coalesce(sum(amount), 0) {_RETURNED}", transaction_id)
            self._refunded[transaction_id] = int(row[0])
        return self._refunded[transaction_id]

    def remembered(self, tenant_id: str, key: str) -> Remembered | None:
        remembered = self._key(tenant_id, key)
        return None if remembered is None or remembered.kind == Void.kind else remembered

    def remember(self, tenant_id: str, key: str, what: Remembered) -> None:
        self._keys[tenant_id, key] = what
        self._new_keys.append(key_values(tenant_id, key, what))

    def voided(self, tenant_id: str, key: str) -> Voided | None:
        if (tenant_id, key) not in self._voids:
            self._look_up([(tenant_id, key)])
        return self._voids[tenant_id, key]

    def mark_voided(self, tenant_id: str, key: str, what: Voided, at: str) -> None:
        if self._key(tenant_id, key) is None:
            self.remember(tenant_id, key, _TOMBSTONE)
        self._voids[tenant_id, key] = what
        self._new_voids.append((tenant_id, key, what.user_id or "", what.refunded, at))

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

    def flush(self) -> None:
        """Write what the rules have written."""
        if self._moved:
            moved = [(*account, self._held[account].balance, self._held[account].granted) for account in self._moved]
            self._execute(
                "UPDATE accounts SET balance = new.balance, granted = new.granted"
                " FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[])"
                " AS new (tenant_id, user_id, balance, granted)"
                " WHERE accounts.tenant_id = new.tenant_id AND accounts.user_id = new.user_id",
                *_columns(moved),
            )
        self._insert("entries", ENTRY, ("text",) * 6 + ("bigint",) * 2 + ("text",) * 5, self._new_entries)
        self._insert("keys", KEY, ("text",) * 4 + ("bytea", "integer", "text", "text"), self._new_keys)
        self._insert("voids", VOID, ("text",) * 3 + ("bigint", "text"), self._new_voids)
        self._moved.clear()

    def _foresee(self, commands: Sequence[Command]) -> None:
        """Lock the commands' accounts, and read what deciding them takes."""
        refunded = {command.transaction_id for command in commands if isinstance(command, Refund)}
        self._fetch_entries(refunded)  # they never change, so that a lock is not needed yet
        accounts: set[Pair] = set()
        keys: set[Pair] = set()
        for command in commands:
            if not isinstance(command, Refund):
                accounts.add((command.tenant_id, command.user_id or ""))
                keys.add((command.tenant_id, command.idempotency_key))
            elif (deduction := self._entries.get(command.transaction_id)) is not None:
                accounts.add((deduction.tenant_id, deduction.user_id or ""))
                keys.add((deduction.tenant_id, command.idempotency_key))
                keys.add((deduction.tenant_id, deduction.idempotency_key))
        self._lock(sorted(accounts))
        # All that follows only now: before the locks, another process could have changed it.
        self._look_up(sorted(keys))
        voided = {
            remembered.entry_id
            for command in commands
            if isinstance(command, Void)
            and (remembered := self.remembered(command.tenant_id, command.idempotency_key)) is not None
            and remembered.entry_id is not None
        }
        self._fetch_entries(voided)
        self._fetch_refunded(refunded | voided)

    def _lock(self, accounts: Sequence[Pair]) -> None:
        tenants, users = [tenant for tenant, _ in accounts], [user for _, user in accounts]
        # Rows are never deleted, so that whoever is past this statement finds all of its own, and waits in order.
        self._execute(
            "INSERT INTO accounts (tenant_id, user_id, balance, granted) SELECT tenant_id, user_id, 0, 0"
            " FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS missing (tenant_id, user_id, n) ORDER BY n"
            " ON CONFLICT DO NOTHING",
            tenants,
            users,
        )
        rows = self._ask(
            "SELECT tenant_id, user_id, balance, granted FROM accounts"
            " WHERE (tenant_id, user_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
            " ORDER BY tenant_id, user_id FOR UPDATE",
            tenants,
            users,
        )
        self._held = {(tenant, user): Held(balance, granted) for tenant, user, balance, granted in rows}

    def _locked(self, tenant_id: str, user_id: str | None) -> Pair:
        account = (tenant_id, user_id or "")
        if account not in self._held:
            # A refund whose deduction was committed after we had looked which accounts to lock.
            raise BeginAgain("an account that is not locked cannot be moved")
        return account

    def _key(self, tenant_id: str, key: str) -> Remembered | None:
        if (tenant_id, key) not in self._keys:
            self._look_up([(tenant_id, key)])
        return self._keys[tenant_id, key]

    def _look_up(self, keys: Sequence[Pair]) -> None:
        self._keys |= dict.fromkeys(keys)
        self._voids |= dict.fromkeys(keys)
        for tenant_id, key, *remembered, voided_by, refunded in self._ask(
            "SELECT asked.tenant_id, asked.key, kind, keys.user_id, payload_hash, status, body, entry_id,"
            " voids.user_id, refunded"
            " FROM unnest(%s::text[], %s::text[]) AS asked (tenant_id, key)"
            " LEFT JOIN keys ON keys.tenant_id = asked.tenant_id AND keys.idempotency_key = asked.key"
            " LEFT JOIN voids ON voids.tenant_id = asked.tenant_id AND voids.idempotency_key = asked.key",
            [tenant for tenant, _ in keys],
            [key for _, key in keys],
        ):
            if remembered[0] is not None:
                self._keys[tenant_id, key] = remembered_of(tuple(remembered))
            if refunded is not None:
                self._voids[tenant_id, key] = Voided(voided_by or None, refunded)

    def _fetch_entries(self, ids: Iterable[str]) -> None:
        if ids := list(ids):
            self._entries |= _by_id(self._ask(f"SELECT {ENTRY} FROM entries WHERE id = ANY(%s)", ids))

    def _fetch_refunded(self, transaction_ids: Iterable[str]) -> None:
        if ids := list(transaction_ids):
            self._refunded |= dict.fromkeys(ids, 0)
            self._refunded |= {
                transaction_id: int(refunded)
                for transaction_id, refunded in self._ask(
                    "SELECT transaction_id, sum(amount) FROM entries WHERE transaction_id = ANY(%s)"
                    " AND kind IN ('refund', 'void') GROUP BY transaction_id",
                    ids,
                )
            }

    def _insert(self, table: str, columns: str, types: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
        if rows:
            arrays = ", ".join(f"%s::{type_}[]" for type_ in types)
            # In their order, which the entries' numbers keep.
            self._execute(
                f"INSERT INTO {table} ({columns}) SELECT {columns}"
                f" FROM unnest({arrays}) WITH ORDINALITY AS new ({columns}, n) ORDER BY n",
                *_columns(rows),
            )
            rows.clear()

    def _ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        if any("\x00" in text for text in _texts(values)):
            return []  # no text here has one, and PostgreSQL refuses to be asked for it
        return self._connection.execute(question.encode(), values).fetchall()

    def _execute(self, statement: str, *values: Any) -> None:
        self._connection.execute(statement.encode(), values)


def _by_id(rows: Iterable[tuple[Any, ...]]) -> dict[str, Entry]:
    return {entry.id: entry for entry in map(entry_of, rows)}


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
