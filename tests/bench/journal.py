"""The journal alone: against a commit for each write, and what a charge costs of the processor.

    python -m tests.bench --only journal

Both write the same rows into the same tables of a file on the disk, in turns. The ratio is of time on the clock; what
a charge costs is time of the processor, for that is what the app's other requests cannot have.
"""

import asyncio
import gc
import itertools
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from metered_billing.charge import Account, Deducted, Record, Refunded, Reported, step
from metered_billing.journal import states_of
from metered_billing.journal.rows import OPEN, SCHEMA, WRITE, columns_of
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import new_uuid7
from metered_billing.schemas import prepare_sqlite
from tests.bench.rows import Row

CONCURRENT = 64
ROUNDS = 7
CHARGES = 1_500
CHARGES_ONE_BY_ONE = 150


class Write(NamedTuple):
    """A write of a charge; its first has nothing before it."""

    before: Record | None
    after: Record
    durable: bool


Charges = Sequence[Sequence[Write]]


def charges(owner: str, many: int, *, whole: bool) -> Charges:
    """So many, each as a request writes it; with something to refund in one of ten. Or the first write of each."""
    made = [list(_writes(owner, number)) for number in range(many)]
    return made if whole else [writes[:1] for writes in made]


def _writes(owner: str, number: int) -> Iterator[Write]:
    now = time.time()
    opened = Record(
        id=new_uuid7(),
        account=Account("acme", "ann"),
        amount_credits=10,
        units=10,
        opened_at=now,
        request_id=new_uuid7()[::-1],  # in no order, as requests' ids are
        owner=owner,
        due_at=now,
    )
    deducted = step(opened, Deducted(new_uuid7()), now=now)
    yield Write(None, opened, True)
    yield Write(opened, deducted, False)
    if number % 10:
        yield Write(deducted, step(deducted, Reported(10), now=now), True)
    else:
        refunding = step(deducted, Reported(8, ("img-1", "img-2")), now=now)
        yield Write(deducted, refunding, True)
        yield Write(refunding, step(refunding, Refunded("refund"), now=now), False)


class OneByOne:
    """What one would write first: one connection in one thread, and a transaction for each write, synced to disk."""

    owner = new_uuid7()

    def __init__(self, directory: Path) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.connection = sqlite3.connect(directory / "one-by-one.db", isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        prepare_sqlite(self.connection, SCHEMA)

    def write(self, before: Record | None, after: Record) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        if before is None:
            self.connection.execute(OPEN, (*columns_of(after), after.request_id))
        else:
            _, _, state, _, tries, due_at, closed_at, body = columns_of(after)
            values = (state, tries, due_at, closed_at, body, before.id, before.owner, *states_of(before))
            self.connection.execute(WRITE, values)
        self.connection.execute("COMMIT")

    def alone(self, made: Charges) -> float:
        """Write them with nothing else to do: no event loop, no other thread. Returns the writes a second."""
        began = time.perf_counter()
        for before, after, _ in itertools.chain.from_iterable(made):
            self.write(before, after)
        return sum(map(len, made)) / (time.perf_counter() - began)

    async def run(self, made: Charges) -> float:
        """Write them for as many requests at a time as the journal has. Returns the writes a second."""
        left, loop = iter(made), asyncio.get_running_loop()

        async def one_after_the_other() -> None:
            for writes in left:
                for before, after, _ in writes:
                    await loop.run_in_executor(self.thread, self.write, before, after)

        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other() for _ in range(CONCURRENT)))
        return sum(map(len, made)) / (time.perf_counter() - began)

    def close(self) -> None:
        self.thread.shutdown()
        self.connection.close()


@dataclass(frozen=True, slots=True)
class Spent:
    """What so many writes took: seconds on the clock, and for each charge µs of the processor in both threads."""

    writes: int
    clock: float
    loop: float
    thread: float
    commits: int


async def run(journal: SqliteJournal, made: Charges, *, for_nothing: bool = False) -> Spent:
    """Write them, so many charges at a time. Or do nothing instead: what the bench itself takes."""
    left = iter(made)

    async def one_after_the_other() -> None:
        for writes in left:
            for before, after, durable in writes:
                if for_nothing:
                    await asyncio.sleep(0)
                elif before is None:
                    await journal.open(after)
                else:
                    await journal.write(before, after, durable=durable)

    file = journal._place().file
    thread = await file.run(lambda _: time.thread_time(), durable=False)
    clock, loop, commits = time.perf_counter(), time.thread_time(), file.commits
    await asyncio.gather(*(one_after_the_other() for _ in range(CONCURRENT)))
    clock, loop, commits = time.perf_counter() - clock, time.thread_time() - loop, file.commits - commits
    thread = await file.run(lambda _: time.thread_time(), durable=False) - thread
    per_charge = 1e6 / len(made)
    return Spent(sum(map(len, made)), clock, loop * per_charge, thread * per_charge, commits)


async def compare(directory: Path, rounds: int) -> list[Row]:
    naive, journal = OneByOne(directory), SqliteJournal(directory / "journal")
    await journal.start()
    ratios: dict[tuple[bool, bool], list[float]] = {}
    spent: list[Spent] = []
    for number, whole in itertools.product(range(rounds + 1), (True, False)):
        few = partial(charges, naive.owner, CHARGES_ONE_BY_ONE, whole=whole)
        many = partial(charges, journal.owner, CHARGES, whole=whole)
        made = few(), few(), many(), many()
        gc.collect()
        gc.freeze()  # an app has no thousand charges ready, to be looked through for garbage again and again
        one_by_one, alone = await naive.run(made[0]), naive.alone(made[1])
        nothing = await run(journal, made[2], for_nothing=True)
        ours = await run(journal, made[3])
        gc.unfreeze()
        if number == 0:  # the first makes files and caches
            continue
        ratios.setdefault((whole, False), []).append(ours.writes / ours.clock / one_by_one)
        ratios.setdefault((whole, True), []).append(ours.writes / ours.clock / alone)
        if whole:
            spent.append(replace(ours, loop=ours.loop - nothing.loop))
    await journal.close()
    naive.close()
    each, alone_in_a_loop = f"one commit each, both {CONCURRENT} at a time, synced", "one commit each, in a bare loop"
    return [
        Row("journal, charges put on record", median(ratios[False, False]), "x", each, "8"),
        Row("journal, charges put on record", median(ratios[False, True]), "x", alone_in_a_loop),
        Row("journal, all writes of a charge", median(ratios[True, False]), "x", each),
        Row("journal, all writes of a charge", median(ratios[True, True]), "x", alone_in_a_loop),
        Row("journal, a charge on the event loop", median(one.loop for one in spent), "µs", "of the processor"),
        Row("journal, a charge in its thread", median(one.thread for one in spent), "µs", "of the processor"),
        Row("journal, writes a commit", median(one.writes / one.commits for one in spent), ""),
    ]


def measure(*, quick: bool = False) -> list[Row]:
    """The rows of the report."""
    home = Path(".bench")  # /tmp may be in memory
    home.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as directory:
        return asyncio.run(compare(Path(directory), 2 if quick else ROUNDS))
