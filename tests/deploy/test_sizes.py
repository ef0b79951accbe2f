"""The figures of "How many, and how large" are those that are measured."""

import asyncio
from pathlib import Path

import psycopg
import pytest
from starlette.types import Receive, Scope, Send

from metered_billing import HttpCredits
from metered_billing.charge import Unknown
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.ledger import Grant, Ledger
from metered_billing.service import Tokens, create_app
from tests.deploy.sizes import on_postgres, on_sqlite
from tests.docs.pages import DOCS, Page, code, table
from tests.docs.sandbox import serving_thread
from tests.scenes import charge
from tests.serving import free_port

MANY = 2_000


def on_the_page() -> dict[str, int]:
    page = Page(DOCS / "how-to" / "sizing.md")
    return {row[0]: int(row[1].replace(",", "")) for row in table(page, "On disk")}


async def test_bytes_of_a_charge_on_sqlite() -> None:
    """To a fifth: few rows fill their pages otherwise than many."""
    for what, size in (await on_sqlite(MANY)).items():
        assert on_the_page()[what] == pytest.approx(size, rel=0.2)


@pytest.mark.slow
async def test_bytes_of_a_charge_on_postgres(pg_url: str) -> None:
    """Likewise."""
    for what, size in (await on_postgres(pg_url, MANY // 2)).items():
        assert on_the_page()[what] == pytest.approx(size, rel=0.25)


def connections(page_row: str) -> int:
    (row,) = [row for row in table(Page(DOCS / "how-to" / "sizing.md"), "Connections") if row[0] == page_row]
    return int(code(row[1])[0])


async def test_connections_to_the_database(pg_url: str) -> None:
    """One for the journal of a process, one for the ledger of a process, whatever is asked of them at once."""
    journal, ledger = PostgresJournal(pg_url), Ledger(pg_url)
    await journal.start("https://credits")
    await asyncio.gather(*(journal.open(charge(owner=journal.owner)) for _ in range(50)))
    grants = (Grant(idempotency_key=f"g{n}", tenant_id="acme", user_id=None, amount=1, reason="x") for n in range(50))
    await asyncio.gather(*map(ledger.grant, grants))
    with psycopg.connect(pg_url) as connection:
        found = connection.execute(
            "SELECT application_name, count(*) FROM pg_stat_activity"
            " WHERE application_name LIKE 'metered-billing%' AND datname = current_database() GROUP BY 1"
        ).fetchall()
    await journal.close()
    await ledger.close()
    assert dict(found) == {
        "metered-billing journal": connections("journal on PostgreSQL, a process of the app"),
        "metered-billing ledger": connections("ledger on PostgreSQL, a process of the service"),
    }


async def test_connections_to_the_service(tmp_path: Path) -> None:
    """Two for deductions and one for refunds and voids, however many requests want something at the same moment."""
    service = create_app(Ledger(tmp_path / "credits.db"), Tokens({"secret": "admin"}))
    peers = set()

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peers.add(scope["client"])
            await asyncio.sleep(0.02)
        await service(scope, receive, send)

    port = free_port()
    with serving_thread(counted, port):
        credits = HttpCredits(f"http://127.0.0.1:{port}", token="secret")  # noqa: A001
        await credits.start()
        async with asyncio.TaskGroup() as asked:
            for _ in range(20):  # while others are under way
                for _ in range(10):
                    asked.create_task(credits.deduct(charge()))
                    asked.create_task(credits.void(charge(Unknown("no answer"))))
                await asyncio.sleep(0.005)
        await credits.aclose()
    assert len(peers) == connections("credits service, a process of the app")
