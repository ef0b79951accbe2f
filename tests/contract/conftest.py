"""The same tests for everything that keeps credits."""

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from metered_billing.charge import Account
from metered_billing.credits import Credits
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.sql import SqlCredits
from metered_billing.ledger import Grant, Ledger
from metered_billing.service import Tokens, create_app

from .running import ADMIN, EXTERNAL_URL, TOKENS, Client, bearer, in_process, on_a_socket


@pytest.fixture(scope="session")
def service_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The reference service on a real socket."""
    with on_a_socket(f"sqlite:///{tmp_path_factory.mktemp('service')}/credits.db") as url:
        yield url


OURS = ["in process", "on a socket", "on PostgreSQL"]


@pytest.fixture(params=OURS if EXTERNAL_URL is None else ["external"])
async def service(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Client]:
    """A credits service, over HTTP, and a tenant of one's own at it."""
    if request.param in ("in process", "on PostgreSQL"):
        on_postgres = request.param == "on PostgreSQL"
        place = request.getfixturevalue("pg_clean") if on_postgres else f"sqlite:///{tmp_path}/credits.db"
        async with in_process(place) as http:
            yield Client(http)
        return
    url = EXTERNAL_URL or request.getfixturevalue("service_url")
    token = os.environ.get("CONFORMANCE_TOKEN", ADMIN)
    async with httpx.AsyncClient(base_url=url, headers=bearer(token), verify=False) as http:
        yield Client(http)


@dataclass
class Backend:
    """Credits, and the ledger behind them, to prepare and to look at."""

    credits: Credits
    ledger: Ledger

    async def grant(self, account: Account, amount: int) -> None:
        answer = await self.ledger.grant(
            Grant(
                idempotency_key=f"grant-{account.user_id}-{amount}",
                tenant_id=account.tenant_id,
                user_id=account.user_id,
                amount=amount,
                reason="test",
            )
        )
        assert answer.done

    async def balance(self, account: Account) -> int:
        return await self.ledger.balance(account.tenant_id, account.user_id)


@pytest.fixture(params=["SqlCredits", "HttpCredits", "SqlCredits on PostgreSQL", "HttpCredits on PostgreSQL"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    """Every kind of credits that the library has."""
    kind, _, engine = request.param.partition(" on ")
    place = request.getfixturevalue("pg_clean") if engine else f"sqlite:///{tmp_path}/credits.db"
    kept: SqlCredits | HttpCredits
    if kind == "SqlCredits":
        kept = SqlCredits(place)
        ledger = kept.ledger
    else:
        ledger = Ledger(place)
        transport = httpx.ASGITransport(create_app(ledger, Tokens(TOKENS)))
        # Patient: a busy machine is no failure.
        kept = HttpCredits("http://credits", token=ADMIN, transport=transport, timeout_s=60, attempt_timeout_s=30)
    yield Backend(kept, ledger)
    await kept.aclose()
    await ledger.close()
