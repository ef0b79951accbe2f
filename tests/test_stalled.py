"""Where a process or its host is stopped, in the middle of whatever it says to PostgreSQL, it holds nobody up."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator

import psycopg
import pytest

from metered_billing.commits import StorageError
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.ledger import Ledger
from metered_billing.postgres import Connection, PostgresDatabase
from metered_billing.runtime import Runtime
from tests.journal.engines import charge
from tests.ledger.asking import deduct

from .stalled import StalledWay, message_ends

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stalled")]

LET_GO_WITHIN_S = 20.0
"""The server ends an idle transaction after 4 s, and a statement after 8 s."""


async def decide(url: str, number: int) -> None:
    """A ledger deducts, and so commits: from an account of its own, so that none of us waits for another."""
    ledger = Ledger(url)
    try:
        await asyncio.gather(
            *(ledger.decide(deduct(1, f"{number}-{each}", user=f"user-{number}")) for each in range(3))
        )
    finally:
        await ledger.close()


async def record(url: str, number: int) -> None:
    """A journal starts, and charges are opened together."""
    journal = PostgresJournal(url)
    try:
        await journal.start("")
        await asyncio.gather(*(journal.open(charge(journal, f"{number}-{each}")) for each in range(3)))
    finally:
        await journal.close()


def stopping_points(sent: bytes) -> Iterator[int]:
    """After each message, and within each, of what is said once the second transaction has begun.

    In the first, which looks whether the tables are there, all would wait for each other, one after the other.
    """
    before, begun = 0, 0
    for end in message_ends(sent):
        begun += b"BEGIN" in sent[before:end]
        if begun > 1:
            yield from (before + 3, (before + end) // 2, end)
        before = end


def in_transactions(url: str) -> list[tuple[str, str]]:
    """What is in the middle of a transaction that others may have to wait for: its state, and its last statement."""
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT state, left(query, 200) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
            " AND backend_type = 'client backend'"
        ).fetchall()


@pytest.mark.parametrize("work", [decide, record])
def test_wherever_it_is_stopped_it_holds_nobody_up(
    pg_url: str, work: Callable[[str, int], Coroutine[None, None, None]]
) -> None:
    """A statement that was executed, in a request that is not at its end, would hold its locks for ever."""

    async def prepare() -> None:
        ledger, journal = Ledger(pg_url), PostgresJournal(pg_url)
        await ledger.start()
        await journal.start("")
        await ledger.close()
        await journal.close()

    asyncio.run(prepare())
    with StalledWay(pg_url) as way:
        asyncio.run(work(way.url, 0))
        points = sorted(set(stopping_points(bytes(way.sent))))

    def run(url: str, number: int) -> None:
        with contextlib.suppress(Exception):  # it is stopped
            asyncio.run(work(url, number))

    with contextlib.ExitStack() as stack:
        ways = [stack.enter_context(StalledWay(pg_url, point)) for point in points]
        threads = [threading.Thread(target=run, args=(way.url, number)) for number, way in enumerate(ways, start=1)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + LET_GO_WITHIN_S
        while not all(way.silent for way in ways) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert in_transactions(pg_url)
        while in_transactions(pg_url) and time.monotonic() < deadline:
            time.sleep(0.2)
        held = in_transactions(pg_url)
    for thread in threads:
        thread.join()
    assert held == []


async def test_who_is_stopped_while_a_long_answer_comes_holds_nobody_up(pg_url: str) -> None:
    """The server can write no more, and looks at none of its other limits meanwhile."""
    with StalledWay(pg_url) as way:
        database = PostgresDatabase(way.url, Runtime())
        await database.run(
            lambda connection: connection.execute(
                "CREATE SCHEMA metered_billing; CREATE TABLE metered_billing.notes (n int)"
            )
        )

        def ask(connection: Connection) -> None:
            connection.execute("LOCK TABLE notes")
            way.deaf.set()
            connection.execute("SELECT repeat('x', 50000000)")

        asking = database.run(ask)
        while not way.deaf.is_set():
            await asyncio.sleep(0.01)
        deadline = time.monotonic() + LET_GO_WITHIN_S
        while (held := in_transactions(pg_url)) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
    with contextlib.suppress(StorageError):
        await asking
    await database.close()
    database.shutdown()
    assert held == []
