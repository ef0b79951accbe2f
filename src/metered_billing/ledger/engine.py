"""What the ledger stands on: an engine that runs work over the rows in transactions."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from metered_billing.ledger.commands import Command
from metered_billing.ledger.rules import Books, Entry

T = TypeVar("T")


class Rows(Books, Protocol):
    """The rows of one transaction: what the rules decide on, and what people read."""

    def returns(self, transaction_id: str) -> list[Entry]:
        """All refunds and the void of a deduction, oldest first."""
        ...

    def position(self, tenant_id: str, entry_id: str) -> int | None:
        """An entry's sequence number; None if the tenant has no such entry."""
        ...

    def page(self, tenant_id: str, user_id: str | None, before: int | None, limit: int) -> list[Entry]:
        """Entries, newest first.

        Args:
            user_id: "" for the tenant's shared pool, None for all of the tenant's accounts.
            before: Only entries older than this sequence number.
        """
        ...


class Engine(Protocol):
    """Opens itself when it is first used, may be closed and used again, in one event loop after another."""

    @property
    def place(self) -> str:
        """Where the rows are, as a URL without user and password."""
        ...

    async def start(self) -> None:
        """Open it, make the tables where there are none.

        Raises:
            LedgerNotOpened: It cannot be opened, or is not a ledger of this version.
        """
        ...

    async def close(self) -> None:
        """Finish what is under way, and let go."""
        ...

    async def run(self, work: Callable[[Rows], T], commands: Sequence[Command] = ()) -> T:
        """Run `work` in a transaction, shared with whatever else is waiting; it may run again after a rollback.

        Args:
            commands: What `work` decides, if it writes: then it is on disk before this returns.

        Raises:
            LedgerError: See `failures`.
        """
        ...
