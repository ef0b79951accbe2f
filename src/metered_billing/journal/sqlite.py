"""The journal on SQLite: a directory with one file a process, each held under `flock`.

A file whose lock is free is a dead process's. The next process that starts takes it as its own; one that is
running adopts it, finishes what stands in it, and gives it back. So there are never more files than there
were processes at one time, and no file ever has two writers. A corrupt file is set aside (see `aside`); one that
cannot be read for another reason, and a row that cannot be read, are left as they are.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import sqlite3
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.charge import Record
from metered_billing.commits import StorageError, Waiting
from metered_billing.journal import JournalError, aside, body_of, record_of, states_of, taken_for
from metered_billing.journal.lock import FileLock, call_in_forked_child
from metered_billing.runtime import Executor, Runtime
from metered_billing.schemas import Schema, SchemaMismatch, prepare_sqlite
from metered_billing.sqlite import SqliteFile, is_corrupt
from metered_billing.telemetry import Telemetry

T = TypeVar("T")

AT_A_TIME = 500
"""Rows that one statement changes: requests wait for the same thread."""

PAGES_AT_A_TIME = 250
STEPS_AT_A_TIME = 40
"""Free pages that go back to the disk in one transaction, and how many such transactions follow each other."""

SLACK_PAGES = 256
"""Free pages that a file may keep: it will need them again."""

_VERSION_1 = (
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
)
_VERSION_2 = (
    # Covers what a hundred thousand unsettled charges are counted by, and is searched by owner first, so that
    # a file can be taken over a little at a time.
    "CREATE INDEX IF NOT EXISTS charges_unsettled ON charges (owner, due_at, id, state, opened_at, closed_at)"
    " WHERE closed_at IS NULL",
    "DROP INDEX IF EXISTS charges_due",
)

_VERSION_3 = (
    # Requests' ids come in no order, so that each new charge had a page of its own to write to keep this index.
    # What is searched for by them, a person looks for, now and then: a file is read through in a moment.
    "DROP INDEX IF EXISTS charges_request",
)

SCHEMA = Schema("journal", (_VERSION_1, _VERSION_2, _VERSION_3))

COLUMNS = ("id", "owner", "state", "opened_at", "tries", "due_at", "closed_at", "body")
_COLUMNS = ", ".join(COLUMNS)
_Row = tuple[str, str, str, float, int, float, float | None, str]

OPEN = f"INSERT INTO charges ({_COLUMNS}, request_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
WRITE = (
    "UPDATE charges SET state = ?, tries = ?, due_at = ?, closed_at = ?, body = ?"
    " WHERE id = ? AND owner = ? AND state IN (?, ?)"
)


class SqliteJournal:
    """A journal in a directory of this machine. It dies with an ephemeral disk.

    Args:
        directory: Made where it is missing. Not on a network file system: `flock` must work.
    """

    def __init__(
        self, directory: str | Path, *, runtime: Runtime | None = None, telemetry: Telemetry | None = None
    ) -> None:
        self._directory = Path(directory)
        self._runtime = runtime or Runtime()
        self._committed = (telemetry or Telemetry()).committed("journal")
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
            if realm != self._realm and (self._executor is not None or self._starting is not None):
                raise taken_for(self._realm, realm)
            if self._own is not None:
                return
            self._realm = realm
            starting, first = self._starting, self._starting is None
            if starting is None:
                starting = self._starting = concurrent.futures.Future()
        if not first:  # a concurrent first request was faster
            await asyncio.shield(asyncio.wrap_future(starting))
            return
        # There is one already where a place was lost.
        running = self._executor
        executor = running or self._runtime.executor()
        try:
            own = await self._take_place(executor)
            if self._executor is not running:
                await own.release()
                raise JournalError("the journal was closed")
        except BaseException as error:
            self._starting = None
            if running is None:
                executor.shutdown(wait=False)
            starting.set_exception(
                error if isinstance(error, JournalError) else JournalError("the start was interrupted")
            )
            starting.exception()  # perhaps nobody else waited for it
            raise
        self._own, self._executor, self._starting = own, executor, None
        starting.set_result(None)

    def open(self, record: Record) -> Awaitable[None]:
        slot = self._place()
        if record.owner != slot.owner:
            raise JournalError(f"charge {record.id} was made before the journal was closed")
        return slot.run(_Open(slot.file, (*_columns(record), record.request_id)), durable=True)

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        # An owner that we are not any more is nowhere on record, so that any file says False.
        slot = self._adopted.get(before.owner) or self._place()
        # Plain strings: SQLite asks for an adapter of any other kind, at each value.
        values = (str(after.state), after.tries, after.due_at, after.closed_at, body_of(after))
        return slot.run(_Write((*values, before.id, before.owner, *states_of(before))), durable=durable)

    def holds(self, record: Record) -> bool:
        own = self._own
        return own is not None and own.owner == record.owner and not own.lock.removed()

    async def adopt(self, now: float) -> int:
        if self._own is None and self._executor is not None:  # our place was lost, and there was no other yet
            await self.start(self._realm)
        self._place()
        await self._give_back()
        found = 0
        for path in aside.live(self._directory):
            if path not in {slot.path for slot in self._slots()} and self._done_with.get(path) != _look(path):
                found += await self._adopt(path, now)
        self._report_set_aside()
        return found

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        def select(owner: str, connection: sqlite3.Connection) -> tuple[list[Record], dict[str, str]]:
            found: list[Record] = []
            unreadable: dict[str, str] = {}
            for row in _rows(
                connection,
                f"SELECT {_COLUMNS} FROM charges WHERE closed_at IS NULL AND due_at <= ? AND owner = ?"  # noqa: S608
                " ORDER BY due_at, id",
                (now, owner),
            ):
                if len(found) == limit:
                    break
                if row[0] in besides:
                    continue
                try:
                    found.append(record_in(row))
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
            rows = _rows(
                connection,
                "SELECT state, COUNT(*), MIN(opened_at) FROM charges"
                " WHERE closed_at IS NULL AND owner = ? GROUP BY state",
                (owner,),
            )
            return [(str(state), count, opened_at) for state, count, opened_at in rows]

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
        for slot in self._slots():
            await self._shrink(slot)
        return forgotten

    async def pause(self) -> None:
        pass  # the lock on its file outlasts a process that is frozen

    def resume(self) -> None:
        pass

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
            aside.make_directory(self._directory)
            number = 0
            while True:
                path = self._directory / f"charges-{number}.db"
                existed = path.exists()
                slot = self._lock(path, executor)
                try:
                    if slot is not None:
                        await self._take_over(slot)
                        await self._lay_out(slot)
                        self._report_set_aside()
                        return slot
                except _SetAside:
                    continue  # its name is free
                except JournalError as error:
                    if not existed or isinstance(error.__cause__, SchemaMismatch):
                        raise
                    self._unusable[path.name] = str(error)
                number += 1
        except OSError as error:
            raise JournalError(f"no journal can be kept in {self._directory}: {error}") from error

    async def _adopt(self, path: Path, now: float) -> int:
        """Take over a dead process's file, if it is one. Returns how many of its charges are not final."""
        executor = self._executor
        if executor is None:  # closed meanwhile
            return 0
        try:
            slot = self._lock(path, executor)
            if slot is not None and not _look(path):  # set aside, or removed, meanwhile
                await slot.release()
                return 0
            left = 0 if slot is None else await self._take_over(slot, now)
        except _SetAside:
            return 0
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
        try:
            aside.complete(path, self._runtime.now())
        except BaseException:
            lock.release()
            raise
        file = _File(
            path,
            "",
            executor,
            self._runtime.connect,
            shrinks=True,
            committed=self._committed,
            clock=self._runtime.monotonic,
        )
        file.lock = lock
        return _Slot(path, lock, file, self._runtime.new_id())

    async def _take_over(self, slot: "_Slot", now: float | None = None) -> int:
        """Make the unsettled charges of a file ours, and due. Returns how many. Releases it if that fails."""
        due_at = self._runtime.now() if now is None else now

        def prepare(connection: sqlite3.Connection) -> dict[str, int]:
            prepare_sqlite(connection, SCHEMA)
            self._claim(slot.path, connection)
            unsettled = "SELECT owner, COUNT(*) FROM charges WHERE closed_at IS NULL GROUP BY owner"
            return dict(connection.execute(unsettled).fetchall())

        def take(connection: sqlite3.Connection) -> int:
            # Not by one statement: with a hundred thousand, requests would wait for it. And not from whoever takes it
            # over meanwhile, as where a lock was removed: neither would ever come to an end.
            return sum(
                connection.execute(
                    "UPDATE charges SET owner = ?, due_at = ? WHERE id IN"
                    " (SELECT id FROM charges WHERE closed_at IS NULL AND owner = ? LIMIT ?)",
                    (slot.owner, due_at, other, AT_A_TIME),
                ).rowcount
                for other in owners
            )

        try:
            owners = await slot.run(prepare, durable=True)
            while await slot.run(take, durable=False):
                pass
            slot.file.lost = weakref.WeakMethod(self._lose)
            return sum(owners.values())
        except BaseException as error:
            if slot.file.corrupt is None:
                await slot.release()
                raise
            told = await self._set_aside(slot)
            raise (JournalError if slot.aside is None else _SetAside)(told) from error

    async def _lay_out(self, slot: "_Slot") -> None:
        """Lay a file of version 1 out anew, so that it can shrink.

        VACUUM is a transaction of its own: whatever dies meanwhile, the file is as it was, or as it is to be.
        Where it cannot be had (a full disk, say) all else goes on, and the next start tries again.
        """

        def vacuum(connection: sqlite3.Connection) -> None:
            if connection.execute("PRAGMA auto_vacuum").fetchone() != (2,):
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
                connection.execute("VACUUM")

        with contextlib.suppress(StorageError, sqlite3.Error):
            await slot.file.between(vacuum)

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

    async def _shrink(self, slot: "_Slot") -> None:
        """Give free pages back to the disk, a few at a time; the next look through the journal goes on."""

        def step(connection: sqlite3.Connection) -> bool:
            pages, free = (int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in _SIZES)
            if free <= max(SLACK_PAGES, pages // 8):
                return False
            # `execute` would stop at the first page: the pragma makes a row of no columns for each.
            connection.executescript(f"PRAGMA incremental_vacuum({PAGES_AT_A_TIME})")
            # In a file of version 1 it does nothing: that is laid out anew when its process starts again.
            return int(connection.execute("PRAGMA freelist_count").fetchone()[0]) < free

        # Whatever fails here fails louder where charges are written.
        with contextlib.suppress(JournalError, StorageError, sqlite3.Error):
            for _ in range(STEPS_AT_A_TIME):
                if not await slot.between(step):
                    break

    # Corrupt files.

    async def _lose(self, file: "_File") -> None:
        """A file of ours turned out to be corrupt while in use: set it aside. Our own place we take anew.

        What was under way in it is unknown, and stays with the file, for a person. Its requests find their
        charges on record nowhere: they are answered 503, or go out and report `ownership_lost`.
        """
        with self._mutex:
            slot = next((slot for slot in self._slots() if slot.file is file), None)
            if slot is None:  # somebody else was faster
                return
            own = self._own is slot
            if own:
                self._own = None
            else:
                self._adopted.pop(slot.owner, None)
        await self._set_aside(slot)
        if own:
            # If there is none to be had now, the next `adopt` tries again.
            with contextlib.suppress(JournalError):
                await self.start(self._realm)

    async def _set_aside(self, slot: "_Slot") -> str:
        """Rename it, close it and let go of it, and report it. Returns what is reported."""
        await slot.release(aside_at=self._runtime.now())
        name = slot.path.name if slot.aside is None else slot.aside.name
        where = "could not be set aside" if slot.aside is None else f"was set aside as {name}"
        told = self._unusable[name] = f"{slot.file.corrupt}; it {where}. {_BY_HAND}"
        return told

    def _report_set_aside(self) -> None:
        """Let `unusable` name what was set aside, by whomever, as long as it is there."""
        found = aside.listed(self._directory)
        for name in [name for name in self._unusable if ".corrupt-" in name and name not in found]:
            self._unusable.pop(name, None)
        for name in found:
            self._unusable.setdefault(name, f"{name} was corrupt, and set aside. {_BY_HAND}")

    def _slots(self) -> "list[_Slot]":
        return [slot for slot in (self._own, *self._adopted.values()) if slot is not None]

    def _place(self) -> "_Slot":
        if self._own is None:
            raise JournalError("the journal is closed")
        return self._own


class _File(SqliteFile):
    """A file of the journal. What is opened and written at the same time goes in by one call each.

    Attributes:
        lock: What it is held by.
        corrupt: What SQLite said when the file turned out to be.
        lost: What is done then, before whoever waits is told.
    """

    lock: FileLock
    corrupt: str | None = None
    lost: "weakref.WeakMethod[Callable[[_File], Coroutine[Any, Any, None]]] | None" = None

    def check_in_place(self) -> None:
        """
        Raises:
            JournalError: What is in it can still be finished; what is new would be lost with this process.
        """
        if not (self.in_place() and self.lock.in_place()):
            raise JournalError(f"{self.path} was removed while it was in use: restart")

    def _operate(self, connection: sqlite3.Connection, batch: list[Waiting[sqlite3.Connection]]) -> list[Any]:
        operations = [waiting.operation for waiting in batch]
        opened = [operation.values for operation in operations if type(operation) is _Open]
        written = [operation.values for operation in operations if type(operation) is _Write]
        if len(operations) == 1 or len(opened) + len(written) < len(operations):
            return super()._operate(connection, batch)
        # What is opened here may be written here too, and never the other way round.
        if opened:
            self.check_in_place()
            connection.executemany(OPEN, opened)
        if written and connection.executemany(WRITE, written).rowcount != len(written):
            raise StorageError("not all of them were as they were read: each for itself")
        return [None if type(operation) is _Open else True for operation in operations]

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
        self, lose: "Callable[[_File], Coroutine[Any, Any, None]]", future: "asyncio.Future[Any]", told: JournalError
    ) -> None:
        try:
            await lose(self)
        finally:
            if not future.done():
                future.set_exception(told)


