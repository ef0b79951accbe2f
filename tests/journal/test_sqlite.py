"""The journal on SQLite: what survives, who holds which file, and what becomes of what cannot be read.

What is true of any journal stands in `test_contract`.
"""

import asyncio
import dataclasses
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from metered_billing.charge import State
from metered_billing.journal import JournalError
from metered_billing.journal import lock as lock_module
from metered_billing.journal.lock import FileLock
from metered_billing.journal.rows import SCHEMA
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import Runtime, one_thread
from tests.journal.engines import charge, everything, moved


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path)
    await journal.start()
    yield journal
    await journal.close()


def sql(path: Path, statement: str, *values: object) -> list[Any]:
    """Run a statement behind the journal's back."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode=WAL")  # as ours are
        with connection:
            return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.db"))


# What survives.

DIES = """
    import asyncio, dataclasses, os, signal, sys
    from metered_billing.charge import Account, Record, State
    from metered_billing.journal import JournalError
    from metered_billing.journal.sqlite import SqliteJournal

    def child(journal, record, tell):
        try:
            journal.open(record)
        except JournalError:
            asyncio.run(of_its_own(journal, record))
        os.write(tell, b".")
        sys.stdin.read()
        os._exit(0)

    async def of_its_own(journal, record):
        await journal.start()
        await journal.open(dataclasses.replace(record, id="child", owner=journal.owner))
        print(journal.owner, flush=True)

    async def main():
        journal = SqliteJournal(sys.argv[1])
        await journal.start()
        for state in State:
            final = state in ("settled", "declined", "abandoned", "voided", "disputed")
            record = Record(id=str(state), account=Account("acme"), amount_credits=3, units=3, opened_at=1.0,
                            owner=journal.owner, due_at=1.0)
            after = dataclasses.replace(record, state=state, closed_at=2.0 if final else None)
            await journal.open(record)
            await journal.write(record, after, durable=False)
        await journal.open(dataclasses.replace(record, id="last"))
        print("ready", flush=True)
        if sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "fork":
            ready, tell = os.pipe()
            if os.fork() == 0:
                child(journal, record, tell)
            os.read(ready, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.read()

    asyncio.run(main())
"""
LEFT = ["deducted", "last", "opened", "refunding", "voiding"]


def process(directory: Path, what: str) -> subprocess.Popen[str]:
    """A process that has written charges of all states, and then dies, lives on or forks."""
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DIES), str(directory), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    return other


def end(other: subprocess.Popen[str]) -> None:
    other.communicate(timeout=20)


@pytest.mark.slow
async def test_charges_of_a_killed_process_are_taken_by_the_next(tmp_path: Path) -> None:
    """kill -9 right after `open` returned: all that is not final is due at once, under a new name."""
    other = process(tmp_path, "die")
    end(other)
    assert other.returncode == -signal.SIGKILL
    journal = SqliteJournal(tmp_path)
    await journal.start()
    now = Runtime().now()
    found = await journal.due(now, besides=(), limit=100)
    assert sorted(record.id for record in found) == LEFT
    assert {record.owner for record in found} == {journal.owner}
    assert names(tmp_path) == ["charges-0.db"]
    assert await moved(journal, found[0], state=State.VOIDING)
    await journal.close()


@pytest.mark.slow
async def test_living_process_is_left_alone_and_a_dead_one_adopted(tmp_path: Path) -> None:
    """Two real processes: while the other lives, its file is not touched; when it is killed, it is taken over,
    and given back when nothing is left in it."""
    other = process(tmp_path, "live")
    journal = SqliteJournal(tmp_path)
    await journal.start()
    assert names(tmp_path) == ["charges-0.db", "charges-1.db"]
    assert await journal.adopt(7.0) == 0
    assert await everything(journal) == []
    other.kill()
    end(other)
    assert await journal.adopt(7.0) == len(LEFT)
    found = await everything(journal)
    assert sorted(record.id for record in found) == LEFT
    assert {record.due_at for record in found} == {7.0}
    await journal.open(charge(journal, "own", due_at=5.0))
    assert [record.id for record in await journal.due(7.0, besides=(), limit=1)] == ["own"]
    assert await journal.unsettled(101.0) == {
        "opened": (3, 100.0),
        "deducted": (1, 100.0),
        "refunding": (1, 100.0),
        "voiding": (1, 100.0),
    }
    assert await journal.next_due(5.0) == 7.0
    for record in found[:-1]:
        await moved(journal, record, state=State.VOIDED, closed_at=8.0)
    assert await journal.adopt(8.0) == 0
    third = SqliteJournal(tmp_path)
    await third.start()
    assert names(tmp_path) == ["charges-0.db", "charges-1.db", "charges-2.db"]
    await moved(journal, found[-1], state=State.VOIDED, closed_at=8.0)
    assert await journal.adopt(9.0) == 0
    fourth = SqliteJournal(tmp_path)
    await fourth.start()
    assert names(tmp_path) == ["charges-0.db", "charges-1.db", "charges-2.db"]
    for each in (journal, third, fourth):
        await each.close()


@pytest.mark.slow
async def test_forked_child_does_not_hold_its_dead_parents_file(tmp_path: Path) -> None:
    """It outlives its parent, whose charges are adopted all the same; and it can take a place of its own."""
    other = process(tmp_path, "fork")
    assert other.stdout is not None
    owner = other.stdout.readline().strip()
    assert owner
    other.wait(20)
    journal = SqliteJournal(tmp_path)
    await journal.start()
    await journal.adopt(7.0)
    found = sorted(record.id for record in await everything(journal))
    assert found == LEFT
    end(other)
    assert await journal.adopt(8.0) == 1
    assert "child" in [record.id for record in await everything(journal)]
    await journal.close()


async def test_same_directory_twice_in_one_process_is_two_files(journal: SqliteJournal, tmp_path: Path) -> None:
    """Neither sees, nor adopts, what is the other's, until it is closed."""
    second = SqliteJournal(tmp_path)
    await second.start()
    await journal.open(charge(journal))
    assert await second.adopt(1.0) == 0
    assert await everything(second) == []
    await journal.close()
    assert await second.adopt(1.0) == 1
    assert [record.id for record in await everything(second)] == ["c1"]
    await second.close()


async def test_concurrent_starts_take_one_place(tmp_path: Path) -> None:
    """Fifty first requests at once: one file; all wait until it is there."""
    journal = SqliteJournal(tmp_path)
    await asyncio.gather(*(journal.start() for _ in range(50)))
    assert names(tmp_path) == ["charges-0.db"]
    await journal.close()


async def test_file_that_nobody_wrote_to_is_not_opened_again_and_again(journal: SqliteJournal, tmp_path: Path) -> None:
    """A dead process's file with nothing left in it costs nothing; one write by somebody, and it is looked at."""
    other = SqliteJournal(tmp_path)
    await other.start()
    await other.close()
    assert await journal.adopt(1.0) == 0
    commits: list[str] = []
    taking = FileLock.take

    def take(path: Path) -> FileLock | None:
        commits.append(path.name)
        return taking(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileLock, "take", take)
        assert await journal.adopt(1.0) == 0
        assert commits == []
        await other.start()
        await other.open(charge(other))
        commits.clear()
        assert await journal.adopt(1.0) == 0
        assert commits == ["charges-1.lock"]
        await other.close()
        assert await journal.adopt(1.0) == 1
    await journal.close()


# What cannot be had, or read.


async def test_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    """It names the directory and the reason."""
    (tmp_path / "file").write_text("")
    journal = SqliteJournal(tmp_path / "file" / "journal")
    with pytest.raises(JournalError, match=r"no journal can be kept in .*journal: .*Not a directory"):
        await journal.start()


async def test_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """A lock file can be made where no database can: still an error, not an endless search for a free number."""
    (tmp_path / "charges-0.db-wal").mkdir()
    journal = SqliteJournal(tmp_path)
    with pytest.raises(JournalError, match=r"charges-0.db: "):
        await asyncio.wait_for(journal.start(), 5)
    (tmp_path / "charges-0.db-wal").rmdir()
    await journal.start()
    await journal.close()


def of_later_version(path: Path) -> None:
    sql(path, f"PRAGMA user_version = {SCHEMA.version + 1}")


async def test_later_version_keeps_the_app_from_starting(tmp_path: Path) -> None:
    """Its charges may be owed refunds: the error says what to do, and the file stays as it is."""
    of_later_version(tmp_path / "charges-0.db")
    before = (tmp_path / "charges-0.db").read_bytes()
    journal = SqliteJournal(tmp_path)
    with pytest.raises(JournalError, match=r"version 4, and .* knows versions up to 3: upgrade"):
        await journal.start()
    assert (tmp_path / "charges-0.db").read_bytes() == before


def of_other_tables(path: Path) -> None:
    sql(path, "CREATE TABLE charges (x)")
    sql(path, "PRAGMA user_version = 1")


UNUSABLE: list[Callable[[Path], object]] = [
    lambda path: path.mkdir(),
    of_later_version,
    of_other_tables,
]


@pytest.mark.parametrize("spoil", UNUSABLE)
async def test_unusable_file_is_skipped_when_adopting(
    journal: SqliteJournal, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """It is reported, stays as it is, and stops neither our own nor other files; once it is gone, so is the report."""
    spoiled = tmp_path / "charges-1.db"
    spoil(spoiled)
    before = spoiled.read_bytes() if spoiled.is_file() else None
    other = SqliteJournal(tmp_path / "other")
    await other.start()
    await other.open(charge(other, "theirs"))
    await other.close()
    (tmp_path / "other" / "charges-0.db").rename(tmp_path / "charges-2.db")
    await journal.open(charge(journal, "ours"))
    for found in (1, 0):
        assert await journal.adopt(1.0) == found
        assert sorted(record.id for record in await everything(journal)) == ["ours", "theirs"]
        assert list(journal.unusable) == ["charges-1.db"]
    assert "charges-1.db" in journal.unusable["charges-1.db"]
    assert before is None or spoiled.read_bytes() == before
    spoiled.rename(tmp_path / "aside")
    (tmp_path / "charges-1.db").touch()
    assert await journal.adopt(1.0) == 0
    assert journal.unusable == {}


async def test_unusable_file_is_passed_by_when_starting(tmp_path: Path) -> None:
    """The next number is taken; what could not be read is reported and stays as it is."""
    of_other_tables(tmp_path / "charges-0.db")
    before = (tmp_path / "charges-0.db").read_bytes()
    journal = SqliteJournal(tmp_path)
    await journal.start()
    await journal.open(charge(journal))
    assert list(journal.unusable) == ["charges-0.db"]
    assert (tmp_path / "charges-0.db").read_bytes() == before
    assert names(tmp_path) == ["charges-0.db", "charges-1.db"]
    await journal.close()


async def test_lock_that_cannot_be_had_stops_no_other_file(journal: SqliteJournal, tmp_path: Path) -> None:
    """Somebody else's permissions, say."""
    (tmp_path / "charges-7.lock").mkdir()
    (tmp_path / "charges-7.db").touch()
    await journal.open(charge(journal))
    assert await journal.adopt(1.0) == 0
    assert "Is a directory" in journal.unusable["charges-7.db"]
    assert len(await everything(journal)) == 1


async def test_adopted_file_that_fails_later_is_set_aside(journal: SqliteJournal, tmp_path: Path) -> None:
    """Our own charges go on; when it can be read again, it is adopted again."""
    other = SqliteJournal(tmp_path)
    await other.start()
    await other.open(charge(other, "theirs"))
    await other.close()
    await journal.open(charge(journal, "ours"))
    assert await journal.adopt(1.0) == 1
    slot = next(iter(journal._adopted.values()))
    await slot.run(lambda connection: connection.execute("ALTER TABLE charges RENAME TO hidden"), durable=True)
    assert [record.id for record in await everything(journal)] == ["ours"]
    assert "no such table" in journal.unusable["charges-1.db"]
    sql(tmp_path / "charges-1.db", "ALTER TABLE hidden RENAME TO charges")
    assert await journal.adopt(1.0) == 1
    assert journal.unusable == {}
    assert len(await everything(journal)) == 2


async def test_own_file_that_fails_is_an_error(journal: SqliteJournal) -> None:
    """Nothing to go on with: whoever asks is told."""
    await journal._place().run(lambda connection: connection.execute("DROP TABLE charges"), durable=True)
    with pytest.raises(JournalError, match="no such table"):
        await everything(journal)


async def test_body_that_is_no_text_stops_no_other(journal: SqliteJournal) -> None:
    """SQLite takes anything in any column."""
    await journal.open(charge(journal))
    await journal.open(charge(journal, "c2"))
    sql(journal._place().path, "UPDATE charges SET body = x'ff' WHERE id = 'c1'")
    assert [record.id for record in await everything(journal)] == ["c2"]
    assert "charge c1 cannot be read" in journal.unusable["charge c1"]


@pytest.mark.parametrize("removed", ["charges-0.db", "charges-0.lock"])
async def test_removed_file_takes_nothing_new_and_finishes_what_it_has(
    journal: SqliteJournal, tmp_path: Path, removed: str
) -> None:
    """A charge opened in it would be lost with the process; one that is in it already is not lost yet."""
    record = charge(journal)
    await journal.open(record)
    (tmp_path / removed).unlink()
    with pytest.raises(JournalError, match="removed while it was in use"):
        await journal.open(charge(journal, "c2"))
    await moved(journal, record, state=State.DEDUCTED)


async def test_lock_can_be_released_twice(tmp_path: Path) -> None:
    """The second time nothing happens; a released lock is nowhere in place."""
    lock = FileLock.take(tmp_path / "a.lock")
    assert lock is not None
    assert FileLock.take(tmp_path / "a.lock") is None
    lock.release()
    lock.release()
    assert not lock.in_place()


# Several event loops.


async def test_recoveries_on_two_loops_do_not_trip_over_each_other(journal: SqliteJournal, tmp_path: Path) -> None:
    """While one gives an adopted file back, the other may be reading it: nobody fails, and it is closed once."""
    stop = threading.Event()
    errors: list[BaseException] = []

    async def recover() -> None:
        while not stop.is_set():
            await journal.adopt(1.0)
            for record in await everything(journal):
                await journal.write(
                    record, dataclasses.replace(record, state=State.VOIDED, closed_at=1.0), durable=False
                )
            await journal.unsettled(2.0)

    def elsewhere() -> None:
        try:
            asyncio.run(recover())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=elsewhere) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(15):
        other = SqliteJournal(tmp_path)
        await other.start()
        await other.open(charge(other, f"c{n}"))
        await other.close()
    while await everything(journal):
        await asyncio.sleep(0.01)
    stop.set()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert errors == []


async def test_released_file_is_not_opened_again(journal: SqliteJournal, tmp_path: Path) -> None:
    """Another loop gave it back in this very moment: it may have another owner by now."""
    other = SqliteJournal(tmp_path)
    await other.start()
    await other.open(charge(other))
    await other.close()
    await journal.adopt(1.0)
    slot = next(iter(journal._adopted.values()))

    def give_back(owner: str, connection: sqlite3.Connection) -> str:
        journal._adopted.clear()
        slot._released = True
        return owner

    assert await journal._everywhere(give_back) == [journal.owner]
    assert journal.unusable == {}
    with pytest.raises(JournalError, match="is closed"):
        slot.run(lambda connection: None, durable=False)
    await slot.release()


async def test_close_while_adopting_leaves_nothing_open(
    journal: SqliteJournal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is adopted in the instant of closing is released again."""
    other = SqliteJournal(tmp_path)
    await other.start()
    await other.open(charge(other))
    await other.close()
    (tmp_path / "charges-2.db").touch()
    take_over = journal._take_over

    async def closed_meanwhile(*args: Any) -> int:
        left = await take_over(*args)
        await journal.close()
        return left

    monkeypatch.setattr(journal, "_take_over", closed_meanwhile)
    assert await journal.adopt(1.0) == 1
    third = SqliteJournal(tmp_path)
    await third.start()
    assert await third.adopt(1.0) == 1
    await third.close()


async def test_two_that_take_over_one_file_come_to_an_end(journal: SqliteJournal, tmp_path: Path) -> None:
    """Where its lock was removed meanwhile: one of them has it all, and neither goes on taking from the other."""
    for number in range(3):
        await journal.open(charge(journal, f"c{number}"))
    await journal.close()
    one, other = SqliteJournal(tmp_path / "one"), SqliteJournal(tmp_path / "other")
    slots = []
    thread = one_thread()  # so that they take turns
    for taker in (one, other):
        slot = taker._lock(tmp_path / "charges-0.db", thread)
        assert slot is not None
        slots.append(slot)
        (tmp_path / "charges-0.lock").unlink()
    async with asyncio.timeout(10):
        lefts = await asyncio.gather(one._take_over(slots[0]), other._take_over(slots[1]))
    assert set(lefts) == {3}
    [(owner, many)] = sql(tmp_path / "charges-0.db", "SELECT owner, COUNT(*) FROM charges GROUP BY owner")
    assert owner in {slot.owner for slot in slots}
    assert many == 3
    for slot in slots:
        await slot.release()
    thread.shutdown()


async def test_charge_is_held_as_long_as_nobody_can_take_its_file(journal: SqliteJournal, tmp_path: Path) -> None:
    """Not by another owner, not where the lock's file was moved, removed or replaced, and not when it is closed."""
    mine = charge(journal)
    assert journal.holds(mine)
    assert not journal.holds(charge(journal, owner="somebody"))
    lock = tmp_path / "charges-0.lock"
    time.sleep(0.02)  # a file system's clock may tick no faster
    lock.rename(lock.with_suffix(".moved"))
    assert not journal.holds(mine)
    lock.with_suffix(".moved").rename(lock)
    assert journal.holds(mine)
    kept = lock.with_suffix(".kept")
    kept.hardlink_to(lock)
    lock.unlink()
    kept.rename(lock)
    assert journal.holds(mine)
    lock.with_suffix(".new").touch()
    lock.with_suffix(".new").replace(lock)
    assert not journal.holds(mine)
    await journal.close()
    assert not journal.holds(mine)


async def test_forked_journal_is_closed_and_can_be_started(journal: SqliteJournal) -> None:
    """In the child nothing is held or used that is the parent's."""
    record = charge(journal)
    await journal.start()
    inherited = journal._place()
    lock_module._forked()
    assert not inherited.lock.in_place()
    with pytest.raises(JournalError, match="closed"):
        journal.open(record)
    await journal.start()
    assert journal.owner != record.owner
    await inherited.release()


async def test_lock_that_the_file_system_refuses_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system without `flock`."""

    def flock(*_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("metered_billing.journal.lock.fcntl.flock", flock)
    with pytest.raises(JournalError, match=r"no journal can be kept in .*No locks available"):
        await SqliteJournal(tmp_path).start()


async def test_file_with_nothing_left_to_do_serves_other_credits(tmp_path: Path) -> None:
    """A service that has moved needs no new directory, once everything is settled."""
    journal = SqliteJournal(tmp_path)
    for realm in ("http://old", "http://new", "http://new"):
        await journal.start(realm)
        assert journal.unusable == {}
        await journal.close()
    assert [path.name for path in tmp_path.glob("*.db")] == ["charges-0.db"]
