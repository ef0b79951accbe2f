"""The reference service keeps every promise that `metered-billing conformance` looks at: one test a check."""

from typing import Any

import pytest

from metered_billing.charge import Account
from metered_billing.conformance import CHECKS, Bench, Check, Outcome, run_check

from .conftest import OURS
from .running import ACME, ADMIN, EXTERNAL_URL, Client

# In process in the everyday tests; each check over a socket and on PostgreSQL too in all of them.
SERVICES: list[Any] = [OURS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in OURS[1:])]


@pytest.mark.parametrize("service", SERVICES if EXTERNAL_URL is None else ["external"], indirect=True)
@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
async def test_reference_service_keeps(check: Check, service: Client) -> None:
    """Alone, on an account of its own."""
    bench = Bench(
        service.http,
        Account(service.tenant),
        prefix=service.tenant,
        token=ADMIN,
        admin_token=ADMIN,
        foreign_token=ACME,
    )
    assert (await bench.grant(100)).status == 201
    result, _ = await run_check(check, bench)
    assert (result.outcome, result.came) == (Outcome.HELD, "")
    assert await service.balance() == 100
