"""A look into a journal, for people and for reconciling. It writes nothing, and holds nobody up.

A charge belongs to a process; whether that one still lives is told along with it.
"""

import contextlib
import heapq
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import quote

from metered_billing.charge import Record, State
from metered_billing.journal import JournalError, NoJournal, aside, transaction_in
from metered_billing.journal.lock import FileLock
from metered_billing.journal.rows import SCHEMA, record_in
from metered_billing.journal.slot import look

PAGE = 500
"""Rows that are read at a time: memory is bounded by it, and so is how long a running app's log is held back."""

AGEING_S = 3_600.0
"""A charge that is not final after so long deserves a look."""

TRIES = 10
"""How often a file is copied that somebody takes up meanwhile."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A charge in a journal.

    Attributes:
        living: Whether the process that it belongs to still runs.
    """

    record: Record
    living: bool

    def worry(self, now: float) -> str | None:
        """Why somebody should see to it, if anybody should."""
        if self.record.state is State.DISPUTED:
            return "disputed: a person has to decide"
        if self.record.final:
            return None
        if not self.living:
            return "left by a process that died: start the app, or run `metered-billing recover`"
        if now - self.record.opened_at > AGEING_S:
            return "not final after more than an hour"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which charges, and in which order.

    Attributes:
        name: The id of a charge, or of a request.
        transaction_id: The service's name for the deduction: what the client was told. It is in no index.
        since: Opened then or later; seconds since the epoch.
    """

    name: str | None = None
    transaction_id: str | None = None
    states: frozenset[State] | None = None
    unsettled: bool = False
    tenant_id: str | None = None
    user_id: str | None = None
    since: float | None = None
    oldest_first: bool = False

    def covers(self, record: Record) -> bool:
        """Whether it is one of them."""
        return (
            (self.name is None or self.name in (record.id, record.request_id))
            and self.transaction_id in (None, record.transaction_id)
            and (self.states is None or record.state in self.states)
            and not (self.unsettled and record.final)
            and self.tenant_id in (None, record.account.tenant_id)
            and self.user_id in (None, record.account.user_id)
            and (self.since is None or record.opened_at >= self.since)
        )


class JournalReader(Protocol):
    """A journal, to be looked into. A context manager; synchronous, for the command line."""

    @property
    def place(self) -> str:
        """Where it is, without secrets."""
        ...

    @property
    def unusable(self) -> Mapping[str, str]:
        """What could not be read, by name, and why."""
        ...

    @property
    def known_dead_after_s(self) -> float:
        """How long a process may be taken for living after its death."""
        ...

    @property
    def realms(self) -> Collection[str]:
        """Which credits its charges were last made at (`Credits.realm`)."""
        ...

    def charges(self, wanted: Wanted) -> Iterator[Seen]:
        """The charges, newest first or oldest first; read page by page."""
        ...

    def complete_since(self, closed_since: float, keep: int) -> float | None:
        """Since when every charge that was made is on record here. None: there is none.

        Args:
            closed_since: What became final before may have been forgotten (`Journal.forget`) …
            keep: … and so may what became final before the latest so many.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class SqliteReader:
    """A journal's directory, as it is when it is entered.

    A living process's file is read beside it, as SQLite allows: such a connection cannot write, and a short
    read transaction a page does not keep the writer from cleaning up its log. A dead one's is copied, with
    its log: to open the file itself would mean to recover that log, which is for its next owner to do.

    Raises:
        NoJournal: There is no such directory.
        JournalError: It cannot be read.
    """

    known_dead_after_s = 0.0

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._realms: set[str] = set()
        self._unusable: dict[str, str] = {}
        self._files: list[_File] = []
        self._stack = contextlib.ExitStack()

    @property
    def place(self) -> str:
        return str(self._directory)

    @property
    def unusable(self) -> Mapping[str, str]:
        return self._unusable

    @property
    def realms(self) -> Collection[str]:
        return self._realms

    def __enter__(self) -> Self:
        if not self._directory.is_dir():
            raise NoJournal(f"there is no journal at {self._directory}")
        try:
            copies = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="metered-billing-")))
            for path in aside.live(self._directory):
                self._open(path, copies)
            for name in aside.listed(self._directory):
                self._unusable[name] = "set aside as corrupt: what stands in it is not read"
        except OSError as error:
            self._stack.close()
            raise JournalError(f"{self._directory} cannot be read: {error}") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def charges(self, wanted: Wanted) -> Iterator[Seen]:
        yield from heapq.merge(
            *(self._charges(file, wanted) for file in self._files),
            key=lambda seen: seen.record.id,
            reverse=not wanted.oldest_first,
        )

    def complete_since(self, closed_since: float, keep: int) -> float | None:
        oldest: list[float] = []
        bounds = [closed_since]
        for file in self._files:
            ((first,),) = file.connection.execute("SELECT MIN(opened_at) FROM charges")
            ((count, closed),) = file.connection.execute(
                "SELECT COUNT(*), MIN(closed_at) FROM charges WHERE closed_at IS NOT NULL AND state <> 'disputed'"
            )
            if first is not None:
                oldest.append(first)
            if count >= keep:
                bounds.append(closed)
        return max(min(oldest), *bounds) if oldest else None

    # Files.

    def _open(self, path: Path, copies: Path) -> None:
        try:
            living, connection = self._connect(path, copies)
            self._stack.callback(connection.close)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                return  # somebody is making it
            if version > SCHEMA.version:
                raise JournalError(f"a journal of version {version}; this release reads up to {SCHEMA.version}")
            self._realms |= {realm for (realm,) in connection.execute("SELECT realm FROM about")}
        except (JournalError, sqlite3.Error, OSError) as error:
            self._unusable[path.name] = str(error)
        else:
            self._files.append(_File(path.name, connection, living))

    def _connect(self, path: Path, copies: Path) -> tuple[bool, sqlite3.Connection]:
        """Whether a living process has it, and a connection that cannot change it."""
        lock = path.with_suffix(".lock")
        for _ in range(TRIES):
            if FileLock.held(lock):
                # Percent signs and question marks are a URL's own.
                return True, sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)
            before = look(path)
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(f"{path}{suffix}", copies / f"{path.name}{suffix}")
            if look(path) == before and not FileLock.held(lock):
                return False, sqlite3.connect(copies / path.name)
            for copy in copies.glob(f"{path.name}*"):
                copy.unlink()
        raise JournalError("it is taken up and let go of all the time: try again")

    def _charges(self, file: "_File", wanted: Wanted) -> Iterator[Seen]:
        try:
            for page in file.pages(wanted):
                for row in page:
                    try:
                        record = record_in(row)
                    except JournalError as error:
                        self._unusable[f"charge {row[0]}"] = str(error)
                        continue
                    if wanted.covers(record):
                        yield Seen(record, file.living)
        except sqlite3.Error as error:
            self._unusable[file.name] = str(error)


