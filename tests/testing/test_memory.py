"""The service in memory keeps what the credits API promises, as the reference service does."""

from collections.abc import AsyncIterator

import httpx
import pytest

from metered_billing.charge import Account
from metered_billing.conformance import CHECKS, Bench, Check, Outcome, run_check
from metered_billing.testing.memory import MemoryService
from metered_billing.testing.router import routed
from metered_billing.testing.wire import Wire

pytestmark = pytest.mark.anyio

URL = "http://credits.test"


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    service = MemoryService({"admin": "admin", "app": "*", "others": "tenant:others"})
    with routed("credits.test", Wire(), service):
        async with httpx.AsyncClient(base_url=URL, trust_env=False, verify=False) as http:
            yield http
    service.close()


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
async def test_service_in_memory_keeps(check: Check, http: httpx.AsyncClient) -> None:
    """Each promise, alone, on an account of its own, over respx."""
    bench = Bench(http, Account("acme"), prefix="test", token="app", admin_token="admin", foreign_token="others")
    assert (await bench.grant(100)).status == 201
    result, _ = await run_check(check, bench)
    assert (result.outcome, result.came) == (Outcome.HELD, "")
