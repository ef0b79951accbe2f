"""The journal and its recovery at their limits: a service that was down for a day, and all that waited for it."""

import asyncio
import itertools
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metered_billing.biller import Biller
from metered_billing.charge import Account, Deducted, Record, Refunded, Reported, State
from metered_billing.journal.rows import COLUMNS, SCHEMA
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.outcomes import Paid
from metered_billing.runtime import Runtime
from metered_billing.settler import MAX_BACKOFF_S, RECOVER_EVERY_S
from metered_billing.sqlite import WAL_BYTES
from tests.fakes import LOST, Inline, World

NOW = 1_795_601_700.0
MANY = 100_000


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: nothing here is about the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield Path(directory)


def journal_in(directory: Path) -> SqliteJournal:
    return SqliteJournal(directory, runtime=Runtime(now=lambda: NOW, executor=Inline))


async def fill(journal: SqliteJournal, many: int) -> None:
    """So many refunds that are due, the later ones longer."""
    slot = journal._place()
    body = '{"tenant_id":"acme","amount":10,"units":10,"transaction_id":"tx","refund":2,"metadata":{"filler":"%s"}}'
    marks = ", ".join("?" * len(COLUMNS))
    rows = (
        (f"c{n:06}", slot.owner, "refunding", NOW - 86_400, 20, NOW - n, None, body % ("x" * 250)) for n in range(many)
    )
    await slot.run(
        lambda connection: connection.executemany(
            f"INSERT INTO charges ({', '.join(COLUMNS)}) VALUES ({marks})", rows
        ).close(),
        durable=False,
    )


def size(journal: SqliteJournal) -> int:
    return journal._place().path.stat().st_size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Service:
    """Says yes to everything, at once, and watches."""

    remembers_declines = True
    realm = ""

    def __init__(self) -> None:
        self.refunded: list[str] = []
        self.resident = 0

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    async def deduct(self, record: Record) -> Deducted:
        return Deducted("tx", 1)

    async def refund(self, record: Record) -> Refunded:
        self.refunded.append(record.id)
        if len(self.refunded) % 500 == 0:
            self.resident = max(self.resident, resident_bytes())
            await asyncio.sleep(0)
        return Refunded()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.no_cover
async def test_hundred_thousand_due_refunds_go_out_in_bounded_memory(fast: Path) -> None:
    """The longest due first; a request in their midst is served at once; afterwards the file is small again."""
    journal, service = journal_in(fast), Service()
    await journal.start()
    await fill(journal, MANY)
    large = size(journal)
    biller = Biller(service, journal, runtime=Runtime(now=lambda: NOW, executor=Inline))  # type: ignore[arg-type] # refunds
    before = resident_bytes()
    recovering = asyncio.ensure_future(biller.recover())
    while len(service.refunded) < MANY // 10:
        await asyncio.sleep(0)
    charge = await biller.deduct(Account("acme"), Paid(10))
    await biller.conclude(charge, Reported(10))
    assert len(service.refunded) < MANY // 5
    biller.release(charge, Reported(10))
    assert await recovering == MANY
    # A round is read in order, and eight at a time are under way.
    assert [int(name[1:]) for name in service.refunded] == sorted(range(MANY), reverse=True)
    # All of them at once would be more than 100 MB.
    assert service.resident - before < 40 << 20
    assert await journal.forget(NOW + 1, keep=0) >= 0
    for _ in range(20):
        await journal.forget(NOW + 1, keep=0)
    await journal.close()
    [path] = fast.glob("charges-*.db")
    assert path.stat().st_size < large // 20


