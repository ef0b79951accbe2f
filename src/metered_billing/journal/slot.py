"""A file of the journal under its lock, and what requests ask of it: open a charge, write a charge."""

import asyncio
import contextlib
import functools
import sqlite3
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.commits import StorageError, Waiting
from metered_billing.journal import JournalError, aside
from metered_billing.journal.lock import FileLock
from metered_billing.journal.rows import OPEN, WRITE
from metered_billing.sqlite import SqliteFile, is_corrupt

T = TypeVar("T")


class File(SqliteFile):
    """A file of the journal. What is opened and written at the same time goes in by one call each.

    Attributes:
        lock: What it is held by.
        corrupt: What SQLite said when the file turned out to be.
        lost: What is done then, before whoever waits is told.
    """

    lock: FileLock
    corrupt: str | None = None
    lost: "weakref.WeakMethod[Callable[[File], Coroutine[Any, Any, None]]] | None" = None

    def check_in_place(self) -> None:
        """
        Raises:
            JournalError: What is in it can still be finished; what is new would be lost with this process.
        """
        if not (self.in_place() and self.lock.in_place()):
            raise JournalError(f"{self.path} was removed while it was in use: restart")

    def _operate(self, connection: sqlite3.Connection, batch: list[Waiting[sqlite3.Connection]]) -> list[Any]:
        operations = [waiting.operation for waiting in batch]
        opened = [operation.values for operation in operations if type(operation) is Open]
        written = [operation.values for operation in operations if type(operation) is Write]
        if len(operations) == 1 or len(opened) + len(written) < len(operations):
            return super()._operate(connection, batch)
        # What is opened here may be written here too, and never the other way round.
        if opened:
            self.check_in_place()
            connection.executemany(OPEN, opened)
        if written and connection.executemany(WRITE, written).rowcount != len(written):
            raise StorageError("not all of them were as they were read: each for itself")
        return [None if type(operation) is Open else True for operation in operations]

    def _fail(self, future: "asyncio.Future[Any]", error: BaseException) -> None:
        if isinstance(error, JournalError):
            future.set_exception(error)
            return
        told = JournalError(f"{self.path}: {error}")
        told.__cause__ = error
        lose = None
        if is_corrupt(error):
            self.corrupt = str(told)
            lose = None if self.lost is None else self.lost()
        if lose is None:
            future.set_exception(told)
        else:
            losing = future.get_loop().create_task(self._lose(lose, future, told))
            _LOSING.add(losing)
            losing.add_done_callback(_LOSING.discard)

    async def _lose(
        self, lose: "Callable[[File], Coroutine[Any, Any, None]]", future: "asyncio.Future[Any]", told: JournalError
    ) -> None:
        try:
            await lose(self)
        finally:
            if not future.done():
                future.set_exception(told)


_LOSING: set[asyncio.Task[None]] = set()
"""A loop itself does not hold on to its tasks."""


@dataclass(slots=True)
class Open:
    """A charge that is put on record."""

    file: File
    values: tuple[object, ...]

    def __call__(self, connection: sqlite3.Connection) -> None:
        self.file.check_in_place()
        connection.execute(OPEN, self.values)


@dataclass(slots=True)
class Write:
    """A compare-and-set of a charge."""

    values: tuple[object, ...]

    def __call__(self, connection: sqlite3.Connection) -> bool:
        return connection.execute(WRITE, self.values).rowcount == 1


@dataclass(slots=True)
class Slot:
    """A file of the journal, under our lock, and the name that its charges are ours under."""

    path: Path
    lock: FileLock
    file: "File"
    owner: str
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False
    left_as: tuple[int, ...] = ()
    aside: Path | None = None

    def run(self, operation: Callable[[sqlite3.Connection], T], *, durable: bool) -> "asyncio.Future[T]":
        """Queue an operation."""
        # Not a coroutine: the write must be in the queue when this returns. Nor a task: there are four a charge.
        try:
            with self._mutex:
                if self._released:  # another event loop was faster; the file is not ours any more
                    raise JournalError(f"{self.path.name} is closed")
                return self.file.run(operation, durable=durable)
        except StorageError as error:
            raise JournalError(str(error)) from error

    def between(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        """Run it outside any transaction."""
        with self._mutex:
            if self._released:
                raise JournalError(f"{self.path.name} is closed")
            return self.file.between(operation)

    def release(self, *, aside_at: float | None = None) -> Awaitable[None]:
        """Finish what is queued, close the file, then let go of the lock, whoever waits for it or not.

        Args:
            aside_at: Set the file aside first, under this time.
        """
        with self._mutex:
            self._released = True
            # Renamed while it is open: closing it merges its log, and removes that by its name.
            first = None if aside_at is None else functools.partial(self._set_aside, aside_at)
            return self.file.close(first=first, then=self._let_go)

    def _set_aside(self, now: float) -> None:
        with contextlib.suppress(OSError):
            self.aside = aside.set_aside(self.path, now)

    def _let_go(self) -> None:
        self.left_as = look(self.path)
        self.lock.release()


class SetAside(JournalError):
    """The file was corrupt, and is out of the way."""


def look(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to the file: itself, or its log while that is not merged yet."""
    found: list[int] = []
    for name in (path, path.with_name(path.name + "-wal")):
        with contextlib.suppress(OSError):
            stat = name.stat()
            found += (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return tuple(found)
