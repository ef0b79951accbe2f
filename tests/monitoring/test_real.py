"""A real Prometheus watches a real app and a real credits service, while things go wrong.

Its rules are the shipped ones, sixty times as fast.
"""

import asyncio
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, Page

from .cases import CRITICAL, WARNING
from .programs import program
from .scene import Scene, scene
from .shipped import queries

pytestmark = pytest.mark.slow

ONE_BY_ONE = {
    ("Disputed", WARNING),
    ("OutcomesUnreadable", WARNING),
    ("OutcomesMismatch", WARNING),
    ("Drift", CRITICAL),
}
DOWN = {("CreditsUnavailable", CRITICAL), ("CircuitOpen", WARNING), ("RefundsOverdue", WARNING)}
REJECTED = {("TokenRejected", CRITICAL)}
# On a very slow machine: an hour of these is a minute, three are three.
PERHAPS = {("RefundsOverdue", CRITICAL), ("ReconcileStale", WARNING)}


@pytest.mark.anyio
async def test_alerts_fire_in_the_cases_they_name_and_are_quiet_otherwise(tmp_path: Path) -> None:
    """And every query of the dashboard and of the runbook has an answer, under load and faults."""
    program("prometheus")
    async with scene(tmp_path) as on:
        await quiet(on)
        await trouble_with_single_charges(on)
        await service_down(on)
        await token_rejected(on)
        await every_query_has_an_answer(on)
        assert await on.fired() - PERHAPS == ONE_BY_ONE | DOWN | REJECTED
        assert len(on.texts) >= 3 * len(ONE_BY_ONE | DOWN | REJECTED) - 3
        assert not [text for text in on.texts if "error" in text or "{{" in text or "%!" in text]


async def quiet(on: Scene) -> None:
    """Nothing fires, and nothing is about to: partial refunds and empty accounts are business."""
    for _ in range(40):
        await asyncio.sleep(0.2)
        assert await on.alerts() == []
    for kind in ("deducted", "kept", "refunded"):
        [credits] = await on.query(f'metered_billing_credits_total{{metered_billing_kind="{kind}"}}')  # noqa: A001
        assert float(credits["value"][1]) > 0
    assert await on.query('metered_billing_operation_duration_seconds_count{metered_billing_outcome="declined"}')


async def trouble_with_single_charges(on: Scene) -> None:
    """One each is enough: it is about money."""
    assert (await on.post("/disputed")).status_code == 200
    assert (await on.post("/mismatch")).status_code == 200
    # Somebody gives credits back by hand, past the app.
    transaction_id = (await on.post("/work", "ann")).headers["credits-transaction-id"]
    await asyncio.sleep(0.5)
    await on.ask_service(f"/v1/deductions/{transaction_id}/refunds", {"amount": 1, "reason": "by hand"}, "by-hand")
    assert await on.reconcile() == 3
    await on.until_fired(ONE_BY_ONE)


async def service_down(on: Scene) -> None:
    """First deductions get no answer, then refunds are late."""
    under_way = asyncio.ensure_future(on.post("/work?failed=10&seconds=1"))
    await asyncio.sleep(0.5)
    on.service.kill()
    assert (await under_way).status_code == 200
    assert (await on.post("/work")).status_code == 503
    await on.until_fired(DOWN)


async def token_rejected(on: Scene) -> None:
    """It is back, with other tokens. When it has the right one, everything comes to its end by itself."""
    await on.restart_service("another")
    await on.until_fired(REJECTED)
    await on.restart_service()
    await on.until_over(DOWN | {("RefundsOverdue", CRITICAL)})


async def every_query_has_an_answer(on: Scene) -> None:
    """Each panel's has data, and each page's is no error."""
    for name, expr in queries().items():
        for variable, value in (("$__rate_interval", "10s"), ("$__range", "60s"), ("$job", ".*")):
            expr = expr.replace(variable, value)
        assert await on.query(expr), f"{name}: {expr}"
    for path in sorted((DOCS / "how-to" / "runbook").glob("*.md")):
        for block in Page(path).blocks:
            if block.language == "promql":
                await on.query(block.text)
