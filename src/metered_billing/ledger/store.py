"""The ledger as its callers see it: async, each command decided and committed as one."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from metered_billing.commits import Committed
from metered_billing.ledger.answers import Answer, Page
from metered_billing.ledger.commands import Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.engine import Rows
from metered_billing.ledger.failures import LedgerBusy, LedgerCorrupt, LedgerError, LedgerUnavailable
from metered_billing.ledger.places import open_engine
from metered_billing.ledger.rows import entry_body
from metered_billing.ledger.rules import Entry, Stamp, decide
from metered_billing.runtime import Runtime

MAX_PAGE = 1000
"""The most entries on one page."""


class Ledger:
    """Accounts and entries, in a SQLite file that this process owns or in a PostgreSQL database that many share.

    It opens itself when it is first used, may be closed and used again, and serves one event loop after
    another. Cancelling a call does not take it back: what it asked for is then unknown.

    Args:
        where: `sqlite:///relative.db`, `sqlite:////absolute.db`, `postgresql://…`, or a file's path.
        committed: Told of its commits, for instance `Telemetry().committed("ledger")`.

    Raises:
        ValueError: It names none of these.
        ImportError: PostgreSQL, without `metered-billing[postgres]`.

    Every method raises `LedgerError` where it has no answer (see `failures`): for commands, that leaves
    unknown what happened, and repeating them under the same key is always safe.
    """

    def __init__(
        self, where: str | Path, runtime: Runtime | None = None, *, committed: Committed | None = None
    ) -> None:
        self._runtime = runtime or Runtime()
        self._engine = open_engine(where, self._runtime, committed)

    @property
    def place(self) -> str:
        """Where it is, as a URL without user and password."""
        return self._engine.place

    async def start(self) -> None:
        """Open it, so that what is wrong with it shows now.

        Raises:
            LedgerLocked: Another process has the file.
            LedgerNotOpened: It cannot be made, read or reached, or is not a ledger of this version.
        """
        await self._engine.start()

    async def close(self) -> None:
        """Finish what is under way and let go of it: a file's next owner can have it."""
        await self._engine.close()

    async def decide(self, command: Command) -> Answer:
        """Do what is asked, whatever it is, or say why not."""
        stamp = self._stamp()
        return await self._engine.run(lambda books: decide(books, command, stamp), [command])

    async def deduct(self, command: Deduct) -> Answer:
        """201 or 200 with the transaction, or a refusal."""
        return await self.decide(command)

    async def refund(self, command: Refund) -> Answer:
        """201 or 200 with the refund, or a refusal."""
        return await self.decide(command)

    async def void(self, command: Void) -> Answer:
        """200 with what it gave back, or a refusal."""
        return await self.decide(command)

    async def grant(self, command: Grant) -> Answer:
        """201 or 200 with the transaction, or a refusal."""
        return await self.decide(command)

    async def batch(self, commands: Sequence[Command]) -> list[Answer | LedgerError]:
        """Decide the commands in order, in one commit; each stands alone.

        Returns:
            An answer for each; where one had none, why.
        """
        new_id, at = self._runtime.new_id, self._at()
        stamped = [(command, Stamp(new_id(), at)) for command in commands]
        try:
            return await self._engine.run(
                lambda books: [decide(books, command, stamp) for command, stamp in stamped], commands
            )
        except (LedgerBusy, LedgerCorrupt):
            # One of them has spoiled the commit of all: each for itself.
            return list(await asyncio.gather(*map(self._try, commands)))
        except LedgerUnavailable as error:
            return [error for _ in commands]

    async def balance(self, tenant_id: str, user_id: str | None = None) -> int:
        """What the account holds, in credits; 0 for one that is unknown."""
        held = await self._engine.run(lambda books: books.held(tenant_id, user_id))
        return held.balance

    async def transactions(
        self, tenant_id: str, user_id: str | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page:
        """A page of the tenant's entries, newest first.

        Args:
            user_id: Only this user's; "" for only the shared pool's; None for all of the tenant's.
            cursor: A page's `next_cursor`. Entries written since do not shift the pages.
            limit: 1 to 1000.

        Raises:
            ValueError: The cursor is none of ours, or the limit is out of bounds.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise ValueError(f"limit must be 1 to {MAX_PAGE}")

        def read(books: Rows) -> list[Entry] | None:
            before = None if cursor is None else books.position(tenant_id, cursor)
            if cursor is not None and before is None:
                return None
            return books.page(tenant_id, user_id, before, limit + 1)

        found = await self._engine.run(read)
        if found is None:
            raise ValueError("cursor is not one that this ledger gave out")
        page = found[:limit]
        # The last entry's id, not its number: that would tell how many entries all tenants have.
        return Page(tuple(map(entry_body, page)), page[-1].id if len(found) > limit else None)

    async def transaction(self, transaction_id: str, *, only_tenant: str | None = None) -> dict[str, Any] | None:
        """One entry with its refunds (and its void), oldest first; None if there is none.

        Args:
            only_tenant: Another tenant's entry is None too.
        """

        def read(books: Rows) -> dict[str, Any] | None:
            entry = books.entry(transaction_id)
            if entry is None or only_tenant not in (None, entry.tenant_id):
                return None
            returns = books.returns(entry.id)
            return entry_body(entry) | {"refunds": [entry_body(refund) for refund in returns]}

        return await self._engine.run(read)

    async def find(self, tenant_id: str, idempotency_key: str) -> str | None:
        """The transaction id of the deduction with this key, if it took credits; voided since or not."""
        remembered = await self._engine.run(lambda books: books.remembered(tenant_id, idempotency_key))
        if remembered is None or remembered.kind != Deduct.kind:
            return None
        return remembered.entry_id

    async def check(self) -> None:
        """Read something, to see whether it answers."""
        await self._engine.run(lambda books: books.held("", None))

    async def _try(self, command: Command) -> Answer | LedgerError:
        try:
            return await self.decide(command)
        except LedgerError as error:
            return error

    def _stamp(self) -> Stamp:
        return Stamp(self._runtime.new_id(), self._at())

    def _at(self) -> str:
        return _at(int(self._runtime.now() * 1000))


@lru_cache(maxsize=1)  # many commands come in one millisecond
def _at(ms: int) -> str:
    at = datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    return at.replace("+00:00", "Z")
