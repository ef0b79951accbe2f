"""The journal on SQLite: a directory with one file a process, each held under `flock`.

A file whose lock is free is a dead process's. The next process that starts takes it as its own; one that is
running adopts it, finishes what stands in it, and gives it back. So there are never more files than there
were processes at one time, and no file ever has two writers.
"""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from metered_billing.charge import Record
from metered_billing.journal import JournalError, body_of, record_of
from metered_billing.runtime import Executor, Runtime
from metered_billing.sqlite import SqliteFile, StorageError

T = TypeVar("T")

SCHEMA_VERSION = 1

AT_A_TIME = 500
"""Rows that one deletion takes."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    tries INTEGER NOT NULL,
    due_at REAL NOT NULL,
    closed_at REAL,
    request_id TEXT,
    body TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS charges_due ON charges (due_at) WHERE closed_at IS NULL;
CREATE INDEX IF NOT EXISTS charges_closed ON charges (closed_at) WHERE closed_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS charges_request ON charges (request_id) WHERE request_id IS NOT NULL;
"""

_COLUMNS = "id, owner, state, tries, due_at, closed_at, body"


class SqliteJournal:
    """A journal in a directory of this machine. It dies with an ephemeral disk.

    Args:
        directory: Made where it is missing. Not on a network file system: `flock` must work.
    """

    def __init__(self, directory: str | Path, *, runtime: Runtime | None = None) -> None:
        self._directory = Path(directory)
        self._runtime = runtime or Runtime()
        self._owner = ""
        self._own: _Slot | None = None
        self._adopted: dict[str, _Slot] = {}
        # Where the records of adopted files are; all others are in our own.
        self._elsewhere: dict[str, _Slot] = {}
        self._executor: Executor | None = None
        self._starting = threading.Lock()

    @property
    def owner(self) -> str:
        return self._owner

    async def start(self) -> None:
        with self._starting:
            if self._own is not None:
                return
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                own = self._first_free_slot()
            except OSError as error:
                raise JournalError(f"no journal can be kept in {self._directory}: {error}") from error
            self._owner = self._runtime.new_id()
            self._executor = self._runtime.executor()
            # In the queue before anybody else can be: whatever comes later finds the file ours.
            taken = self._take_over(own, self._executor, self._runtime.now())
            self._own = own
        try:
            await taken
        except BaseException:
            await self.close()
            raise

    def open(self, record: Record) -> Awaitable[None]:
        row = (*_columns(record), record.request_id)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"INSERT INTO charges ({_COLUMNS}, request_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                row,
            )

        return self._run(self._place(), insert, durable=True)

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        slot = self._elsewhere.get(before.id, self._place())
        _, _, state, tries, due_at, closed_at, body = _columns(after)
        values = (state, tries, due_at, closed_at, body, before.id, before.owner, before.state)

        def compare_and_set(connection: sqlite3.Connection) -> bool:
            cursor = connection.execute(
                "UPDATE charges SET state = ?, tries = ?, due_at = ?, closed_at = ?, body = ?"
                " WHERE id = ? AND owner = ? AND state = ?",
                values,
            )
            return cursor.rowcount == 1

        return self._run(slot, compare_and_set, durable=durable)

    async def adopt(self, now: float) -> int:
        if self._executor is None:
            raise JournalError("the journal is closed")
        await self._give_back()
        found = 0
        for path in sorted(self._directory.glob("charges-*.db")):
            if path.name in self._adopted or (self._own is not None and path == self._own.path):
                continue
            slot = _Slot.take(path)
            if slot is None:
                continue  # a living process's
            self._adopted[path.name] = slot
            found += await self._take_over(slot, self._executor, now)
        return found

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        records: list[Record] = []
        for slot in self._slots():

            def select(connection: sqlite3.Connection) -> list[Record]:
                rows = connection.execute(
                    f"SELECT {_COLUMNS} FROM charges WHERE closed_at IS NULL AND due_at <= ?"  # noqa: S608
                    " ORDER BY due_at",
                    (now,),
                )
                found: list[Record] = []
                for row in rows:
                    if row[0] in besides:
                        continue
                    found.append(_record(row))
                    if len(found) == limit:
                        break
                return found

            found = await self._run(slot, select, durable=False)
            if slot is not self._own:
                self._elsewhere.update((record.id, slot) for record in found)
            records += found
        records.sort(key=lambda record: record.due_at)
        return records[:limit]

    async def next_due(self, now: float) -> float | None:
        times: list[float] = []
        for slot in self._slots():
            row = await self._run(
                slot,
                lambda connection: connection.execute(
                    "SELECT MIN(due_at) FROM charges WHERE closed_at IS NULL AND due_at > ?", (now,)
                ).fetchone(),
                durable=False,
            )
            times += [row[0]] if row[0] is not None else []
        return min(times, default=None)

    async def unsettled(self, now: float) -> Mapping[str, tuple[int, float]]:
        states: dict[str, tuple[int, float]] = {}
        for slot in self._slots():
            rows = await self._run(
                slot,
                lambda connection: connection.execute(
                    "SELECT state, COUNT(*), MIN(json_extract(body, '$.opened_at')) FROM charges"
                    " WHERE closed_at IS NULL GROUP BY state"
                ).fetchall(),
                durable=False,
            )
            for state, count, opened_at in rows:
                before, age_s = states.get(state, (0, 0.0))
                states[state] = (before + count, max(age_s, now - opened_at))
        return states

    async def forget(self, closed_before: float, *, keep: int) -> int:
        forgotten = 0
        for slot in self._slots():

            def delete(connection: sqlite3.Connection) -> int:
                beyond = connection.execute(
                    "SELECT closed_at FROM charges WHERE closed_at IS NOT NULL"
                    " ORDER BY closed_at DESC LIMIT 1 OFFSET ?",
                    (keep,),
                ).fetchone()
                before = max(closed_before, beyond[0] if beyond else 0.0)
                return connection.execute(
                    "DELETE FROM charges WHERE id IN (SELECT id FROM charges"
                    " WHERE closed_at < ? AND state <> 'disputed' ORDER BY closed_at LIMIT ?)",
                    (before, AT_A_TIME),
                ).rowcount

            # A little at a time: requests wait for the same thread.
            while deleted := await self._run(slot, delete, durable=False):
                forgotten += deleted
                if deleted < AT_A_TIME:
                    break
        return forgotten

    async def close(self) -> None:
        slots = self._slots()
        self._own, self._adopted, self._elsewhere = None, {}, {}
        for slot in slots:
            await slot.release()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    # Files and their locks.

    def _first_free_slot(self) -> "_Slot":
        number = 0
        while True:
            slot = _Slot.take(self._directory / f"charges-{number}.db")
            if slot is not None:
                return slot
            number += 1

    def _take_over(self, slot: "_Slot", executor: Executor, now: float) -> Awaitable[int]:
        """Open a file whose lock is ours, and make its unsettled charges ours and due."""
        slot.file = SqliteFile(slot.path, _SCHEMA, executor)

        def take(connection: sqlite3.Connection) -> int:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise JournalError(
                    f"{slot.path} is a journal of version {version}; this release reads {SCHEMA_VERSION}."
                    " Run the release that wrote it until nothing is unsettled"
                )
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            cursor = connection.execute(
                "UPDATE charges SET owner = ?, due_at = ? WHERE closed_at IS NULL", (self._owner, now)
            )
            return cursor.rowcount

        return self._run(slot, take, durable=True)

    async def _give_back(self) -> None:
        """Release adopted files in which nothing is left to do."""
        for name, slot in list(self._adopted.items()):
            left = await self._run(
                slot,
                lambda connection: connection.execute(
                    "SELECT COUNT(*) FROM charges WHERE closed_at IS NULL"
                ).fetchone()[0],
                durable=False,
            )
            if left == 0:
                del self._adopted[name]
                self._elsewhere = {charge: at for charge, at in self._elsewhere.items() if at is not slot}
                await slot.release()

    def _slots(self) -> list["_Slot"]:
        return ([self._own] if self._own is not None else []) + list(self._adopted.values())

    def _place(self) -> "_Slot":
        if self._own is None:
            raise JournalError("the journal is closed")
        return self._own

    def _run(
        self, slot: "_Slot", operation: Callable[[sqlite3.Connection], T], *, durable: bool
    ) -> Awaitable[T]:
        # Not a coroutine: the write must be in the queue when this returns.
        try:
            if slot.file is None:
                raise JournalError(f"{slot.path.name} is closed")
            return _translated(slot.file.run(operation, durable=durable))
        except StorageError as error:
            raise JournalError(str(error)) from error


