"""A copy of a ledger's file: whole, sound, and taken while it is written."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from metered_billing.ledger import Ledger, LedgerLocked, backup
from metered_billing.ledger.backup import BackupFailed, Contents, back_up
from metered_billing.ledger.owner import OwnerLock

from .asking import deduct, granted, refund


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    ledger = Ledger(tmp_path / "a 20% ledger.db")
    yield ledger
    await ledger.close()


@pytest.fixture
def file(ledger: Ledger, tmp_path: Path) -> Path:
    return tmp_path / "a 20% ledger.db"


def spoil(file: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


# What fails.


async def test_copy_that_does_not_add_up_is_none(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    """A balance that its entries do not explain: found at night, not when it is needed."""
    await granted(ledger, 100)
    await ledger.close()
    spoil(file, "UPDATE accounts SET balance = 99")
    with pytest.raises(BackupFailed, match="account acme / alice does not hold the sum of its entries"):
        back_up(file, tmp_path / "copy.db")
    spoil(file, "UPDATE accounts SET balance = 100", "DELETE FROM accounts")
    with pytest.raises(BackupFailed, match="account acme / alice"):
        back_up(file, tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy.db*"))


async def test_copy_of_a_damaged_file_is_none(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    """Where SQLite itself says so, in the middle of the copy or when it is looked through."""
    await granted(ledger, 100)
    for number in range(200):
        await ledger.deduct(deduct(1, key=f"k{number}"))
    await ledger.close()
    whole = file.read_bytes()
    page = 4096
    for damaged in (whole[: page * 3] + b"\xff" * page + whole[page * 4 :], b"a letter" * 1000):
        file.write_bytes(damaged)
        with pytest.raises(BackupFailed, match=r"damaged|malformed|not a database"):
            back_up(file, tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy.db*"))


def test_what_is_no_ledger_is_not_backed_up(tmp_path: Path) -> None:
    """Another database, a later release's, none at all."""
    file = tmp_path / "other.db"
    with pytest.raises(BackupFailed, match="there is no ledger at"):
        back_up(file, tmp_path / "copy.db")
    assert not file.exists()
    for statement in ("CREATE TABLE accounts (n)", "PRAGMA user_version = 1", "PRAGMA user_version = 99"):
        spoil(file, statement)
        with pytest.raises(BackupFailed, match="not a ledger that this release"):
            back_up(file, tmp_path / "copy.db")


async def test_backup_replaces_nothing(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    """Yesterday's copy may be the only good one. What an earlier try left unfinished is in nobody's way."""
    await granted(ledger, 100)
    copy = tmp_path / "copy.db"
    copy.write_text("yesterday's")
    with pytest.raises(BackupFailed, match="is there already"):
        back_up(file, copy)
    assert copy.read_text() == "yesterday's"
    with pytest.raises(BackupFailed, match=r"was not backed up: .*No such file or directory"):
        back_up(file, tmp_path / "no" / "copy.db")
    (tmp_path / "new.db.unfinished").write_text("half")
    assert back_up(file, tmp_path / "new.db").entries == 1


async def test_copy_appears_when_it_is_whole(
    ledger: Ledger, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is looked through and on disk, nothing stands at its name, and nobody else may read it."""
    await granted(ledger, 100)
    seen = []

    def look(path: Path) -> None:
        seen.append(((tmp_path / "copy.db").exists(), oct(path.stat().st_mode & 0o077), path.name))

    monkeypatch.setattr(backup, "_sync", look)
    back_up(file, tmp_path / "copy.db")
    assert seen[0] == (False, "0o0", "copy.db.unfinished")
    assert [name for _, _, name in seen] == ["copy.db.unfinished", tmp_path.name]


# What is right.


async def test_copy_of_a_ledger_in_use_is_one_moment_of_it(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    """While credits move, each account of the copy holds the sum of its entries; nothing waits, nothing is changed."""
    await granted(ledger, 1_000)
    done = 0
    stopped = False

    async def work() -> None:
        nonlocal done
        while not stopped:
            taken = await ledger.deduct(deduct(10, key=f"d{done}"))
            assert (await ledger.refund(refund(taken.body["transaction_id"], 10, key=f"r{done}"))).done
            done += 1

    working = asyncio.create_task(work())
    found = []
    for number in range(5):
        while done < 20 * (number + 1):
            await asyncio.sleep(0.001)
        found.append(await asyncio.to_thread(back_up, file, tmp_path / f"{number}.db"))
    stopped = True
    await working
    assert [contents.accounts for contents in found] == [1] * 5
    assert found == sorted(found, key=lambda contents: contents.entries)
    assert all(contents.held_credits in (990, 1_000) for contents in found)
    assert not list(tmp_path.glob("*.db-*"))[2:]  # the ledger's own log and index


async def test_copy_is_a_ledger(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    """With all keys: what was done before is answered as it was. Also of a ledger that was killed, from its log."""
    await granted(ledger, 100)
    taken = (await ledger.deduct(deduct(30, key="k"))).body
    contents = back_up(file, tmp_path / "copy.db")
    assert contents == Contents(1, 2, 70, taken["created_at"])
    copy = Ledger(tmp_path / "copy.db")
    assert (await copy.deduct(deduct(30, key="k"))).body == taken
    await copy.close()


async def test_ledger_without_an_owner_is_held_meanwhile(
    ledger: Ledger, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that a killed service left is for one process to recover, not for two at a time."""
    await granted(ledger, 100)
    await ledger.close()
    looked = backup.look_through
    asked = []

    def meanwhile(connection: sqlite3.Connection) -> Contents:
        with pytest.raises(LedgerLocked):
            OwnerLock(file).acquire()
        asked.append(True)
        return looked(connection)

    monkeypatch.setattr(backup, "look_through", meanwhile)
    assert back_up(file, tmp_path / "copy.db").held_credits == 100
    assert asked
    await ledger.start()
