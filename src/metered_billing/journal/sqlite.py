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
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from metered_billing.charge import Record
from metered_billing.commits import StorageError
from metered_billing.journal import JournalError, aside, body_of, states_of, taken_for
from metered_billing.journal.lock import FileLock, call_in_forked_child
from metered_billing.journal.rows import COLUMN_LIST, SCHEMA, columns_of, record_in, rows_of
from metered_billing.journal.slot import File, Open, SetAside, Slot, Write, look
from metered_billing.runtime import Executor, Runtime
from metered_billing.schemas import SchemaMismatch, prepare_sqlite
from metered_billing.telemetry import Telemetry

T = TypeVar("T")

AT_A_TIME = 500
"""Rows that one statement changes: requests wait for the same thread."""

PAGES_AT_A_TIME = 250
STEPS_AT_A_TIME = 40
"""Free pages that go back to the disk in one transaction, and how many such transactions follow each other."""

SLACK_PAGES = 256
"""Free pages that a file may keep: it will need them again."""


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
        self._own: Slot | None = None
        self._realm = ""
        self._adopted: dict[str, Slot] = {}
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
        return slot.run(Open(slot.file, (*columns_of(record), record.request_id)), durable=True)

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        # An owner that we are not any more is nowhere on record, so that any file says False.
        slot = self._adopted.get(before.owner) or self._place()
        # Plain strings: SQLite asks for an adapter of any other kind, at each value.
        values = (str(after.state), after.tries, after.due_at, after.closed_at, body_of(after))
        return slot.run(Write((*values, before.id, before.owner, *states_of(before))), durable=durable)

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
            if path not in {slot.path for slot in self._slots()} and self._done_with.get(path) != look(path):
                found += await self._adopt(path, now)
        self._report_set_aside()
        return found

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        def select(owner: str, connection: sqlite3.Connection) -> tuple[list[Record], dict[str, str]]:
            found: list[Record] = []
            unreadable: dict[str, str] = {}
            for row in rows_of(
                connection,
                f"SELECT {COLUMN_LIST} FROM charges WHERE closed_at IS NULL AND due_at <= ? AND owner = ?"  # noqa: S608
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
            rows = rows_of(
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

    async def _take_place(self, executor: Executor) -> "Slot":
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
                except SetAside:
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
            if slot is not None and not look(path):  # set aside, or removed, meanwhile
                await slot.release()
                return 0
            left = 0 if slot is None else await self._take_over(slot, now)
        except SetAside:
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

    def _lock(self, path: Path, executor: Executor) -> "Slot | None":
        """The file under our lock, or None where a living process has it."""
        lock = FileLock.take(path.with_suffix(".lock"))
        if lock is None:
            return None
        try:
            aside.complete(path, self._runtime.now())
        except BaseException:
            lock.release()
            raise
        file = File(
            path,
            "",
            executor,
            self._runtime.connect,
            shrinks=True,
            committed=self._committed,
            clock=self._runtime.monotonic,
        )
        file.lock = lock
        return Slot(path, lock, file, self._runtime.new_id())

    async def _take_over(self, slot: "Slot", now: float | None = None) -> int:
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
            raise (JournalError if slot.aside is None else SetAside)(told) from error

    async def _lay_out(self, slot: "Slot") -> None:
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

    async def _release(self, slot: "Slot") -> None:
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

    async def _shrink(self, slot: "Slot") -> None:
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

    async def _lose(self, file: "File") -> None:
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

    async def _set_aside(self, slot: "Slot") -> str:
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

    def _slots(self) -> "list[Slot]":
        return [slot for slot in (self._own, *self._adopted.values()) if slot is not None]

    def _place(self) -> "Slot":
        if self._own is None:
            raise JournalError("the journal is closed")
        return self._own


_BY_HAND = (
    "Charges that were unsettled in it are neither refunded nor voided by themselves: docs/how-to/mend-a-journal.md"
    " says how a person gets them back"
)

_SIZES = ("page_count", "freelist_count")


_INHERITED: list[Any] = []
