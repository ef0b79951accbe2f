"""What a group costs, counted: commits, statements, round trips. A lost factor shows here, on any machine."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from metered_billing.ledger import Answer, Command, Ledger, postgres_books
from metered_billing.ledger.books import _statements
from metered_billing.postgres import Connection, PostgresDatabase
from metered_billing.runtime import Runtime

from .asking import InTheLoop, deduct, grant, refund, void


@pytest.fixture
def said() -> list[str]:
    """Every statement that SQLite was given."""
    return []


@pytest.fixture
def ledger(tmp_path: Path, said: list[str]) -> Ledger:
    def connect(path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.set_trace_callback(said.append)
        return connection

    return Ledger(tmp_path / "credits.db", Runtime(connect=connect, executor=InTheLoop))


Ask = Callable[[Ledger, list[Command]], Awaitable[list[Answer]]]


async def singly(ledger: Ledger, commands: list[Command]) -> list[Answer]:
    return await asyncio.gather(*map(ledger.decide, commands))


async def batched(ledger: Ledger, commands: list[Command]) -> list[Answer]:
    return [answer for answer in await ledger.batch(commands) if isinstance(answer, Answer)]


async def in_batches(ledger: Ledger, commands: list[Command]) -> list[Answer]:
    size = len(commands) // 4
    parts = [commands[start : start + size] for start in range(0, len(commands), size)]
    return [answer for part in await asyncio.gather(*(batched(ledger, part) for part in parts)) for answer in part]


ASKING = pytest.mark.parametrize("ask", [singly, batched, in_batches])


def deductions(number: int, start: int = 0) -> list[Command]:
    return [deduct(1, key=f"charge-{n}") for n in range(start, start + number)]


def changes(answers: list[Answer]) -> list[Command]:
    """One for each deduction: every other one gets a refund, and the others are voided."""
    return [
        void(f"charge-{n}") if n % 2 else refund(answer.body["transaction_id"], 1, key=f"charge-{n}:refund")
        for n, answer in enumerate(answers)
    ]


class TestSqlite:
    @ASKING
    async def test_64_at_once_share_a_commit_and_its_statements(
        self, ledger: Ledger, said: list[str], ask: Ask
    ) -> None:
        """Seven in all: begin, look for keys and account, write account, entries and keys, commit."""
        await ledger.grant(grant(1000))
        said.clear()
        assert {answer.status for answer in await ask(ledger, deductions(64))} == {201}
        assert [statement.split()[0] for statement in said] == [
            *("BEGIN", "WITH", "WITH", "INSERT", "INSERT", "INSERT", "COMMIT")
        ]
        await ledger.close()

    @ASKING
    async def test_refunds_voids_and_replays_are_as_few(self, ledger: Ledger, said: list[str], ask: Ask) -> None:
        """32 refunds and 32 voids of 64 deductions, and the deductions again: no more than 16 statements each."""
        await ledger.grant(grant(1000))
        done = changes(await ask(ledger, deductions(64)))
        for commands in (done, done, deductions(64)):
            said.clear()
            await ask(ledger, commands)
            assert said.count("COMMIT") == 1
            assert len(said) <= 16
        assert await ledger.balance("acme", "alice") == 1000
        await ledger.close()

    async def test_thousand_take_few_statements(self, ledger: Ledger, said: list[str]) -> None:
        """A batch of the greatest size: under a tenth of a statement each, in few texts, which SQLite keeps parsed."""
        await ledger.grant(grant(1000))
        said.clear()
        assert {answer.status for answer in await batched(ledger, deductions(1000))} == {201}
        assert said.count("COMMIT") == 1
        assert len(said) < 100
        await ledger.close()

    def test_statements_have_few_texts(self) -> None:
        """Whatever the number of rows: 1, 2, 4 … 64 of them, all, and in their order."""
        texts = set()
        for number in range(300):
            statements = list(_statements("VALUES {rows}", [(n, n) for n in range(number)]))
            assert [value for _, values in statements for value in values[::2]] == list(range(number))
            texts |= {text for text, _ in statements}
        assert len(texts) == 7


@pytest.fixture
def trips(pg_clean: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How often PostgreSQL was waited for since this was last asked: libpq's own record of the protocol."""
    record = (tmp_path / "protocol").open("w+b")
    connect = PostgresDatabase._connect

    def traced(database: PostgresDatabase) -> Connection:
        connection = connect(database)
        connection.pgconn.trace(record.fileno())
        return connection

    def count() -> int:
        lines = Path(record.name).read_text(errors="replace").splitlines()
        found = sum(line.split("\t")[1:2] == ["F"] and line.split("\t")[3] in ("Query", "Sync") for line in lines)
        record.seek(0)
        record.truncate()
        return found

    monkeypatch.setattr(PostgresDatabase, "_connect", traced)
    yield count
    record.close()


class TestPostgres:
    @ASKING
    async def test_64_at_once_share_four_round_trips(self, pg_clean: str, trips: Callable[[], int], ask: Ask) -> None:
        """BEGIN; locks and keys; everything that is written; COMMIT."""
        ledger = Ledger(pg_clean, Runtime(executor=InTheLoop))
        await ledger.grant(grant(1000))
        trips()
        assert {answer.status for answer in await ask(ledger, deductions(64))} == {201}
        assert trips() == 4
        await ledger.close()

    @ASKING
    async def test_refunds_voids_and_replays_take_three_more(
        self, pg_clean: str, trips: Callable[[], int], ask: Ask
    ) -> None:
        """Their deductions, before and after the locks, and what came back of them."""
        ledger = Ledger(pg_clean, Runtime(executor=InTheLoop))
        await ledger.grant(grant(1000))
        done = changes(await ask(ledger, deductions(64)))
        trips()
        for commands in (done, done, deductions(64)):
            await ask(ledger, commands)
            assert trips() <= 7
        assert await ledger.balance("acme", "alice") == 1000
        await ledger.close()

    async def test_no_statement_reads_a_whole_table(self, pg_clean: str) -> None:
        """Also not while it is small, or grows faster than PostgreSQL takes note of it: never a sequential scan."""
        ledger = Ledger(pg_clean)
        await ledger.grant(grant(1000))
        reading = {
            "accounts": postgres_books._ACCOUNTS.format(""),
            "accounts, locked": postgres_books._ACCOUNTS.format("FOR UPDATE"),
            "keys": postgres_books._KEYS,
            "entries": postgres_books._ENTRIES,
            "refunded": postgres_books._REFUNDED,
            "hold": postgres_books._HOLD,
        }
        arrays = ["{a,b}", "{c,d}", "{1,2}", "{3,4}"]
        with psycopg.connect(pg_clean, options="-c search_path=metered_billing") as connection:
            for start in range(0, 1000, 200):
                await batched(ledger, deductions(200, start))
                for name, statement in reading.items():
                    values = arrays[: statement.count("%s")]
                    plan = connection.execute(f"EXPLAIN {statement}".encode(), values).fetchall()
                    assert not any("Seq Scan" in line for (line,) in plan), (name, start, plan)
        await ledger.close()
