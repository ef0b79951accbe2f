"""The journals there are, each with what a test needs besides: a death, and a look behind its back."""

import contextlib
import dataclasses
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg

from metered_billing.charge import Account, Record
from metered_billing.journal import Journal
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import Runtime

ANN = Account("acme", "ann")


class Engine:
    """One place for journals, empty at first."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def journal(self, runtime: Runtime | None = None) -> Journal:
        """Another process's."""
        made = self._make(runtime or Runtime())
        self._made.append(made)
        return made

    def _make(self, runtime: Runtime) -> Journal:
        raise NotImplementedError

    def sql(self, statement: str, *values: object) -> list[Any]:
        """Run a statement with `?` behind the journals' backs. Returns its rows."""
        raise NotImplementedError

    def kill(self, journal: Journal) -> None:
        """Its process dies, and that is known by now."""
        raise NotImplementedError

    async def aclose(self) -> None:
        for journal in self._made:
            with contextlib.suppress(Exception):
                await journal.close()


class Sqlite(Engine):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def _make(self, runtime: Runtime) -> SqliteJournal:
        return SqliteJournal(self._directory, runtime=runtime)

    def sql(self, statement: str, *values: object) -> list[Any]:
        rows: list[Any] = []
        for path in sorted(self._directory.glob("*.db")):
            connection = sqlite3.connect(path)
            with contextlib.closing(connection), connection:
                connection.execute("PRAGMA journal_mode=WAL")  # as ours are
                rows += connection.execute(statement, values).fetchall()
        return rows

    def kill(self, journal: Journal) -> None:
        assert isinstance(journal, SqliteJournal)
        for slot in journal._slots():
            slot.lock.release()
            slot.file._disconnect()


class Postgres(Engine):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def _make(self, runtime: Runtime) -> PostgresJournal:
        return PostgresJournal(self.url, runtime=runtime)

    def sql(self, statement: str, *values: object) -> list[Any]:
        with psycopg.connect(self.url, options="-c search_path=metered_billing") as connection:
            done = connection.execute(statement.replace("?", "%s").encode(), values)
            return done.fetchall() if done.description else []

    def kill(self, journal: Journal) -> None:
        assert isinstance(journal, PostgresJournal)
        place = journal._taken()
        place._stop_beating()
        self.expire(journal)

    def expire(self, journal: Journal) -> None:
        """It has not been heard of for the time of its lease."""
        self.sql("UPDATE owners SET expires_at = clock_timestamp() - interval '1 s' WHERE owner = ?", journal.owner)

    def stay(self, journal: Journal) -> None:
        """It has been heard of without a gap for longer than the grace."""
        self.sql("UPDATE owners SET since = '-infinity' WHERE owner = ?", journal.owner)


@contextlib.asynccontextmanager
async def engine(name: str, directory: Path, url: str) -> AsyncIterator[Engine]:
    """The one of that name; its journals are closed afterwards."""
    made = Sqlite(directory) if name == "sqlite" else Postgres(url)
    try:
        yield made
    finally:
        await made.aclose()


def charge(journal: Journal, name: str = "c1", **more: Any) -> Record:
    """A charge of 10 credits, of this journal's."""
    return Record(
        **{
            "id": name,
            "account": ANN,
            "amount_credits": 10,
            "units": 10,
            "opened_at": 100.0,
            "due_at": 100.0,
            "owner": journal.owner,
            **more,
        }
    )


async def moved(journal: Journal, record: Record, **changes: Any) -> Record:
    """The record, as it is after a write that has to succeed."""
    after = dataclasses.replace(record, **changes)
    assert await journal.write(record, after, durable=False)
    return after


async def everything(journal: Journal, now: float = 1e12) -> list[Record]:
    return await journal.due(now, besides=(), limit=1000)


def ids(records: list[Record]) -> Iterator[str]:
    return (record.id for record in records)