_LOSING: set[asyncio.Task[None]] = set()
"""A loop itself does not hold on to its tasks."""


@dataclass(slots=True)
class _Open:
    """A charge that is put on record."""

    file: _File
    values: tuple[object, ...]

    def __call__(self, connection: sqlite3.Connection) -> None:
        self.file.check_in_place()
        connection.execute(OPEN, self.values)


@dataclass(slots=True)
class _Write:
    """A compare-and-set of a charge."""

    values: tuple[object, ...]

    def __call__(self, connection: sqlite3.Connection) -> bool:
        return connection.execute(WRITE, self.values).rowcount == 1


@dataclass(slots=True)
class _Slot:
    """A file of the journal, under our lock, and the name that its charges are ours under."""

    path: Path
    lock: FileLock
    file: "_File"
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
        self.left_as = _look(self.path)
        self.lock.release()


class _SetAside(JournalError):
    """The file was corrupt, and is out of the way."""


_BY_HAND = (
    "Charges that were unsettled in it are neither refunded nor voided by themselves: docs/how-to/mend-a-journal.md"
    " says how a person gets them back"
)

_SIZES = ("page_count", "freelist_count")


def _rows(connection: sqlite3.Connection, statement: str, values: tuple[object, ...]) -> Iterator[Any]:
    """Rows whose text may be bytes: one that is no UTF-8 must not keep the others from being read."""
    cursor = connection.cursor()
    before, connection.text_factory = connection.text_factory, text_or_bytes
    try:
        yield from cursor.execute(statement, values)
    finally:
        cursor.close()
        connection.text_factory = before


def text_or_bytes(raw: bytes) -> str | bytes:
    """Text as SQLite gives it; bytes where it is no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _columns(record: Record) -> _Row:
    return (
        record.id,
        record.owner,
        str(record.state),
        record.opened_at,
        record.tries,
        record.due_at,
        record.closed_at,
        body_of(record),
    )


def record_in(row: _Row) -> Record:
    """The record in a row of `COLUMNS`.

    Raises:
        JournalError: It cannot be read.
    """
    charge_id, owner, state, opened_at, tries, due_at, closed_at, body = row
    if not isinstance(charge_id, str):
        raise JournalError(f"charge {charge_id!r} cannot be read: its id is no text")
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
