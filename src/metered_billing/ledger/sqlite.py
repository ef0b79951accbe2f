"""The ledger in one SQLite file, which one process owns while it is open."""

import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.commits import Committed, StorageError, Waiting
from metered_billing.ledger.books import SCHEMA, SqliteBooks
from metered_billing.ledger.commands import Command
from metered_billing.ledger.engine import Rows
from metered_billing.ledger.failures import LedgerCorrupt, LedgerNotOpened, LedgerUnavailable
from metered_billing.ledger.grouped import Work
from metered_billing.ledger.owner import OwnerLock
from metered_billing.runtime import Runtime
from metered_billing.schemas import SchemaMismatch, prepare_sqlite
from metered_billing.sqlite import SqliteFile

T = TypeVar("T")


class _LedgerFile(SqliteFile):
    """Works that are waiting share one transaction and its statements."""

    def _operate(self, connection: sqlite3.Connection, batch: list[Waiting[sqlite3.Connection]]) -> list[Any]:
        works = [waiting.operation for waiting in batch if isinstance(waiting.operation, Work)]
        commands = [command for work in works for command in work.commands]
        if commands and not self.in_place():
            # What is written to a file without a name is gone with this process.
            raise LedgerNotOpened(f"{self.path} was removed while it was in use: restart")
        if len(works) < len(batch):  # one of them makes the tables
            return super()._operate(connection, batch)
        books = SqliteBooks(connection, commands)
        done = [work.do(books) for work in works]
        books.flush()
        return done


class SqliteEngine:
    """An `Engine`.

    Args:
        file: Made where it is missing, in a directory that exists.
        committed: Told of its commits.
    """

    def __init__(self, file: Path, runtime: Runtime, committed: Committed | None = None) -> None:
        self._file = _LedgerFile(
            file.resolve(),  # so that two names of one file meet at one lock
            "",
            runtime.executor(),
            runtime.connect,
            committed=committed,
            clock=runtime.monotonic,
        )
        self._lock = OwnerLock(self._file.path)
        self._mutex = threading.Lock()
        self._calls = 0  # under way
        self._opened = False  # the file may be open, so the lock is needed
        self._prepared = False  # and it is known to be a ledger

    @property
    def place(self) -> str:
        return f"sqlite:///{self._file.path}"

    async def start(self) -> None:
        """Take the lock and open the file.

        Raises:
            LedgerLocked: Another process has it.
            LedgerNotOpened: It cannot be made or read, or is not a ledger of this version.
        """
        path = self._file.path
        with self._mutex:
            try:
                self._lock.acquire()
            except OSError as error:
                raise LedgerNotOpened(f"{path} cannot be opened: {error.strerror or error}") from error
        self._opened = True
        try:
            await self._file.run(_prepare)
        except (LedgerNotOpened, SchemaMismatch) as error:
            await self.close()
            raise LedgerNotOpened(f"{path}: {error}") from None
        except (StorageError, sqlite3.Error, OSError) as error:
            await self.close()
            raise LedgerNotOpened(f"{path} cannot be opened: {error}") from error
        self._opened = self._prepared = True

    async def close(self) -> None:
        """Finish what is under way and let the next owner have the file."""
        self._prepared = False
        await self._file.close()
        self._opened = False
        with self._mutex:
            self._release_if_idle()

    async def run(self, work: Callable[[Rows], T], commands: Sequence[Command] = ()) -> T:
        with self._mutex:
            self._calls += 1
        try:
            # A loop, because a `close` may come between the two; and a forked child holds no lock.
            while not (self._prepared and self._lock.held):
                await self.start()
            return await self._file.run(Work(work, commands, SqliteBooks), durable=bool(commands))
        except StorageError as error:
            raise LedgerNotOpened(str(error)) from error
        except sqlite3.IntegrityError as error:
            # The file's own walls held where the rules did not: repeating it would never help.
            raise LedgerCorrupt(f"{self._file.path.name}: {error}") from error
        except (sqlite3.Error, OSError) as error:
            raise LedgerUnavailable(f"{self._file.path.name}: {error}") from error
        finally:
            with self._mutex:
                self._calls -= 1
                self._release_if_idle()

    def _release_if_idle(self) -> None:
        # A call that came while it was being closed opens it again: then the last call lets go, or nobody.
        if self._calls == 0 and not self._opened:
            self._lock.release()


def _prepare(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0 and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise LedgerNotOpened("this is a SQLite database, but not a ledger: name another file")
    prepare_sqlite(connection, SCHEMA)
