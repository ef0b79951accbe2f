"""The ledger without an app around it: against one transaction each, against pgbench, and at a million entries.

    .venv-bench/bin/python -m tests.bench --only ledger

64 ask at once, of one account, and every commit is on disk before it is answered. What is compared takes turns, and
a figure is the median of each round's own ratio.
"""

import asyncio
import contextlib
import itertools
import os
import re
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg

from metered_billing import SqlCredits
from metered_billing.charge import Account, Deducted, Record
from metered_billing.ledger import Deduct, Grant, Ledger, Refund
from metered_billing.runtime import new_uuid7
from tests.bench.processes import ROOT, alone
from tests.bench.rows import Row
from tests.postgres import NoPostgres, Server, binaries

AT_ONCE = 64
MILLION = 1_000_000
ACCOUNT = {"tenant_id": "acme", "user_id": "alice"}
POOL = 16
"""Connections of the naive way to PostgreSQL; with more, they only wait for each other's row."""

Step = Callable[[], Awaitable[object]]


def say(text: str) -> None:
    print(f"· ledger: {text}", flush=True)  # noqa: T201 - a part of the bench, which people start


def measure(quick: bool = False) -> list[Row]:
    """Everything about the ledger."""
    home = ROOT / ".bench"
    home.mkdir(exist_ok=True)
    affinity = os.sched_getaffinity(0)
    rounds, seconds, entries = (1, 0.5, 20_000) if quick else (5, 1.5, MILLION)
    try:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))  # a server and its client, as on any machine
        with tempfile.TemporaryDirectory(dir=home) as directory:
            rows = run(on_sqlite(Path(directory), rounds, seconds, entries))
        try:
            # Durable, as PostgreSQL comes; only larger than the tests' own.
            server = Server("-c", "max_connections=200", "-c", "shared_buffers=256MB", "-c", "max_wal_size=4GB")
        except NoPostgres as error:
            say(f"no PostgreSQL: {error}")
            return rows
        try:
            return rows + run(on_postgres(server.url, rounds, seconds, entries))
        finally:
            server.remove()
    finally:
        os.sched_setaffinity(0, affinity)


