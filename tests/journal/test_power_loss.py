"""Power loss, as far as it can be shown: the journal's log cut or garbled anywhere.

What this shows: whatever part of the log reached the disk, from nothing to everything, the file opens, no
transaction is half there, and every record whose durable write was acknowledged is there, provided that what was
in the log at that moment is on the disk. That it is, is what a sync is for: the last test looks that one is made
before anybody is told. What this cannot show: a disk that says "synced" and lies, or loses what it had long ago.
"""

import asyncio
import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from metered_billing.charge import Account, Record, State
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import Runtime
from tests.fakes import Inline

pytestmark = pytest.mark.no_cover

FRAME = 24 + 4096
HEADER = 32


@dataclass(frozen=True)
class Acknowledged:
    """A durable write, and how long the log was when its caller was told."""

    log_bytes: int
    charge_id: str
    state: State


def journal_in(directory: Path) -> SqliteJournal:
    return SqliteJournal(directory, runtime=Runtime(executor=Inline))


def written(
    directory: Path, charges: int, *, checkpoint_at: int | None = None
) -> tuple[bytes, bytes, list[Acknowledged]]:
    """A database and its log as they stand after so many charges, and what was acknowledged on the way.

    Each is opened (durable), deducted (not), and refunding (durable).
    """
    acknowledged: list[Acknowledged] = []

    async def write() -> tuple[bytes, bytes]:
        journal = journal_in(directory)
        await journal.start()
        path = journal._place().path
        log = path.with_name(path.name + "-wal")
        for number in range(charges):
            if number == checkpoint_at:
                await journal._place().file.between(
                    lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
                )
                acknowledged[:] = [dataclasses.replace(each, log_bytes=0) for each in acknowledged]
            record = Record(
                id=f"c{number:03}",
                account=Account("acme"),
                amount_credits=3,
                units=3,
                opened_at=1.0,
                owner=journal.owner,
                due_at=1.0,
                metadata={"filler": "x" * 300},
            )
            await journal.open(record)
            acknowledged.append(Acknowledged(log.stat().st_size, record.id, State.OPENED))
            deducted = dataclasses.replace(record, state=State.DEDUCTED, transaction_id="tx")
            await journal.write(record, deducted, durable=False)
            refunding = dataclasses.replace(deducted, state=State.REFUNDING, refund_credits=2)
            await journal.write(deducted, refunding, durable=True)
            acknowledged.append(Acknowledged(log.stat().st_size, record.id, State.REFUNDING))
        found = path.read_bytes(), log.read_bytes()
        await journal.close()
        return found

    found = asyncio.run(write())
    shutil.rmtree(directory)
    return *found, acknowledged


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of files are opened, and what is on the disk is given."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield Path(directory)


ORDER = [State.OPENED, State.DEDUCTED, State.REFUNDING]


def check(directory: Path, database: bytes, log: bytes, kept_bytes: int, acknowledged: list[Acknowledged]) -> None:
    """It opens, in its own place; what was acknowledged within the kept bytes is there; and nothing is half there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "charges-0.db").write_bytes(database)
    (directory / "charges-0.db-wal").write_bytes(log)

    async def look() -> list[Record]:
        journal = journal_in(directory)
        await journal.start()
        try:
            assert journal._place().path.name == "charges-0.db"
            assert journal.unusable == {}
            connection = journal._place().file._connection
            assert connection is not None
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found = await journal.due(1e12, besides=(), limit=10_000)
            assert journal.unusable == {}
            return found
        finally:
            await journal.close()

    states = {record.id: record.state for record in asyncio.run(look())}
    for each in acknowledged:
        if each.log_bytes <= kept_bytes:
            assert each.charge_id in states, (kept_bytes, each)
            assert ORDER.index(states[each.charge_id]) >= ORDER.index(each.state), (kept_bytes, each)
    # In the order in which they were written: a later one is never there without all that came before.
    numbers = sorted(states)
    assert numbers == [f"c{number:03}" for number in range(len(numbers))]
    assert all(states[name] is State.REFUNDING for name in numbers[:-1])


def cuts(log: bytes, inside: int, seed: int) -> list[int]:
    """Lengths: around the header, every frame and every frame's header; and some bytes within."""
    edges = {0, 1, HEADER - 1, HEADER, HEADER + 1, len(log)}
    for start in range(HEADER, len(log), FRAME):
        edges |= {start + offset for offset in (-1, 0, 1, 23, 24, 25, FRAME - 1)}
    random = Random(seed)
    edges |= {random.randrange(len(log)) for _ in range(inside)}
    return sorted(length for length in edges if 0 <= length <= len(log))


