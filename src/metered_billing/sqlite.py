"""One SQLite file, one connection, one thread, group commit: what the journal and the ledger write with.

Operations are functions of the connection. Those that arrive while a commit is under way share the next
one: at `synchronous=FULL` the sync to disk is nearly all the cost, whether for one operation or for sixty.
A thread of our own, because aiosqlite interleaves two coroutines' transactions on one connection; one
connection, because two that write and checkpoint a WAL file can corrupt it in SQLite before 3.51.3.
"""

import asyncio
import contextlib
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.runtime import Executor

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

MAX_WAITING = 10_000
"""Operations that may wait for the thread; beyond it, a caller is refused rather than queued without end."""


class StorageError(Exception):
    """The file could not be written or read; the operation did not happen, unless said otherwise."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    operation: Operation[Any]
    durable: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class SqliteFile:
    """A SQLite database that this process alone writes.

    Args:
        path: The file; made where it is missing.
        schema: SQL that runs once, at opening; must be repeatable (`CREATE … IF NOT EXISTS`).
        executor: The one thread. All of SQLite happens there.
    """

    def __init__(self, path: Path, schema: str, executor: Executor) -> None:
        self.path = path
        self._schema = schema
        self._executor = executor
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._scheduled = False
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self.commits = 0

    def run(self, operation: Operation[T], *, durable: bool = True) -> asyncio.Future[T]:
        """Run `operation` in the thread, in a transaction shared with whatever else is waiting.

        It is queued at once, in the order of the calls; the future only tells how it went, and cancelling
        that does not take the operation back. An operation that raises is rolled back alone. It may run
        twice (the second time after all of the first was rolled back).

        Args:
            durable: Sync to disk before the future is done. Otherwise a power loss (not a crash of the
                process) may take the operation back, but never one before it that was durable.

        Raises:
            StorageError: Too many are waiting; nothing was queued.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._lock:
            if len(self._waiting) >= MAX_WAITING:
                raise StorageError(f"{self.path.name}: {MAX_WAITING} operations are waiting already")
            self._waiting.append(_Waiting(operation, durable, loop, future))
            schedule = not self._scheduled
            self._scheduled = True
        if schedule:
            try:
                self._executor.submit(self._drain)
            except RuntimeError as error:  # the executor, or the whole interpreter, is shutting down
                self._refuse(StorageError(f"{self.path.name}: {error}"))
        return future

    def __del__(self) -> None:
        # An app that was never shut down (a test client without a lifespan, say) just lets go of it.
        if getattr(self, "_connection", None) is not None:
            with contextlib.suppress(Exception):
                self._disconnect()

    def close(self, then: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Finish what is waiting, then close the file. The next `run` opens it again.

        It is queued at once; cancelling the future does not take it back.

        Args:
            then: Runs in the thread when the file is closed.
        """
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()

        def close() -> None:
            try:
                self._disconnect()
            finally:
                if then is not None:
                    then()
                _tell(loop, [(closed, None, None)])

        try:
            self._executor.submit(close)
        except RuntimeError:  # no thread any more, so nothing is under way in it either
            close()
        return closed

    # Below: in the thread.

    def in_place(self) -> bool:
        """Whether the file that is open still stands at its path: what is written to another is lost."""
        try:
            return self._opened == _identity(self.path)
        except OSError:
            return False

    def _drain(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._scheduled = False
                    return
            self._answer(batch, self._commit(batch))

    def _refuse(self, error: StorageError) -> None:
        with self._lock:
            batch, self._waiting, self._scheduled = self._waiting, [], False
        self._answer(batch, [(None, error)] * len(batch))

    def _answer(self, batch: list[_Waiting], outcomes: list[tuple[Any, BaseException | None]]) -> None:
        told = defaultdict(list)
        for waiting, (result, error) in zip(batch, outcomes, strict=True):
            told[waiting.loop].append((waiting.future, result, error))
        for loop, answers in told.items():
            _tell(loop, answers)

    def _commit(self, batch: list[_Waiting]) -> list[tuple[Any, BaseException | None]]:
        try:
            return self._transaction(batch)
        except BaseException as error:
            if len(batch) == 1:
                return [(None, _tellable(error))]
        # One of them spoiled the transaction: each for itself, so that its neighbours go through.
        return [self._commit([waiting])[0] for waiting in batch]

    def _transaction(self, batch: list[_Waiting]) -> list[tuple[Any, BaseException | None]]:
        connection = self._open()
        durable = any(waiting.durable for waiting in batch)
        try:
            connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            results = [waiting.operation(connection) for waiting in batch]
            connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise
        self.commits += 1
        return [(result, None) for result in results]

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
            connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                connection.executescript(self._schema)
                self._opened = _identity(self.path)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _tellable(error: BaseException) -> Exception:
    """The error as a future can carry it: a StopIteration it refuses, a cancellation it would obey."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    told = StorageError(f"the operation raised {error!r}")
    told.__cause__ = error
    return told


def _tell(
    loop: asyncio.AbstractEventLoop, answers: list[tuple[asyncio.Future[Any], Any, BaseException | None]]
) -> None:
    """Wake a loop once for all its answers. One that is closed has nobody left to tell."""

    def resolve() -> None:
        for future, result, error in answers:
            if future.done():  # its waiter was cancelled
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(resolve)