def run(measuring: Coroutine[Any, Any, list[Row]]) -> list[Row]:
    """On the loop that the service runs on."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measuring)


async def on_sqlite(directory: Path, rounds: int, seconds: float, entries: int) -> list[Row]:
    """In files of their own."""
    async with contextlib.AsyncExitStack() as stack:
        naive = await stack.enter_async_context(naive_sqlite(directory / "naive.db"))
        ours = await stack.enter_async_context(opened(f"sqlite:///{directory}/ours.db"))
        in_process = SqlCredits(f"sqlite:///{directory}/credits.db")
        stack.push_async_callback(in_process.aclose)
        await in_process.grant(**ACCOUNT, amount=10**9, reason="bench", idempotency_key="grant")
        rates = await in_turn(
            rounds,
            seconds,
            {"one transaction each": naive, "ledger": deducting(ours), "SqlCredits": through(in_process)},
        )
        grown = f"sqlite:///{directory}/grown.db"
        async with opened(grown) as young:
            await young.check()
        say(f"filling SQLite with {entries:,} entries")
        fill_sqlite(directory / "grown.db", entries)
        fresh = await stack.enter_async_context(opened(f"sqlite:///{directory}/fresh.db"))
        old = await stack.enter_async_context(opened(grown))
        aged = await in_turn(rounds, seconds, {"at the start": mixed(fresh), "with many": mixed(old)})
    return [
        *shown("SQLite", rates),
        compared("SQLite", rates, "ledger", "one transaction each", goal="9 SQLite"),
        compared("SQLite, SqlCredits", rates, "SqlCredits", "one transaction each"),
        *shown("SQLite, one refund in ten", aged),
        compared(f"SQLite at {entries:,} entries", aged, "with many", "at the start", goal="10"),
    ]


async def on_postgres(url: str, rounds: int, seconds: float, entries: int) -> list[Row]:
    """In databases of their own, on one server."""
    urls = {name: database(url, name) for name in ("naive", "pgbench", "ours", "fresh", "grown")}
    async with contextlib.AsyncExitStack() as stack:
        naive = await stack.enter_async_context(naive_postgres(urls["naive"]))
        ours = await stack.enter_async_context(opened(urls["ours"]))
        bench = Pgbench(urls["pgbench"])
        rates = await in_turn(
            rounds, seconds, {"one transaction each": naive, "ledger": deducting(ours), "pgbench": bench}
        )
        fresh = await stack.enter_async_context(opened(urls["fresh"]))
        # Connected, and in use, while it was empty: a plan made then must not be kept.
        old = await stack.enter_async_context(opened(urls["grown"]))
        await rate(mixed(old), seconds / 3)
        say(f"filling PostgreSQL with {entries:,} entries")
        fill_postgres(urls["grown"], entries)
        aged = await in_turn(rounds, seconds, {"at the start": mixed(fresh), "with many": mixed(old)})
    return [
        *shown("PostgreSQL", rates),
        compared("PostgreSQL", rates, "ledger", "one transaction each", goal="9 PostgreSQL"),
        compared("PostgreSQL", rates, "ledger", "pgbench", goal="9 pgbench"),
        *shown("PostgreSQL, one refund in ten", aged),
        compared(f"PostgreSQL at {entries:,} entries", aged, "with many", "at the start", goal="10"),
    ]


# Rates.

Rates = dict[str, list[float]]


async def in_turn(rounds: int, seconds: float, ways: "dict[str, Step | Pgbench]") -> Rates:
    """Operations a second of each way, round by round."""
    rates: Rates = {name: [] for name in ways}
    for way in ways.values():  # files and connections opened, statements parsed
        if not isinstance(way, Pgbench):
            await rate(way, seconds / 5)
    for number in range(rounds):
        for name in list(ways) if number % 2 else reversed(ways):
            way = ways[name]
            with alone():
                found = way.rate(seconds) if isinstance(way, Pgbench) else await rate(way, seconds)
            rates[name].append(found)
            say(f"round {number + 1} of {rounds}: {name}: {found:,.0f} operations a second")
    return rates


async def rate(step: Step, seconds: float) -> float:
    """How often a second it is done, 64 at once."""
    begun = time.perf_counter()
    until = begun + seconds
    done = 0

    async def work() -> None:
        nonlocal done
        while time.perf_counter() < until:
            await step()
            done += 1

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return done / (time.perf_counter() - begun)


def shown(where: str, rates: Rates) -> list[Row]:
    return [Row(f"{where}: {name}", statistics.median(found), "operations/s") for name, found in rates.items()]


def compared(where: str, rates: Rates, this: str, with_that: str, goal: str = "") -> Row:
    ratios = [ours / theirs for ours, theirs in zip(rates[this], rates[with_that], strict=True)]
    say(f"{where}: {this} / {with_that}: {statistics.median(ratios):.2f}")
    return Row(f"{where}: {this}", statistics.median(ratios), "x", with_that, goal)


# Ours.


@contextlib.asynccontextmanager
async def opened(where: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(where)
    await ledger.grant(Grant(**ACCOUNT, idempotency_key="grant", amount=10**12, reason="bench"))
    yield ledger
    await ledger.close()


def deduction() -> Deduct:
    return Deduct(**ACCOUNT, idempotency_key=new_uuid7(), amount=10, metadata={"route": "/create-products"})


def deducting(ledger: Ledger) -> Step:
    async def step() -> None:
        if (await ledger.deduct(deduction())).status != 201:
            raise AssertionError

    return step


def mixed(ledger: Ledger) -> Step:
    """Every tenth deduction gets a refund, as in the comparison of apps."""
    numbers = itertools.count()
    given: list[tuple[str, str]] = []

    async def step() -> None:
        number = next(numbers)
        if number % 11 == 10 and given:
            key, transaction = given.pop()
            refund = Refund(
                idempotency_key=f"{key}:refund", transaction_id=transaction, amount=2, reason="failed", items=("i-1",)
            )
            answer = await ledger.refund(refund)
        else:
            asked = deduction()
            answer = await ledger.deduct(asked)
            if number % 11 == 0:
                given.append((asked.idempotency_key, answer.body["transaction_id"]))
        if answer.status != 201:
            raise AssertionError(answer)

    return step


def through(in_process: SqlCredits) -> Step:
    account = Account(**ACCOUNT)

    async def step() -> None:
        record = Record(id=new_uuid7(), account=account, amount_credits=10, units=10, opened_at=time.time())
        if not isinstance(await in_process.deduct(record), Deducted):
            raise AssertionError

    return step


# By hand, the same rows into the same tables, a transaction for each: the key is looked for, the balance is moved where
# it is enough, the movement is written, the key is remembered, and all of it is committed.

_SEEN = "SELECT status FROM keys WHERE tenant_id = {0} AND idempotency_key = {0}"
_TAKE = (
    "UPDATE accounts SET balance = balance - {0} WHERE tenant_id = {0} AND user_id = {0} AND balance >= {0}"
    " RETURNING balance"
)
_WRITE = (
    "INSERT INTO entries (id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance, created_at,"
    " metadata) VALUES ({0}, 'deduction', {0}, {0}, 'acme', 'alice', -10, {0}, '2026-03-01T09:30:00.000Z', {0})"
)
_REMEMBER = (
    "INSERT INTO keys (tenant_id, idempotency_key, kind, user_id, payload_hash, status, entry_id)"
    " VALUES ('acme', {0}, 'deduction', 'alice', {0}, 201, {0})"
)
_METADATA = '{"route":"/create-products"}'


@contextlib.asynccontextmanager
async def naive_sqlite(file: Path) -> AsyncIterator[Step]:
    """One connection, in one thread. (aiosqlite would go there and back for every statement.)"""
    async with opened(str(file)):
        pass
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    seen, take, write, remember = (text.format("?") for text in (_SEEN, _TAKE, _WRITE, _REMEMBER))

    def deduct(key: str) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute(seen, ("acme", key)).fetchone() is None:
            (balance,) = connection.execute(take, (10, "acme", "alice", 10)).fetchone()
            entry = new_uuid7()
            connection.execute(write, (entry, entry, key, balance, _METADATA))
            connection.execute(remember, (key, deduction().payload_hash, entry))
        connection.execute("COMMIT")

    with ThreadPoolExecutor(1) as thread:
        yield lambda: asyncio.get_running_loop().run_in_executor(thread, deduct, new_uuid7())
    connection.close()


@contextlib.asynccontextmanager
async def naive_postgres(url: str) -> AsyncIterator[Step]:
    """A pool of connections, statements prepared."""
    async with opened(url):
        pass
    pool: asyncio.Queue[psycopg.AsyncConnection[Any]] = asyncio.Queue()
    for _ in range(POOL):
        pool.put_nowait(
            await psycopg.AsyncConnection.connect(url, autocommit=True, options="-c search_path=metered_billing")
        )
    seen, take, write, remember = (text.format("%s").encode() for text in (_SEEN, _TAKE, _WRITE, _REMEMBER))

    async def deduct() -> None:
        key = new_uuid7()
        connection = await pool.get()
        async with connection.transaction():
            if await (await connection.execute(seen, ("acme", key))).fetchone() is None:
                (balance,) = await (await connection.execute(take, (10, "acme", "alice", 10))).fetchone() or (0,)
                entry = new_uuid7()
                await connection.execute(write, (entry, entry, key, balance, _METADATA))
                await connection.execute(remember, (key, deduction().payload_hash, entry))
        pool.put_nowait(connection)

    yield deduct
    while not pool.empty():
        await pool.get_nowait().close()


class Pgbench:
    """PostgreSQL's own bench: one row's UPDATE and an INSERT a transaction, prepared, from 64 clients."""

    SCRIPT = (
        "BEGIN;\n"
        "UPDATE accounts SET balance = balance - 10 WHERE id = 1;\n"
        "INSERT INTO moves (amount, at) VALUES (-10, now());\n"
        "COMMIT;\n"
    )

    def __init__(self, url: str) -> None:
        self._url = url
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL)")
            connection.execute("CREATE TABLE moves (id bigserial PRIMARY KEY, amount bigint, at timestamptz)")
            connection.execute("INSERT INTO accounts VALUES (1, 1000000000000)")

    def rate(self, seconds: float) -> float:
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(self.SCRIPT)
            script.flush()
            command = [str(binaries() / "pgbench"), "-n", "-M", "prepared", "-c", str(AT_ONCE), "-j", "2"]
            done = subprocess.run(
                [*command, "-T", str(max(2, round(seconds))), "-f", script.name, self._url],
                capture_output=True,
                text=True,
                check=True,
            )
        found = re.search(r"^tps = ([\d.]+)", done.stdout, flags=re.M)
        if found is None:
            raise RuntimeError(done.stdout + done.stderr)
        return float(found[1])


# A million entries, with keys as time has ordered them: of the months before, so that new ones come after.


def old_rows(number: int) -> Iterator[tuple[str, str, str, int]]:
    """Entry id, key, time and balance of each, oldest first."""
    first = int(time.time() * 1000) - 90 * 86_400_000
    for n in range(number):
        ms = first + n * 5_000
        stamp = f"{ms:012x}"
        head = f"{stamp[:8]}-{stamp[8:]}-7"
        tail = f"-8{n % 4096:03x}-{(n * 2_654_435_761) % 2**48:012x}"
        at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(ms / 1000))
        yield f"{head}aaa{tail}", f"{head}bbb{tail}", at, 10**12 - 10 * (n + 1)


def fill_sqlite(file: Path, number: int) -> None:
    """As the ledger would have left it."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO entries (id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance,"
        " created_at, metadata) VALUES (?1, 'deduction', ?1, ?2, 'acme', 'alice', -10, ?4, ?3, '{\"route\":\"/\"}')",
        old_rows(number),
    )
    connection.executemany(
        "INSERT INTO keys (tenant_id, idempotency_key, kind, user_id, payload_hash, status, entry_id)"
        " VALUES ('acme', ?2, 'deduction', 'alice', zeroblob(32), 201, ?1)",
        ((entry, key) for entry, key, _, _ in old_rows(number)),
    )
    connection.execute("UPDATE accounts SET balance = balance - 10 * ?", (number,))
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def fill_postgres(url: str, number: int) -> None:
    """As the ledger would have left it, tidied as a server does by itself."""
    with psycopg.connect(url, autocommit=True, options="-c search_path=metered_billing") as connection:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE old (n serial, id text, key text, at text, balance bigint)")
            with cursor.copy("COPY old (id, key, at, balance) FROM STDIN") as copy:
                for row in old_rows(number):
                    copy.write_row(row)
            cursor.execute(
                "INSERT INTO entries (id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance,"
                " created_at, metadata) SELECT id, 'deduction', id, key, 'acme', 'alice', -10, balance, at,"
                ' \'{"route":"/"}\' FROM old ORDER BY n'
            )
            cursor.execute(
                "INSERT INTO keys (tenant_id, idempotency_key, kind, user_id, payload_hash, status, entry_id)"
                " SELECT 'acme', key, 'deduction', 'alice', decode(repeat('00', 32), 'hex'), 201, id"
                " FROM old ORDER BY n"
            )
            cursor.execute("UPDATE accounts SET balance = balance - 10 * %s", (number,))
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def database(url: str, name: str) -> str:
    """A database of its own on the server. Returns its URL."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return url.rsplit("/", 1)[0] + "/" + name
