"""The journal on SQLite: a directory with one file a process, each held under `flock`.

A file whose lock is free is a dead process's. The next process that starts takes it as its own; one that is
running adopts it, finishes what stands in it, and gives it back. So there are never more files than there
were processes at one time, and no file ever has two writers. A file that cannot be read is left as it is.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.charge import Record
from metered_billing.commits import StorageError
from metered_billing.journal import JournalError, body_of, record_of
from metered_billing.journal.lock import FileLock, call_in_forked_child
from metered_billing.runtime import Executor, Runtime
from metered_billing.sqlite import SqliteFile

T = TypeVar("T")

SCHEMA_VERSION = 1

AT_A_TIME = 500
"""Rows that one deletion takes: requests wait for the same thread."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS charges (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        state TEXT NOT NULL,
        opened_at REAL NOT NULL,
        tries INTEGER NOT NULL,
        due_at REAL NOT NULL,
        closed_at REAL,
        request_id TEXT,
        body TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS about (realm TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS charges_due ON charges (due_at) WHERE closed_at IS NULL",
    "CREATE INDEX IF NOT EXISTS charges_closed ON charges (closed_at, id)"
    " WHERE closed_at IS NOT NULL AND state <> 'disputed'",
    "CREATE INDEX IF NOT EXISTS charges_request ON charges (request_id) WHERE request_id IS NOT NULL",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


_COLUMNS = "id, owner, state, opened_at, tries, due_at, closed_at, body"
_Row = tuple[str, str, str, float, int, float, float | None, str]


class SqliteJournal:
    """A journal in a directory of this machine. It dies with an ephemeral disk.

    Args:
        directory: Made where it is missing. Not on a network file system: `flock` must work.
    """

    def __init__(self, directory: str | Path, *, runtime: Runtime | None = None) -> None:
        self._directory = Path(directory)
        self._runtime = runtime or Runtime()
        self._unusable: dict[str, str] = {}
        self._vacate()
        call_in_forked_child(self)

    def _vacate(self) -> None:
        self._mutex = threading.Lock()
        self._starting: concurrent.futures.Future[None] | None = None
        self._executor: Executor | None = None
        self._own: _Slot | None = None
        self._realm = ""
        self._adopted: dict[str, _Slot] = {}
        # Dead processes' files in which nothing is left to do, as they looked then.
        self._done_with: dict[Path, tuple[int, ...]] = {}

    def forked(self) -> None:
        """This is a child: the place, the thread and the connections are its parent's."""
        # Closing its copy of a connection could write to the parent's file, so it stays open.
        _INHERITED.append((self._own, self._adopted, self._executor))
        self._vacate()

    @property
    def owner(self) -> str:
        return "" if self._own is None else self._own.owner

    @property
    def unusable(self) -> Mapping[str, str]:
        return self._unusable

    async def start(self, realm: str = "") -> None:
        with self._mutex:
            if self._own is not None:
                return
            starting, first = self._starting, self._starting is None
            if starting is None:
                starting = self._starting = concurrent.futures.Future()
        if not first:  # a concurrent first request was faster
            await asyncio.shield(asyncio.wrap_future(starting))
            return
        executor = self._runtime.executor()
        self._realm = realm
        try:
            self._own = await self._take_place(executor)
        except BaseException as error:
            self._starting = None
            executor.shutdown(wait=False)
            starting.set_exception(
                error if isinstance(error, JournalError) else JournalError("the start was interrupted")
            )
            raise
        self._executor, self._starting = executor, None
        starting.set_result(None)

    def open(self, record: Record) -> Awaitable[None]:
        slot = self._place()
        row = (*_columns(record), record.request_id)

        def insert(connection: sqlite3.Connection) -> None:
            if not (slot.file.in_place() and slot.lock.in_place()):
                # What is in it can still be finished; what is new would be lost with this process.
                raise JournalError(f"{slot.path} was removed while it was in use: restart")
            if record.owner != slot.owner:
                raise JournalError(f"charge {record.id} was made before the journal was closed")
            connection.execute(
                f"INSERT INTO charges ({_COLUMNS}, request_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                row,
            )

        return slot.run(insert, durable=True)

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        # An owner that we are not any more is nowhere on record, so that any file says False.
        slot = self._adopted.get(before.owner) or self._place()
        _, _, state, _, tries, due_at, closed_at, body = _columns(after)
        values = (state, tries, due_at, closed_at, body, before.id, before.owner, before.state)

        def compare_and_set(connection: sqlite3.Connection) -> bool:
            cursor = connection.execute(
                "UPDATE charges SET state = ?, tries = ?, due_at = ?, closed_at = ?, body = ?"
                " WHERE id = ? AND owner = ? AND state = ?",
                values,
            )
            return cursor.rowcount == 1

        return slot.run(compare_and_set, durable=durable)

    async def adopt(self, now: float) -> int:
        self._place()
        await self._give_back()
        found = 0
        for path in sorted(self._directory.glob("charges-*.db")):
            if path not in {slot.path for slot in self._slots()} and self._done_with.get(path) != _look(path):
                found += await self._adopt(path, now)
        return found

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        def select(owner: str, connection: sqlite3.Connection) -> tuple[list[Record], dict[str, str]]:
            found: list[Record] = []
            unreadable: dict[str, str] = {}
            for row in connection.execute(
                f"SELECT {_COLUMNS} FROM charges WHERE closed_at IS NULL AND due_at <= ? AND owner = ?"  # noqa: S608
                " ORDER BY due_at, id",
                (now, owner),
            ):
                if len(found) == limit:
                    break
                if row[0] in besides:
                    continue
                try:
                    found.append(_record(row))
                except JournalError as error:
                    unreadable[f"charge {row[0]}"] = str(error)
            return found, unreadable

        records: list[Record] = []
        for found, unreadable in await self._everywhere(select):
            records += found
            self._unusable.update(unreadable)
        records.sort(key=lambda record: (record.due_at, record.id))
        return records[:limit]

    async def next_due(self, now: float) -> float | None:
        def select(owner: str, connection: sqlite3.Connection) -> float | None:
            row: tuple[float | None] = connection.execute(
                "SELECT MIN(due_at) FROM charges WHERE closed_at IS NULL AND due_at > ? AND owner = ?",
                (now, owner),
            ).fetchone()
            return row[0]

        return min((due for due in await self._everywhere(select) if due is not None), default=None)

    async def unsettled(self, now: float) -> Mapping[str, tuple[int, float]]:
        def select(owner: str, connection: sqlite3.Connection) -> list[tuple[str, int, float]]:
            return connection.execute(
                "SELECT state, COUNT(*), MIN(opened_at) FROM charges"
                " WHERE closed_at IS NULL AND owner = ? GROUP BY state",
                (owner,),
            ).fetchall()

        states: dict[str, tuple[int, float]] = {}
        for rows in await self._everywhere(select):
            for state, count, opened_at in rows:
                before, age_s = states.get(state, (0, 0.0))
                states[state] = (before + count, max(age_s, now - opened_at))
        return states

    async def forget(self, closed_before: float, *, keep: int) -> int:
        def delete(owner: str, connection: sqlite3.Connection) -> int:
            newest_beyond = connection.execute(
                "SELECT closed_at, id FROM charges WHERE closed_at IS NOT NULL AND state <> 'disputed'"
                " ORDER BY closed_at DESC, id DESC LIMIT 1 OFFSET ?",
                (keep,),
            ).fetchone()
            return connection.execute(
                "DELETE FROM charges WHERE id IN (SELECT id FROM charges"
                " WHERE closed_at IS NOT NULL AND state <> 'disputed'"
                " AND (closed_at < ? OR (closed_at, id) <= (?, ?)) ORDER BY closed_at, id LIMIT ?)",
                (closed_before, *(newest_beyond or (None, None)), AT_A_TIME),
            ).rowcount

        forgotten = 0
        while deleted := sum(await self._everywhere(delete)):
            forgotten += deleted
        return forgotten

    async def close(self) -> None:
        slots, executor = self._slots(), self._executor
        self._executor, self._own, self._adopted, self._done_with = None, None, {}, {}
        released = [slot.release() for slot in slots]
        if executor is not None:
            executor.shutdown(wait=False)
        for done in released:
            await done

    # Files.

    async def _take_place(self, executor: Executor) -> "_Slot":
        """The first file whose lock is free and that can be read, as ours."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            number = 0
            while True:
                path = self._directory / f"charges-{number}.db"
                number += 1
                existed = path.exists()
                slot = self._lock(path, executor)
                if slot is None:
                    continue
                try:
                    await self._take_over(slot)
                except _OtherVersion:
                    raise
                except JournalError as error:
                    if not existed:
                        raise
                    self._unusable[path.name] = str(error)
                else:
                    return slot
        except OSError as error:
            raise JournalError(f"no journal can be kept in {self._directory}: {error}") from error

    async def _adopt(self, path: Path, now: float) -> int:
        """Take over a dead process's file, if it is one. Returns how many of its charges are not final."""
        executor = self._executor
        if executor is None:  # closed meanwhile
            return 0
        try:
            slot = self._lock(path, executor)
            left = 0 if slot is None else await self._take_over(slot, now)
        except (JournalError, OSError) as error:
            self._unusable[path.name] = str(error)
            return 0
        self._unusable.pop(path.name, None)
        if slot is None:
            return 0  # a living process's
        if left == 0 or self._executor is None:
            await self._release(slot)
        else:
            self._adopted[slot.owner] = slot
        return left

    def _lock(self, path: Path, executor: Executor) -> "_Slot | None":
        """The file under our lock, or None where a living process has it."""
        lock = FileLock.take(path.with_suffix(".lock"))
        if lock is None:
            return None
        return _Slot(path, lock, SqliteFile(path, "", executor, self._runtime.connect), self._runtime.new_id())

    async def _take_over(self, slot: "_Slot", now: float | None = None) -> int:
        """Make the unsettled charges of a file ours, and due. Returns how many. Releases it if that fails."""
        due_at = self._runtime.now() if now is None else now

        def take(connection: sqlite3.Connection) -> int:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise _OtherVersion(
                    f"{slot.path} is a journal of version {version}; this release reads {SCHEMA_VERSION}."
                    " Run the release that wrote it until nothing is unsettled"
                )
            if version == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
            self._claim(slot.path, connection)
            return connection.execute(
                "UPDATE charges SET owner = ?, due_at = ? WHERE closed_at IS NULL", (slot.owner, due_at)
            ).rowcount

        try:
            return await slot.run(take, durable=True)
        except BaseException:
            await slot.release()
            raise

    def _claim(self, path: Path, connection: sqlite3.Connection) -> None:
        """Make the file our realm's, unless it holds what can only be settled in another."""
        about = connection.execute("SELECT realm FROM about").fetchone()
        if about is not None and about[0] == self._realm:
            return
        left = connection.execute("SELECT COUNT(*) FROM charges WHERE closed_at IS NULL").fetchone()[0]
        if about is not None and left:
            raise JournalError(
                f"{path} holds {left} unsettled charges that were made at {about[0]}, and this app's credits are at"
                f" {self._realm}: they wait for an app with those credits on this journal"
            )
        connection.execute("DELETE FROM about")
        connection.execute("INSERT INTO about VALUES (?)", (self._realm,))

    async def _give_back(self) -> None:
        """Release adopted files in which nothing is left to do."""

        def count(owner: str, connection: sqlite3.Connection) -> tuple[str, int]:
            left: int = connection.execute("SELECT COUNT(*) FROM charges WHERE closed_at IS NULL").fetchone()[0]
            return owner, left

        for owner, left in await self._everywhere(count):
            if left == 0 and (slot := self._adopted.pop(owner, None)) is not None:
                await self._release(slot)

    async def _release(self, slot: "_Slot") -> None:
        """Release a file in which nothing is left to do, and leave it alone until somebody has written to it."""
        await slot.release()
        self._done_with[slot.path] = slot.left_as

    async def _everywhere(self, operation: Callable[[str, sqlite3.Connection], T]) -> list[T]:
        """Run it in each of our files. An adopted one that fails is set aside, and stops none of the others."""
        own = self._place()
        results: list[T] = []
        for slot in (own, *self._adopted.values()):
            try:
                results.append(await slot.run(functools.partial(operation, slot.owner), durable=False))
            except JournalError as error:
                if slot is own:
                    raise
                if self._adopted.pop(slot.owner, None) is not None:
                    self._unusable[slot.path.name] = str(error)
                    await slot.release()
        return results

    def _slots(self) -> "list[_Slot]":
        return [slot for slot in (self._own, *self._adopted.values()) if slot is not None]

    def _place(self) -> "_Slot":
        if self._own is None:
            raise JournalError("the journal is closed")
        return self._own


@dataclass(slots=True)
class _Slot:
    """A file of the journal, under our lock, and the name that its charges are ours under."""

    path: Path
    lock: FileLock
    file: SqliteFile
    owner: str
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False
    left_as: tuple[int, ...] = ()

    def run(self, operation: Callable[[sqlite3.Connection], T], *, durable: bool) -> Awaitable[T]:
        # Not a coroutine: the write must be in the queue when this returns.
        try:
            with self._mutex:
                if self._released:  # another event loop was faster; the file is not ours any more
                    raise JournalError(f"{self.path.name} is closed")
                return _translated(self.path, self.file.run(operation, durable=durable))
        except StorageError as error:
            raise JournalError(str(error)) from error

    def release(self) -> Awaitable[None]:
        """Finish what is queued, close the file, then let go of the lock, whoever waits for it or not."""
        with self._mutex:
            self._released = True
            return self.file.close(then=self._let_go)

    def _let_go(self) -> None:
        self.left_as = _look(self.path)
        self.lock.release()


class _OtherVersion(JournalError):
    """The file is whole, and of another release."""


async def _translated(path: Path, future: "asyncio.Future[T]") -> T:
    try:
        return await future
    except JournalError:
        raise
    except Exception as error:
        raise JournalError(f"{path}: {error}") from error


def _columns(record: Record) -> _Row:
    return (
        record.id,
        record.owner,
        record.state,
        record.opened_at,
        record.tries,
        record.due_at,
        record.closed_at,
        body_of(record),
    )


def _record(row: _Row) -> Record:
    charge_id, owner, state, opened_at, tries, due_at, closed_at, body = row
    return record_of(
        charge_id,
        body,
        owner=owner,
        state=state,
        opened_at=opened_at,
        tries=tries,
        due_at=due_at,
        closed_at=closed_at,
    )


def _look(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to the file: itself, or its log while that is not merged yet."""
    found: list[int] = []
    for name in (path, path.with_name(path.name + "-wal")):
        with contextlib.suppress(OSError):
            stat = name.stat()
            found += (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return tuple(found)


_INHERITED: list[Any] = []