def test_log_cut_at_every_edge_loses_nothing_that_was_acknowledged(fast: Path) -> None:
    """Around each frame and its header, for a few charges."""
    database, log, acknowledged = written(fast / "whole", 3)
    assert len({each.log_bytes for each in acknowledged}) == 6
    for length in cuts(log, 20, seed=1):
        check(fast / "cut", database, log[:length], length, acknowledged)


@pytest.mark.slow
def test_log_cut_at_every_byte_of_two_frames_loses_nothing_that_was_acknowledged(fast: Path) -> None:
    """The last frame of an acknowledged write and the first of the next: at each of their bytes."""
    database, log, acknowledged = written(fast / "whole", 2)
    middle = acknowledged[1].log_bytes
    step = 3  # and every byte of both headers
    lengths = {*range(middle - FRAME, middle + FRAME, step), *range(middle - FRAME - 24, middle - FRAME + 48)}
    lengths |= set(range(middle - 24, middle + 48))
    for length in sorted(lengths):
        check(fast / "cut", database, log[:length], length, acknowledged)


@pytest.mark.slow
@pytest.mark.parametrize("charges", [12, 40])
def test_long_log_cut_anywhere_loses_nothing_that_was_acknowledged(fast: Path, charges: int) -> None:
    """A sample over many transactions, after a merge in the middle too."""
    for checkpoint_at in (None, charges // 2):
        database, log, acknowledged = written(fast / "whole", charges, checkpoint_at=checkpoint_at)
        assert checkpoint_at is None or acknowledged[0].log_bytes == 0
        for length in Random(charges).sample(cuts(log, 60, seed=charges), 150):
            check(fast / "cut", database, log[:length], length, acknowledged)


@pytest.mark.parametrize("tail", ["zeros", "noise", "a page twice", "an old log"])
def test_log_that_ends_in_garbage_loses_nothing_that_was_acknowledged(fast: Path, tail: str) -> None:
    """The file had its length already, but not its contents: what comes after the garbage counts for nothing."""
    database, log, acknowledged = written(fast / "whole", 3)
    random = Random(7)
    garbage = {
        "zeros": bytes(len(log)),
        "noise": random.randbytes(len(log)),
        "a page twice": log[HEADER : HEADER + FRAME] * (len(log) // FRAME + 1),
        # Under another salt, as what is left of the log before the last merge.
        "an old log": log[:16] + struct.pack(">II", 1, 2) + log[24:],
    }[tail]
    for length in cuts(log, 10, seed=2)[::3]:
        garbled = log[:length] + garbage[length : len(log)]
        check(fast / "cut", database, garbled, length, acknowledged)


WRITES = """
    import asyncio, os, sys
    from metered_billing.charge import Account, Record
    from metered_billing.journal.sqlite import SqliteJournal

    async def main():
        journal = SqliteJournal(sys.argv[1])
        await journal.start()
        for number in range(3):
            os.write(2, b"before\\n")
            await journal.open(Record(id=f"c{number}", account=Account("acme"), amount_credits=3, units=3,
                                      opened_at=1.0, owner=journal.owner, due_at=1.0))
            os.write(2, b"acknowledged\\n")
        await journal.close()

    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_durable_write_syncs_the_log_before_it_is_acknowledged(tmp_path: Path) -> None:
    """As the kernel sees it: the log is written, then synced, and only then is the caller told."""
    trace = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-y",
        "-e",
        "trace=write,pwrite64,fsync,fdatasync",
        "-o",
        str(trace),
        sys.executable,
        "-c",
    ]
    done = subprocess.run(
        [*command, textwrap.dedent(WRITES), str(tmp_path / "journal")], capture_output=True, check=False
    )
    if b"ptrace" in done.stderr or b"PTRACE" in done.stderr:
        pytest.skip("this container does not let processes be traced")
    assert done.returncode == 0, done.stderr
    calls = trace.read_text()
    between = [part.split('"acknowledged')[0] for part in calls.split('"before')[1:]]
    assert len(between) == 3
    for part in between:
        lines = [line for line in part.splitlines() if "charges-0.db-wal>" in line]
        kinds = ["sync" if "sync(" in line else "write" for line in lines]
        assert kinds.count("write") >= 2
        assert kinds[-1] == "sync"
    # The directories too: a file whose name is not on the disk is as lost as its contents.
    for directory in (tmp_path, tmp_path / "journal"):
        assert re.search(rf"sync\(\d+<{re.escape(str(directory))}>", calls.split('"acknowledged')[0])
