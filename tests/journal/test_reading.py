"""Looking into a journal: all that is there, page by page, and not a byte of it changes."""

import asyncio
import hashlib
import shutil
import sqlite3
import tracemalloc
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from metered_billing.charge import Account, Deducted, Lost, Reported, State, Unread, step
from metered_billing.journal import JournalError
from metered_billing.journal.reading import PAGE, Seen, SqliteReader, Wanted
from metered_billing.journal.sqlite import SqliteJournal
from tests.scenes import ANN, NOON, charge, keep, put

pytestmark = pytest.mark.anyio

ALL = Wanted()


def bytes_of(directory: Path, suffixes: Collection[str] = (".db", ".db-wal", ".lock")) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name.endswith(tuple(suffixes))
    }


def seen(directory: Path, wanted: Wanted = ALL) -> list[Seen]:
    with SqliteReader(directory) as reader:
        found = list(reader.charges(wanted))
        assert not reader.unusable
    return found


# What is wrong with it.


def test_no_journal_is_an_error_and_makes_none(tmp_path: Path) -> None:
    """A wrong path is not an empty journal."""
    with pytest.raises(JournalError, match="no journal at"), SqliteReader(tmp_path / "nowhere"):
        pass
    assert not (tmp_path / "nowhere").exists()


async def test_what_cannot_be_read_is_named_and_hides_nothing_else(tmp_path: Path) -> None:
    """A corrupt file, one of another version, one set aside, one charge: the rest is read."""
    good, broken = charge(Deducted("t-1")), charge()
    await keep(tmp_path, [good, broken])
    with closing(sqlite3.connect(tmp_path / "charges-0.db")) as connection, connection:
        connection.execute("UPDATE charges SET body = '{' WHERE id = ?", (broken.id,))
    (tmp_path / "charges-1.db").write_bytes(b"not a database at all" * 100)
    (tmp_path / "charges-2.corrupt-20261125T101500Z.db").write_bytes(b"?")
    shutil.copy(tmp_path / "charges-0.db", tmp_path / "charges-3.db")
    with closing(sqlite3.connect(tmp_path / "charges-3.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    (tmp_path / "charges-4.db").touch()  # somebody is making it
    with SqliteReader(tmp_path) as reader:
        assert [seen.record.id for seen in reader.charges(ALL)] == [good.id]
        named = dict(reader.unusable)
    assert named.keys() == {
        "charges-1.db",
        "charges-2.corrupt-20261125T101500Z.db",
        "charges-3.db",
        f"charge {broken.id}",
    }
    assert "version 99" in named["charges-3.db"]


async def test_file_damaged_further_on_yields_what_comes_before(tmp_path: Path) -> None:
    """What is read until then is told; the file is named."""
    await keep(tmp_path, [charge(metadata={"x": "y" * 1_000}) for _ in range(50)])
    path = tmp_path / "charges-0.db"
    content = bytearray(path.read_bytes())
    content[4096 * 6 : 4096 * 8] = bytes(range(256)) * 32
    path.write_bytes(content)
    with SqliteReader(tmp_path) as reader:
        assert len(list(reader.charges(ALL))) < 50
        assert "charges-0.db" in reader.unusable


async def test_realms_are_those_of_its_files(tmp_path: Path) -> None:
    """A charge can only be found where it was made."""
    await keep(tmp_path, [charge()], realm="https://credits")
    with SqliteReader(tmp_path) as reader:
        assert set(reader.realms) == {"https://credits"}


# What is there.


async def test_charges_are_told_with_whether_their_process_lives(tmp_path: Path) -> None:
    """Of all files, in the order of their ids, dead and living mixed; the log of a dead one included."""
    dead, living = SqliteJournal(tmp_path / "then"), SqliteJournal(tmp_path / "now")
    records = [charge(opened_at=NOON + number) for number in range(4)]
    await dead.start()
    await put(dead, records[::2])
    # Killed: what stands in the log has not been merged into the file, and nobody holds the lock.
    (tmp_path / "now").mkdir()
    for path in (tmp_path / "then").glob("charges-0.db*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, tmp_path / "now" / path.name.replace("-0.", "-1."))
    await dead.close()
    await living.start()
    await put(living, records[1::2])
    try:
        found = seen(tmp_path / "now", Wanted(oldest_first=True))
        assert [(one.record.id, one.living) for one in found] == [
            (records[0].id, False),
            (records[1].id, True),
            (records[2].id, False),
            (records[3].id, True),
        ]
        assert [one.record.id for one in seen(tmp_path / "now")] == [record.id for record in reversed(records)]
    finally:
        await living.close()


async def test_only_what_is_wanted_is_yielded(tmp_path: Path) -> None:
    """By name, state, tenant, user, time, and whether it is final."""
    settled = charge(Deducted('t"é\x00'), Reported(10), request_id="req-1")
    disputed = charge(Deducted("t"), Unread("x"), account=Account("other"), opened_at=NOON + 100)
    opened = charge(request_id="req-1")
    await keep(tmp_path, [settled, disputed, opened])

    def ids(**wanted: object) -> set[str]:
        return {one.record.id for one in seen(tmp_path, Wanted(**wanted))}  # type: ignore[arg-type]

    assert ids(name="req-1") == {settled.id, opened.id}
    assert ids(name=settled.id) == {settled.id}
    assert ids(name="' OR 1=1 --") == set()
    assert ids(transaction_id='t"é\x00') == {settled.id}
    assert ids(transaction_id="t") == {disputed.id}
    assert ids(transaction_id='t"') == set()
    assert ids(states=frozenset({State.DISPUTED, State.SETTLED})) == {settled.id, disputed.id}
    assert ids(unsettled=True) == {opened.id}
    assert ids(tenant_id="acme", user_id="ann") == {settled.id, opened.id}
    assert ids(tenant_id="acme", user_id="bob") == set()
    assert ids(since=NOON + 50) == {disputed.id}


async def test_worry_names_what_somebody_has_to_see_to(tmp_path: Path) -> None:
    """Disputed, left by the dead, or old; what is under way or final is nobody's worry."""
    disputed, opened, settled = charge(Deducted("t"), Unread("x")), charge(), charge(Deducted("t"), Reported(10))
    soon, later = NOON + 60, NOON + 4_000
    assert "person" in str(Seen(disputed, True).worry(soon))
    assert "died" in str(Seen(opened, False).worry(soon))
    assert "hour" in str(Seen(opened, True).worry(later))
    assert Seen(opened, True).worry(soon) is None
    assert Seen(settled, False).worry(later) is None


# What has been forgotten.


async def test_complete_since_is_bounded_by_what_may_be_forgotten(tmp_path: Path) -> None:
    """The first charge; or the age beyond which final ones go; or the closing of the oldest that is kept."""
    old = charge(Deducted("t"), Unread("x"), opened_at=NOON - 1_000_000)
    final = [charge(Deducted("t"), Reported(10), opened_at=NOON + number) for number in range(3)]
    await keep(tmp_path, [*final, old])
    with SqliteReader(tmp_path) as reader:
        assert reader.complete_since(NOON - 2_000_000, 100) == old.opened_at
        assert reader.complete_since(NOON - 500, 100) == NOON - 500
        assert reader.complete_since(NOON - 500, 3) == final[0].closed_at
    (tmp_path / "empty").mkdir()
    with SqliteReader(tmp_path / "empty") as reader:
        assert reader.complete_since(NOON, 100) is None


# What it leaves behind.


async def test_reading_a_dead_file_changes_nothing_in_the_directory(tmp_path: Path) -> None:
    """Not a byte, not a name: its log is recovered in a copy."""
    journal = SqliteJournal(tmp_path / "journal")
    await journal.start()
    await put(journal, [charge() for _ in range(10)])
    left = tmp_path / "left"
    left.mkdir()
    for name in ("charges-0.db", "charges-0.db-wal"):
        shutil.copy(tmp_path / "journal" / name, left / name)
    await journal.close()
    before = bytes_of(left, ("",))
    assert len(seen(left)) == 10
    assert bytes_of(left, ("",)) == before


async def test_reading_beside_a_living_writer_changes_nothing_and_holds_nothing_up(tmp_path: Path) -> None:
    """File and log stay as they are; afterwards the writer writes, and merges its log, as if alone."""
    journal = SqliteJournal(tmp_path)
    await journal.start()
    records = [charge(Deducted("t")) for _ in range(3 * PAGE)]
    await asyncio.gather(*(journal.open(replace(record, owner=journal.owner)) for record in records))
    before = bytes_of(tmp_path)
    with SqliteReader(tmp_path) as reader:
        found = reader.charges(ALL)
        first = next(found)
        assert bytes_of(tmp_path) == before
        # In the middle of it, the app goes on.
        owned = replace(records[0], owner=journal.owner)
        assert await journal.write(owned, step(owned, Lost("x"), now=NOON), durable=True)
        left = list(found)
        assert len({first.record.id, *(one.record.id for one in left)}) == len(records)
    await journal.close()
    # The last connection's end merges the log: no reader stood in the way of that.
    assert not (tmp_path / "charges-0.db-wal").exists()
    (changed,) = seen(tmp_path, Wanted(name=records[0].id))
    assert changed.record.state is State.REFUNDING


async def test_reading_while_an_app_writes_sees_whole_records(tmp_path: Path) -> None:
    """Under load each look sees every charge that was there before it, once, and reads no rubbish."""
    journal = SqliteJournal(tmp_path)
    await journal.start()
    written: list[str] = []

    async def write() -> None:
        for _ in range(300):
            record = charge(metadata={"x": "y" * 200})
            await journal.open(replace(record, owner=journal.owner))
            written.append(record.id)

    writing = [asyncio.create_task(write()) for _ in range(4)]
    looks = 0
    while not all(task.done() for task in writing):
        known = set(written)
        found = await asyncio.to_thread(seen, tmp_path)
        ids = [one.record.id for one in found]
        assert known <= set(ids)
        assert len(ids) == len(set(ids))
        assert all(one.living for one in found)
        looks += 1
    await asyncio.gather(*writing)
    await journal.close()
    assert looks > 1


@pytest.mark.slow
@pytest.mark.no_cover
async def test_memory_is_bounded_by_a_page(tmp_path: Path) -> None:
    """50,000 charges are read in the memory of a few hundred."""
    journal = SqliteJournal(tmp_path)
    await journal.start()
    for _ in range(50):
        await asyncio.gather(*(journal.open(replace(charge(account=ANN), owner=journal.owner)) for _ in range(1_000)))
    await journal.close()
    with SqliteReader(tmp_path) as reader:
        tracemalloc.start()
        try:
            assert sum(1 for _ in reader.charges(ALL)) == 50_000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 5_000_000