async def test_file_shrinks_a_little_at_a_time(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten goes back to the disk, in bounded steps; the log stays bounded too."""
    journal = journal_in(fast)
    await journal.start()
    await fill(journal, 8_000)
    slot = journal._place()
    await slot.run(
        lambda connection: connection.execute("UPDATE charges SET state = 'settled', closed_at = 1").close(),
        durable=True,
    )
    await slot.file.between(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close())
    large = size(journal)
    monkeypatch.setattr("metered_billing.journal.sqlite.STEPS_AT_A_TIME", 1)
    sizes: list[int] = []
    await journal.forget(2.0, keep=0)
    while not sizes or pages(journal, "page_count") < sizes[-1]:
        sizes.append(pages(journal, "page_count"))
        await journal.forget(2.0, keep=0)
    steps = [earlier - later for earlier, later in itertools.pairwise(sizes)]
    assert len(steps) > 2
    # A page that says where others are may go along.
    assert all(240 <= step <= 252 for step in steps[:-1])
    assert pages(journal, "freelist_count") <= 256
    assert slot.path.with_name(slot.path.name + "-wal").stat().st_size <= 2 * WAL_BYTES
    await journal.close()
    assert slot.path.stat().st_size < large // 4


def pages(journal: SqliteJournal, name: str) -> int:
    connection = journal._place().file._connection
    assert connection is not None
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def of_version_1(path: Path, charges: int = 3) -> None:
    """A file as the first version made it."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    for statement in SCHEMA.steps[0]:
        connection.execute(statement)
    connection.execute("PRAGMA user_version = 1")
    connection.execute("INSERT INTO about VALUES ('')")
    for n in range(charges):
        connection.execute(
            "INSERT INTO charges VALUES (?, 'x', 'opened', 1, 0, 1, NULL, NULL, ?)",
            (f"c{n}", '{"tenant_id":"a","amount":1,"units":1}'),
        )
    connection.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_file_of_version_1_is_brought_up_to_date(
    fast: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Its charges are all there. Where there is no room to lay it out anew, the next start tries again."""
    of_version_1(fast / "charges-0.db")
    journal = journal_in(fast)
    if fails:

        async def no_room(slot: Any) -> None:
            with pytest.raises(sqlite3.OperationalError):
                await slot.file.between(lambda connection: connection.execute("VACUUM INTO '/nowhere/at/all'").close())

        monkeypatch.setattr(journal, "_lay_out", no_room)
    await journal.start()
    assert pages(journal, "user_version") == SCHEMA.version == 3
    connection = sqlite3.connect(fast / "charges-0.db")
    assert {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")} == {
        "charges_closed",
        "charges_unsettled",
    }
    connection.close()
    assert pages(journal, "auto_vacuum") == (0 if fails else 2)
    assert len(await journal.due(NOW, besides=(), limit=10)) == 3
    assert await journal.forget(NOW, keep=0) == 0
    monkeypatch.undo()
    await journal.close()
    await journal.start()
    assert pages(journal, "auto_vacuum") == 2
    assert len(await journal.due(NOW, besides=(), limit=10)) == 3
    await journal.close()


async def test_file_of_many_charges_is_taken_over_a_little_at_a_time(fast: Path) -> None:
    """So that requests need not wait for all of them; all are ours in the end, and due."""
    journal = journal_in(fast)
    await journal.start()
    await fill(journal, 3_300)
    await journal.close()
    other = journal_in(fast)
    (fast / "charges-0.db").rename(fast / "charges-1.db")
    await other.start()
    commits = other._place().file.commits
    assert await other.adopt(NOW) == 3_300
    assert other._place().file.commits - commits < 5  # its own file was not in the way
    [slot] = other._adopted.values()
    assert slot.file.commits > 6
    found = await other.due(NOW, besides=(), limit=5_000)
    assert len(found) == 3_300
    assert {record.owner for record in found} == {slot.owner}
    await other.close()


class Timed(list[tuple[str, str]]):
    """Calls, and when they were made."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.at: dict[tuple[str, str], list[float]] = {}

    def append(self, call: tuple[str, str]) -> None:
        super().append(call)
        self.at.setdefault(call, []).append(self.world.time)


@pytest.mark.slow
@pytest.mark.no_cover
def test_service_that_is_down_for_a_day_gets_every_refund_when_it_is_back(fast: Path) -> None:
    """Within the longest pause and a round; meanwhile it is asked ever more seldom, and the age is told."""
    world = World(fast)
    world.bank.always["refund"] = LOST
    calls = world.bank.calls = Timed(world)

    async def a_day() -> None:
        for _ in range(5):
            await world.serve()
        await asyncio.sleep(86_400)
        [(_, age_s)] = (await world.inner.unsettled(world.runtime.now())).values()
        assert age_s >= 86_400
        assert any(value >= 86_000 for value in world.metric("metered_billing.unsettled.age").values())
        waiting = await world.inner.due(1e12, besides=(), limit=10)
        assert len(waiting) == 5
        assert all(
            record.state is State.REFUNDING and record.tries > 86_400 / (MAX_BACKOFF_S + RECOVER_EVERY_S)
            for record in waiting
        )
        del world.bank.always["refund"]
        await world.quiet(within_s=MAX_BACKOFF_S + RECOVER_EVERY_S)

    world.run(a_day)
    world.holds()
    pauses = {call: [later - earlier for earlier, later in itertools.pairwise(at)] for call, at in calls.at.items()}
    refunds = [found for (name, _), found in pauses.items() if name == "refund"]
    assert len(refunds) == 5
    for found in refunds:
        assert max(found) <= MAX_BACKOFF_S + 1
        late = found[20:]
        assert min(late) >= MAX_BACKOFF_S / 2
        assert max(late) > MAX_BACKOFF_S * 0.9
        assert len({round(pause) for pause in late}) > 50  # jittered
