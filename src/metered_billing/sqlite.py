"""One SQLite file, one connection, one thread, group commit: what the journal and the ledger write with.

One connection, because aiosqlite interleaves two coroutines' transactions on one, and because two that write
and checkpoint a WAL file can corrupt it in SQLite before 3.51.3.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.commits import Committed, GroupCommit, Outcome, StorageError, Waiting, tell
from metered_billing.runtime import Executor, connect_sqlite

T = TypeVar("T")

WAL_BYTES = 4 << 20
"""What a log that once was longer is cut back to: SQLite merges it every 1,000 pages, which is this much."""


def is_corrupt(error: BaseException | None) -> bool:
    """Whether SQLite says that the file is no database, or a broken one; not that it could not be had."""
    code = getattr(error, "sqlite_errorcode", None)
    # Extended codes carry the reason in their higher bytes.
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class SqliteFile(GroupCommit[sqlite3.Connection]):
    """A SQLite database that this process alone writes.

    Args:
        path: The file; made where it is missing.
        schema: SQL that runs once, at opening; must be repeatable (`CREATE … IF NOT EXISTS`).
        executor: The one thread. All of SQLite happens there.
        connect: Opens the file.
        shrinks: Lay a new file out so that `PRAGMA incremental_vacuum` can give free pages back to the disk.
        committed, clock: See `GroupCommit`.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        executor: Executor,
        connect: Callable[[Path], sqlite3.Connection] = connect_sqlite,
        *,
        shrinks: bool = False,
        committed: Committed | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(path.name, executor, committed=committed, clock=clock)
        self.path = path
        self._schema = schema
        self._connect = connect
        self._shrinks = shrinks
        self._connection: sqlite3.Connection | None = None
        # One that found the file broken: closing it would merge its log, so it waits for `_disconnect`.
        self._broken: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._syncs = True  # how its commits are made, as long as nobody asks for another way

    def __del__(self) -> None:
        # An app that was never shut down (a test client without a lifespan, say) just lets go of it.
        if getattr(self, "_connection", None) is not None or getattr(self, "_broken", None) is not None:
            with contextlib.suppress(Exception):
                self._disconnect()

    def between(self, operation: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run `operation` in the thread outside any transaction, as VACUUM must. It is queued at once.

        Raises:
            StorageError: There is no thread any more. (From the call; from the future, what it raised.)
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = operation(self._open())
            except Exception as error:
                tell(loop, [(done, None, error)])
            else:
                tell(loop, [(done, result, None)])

        try:
            self._submit_behind(run)
        except RuntimeError as error:
            raise StorageError(f"{self.path.name}: {error}") from error
        return done

    # Below: in the thread.

    def in_place(self) -> bool:
        """Whether the file that is open still stands at its path: what is written to another is lost."""
        try:
            return self._opened == _identity(self.path)
        except OSError:
            return False

    def _transaction(self, batch: list[Waiting[sqlite3.Connection]]) -> list[Outcome]:
        connection = self._open()
        durable = any(waiting.durable for waiting in batch)
        try:
            if durable is not self._syncs:
                connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
                self._syncs = durable
            connection.execute("BEGIN IMMEDIATE")
            results = self._operate(connection, batch)
            connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise
        return [(result, None) for result in results]

    def _operate(self, connection: sqlite3.Connection, batch: list[Waiting[sqlite3.Connection]]) -> list[Any]:
        """Run the operations within the transaction that has begun. Returns what each returned."""
        return [waiting.operation(connection) for waiting in batch]

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            # After a failed COMMIT (disk full) SQLite may have rolled back by itself.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            # A connection stuck in a transaction would fail for ever: the next operation gets a new one.
            self._disconnect()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._disconnect()
            connection = self._connect(self.path)
            try:
                if self._shrinks:
                    # Before the first page is written; in a file that has pages it changes nothing.
                    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
                connection.execute("PRAGMA synchronous=FULL")
                self._syncs = True
                connection.executescript(self._schema)
                self._opened = _identity(self.path)
            except BaseException as error:
                if is_corrupt(error):
                    self._broken = connection
                else:
                    connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connections, self._connection, self._broken = (self._connection, self._broken), None, None
        for connection in connections:
            if connection is not None:
                connection.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
