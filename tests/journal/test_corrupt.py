"""Corrupt files of the journal: set aside, named, reported; never deleted, and in nobody's way."""

import asyncio
import dataclasses
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from metered_billing.charge import Account, Record, State
from metered_billing.journal import JournalError, aside, mend
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import Runtime
from metered_billing.sqlite import is_corrupt

NOW = 1_795_601_700.0
STAMP = "20261125T101500Z"
LETTER = b"not a database, but a letter to mother\n" * 500
"""Four pages and a half."""


def journal_in(directory: Path) -> SqliteJournal:
    return SqliteJournal(directory, runtime=Runtime(now=lambda: NOW))


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    journal = journal_in(tmp_path)
    await journal.start()
    yield journal
    await journal.close()


def charge(journal: SqliteJournal, name: str = "c1", **more: Any) -> Record:
    """A charge of 10 credits, of this journal's."""
    fields: dict[str, Any] = {"id": name, "account": Account("acme", "ann"), "amount_credits": 10, "units": 10}
    return Record(**fields | {"opened_at": 100.0, "due_at": 100.0, "owner": journal.owner} | more)


async def ids(journal: SqliteJournal) -> list[str]:
    return [record.id for record in await journal.due(1e12, besides=(), limit=1000)]


def left_by_a_killed_process(path: Path, charges: int = 50) -> None:
    """A journal's file and its log, as after kill -9: the latest charges stand in the log alone."""

    async def write() -> None:
        journal = journal_in(path.parent / "elsewhere")
        await journal.start()
        for number in range(charges):
            await journal.open(charge(journal, f"{path.stem}-{number:03}", metadata={"filler": "x" * 200}))
            if number == charges // 2:
                await journal._place().file.between(
                    lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
                )
        for suffix in ("", "-wal", "-shm"):
            shutil.copy(path.parent / "elsewhere" / f"charges-0.db{suffix}", path.with_name(path.name + suffix))
        await journal.close()
        shutil.rmtree(path.parent / "elsewhere")

    asyncio.run(write())


def a_letter(path: Path) -> None:
    path.write_bytes(LETTER)


def a_short_letter(path: Path) -> None:
    path.write_bytes(LETTER[:7])


def a_letter_with_a_log(path: Path) -> None:
    left_by_a_killed_process(path)
    path.write_bytes(LETTER)
    wal = path.with_name(path.name + "-wal")
    wal.write_bytes(LETTER + wal.read_bytes()[len(LETTER) :])


def broken_pages(path: Path) -> None:
    left_by_a_killed_process(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + (LETTER * 20)[: len(whole) - 4096])
    path.with_name(path.name + "-wal").unlink()


SPOILT = [a_letter, a_short_letter, a_letter_with_a_log, broken_pages]


def contents(directory: Path) -> dict[str, bytes]:
    """What is in a directory, but for locks and shared memory."""
    return {
        path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix not in (".lock", ".db-shm")
    }


def renamed(before: dict[str, bytes], number: int) -> dict[str, bytes]:
    return {
        name.replace(f"charges-{number}.db", f"charges-{number}.corrupt-{STAMP}.db"): text
        for name, text in before.items()
    }


