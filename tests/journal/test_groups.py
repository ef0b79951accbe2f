"""What is written to a journal file at the same time: what it costs, counted exactly, and that each stands alone."""

import asyncio
import dataclasses
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metered_billing.charge import Record, State
from metered_billing.journal import JournalError
from metered_billing.journal.rows import OPEN, WRITE
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import Runtime
from tests.journal.engines import charge, everything

CHARGES = 64


class Held:
    """A thread that does nothing until it is told to."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []
        self.submitted = 0

    def submit(self, fn: Callable[[], Any], /) -> None:
        self.submitted += 1
        self.jobs.append(fn)

    def shutdown(self, wait: bool = True) -> None: ...

    def go(self) -> None:
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()


class Journal(SqliteJournal):
    """One whose thread is held, and whose calls of SQLite are noted."""

    def __init__(self, directory: Path) -> None:
        self.thread = Held()
        self.calls = calls = list[str]()

        class Noting(sqlite3.Connection):
            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                calls.append(statement)
                return super().execute(statement, *values)

            def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:
                calls.append(statement)
                return super().executemany(statement, rows)

        def connect(path: Path) -> sqlite3.Connection:
            return sqlite3.connect(path, isolation_level=None, factory=Noting)

        super().__init__(directory, runtime=Runtime(executor=lambda: self.thread, connect=connect))

    async def meanwhile(self, *writes: Any) -> list[Any]:
        """What comes of these, and of whatever they lead to."""
        together = asyncio.gather(*writes, return_exceptions=True)
        while not together.done():
            self.thread.go()
            await asyncio.sleep(0)
        return together.result()


@pytest.fixture
async def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path)
    await journal.meanwhile(journal.start())
    journal.calls.clear()
    journal.thread.submitted = 0
    return journal


def to(state: State, record: Record) -> Record:
    return dataclasses.replace(record, state=state, closed_at=1.0 if state is State.SETTLED else None)


async def test_sixty_four_charges_cost_as_many_calls_as_one(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three commits, of which two are synced; each wakes the thread once and the event loop once, and makes no task."""
    loop = asyncio.get_running_loop()
    wake, woken = loop.call_soon_threadsafe, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal woken
        woken += 1
        return wake(*args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    records = [charge(journal, f"c{number:02}") for number in range(CHARGES)]
    opened = [journal.open(record) for record in records]
    assert {type(future) for future in opened} == {type(loop.create_future())}
    assert await journal.meanwhile(*opened) == [None] * CHARGES
    for state, durable in ((State.DEDUCTED, False), (State.SETTLED, True)):
        written = [journal.write(record, to(state, record), durable=durable) for record in records]
        assert {type(future) for future in written} == {type(loop.create_future())}
        assert await journal.meanwhile(*written) == [True] * CHARGES
        records = [to(state, record) for record in records]
    assert journal.calls == [
        *("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE", OPEN, "COMMIT"),
        *("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE", WRITE, "COMMIT"),
        *("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE", WRITE, "COMMIT"),
    ]
    assert (journal.thread.submitted, woken) == (3, 3)
    await journal.meanwhile(journal.close())


async def test_charges_are_opened_and_written_by_two_calls_however_they_are_mixed(journal: Journal) -> None:
    """Also one that is opened and written in the same commit, twice."""
    records = [charge(journal, f"c{number}") for number in range(6)]
    for record in records:
        deducted = to(State.DEDUCTED, record)
        journal.open(record)
        journal.write(record, deducted, durable=False)
        last = journal.write(deducted, to(State.SETTLED, deducted), durable=True)
    assert await journal.meanwhile(last) == [True]
    assert journal.calls == ["PRAGMA synchronous=FULL", "BEGIN IMMEDIATE", OPEN, WRITE, "COMMIT"]
    assert await journal.meanwhile(everything(journal)) == [[]]
    await journal.meanwhile(journal.close())


async def test_compare_and_set_that_is_lost_is_lost_alone(journal: Journal) -> None:
    """Of those that are written at the same time, whoever read an older state is told so, and nobody else is."""
    records = [charge(journal, f"c{number}") for number in range(4)]
    await journal.meanwhile(*map(journal.open, records))
    stale = to(State.REFUNDING, records[1])
    befores = [records[0], stale, records[2], records[3]]
    written = [journal.write(before, to(State.VOIDING, before), durable=True) for before in befores]
    opened = journal.open(charge(journal, "c4"))
    assert await journal.meanwhile(*written, opened) == [True, False, True, True, None]
    [found] = await journal.meanwhile(everything(journal))
    assert {record.id: str(record.state) for record in found} == {
        **dict.fromkeys(("c0", "c2", "c3"), "voiding"),
        **dict.fromkeys(("c1", "c4"), "opened"),
    }
    await journal.meanwhile(journal.close())


async def test_charge_that_cannot_be_opened_stands_in_nobodys_way(journal: Journal) -> None:
    """The same id twice is an error for the second, and for no other of the commit."""
    record = charge(journal)
    others = [charge(journal, "c2"), charge(journal, "c3")]
    results = await journal.meanwhile(*map(journal.open, [record, others[0], record, others[1]]))
    assert [type(result) for result in results] == [type(None), type(None), JournalError, type(None)]
    assert "UNIQUE constraint failed" in str(results[2])
    [found] = await journal.meanwhile(everything(journal))
    assert [record.id for record in found] == ["c1", "c2", "c3"]
    await journal.meanwhile(journal.close())


async def test_removed_file_takes_none_of_those_opened_at_once(journal: Journal, tmp_path: Path) -> None:
    """What was opened before can still be finished, in the same commit."""
    record = charge(journal)
    await journal.meanwhile(journal.open(record))
    (tmp_path / "charges-0.lock").unlink()
    opened = [journal.open(charge(journal, name)) for name in ("c2", "c3")]
    written = journal.write(record, to(State.VOIDED, record), durable=True)
    *refused, won = await journal.meanwhile(*opened, written)
    assert won is True
    assert ["removed while it was in use" in str(error) for error in refused] == [True, True]
    await journal.meanwhile(journal.close())
