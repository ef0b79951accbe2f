"""What a charge leaves behind, in bytes, and what a process holds open: figures that no noise changes.

.venv/bin/python -m tests.deploy.sizes
"""

import asyncio
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import psycopg

from metered_billing.journal import Journal
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger import Deduct, Grant, Ledger, Refund
from metered_billing.runtime import new_uuid7
from tests.bench.journal import charges

MANY = 20_000
AT_ONCE = 200
ACCOUNT = {"tenant_id": "acme", "user_id": "alice"}


async def in_groups(many: int, step: Callable[[int], Awaitable[object]]) -> None:
    for first in range(0, many, AT_ONCE):
        await asyncio.gather(*(step(number) for number in range(first, min(first + AT_ONCE, many))))


async def fill_ledger(ledger: Ledger, many: int) -> None:
    """So many deductions, with the metadata that the library sends, and a refund in one of ten."""
    await ledger.grant(Grant(idempotency_key="grant", amount=10 * many, reason="size", **ACCOUNT))

    async def charge(number: int) -> None:
        key = new_uuid7()
        taken = await ledger.deduct(
            Deduct(
                idempotency_key=key,
                amount=10,
                request_id=new_uuid7(),
                metadata={"endpoint": "create_products"},
                **ACCOUNT,
            )
        )
        if number % 10 == 0:
            back = Refund(
                idempotency_key=f"{key}:refund",
                transaction_id=taken.body["transaction_id"],
                amount=2,
                reason="failed items",
                items=("img-3", "img-7"),
            )
            assert (await ledger.refund(back)).done

    await in_groups(many, charge)
    await ledger.close()


async def fill_journal(journal: Journal, many: int) -> None:
    """So many charges, all of them final, a refund in one of ten."""
    await journal.start("https://credits.internal")
    made = charges(journal.owner, many, whole=True)

    async def write(number: int) -> None:
        for before, after, durable in made[number]:
            if before is None:
                await journal.open(after)
            else:
                await journal.write(before, after, durable=durable)

    await in_groups(many, write)
    await journal.close()


def of_file(path: Path) -> int:
    """The bytes of a SQLite file's tables and indexes, its log merged."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ((pages,),) = connection.execute("PRAGMA page_count")
        ((free,),) = connection.execute("PRAGMA freelist_count")
        ((size,),) = connection.execute("PRAGMA page_size")
    return int((pages - free) * size)


def of_tables(url: str, *tables: str) -> int:
    """The bytes of PostgreSQL's tables with their indexes."""
    with psycopg.connect(url) as connection:
        found = [
            connection.execute("SELECT pg_total_relation_size(%s)", (f"metered_billing.{table}",)).fetchone()
            for table in tables
        ]
    return sum(int(row[0]) for row in found if row is not None)


async def on_sqlite(many: int) -> dict[str, int]:
    """Bytes a charge, by what holds it."""
    with tempfile.TemporaryDirectory(prefix="metered-billing-sizes-") as name:
        directory = Path(name)
        await fill_ledger(Ledger(directory / "credits.db"), many)
        await fill_journal(SqliteJournal(directory / "journal"), many)
        (journal,) = (directory / "journal").glob("*.db")
        return {
            "ledger, SQLite": of_file(directory / "credits.db") // many,
            "journal, SQLite": of_file(journal) // many,
        }


async def on_postgres(url: str, many: int) -> dict[str, int]:
    """Likewise. What dead rows take is counted: autovacuum makes room of them for the next."""
    await fill_ledger(Ledger(url), many)
    await fill_journal(PostgresJournal(url), many)
    return {
        "ledger, PostgreSQL": of_tables(url, "accounts", "entries", "keys", "voids") // many,
        "journal, PostgreSQL": of_tables(url, "charges") // many,
    }


async def main() -> None:
    from tests import postgres

    with postgres.running() as server, postgres.new_database(server) as url:
        for what, size in {**await on_sqlite(MANY), **await on_postgres(url, MANY)}.items():
            print(f"{what}: {size:,} bytes a charge")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