@pytest.mark.parametrize("spoil", SPOILT)
def test_corrupt_file_is_set_aside_at_the_start(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """It gets a name that says so, with its log, to the byte; its place is taken, and every start reports it."""
    spoil(tmp_path / "charges-0.db")
    before = contents(tmp_path)

    async def start() -> None:
        journal = journal_in(tmp_path)
        await journal.start()
        await journal.open(charge(journal))
        assert journal._place().path.name == "charges-0.db"
        assert list(journal.unusable) == [f"charges-0.corrupt-{STAMP}.db"]
        [why] = journal.unusable.values()
        assert "docs/how-to/mend-a-journal.md" in why
        await journal.adopt(NOW)
        assert list(journal.unusable.values()) == [why]
        assert renamed(before, 0).items() <= contents(tmp_path).items()
        await journal.close()

    asyncio.run(start())

    async def again() -> None:
        journal = journal_in(tmp_path)
        await journal.start()
        assert await ids(journal) == ["c1"]
        assert list(journal.unusable) == [f"charges-0.corrupt-{STAMP}.db"]
        for path in tmp_path.glob("*.corrupt-*"):
            path.unlink()
        await journal.adopt(NOW)
        assert journal.unusable == {}
        await journal.close()

    asyncio.run(again())


@pytest.mark.parametrize("spoil", SPOILT)
def test_corrupt_file_is_set_aside_when_adopting(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Neither our own file nor other dead processes' have to wait for it; it is looked at once."""
    spoil(tmp_path / "charges-1.db")
    before = contents(tmp_path)
    left_by_a_killed_process(tmp_path / "charges-2.db", charges=3)

    async def adopt() -> None:
        journal = journal_in(tmp_path)
        await journal.start()
        assert [await journal.adopt(NOW) for _ in range(2)] == [3, 0]
        assert await ids(journal) == [f"charges-2-00{number}" for number in range(3)]
        assert list(journal.unusable) == [f"charges-1.corrupt-{STAMP}.db"]
        assert not (tmp_path / "charges-1.db").exists()
        assert renamed(before, 1).items() <= contents(tmp_path).items()
        await journal.close()

    asyncio.run(adopt())


async def test_file_that_another_process_has_is_not_touched(journal: SqliteJournal, tmp_path: Path) -> None:
    """Whatever is wrong with it: its owner will see to it."""
    (tmp_path / "charges-0.db").write_bytes(LETTER)
    other = journal_in(tmp_path)
    await other.start()
    await other.adopt(NOW)
    assert other.unusable == {}
    assert (tmp_path / "charges-0.db").read_bytes() == LETTER
    await other.close()


async def test_two_that_are_corrupt_in_one_second_do_not_replace_each_other(tmp_path: Path) -> None:
    """A rename would put the second in the place of the first."""
    for text in (LETTER[:7], LETTER, LETTER[:9]):
        (tmp_path / "charges-0.db").write_bytes(text)
        journal = journal_in(tmp_path)
        await journal.start()
        await journal.close()
    stem = f"charges-0.corrupt-{STAMP}"
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.corrupt-*")}
    assert found == {f"{stem}.db": LETTER[:7], f"{stem}_2.db": LETTER, f"{stem}_3.db": LETTER[:9]}


@pytest.mark.parametrize("dies_at", range(5))
def test_crash_while_setting_aside_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Before, between and after the renames: the next start finishes them, and nothing is lost or mixed up."""
    path = tmp_path / "charges-0.db"
    a_letter_with_a_log(path)
    before = contents(tmp_path)
    renames, rename = 0, Path.rename

    def dies(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames > dies_at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    if dies_at < 3:
        with pytest.raises(KeyboardInterrupt):
            aside.set_aside(path, NOW)
    else:
        aside.set_aside(path, NOW)
    assert renames == min(dies_at + 1, 3)
    monkeypatch.undo()

    async def start() -> None:
        journal = journal_in(tmp_path)
        await journal.start()
        await journal.open(charge(journal))
        assert list(journal.unusable) == [f"charges-0.corrupt-{STAMP}.db"]
        assert renamed(before, 0).items() <= contents(tmp_path).items()
        await journal.close()

    asyncio.run(start())


def test_log_whose_database_was_removed_is_set_aside(tmp_path: Path) -> None:
    """SQLite would delete it, and with it the latest charges; it is not put to somebody else's database either."""
    left_by_a_killed_process(tmp_path / "charges-0.db")
    (tmp_path / "charges-0.db").unlink()
    log = (tmp_path / "charges-0.db-wal").read_bytes()
    earlier = tmp_path / "charges-0.corrupt-20200101T000000Z.db"
    for suffix in ("", "-wal"):
        earlier.with_name(earlier.name + suffix).write_bytes(LETTER)

    async def start() -> None:
        journal = journal_in(tmp_path)
        await journal.start()
        assert set(journal.unusable) == {earlier.name, f"charges-0.corrupt-{STAMP}.db-wal"}
        await journal.close()

    asyncio.run(start())
    assert (tmp_path / f"charges-0.corrupt-{STAMP}.db-wal").read_bytes() == log


async def test_corrupt_file_that_cannot_be_renamed_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays where it is, and is reported: never in the way of a start."""
    (tmp_path / "charges-0.db").write_bytes(LETTER)

    def refuse(*_: Any) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(aside, "set_aside", refuse)
    journal = journal_in(tmp_path)
    await asyncio.wait_for(journal.start(), 5)
    assert journal._place().path.name == "charges-1.db"
    assert "could not be set aside" in journal.unusable["charges-0.db"]
    assert await journal.adopt(NOW) == 0
    assert (tmp_path / "charges-0.db").read_bytes() == LETTER
    await journal.close()


@pytest.mark.parametrize(
    ("code", "corrupt"),
    [
        (sqlite3.SQLITE_CORRUPT, True),
        (sqlite3.SQLITE_CORRUPT | 2 << 8, True),
        (sqlite3.SQLITE_NOTADB, True),
        (sqlite3.SQLITE_IOERR, False),
        (sqlite3.SQLITE_IOERR | 8 << 8, False),
        (sqlite3.SQLITE_FULL, False),
        (sqlite3.SQLITE_CANTOPEN, False),
        (sqlite3.SQLITE_BUSY, False),
        (sqlite3.SQLITE_PERM, False),
        (sqlite3.SQLITE_READONLY, False),
        (sqlite3.SQLITE_ERROR, False),
        (None, False),
    ],
)
def test_only_what_sqlite_calls_corrupt_is(code: int | None, corrupt: bool) -> None:
    """A disk that fails or is full, rights, and locks can be mended where the file stands."""
    error = sqlite3.DatabaseError("no")
    if code is not None:
        error.sqlite_errorcode = code
    assert is_corrupt(error) is corrupt


# While it is in use.


async def spoil_in_use(journal: SqliteJournal) -> Path:
    """Garbage on the disk under an open file, and nothing of it left in memory."""

    def forget(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.write(whole[:100] + (LETTER * 20)[: len(whole) - 100])
        connection.execute("PRAGMA shrink_memory")

    path = journal._place().path
    await journal._place().file.between(forget)
    return path


async def test_own_file_that_turns_corrupt_is_set_aside_and_we_go_on(journal: SqliteJournal, tmp_path: Path) -> None:
    """Who meets it is refused; the next is served from a new file. What was in the old one is nowhere on record."""
    old = charge(journal)
    await journal.open(old)
    path = await spoil_in_use(journal)
    with pytest.raises(JournalError, match=r"charges-0.db: .*(malformed|not a database)"):
        await journal.open(charge(journal, "c2"))
    assert journal.owner not in ("", old.owner)
    await journal.open(charge(journal, "c3"))
    assert await ids(journal) == ["c3"]
    assert not await journal.write(old, dataclasses.replace(old, state=State.VOIDING), durable=True)
    assert list(journal.unusable) == [f"charges-0.corrupt-{STAMP}.db"]
    assert LETTER in (tmp_path / f"charges-0.corrupt-{STAMP}.db").read_bytes()
    assert journal._place().path == path


async def test_many_that_meet_a_corrupt_file_at_once_lead_to_one_new_place(
    journal: SqliteJournal, tmp_path: Path
) -> None:
    """Reading and writing: all are refused, and the file is set aside once."""
    await journal.open(charge(journal))
    await spoil_in_use(journal)
    results = await asyncio.gather(
        *(journal.open(charge(journal, f"d{n}")) for n in range(20)),
        journal.due(1e12, besides=(), limit=1),
        journal.unsettled(NOW),
        return_exceptions=True,
    )
    assert {type(result) for result in results} == {JournalError}
    await journal.adopt(NOW)
    await journal.open(charge(journal, "c3"))
    assert await ids(journal) == ["c3"]
    assert [path.name for path in tmp_path.glob("*.db")].count(f"charges-0.corrupt-{STAMP}.db") == 1
    assert len(list(tmp_path.glob("*.db"))) == 2


async def test_place_that_cannot_be_regained_at_once_is_regained_by_recovery(
    journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile everything is refused: nothing is charged that could not be put on record."""
    await journal.open(charge(journal))
    await spoil_in_use(journal)
    with monkeypatch.context() as patch:

        def full(directory: Path) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(aside, "make_directory", full)
        for _ in range(2):
            with pytest.raises(JournalError):
                await journal.open(charge(journal, "c2"))
            assert journal.owner == ""
        with pytest.raises(JournalError, match="No space left"):
            await journal.adopt(NOW)
    assert await journal.adopt(NOW) == 0
    await journal.open(charge(journal, "c3"))
    assert await ids(journal) == ["c3"]


async def test_request_that_is_cancelled_meanwhile_leaves_it_to_recovery(journal: SqliteJournal) -> None:
    """The file is set aside all the same, and the next look through the journal takes a new place."""
    await journal.open(charge(journal))
    await spoil_in_use(journal)
    start = journal.start
    reached = asyncio.Event()

    async def hangs(realm: str = "") -> None:
        reached.set()
        await asyncio.Event().wait()

    journal.start = hangs  # type: ignore[method-assign] # a disk that hangs just now
    opening = asyncio.ensure_future(journal.open(charge(journal, "c2")))
    await asyncio.wait_for(reached.wait(), 5)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    journal.start = start  # type: ignore[method-assign]
    await journal.adopt(NOW)
    await journal.open(charge(journal, "c3"))
    assert list(journal.unusable) == [f"charges-0.corrupt-{STAMP}.db"]


async def test_journal_that_is_closed_meanwhile_stays_closed(
    journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new place is given up again at once, for whoever comes next."""
    await journal.open(charge(journal))
    await spoil_in_use(journal)
    take_place = journal._take_place

    async def closed(executor: Any) -> Any:
        slot = await take_place(executor)
        await journal.close()
        return slot

    monkeypatch.setattr(journal, "_take_place", closed)
    with pytest.raises(JournalError):
        await journal.open(charge(journal, "c2"))
    with pytest.raises(JournalError, match="closed"):
        await journal.adopt(NOW)
    monkeypatch.undo()
    await journal.start()
    assert journal._place().path.name == "charges-0.db"


async def test_adopted_file_that_turns_corrupt_is_set_aside(journal: SqliteJournal, tmp_path: Path) -> None:
    """Our own goes on as if nothing were."""
    other = journal_in(tmp_path)
    await other.start()
    await other.open(charge(other, "theirs"))
    await other.close()
    await journal.open(charge(journal, "ours"))
    assert await journal.adopt(NOW) == 1
    [slot] = journal._adopted.values()
    slot.file.corrupt = "it is, says SQLite"
    await journal._lose(slot.file)
    await journal._lose(slot.file)
    assert await ids(journal) == ["ours"]
    assert await journal.adopt(NOW) == 0
    assert list(journal.unusable) == [f"charges-1.corrupt-{STAMP}.db"]


DIES = """
    import asyncio, sys
    from metered_billing.journal.sqlite import SqliteJournal

    async def main():
        journal = SqliteJournal(sys.argv[1])
        sys.stdin.readline()
        await journal.start()
        print(journal._place().path.name, *journal.unusable, flush=True)
        sys.stdin.readline()

    asyncio.run(main())
"""


@pytest.mark.slow
def test_two_processes_that_find_one_corrupt_file_set_it_aside_once(tmp_path: Path) -> None:
    """Whoever has its lock; both are up afterwards, each in a place of its own."""
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        for number in range(3):
            (directory / f"charges-{number}.db").write_bytes(LETTER)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(DIES), str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"TZ": "UTC"},
                text=True,
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.stdout.readline().split() for process in processes if process.stdout is not None]
        for process in processes:
            process.communicate(timeout=20)
        assert len({name for name, *_ in told}) == 2
        asides = [path for path in directory.iterdir() if ".corrupt-" in path.name]
        assert all(path.read_bytes() == LETTER for path in asides)
        assert len(asides) + sum(path.read_bytes() == LETTER for path in directory.glob("charges-?.db")) == 3


async def test_text_that_is_no_utf_8_stops_no_other_charge(journal: SqliteJournal) -> None:
    """A flipped bit in a body, a state or an id: that charge is reported, the rest is settled."""
    for n in range(5):
        await journal.open(charge(journal, f"c{n}"))
    connection = sqlite3.connect(journal._place().path)
    connection.execute("UPDATE charges SET body = CAST(x'7bff7d' AS TEXT) WHERE id = 'c1'")
    connection.execute("UPDATE charges SET state = CAST(x'ff' AS TEXT) WHERE id = 'c2'")
    connection.execute("UPDATE charges SET id = CAST(x'63ff' AS TEXT) WHERE id = 'c3'")
    connection.commit()
    connection.close()
    assert await ids(journal) == ["c0", "c4"]
    assert sum("cannot be read" in why for why in journal.unusable.values()) == 3
    assert sum(count for count, _ in (await journal.unsettled(NOW)).values()) == 5


# By hand.


def test_mend_finds_what_can_be_read_and_names_the_rest(tmp_path: Path) -> None:
    """Whole rows come back, and the app settles them; of a broken page the index still tells the ids."""
    path = tmp_path / "charges-0.db"
    left_by_a_killed_process(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = bytearray(path.read_bytes())
    leaf = next(
        number
        for number in range(4, len(whole) // 4096)
        if whole[number * 4096] == 10
        and b"charges-0-005" in whole[number * 4096 : number * 4096 + 4096]
        and b"filler" in whole[number * 4096 : number * 4096 + 4096]
    )
    whole[leaf * 4096 : (leaf + 1) * 4096] = b"garbage!" * 512
    corrupt = tmp_path / f"charges-0.corrupt-{STAMP}.db"
    path.unlink()
    corrupt.write_bytes(whole)
    said: list[str] = []
    assert mend.main([str(corrupt)], said.append) == 1
    assert corrupt.read_bytes() == whole
    lost = {line.split(",")[0].removeprefix("charge ") for line in said if "could not be read" in line}
    assert 0 < len(lost) < 20

    async def adopt() -> None:
        journal = journal_in(tmp_path)
        await journal.start()
        await journal.adopt(NOW)
        found = set(await ids(journal))
        assert found | lost == {f"charges-0-{number:03}" for number in range(50)}
        assert not found & lost
        await journal.close()

    asyncio.run(adopt())


@pytest.mark.parametrize("spoil", [a_letter, a_short_letter, lambda path: path.write_bytes(b"")])
def test_mend_that_can_read_nothing_says_so_and_fails(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    """No charge found is not no charge owed."""
    corrupt = tmp_path / f"charges-0.corrupt-{STAMP}.db"
    spoil(corrupt)
    said: list[str] = []
    assert mend.main([str(corrupt)], said.append) == 1
    assert "".join(said).startswith("0 charges that need something done could be read.\nNot all of it could be read")
    assert [path.name for path in tmp_path.iterdir()] == [corrupt.name]


def test_mend_of_a_file_whose_first_bytes_alone_are_gone_finds_all(tmp_path: Path) -> None:
    """They are the same in every file."""
    path = tmp_path / "charges-0.db"
    left_by_a_killed_process(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    corrupt = path.rename(tmp_path / f"charges-0.corrupt-{STAMP}.db")
    corrupt.write_bytes(b"X" * 16 + corrupt.read_bytes()[16:])
    said: list[str] = []
    assert mend.main([str(corrupt)], said.append) == 0
    assert said[0] == "50 charges that need something done could be read"


async def test_mend_of_a_file_in_use_is_refused(journal: SqliteJournal, tmp_path: Path) -> None:
    """Its charges would stand in two files, and be settled in both."""
    await journal.open(charge(journal))
    said: list[str] = []
    assert mend.main([str(tmp_path / "charges-0.db")], said.append) == 2
    assert "is not a file that was set aside" in said[0]
    assert not (tmp_path / "charges-1.db").exists()


def test_mend_of_nothing_says_how_it_is_called(tmp_path: Path) -> None:
    """No file, or a file that is not there."""
    for arguments in ([], [str(tmp_path / "absent.db")]):
        said: list[str] = []
        assert mend.main(arguments, said.append) == 2
        assert "usage" in said[0]
