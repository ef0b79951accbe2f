"""The ledger as its callers see it: async, each command decided and committed as one."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.commits import StorageError
from metered_billing.ledger.answers import Answer, Page
from metered_billing.ledger.books import SqliteBooks, entry_body, prepare
from metered_billing.ledger.commands import Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.failures import LedgerCorrupt, LedgerError, LedgerNotOpened, LedgerUnavailable
from metered_billing.ledger.owner import OwnerLock
from metered_billing.ledger.rules import Entry, Stamp, decide
from metered_billing.runtime import Runtime
from metered_billing.sqlite import SqliteFile

T = TypeVar("T")

MAX_PAGE = 1000
"""The most entries on one page."""


class Ledger:
    """Accounts and entries in one SQLite file, owned by this process while it is open.

    It opens itself when it is first used, may be closed and used again, and serves one event loop after
    another. Cancelling a call does not take it back: what it asked for is then unknown.

    Args:
        file: The file; made where it is missing, in a directory that exists.

    Every method raises `LedgerError` where it has no answer (see `failures`): for commands, that leaves
    unknown what happened, and repeating them under the same key is always safe.
    """

    def __init__(self, file: str | Path | SqliteFile, runtime: Runtime | None = None) -> None:
        self._runtime = runtime or Runtime()
        if not isinstance(file, SqliteFile):
            # Resolved, so that two names of one file meet at one lock.
            file = SqliteFile(Path(file).resolve(), "", self._runtime.executor(), self._runtime.connect)
        self._file = file
        self._lock = OwnerLock(file.path)
        self._mutex = threading.Lock()
        self._calls = 0  # under way
        self._opened = False  # the file may be open, so the lock is needed
        self._prepared = False  # and it is known to be a ledger

    @property
    def path(self) -> Path:
        return self._file.path

    async def start(self) -> None:
        """Open the file, so that what is wrong with it shows now.

        Raises:
            LedgerLocked: Another process has it.
            LedgerNotOpened: It cannot be made or read, or is not a ledger of this version.
        """
        with self._mutex:
            try:
                self._lock.acquire()
            except OSError as error:
                raise LedgerNotOpened(f"{self.path} cannot be opened: {error.strerror or error}") from error
        self._opened = True
        try:
            await self._file.run(prepare)
        except LedgerNotOpened as error:
            await self.close()
            raise LedgerNotOpened(f"{self.path}: {error}") from None
        except (StorageError, sqlite3.Error, OSError) as error:
            await self.close()
            raise LedgerNotOpened(f"{self.path} cannot be opened: {error}") from error
        self._opened = self._prepared = True

    async def close(self) -> None:
        """Finish what is under way and let the next owner have the file."""
        self._prepared = False
        await self._file.close()
        self._opened = False
        self._release_if_idle()

    async def decide(self, command: Command) -> Answer:
        """Do what is asked, whatever it is, or say why not."""
        stamp = self._stamp()
        return await self._run(lambda books: decide(books, command, stamp), durable=True)

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
        stamped = [(command, self._stamp()) for command in commands]
        try:
            return await self._run(
                lambda books: [decide(books, command, stamp) for command, stamp in stamped], durable=True
            )
        except LedgerUnavailable as error:
            return [error for _ in commands]
        except LedgerCorrupt:
            # One of them has spoiled the commit of all: each for itself.
            return list(await asyncio.gather(*map(self._try, commands)))

    async def balance(self, tenant_id: str, user_id: str | None = None) -> int:
        """What the account holds, in credits; 0 for one that is unknown."""
        held = await self._run(lambda books: books.held(tenant_id, user_id), durable=False)
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

        def read(books: SqliteBooks) -> list[Entry] | None:
            before = None if cursor is None else books.position(tenant_id, cursor)
            if cursor is not None and before is None:
                return None
            return books.page(tenant_id, user_id, before, limit + 1)

        found = await self._run(read, durable=False)
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

        def read(books: SqliteBooks) -> dict[str, Any] | None:
            entry = books.entry(transaction_id)
            if entry is None or only_tenant not in (None, entry.tenant_id):
                return None
            returns = books.returns(entry.id)
            return entry_body(entry) | {"refunds": [entry_body(refund) for refund in returns]}

        return await self._run(read, durable=False)

    async def find(self, tenant_id: str, idempotency_key: str) -> str | None:
        """The transaction id of the deduction with this key, if it took credits; voided since or not."""
        remembered = await self._run(lambda books: books.remembered(tenant_id, idempotency_key), durable=False)
        if remembered is None or remembered.kind != Deduct.kind:
            return None
        return remembered.entry_id

    async def check(self) -> None:
        """Read something, to see whether the file answers."""
        await self._run(lambda books: books.held("", None), durable=False)

    async def _try(self, command: Command) -> Answer | LedgerError:
        try:
            return await self.decide(command)
        except LedgerError as error:
            return error

    def _stamp(self) -> Stamp:
        at = datetime.fromtimestamp(self._runtime.now(), UTC).isoformat(timespec="milliseconds")
        return Stamp(self._runtime.new_id(), at.replace("+00:00", "Z"))

    def _release_if_idle(self) -> None:
        # A call that came while it was being closed opens it again: then the last call lets go, or nobody.
        with self._mutex:
            if self._calls == 0 and not self._opened:
                self._lock.release()

    async def _run(self, work: Callable[[SqliteBooks], T], *, durable: bool) -> T:
        def operation(connection: sqlite3.Connection) -> T:
            if durable and not self._file.in_place():
                # What is written to a file without a name is gone with this process.
                raise LedgerNotOpened(f"{self.path} was removed while it was in use: restart")
            return work(SqliteBooks(connection))

        with self._mutex:
            self._calls += 1
        try:
            # A loop, because a `close` may come between the two; and a forked child holds no lock.
            while not (self._prepared and self._lock.held):
                await self.start()
            return await self._file.run(operation, durable=durable)
        except StorageError as error:
            raise LedgerNotOpened(str(error)) from error
        except sqlite3.IntegrityError as error:
            # The file's own walls held where the rules did not: repeating it would never help.
            raise LedgerCorrupt(f"{self.path.name}: {error}") from error
        except (sqlite3.Error, OSError) as error:
            raise LedgerUnavailable(f"{self.path.name}: {error}") from error
        finally:
            with self._mutex:
                self._calls -= 1
            self._release_if_idle()