@dataclass(frozen=True, slots=True)
class _File:
    """One process's file, or a copy of it."""

    name: str
    connection: sqlite3.Connection
    living: bool

    def pages(self, wanted: Wanted) -> Iterator[list[tuple[Any, ...]]]:
        """Its rows, in the order of their ids; some that are not wanted among them."""
        where, values = ["1"], list[Any]()
        if wanted.name is not None:
            where.append("(id = ? OR request_id = ?)")
            values += [wanted.name, wanted.name]
        if wanted.transaction_id is not None:
            where.append("instr(body, ?) > 0")
            values.append(transaction_in(wanted.transaction_id))
        if wanted.unsettled:
            where.append("closed_at IS NULL")
        if wanted.states is not None:
            where.append(f"state IN ({', '.join('?' * len(wanted.states))})")
            values += sorted(wanted.states)
        if wanted.since is not None:
            where.append("opened_at >= ?")
            values.append(wanted.since)
        beyond, order = ("id > ?", "ASC") if wanted.oldest_first else ("id < ?", "DESC")
        statement = (
            "SELECT id, owner, state, opened_at, tries, due_at, closed_at, body FROM charges"  # noqa: S608 - our words
            f" WHERE {' AND '.join(where)} AND {beyond} ORDER BY id {order} LIMIT {PAGE}"
        )
        # Beyond every id there is: a text is less than any blob.
        last: str | bytes = "" if wanted.oldest_first else b""
        while True:
            page = self.connection.execute(statement, (*values, last)).fetchall()
            if page:
                yield page
            if len(page) < PAGE:
                return
            last = page[-1][0]