async def _translated(future: "asyncio.Future[T]") -> T:
    try:
        return await future
    except sqlite3.Error as error:
        raise JournalError(f"the journal could not be written: {error}") from error


def _columns(record: Record) -> tuple[str, str, str, int, float, float | None, str]:
    return (
        record.id,
        record.owner,
        record.state,
        record.tries,
        record.due_at,
        record.closed_at,
        body_of(record),
    )


def _record(row: tuple[str, str, str, int, float, float | None, str]) -> Record:
    charge_id, owner, state, tries, due_at, closed_at, body = row
    return record_of(
        charge_id, body, owner=owner, state=state, tries=tries, due_at=due_at, closed_at=closed_at
    )


class _Slot:
    """A file of the journal and the lock on it.

    The lock is on a file of its own: closing any handle of a SQLite file drops SQLite's own locks.
    """

    _held: "dict[int, None]" = {}  # noqa: RUF012 - file descriptors are the process's, whoever opens them

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.file: SqliteFile | None = None
        self._lock = lock
        self._held[lock] = None

    @classmethod
    def take(cls, path: Path) -> "_Slot | None":
        """Take the file, or None where a living process has it."""
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock)

    async def release(self) -> None:
        if self.file is not None:
            file, self.file = self.file, None
            await file.close()
        self._held.pop(self._lock, None)
        os.close(self._lock)

    @classmethod
    def _forked(cls) -> None:
        # A forked child shares the lock: while it lived, its dead parent's file could not be adopted.
        for lock in cls._held:
            with contextlib.suppress(OSError):
                os.close(lock)
        cls._held.clear()


os.register_at_fork(after_in_child=_Slot._forked)
