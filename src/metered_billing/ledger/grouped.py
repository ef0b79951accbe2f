"""The rows of a transaction that a group of works shares: read at once before the first, written after the last.

So a group takes a constant number of statements, whether it holds one command or sixty: on PostgreSQL each is a
round trip, and on SQLite each lets go of the interpreter's lock, and has to wait for it again.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from metered_billing.ledger.commands import Command, Deduct, Refund, Void
from metered_billing.ledger.engine import Rows
from metered_billing.ledger.rows import entry_of, entry_values, key_values, remembered_of
from metered_billing.ledger.rules import Entry, Held, Remembered, Voided

C = TypeVar("C")
T = TypeVar("T")

Row = tuple[Any, ...]
Pair = tuple[str, str]
"""A tenant and a user ("" for none), or a tenant and a key."""

_TOMBSTONE = Remembered(Void.kind, None, b"", 200, {}, None)


@dataclass(slots=True)
class Work(Generic[C, T]):
    """What is to be done with the rows, as an operation on a connection.

    Attributes:
        commands: What it decides.
        books: Makes the rows of a transaction, given all commands that are decided in it.
    """

    do: Callable[[Rows], T]
    commands: Sequence[Command]
    books: Callable[[C, Sequence[Command]], "GroupedBooks"]

    def __call__(self, connection: C) -> T:
        """Do it by itself."""
        books = self.books(connection, self.commands)
        done = self.do(books)
        books.flush()
        return done


class GroupedBooks(Rows):
    """The `Rows` of one transaction. What each engine does in its own way stands at the end.

    Args:
        commands: What is going to be decided.
    """

    def __init__(self, commands: Sequence[Command] = ()) -> None:
        self._held: dict[Pair, Held] = {}
        self._keys: dict[Pair, Remembered | None] = {}
        self._voids: dict[Pair, Voided | None] = {}
        self._entries: dict[str, Entry | None] = {}
        self._refunded: dict[str, int] = {}
        self._moved: set[Pair] = set()
        self._new_entries: list[Row] = []
        self._new_keys: list[Row] = []
        self._new_voids: list[Row] = []
        if commands:
            self._foresee(commands)

    def held(self, tenant_id: str, user_id: str | None) -> Held:
        account = (tenant_id, user_id or "")
        held = self._held.get(account)
        if held is not None:
            return held
        for _, _, balance, granted in self._read_accounts([account]):
            return Held(balance, granted)
        return Held(0, 0)

    def hold(self, tenant_id: str, user_id: str | None, held: Held) -> None:
        account = (tenant_id, user_id or "")
        self._held[account] = held
        self._moved.add(account)

    def entry(self, entry_id: str) -> Entry | None:
        if entry_id not in self._entries:
            self._fetch_entries([entry_id])
        return self._entries.get(entry_id)

    def write(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        if entry.kind == Deduct.kind:
            self._refunded[entry.id] = 0
        elif entry.transaction_id != entry.id:
            self._refunded[entry.transaction_id] = self.refunded(entry.transaction_id) + entry.amount
        self._new_entries.append(entry_values(entry))

    def refunded(self, transaction_id: str) -> int:
        if transaction_id not in self._refunded:
            self._fetch_refunded([transaction_id])
        return self._refunded[transaction_id]

    def remembered(self, tenant_id: str, key: str) -> Remembered | None:
        if (tenant_id, key) not in self._keys:
            self._look_up([(tenant_id, key)])
        remembered = self._keys[tenant_id, key]
        return None if remembered is None or remembered.kind == Void.kind else remembered

    def remember(self, tenant_id: str, key: str, what: Remembered) -> None:
        self._keys[tenant_id, key] = what
        self._new_keys.append(key_values(tenant_id, key, what))

    def voided(self, tenant_id: str, key: str) -> Voided | None:
        if (tenant_id, key) not in self._voids:
            self._look_up([(tenant_id, key)])
        return self._voids[tenant_id, key]

    def mark_voided(self, tenant_id: str, key: str, what: Voided, at: str) -> None:
        if (tenant_id, key) not in self._keys:
            self._look_up([(tenant_id, key)])
        if self._keys[tenant_id, key] is None:
            self.remember(tenant_id, key, _TOMBSTONE)
        self._voids[tenant_id, key] = what
        self._new_voids.append((tenant_id, key, what.user_id or "", what.refunded, at))

    def flush(self) -> None:
        """Write what the rules have written."""
        held = self._held
        accounts = [(*account, *held[account]) for account in self._moved]
        if accounts or self._new_keys or self._new_entries or self._new_voids:
            self._write(accounts, self._new_entries, self._new_keys, self._new_voids)
        self._moved, self._new_entries, self._new_keys, self._new_voids = set(), [], [], []

    def _foresee(self, commands: Sequence[Command]) -> None:
        """Have the commands' accounts, and read what deciding them takes."""
        refunds = [command for command in commands if isinstance(command, Refund)]
        deductions = {command.transaction_id for command in refunds}
        self._fetch_entries(deductions)  # they never change, so that a lock is not needed yet
        accounts: set[Pair] = set()
        keys: dict[Pair, None] = {}
        for command in commands:
            if not isinstance(command, Refund):
                accounts.add((command.tenant_id, command.user_id or ""))
                keys[command.tenant_id, command.idempotency_key] = None
            elif (deduction := self._entries.get(command.transaction_id)) is not None:
                accounts.add((deduction.tenant_id, deduction.user_id or ""))
                keys[deduction.tenant_id, command.idempotency_key] = None
                keys[deduction.tenant_id, deduction.idempotency_key] = None
        if accounts:
            self._lock(sorted(accounts), keys)
        answered = {what.entry_id for what in self._keys.values() if what is not None and what.entry_id is not None}
        needed = (deductions | answered) - self._entries.keys()
        if needed:
            self._fetch_entries(needed)
            for entry_id in needed:
                self._entries.setdefault(entry_id, None)
        if refunds or answered:
            self._fetch_refunded(entry.id for entry in self._entries.values() if entry and entry.kind == Deduct.kind)

    def _lock(self, accounts: Sequence[Pair], keys: Collection[Pair]) -> None:
        """Read the accounts, and keep others from moving them until the transaction ends; then look up the keys."""
        self._held = dict.fromkeys(accounts, Held(0, 0))
        for tenant_id, user_id, balance, granted in self._read_accounts(accounts):
            self._held[tenant_id, user_id] = Held(balance, granted)
        self._look_up(keys)

    def _look_up(self, keys: Collection[Pair]) -> None:
        self._note_keys(keys, self._read_keys(keys))

    def _note_keys(self, keys: Collection[Pair], found: Iterable[Row]) -> None:
        self._keys |= dict.fromkeys(keys)
        self._voids |= dict.fromkeys(keys)
        for tenant_id, key, *remembered, voided_by, refunded in found:
            self._keys[tenant_id, key] = remembered_of(tuple(remembered))
            if refunded is not None:
                self._voids[tenant_id, key] = Voided(voided_by or None, refunded)

    def _fetch_entries(self, ids: Iterable[str]) -> None:
        for row in self._read_entries(list(ids)):
            entry = entry_of(row)
            self._entries[entry.id] = entry

    def _fetch_refunded(self, transaction_ids: Iterable[str]) -> None:
        ids = list(transaction_ids)
        self._refunded |= dict.fromkeys(ids, 0)
        for transaction_id, refunded in self._read_refunded(ids):
            self._refunded[transaction_id] = int(refunded)

    # An engine's. What is asked for may be nothing.

    def _read_accounts(self, accounts: Sequence[Pair]) -> Iterable[Row]:
        """Tenant, user, balance and granted of the accounts that there are."""
        raise NotImplementedError

    def _read_keys(self, keys: Collection[Pair]) -> Iterable[Row]:
        """The columns `KEY` of each key that there is; then by whom it was voided and what that gave back, or NULL."""
        raise NotImplementedError

    def _read_entries(self, ids: Sequence[str]) -> Iterable[Row]:
        """The columns `ENTRY`."""
        raise NotImplementedError

    def _read_refunded(self, transaction_ids: Sequence[str]) -> Iterable[Row]:
        """What came back of each deduction of which anything did: its id, and how many credits."""
        raise NotImplementedError

    def _write(self, accounts: list[Row], entries: list[Row], keys: list[Row], voids: list[Row]) -> None:
        """Write the rows, entries in their order; accounts that are there already are changed."""
        raise NotImplementedError
