"""The library at a service that says "too many": alone and in batches, nothing is charged twice and nothing lost."""

import asyncio
from pathlib import Path
from random import Random

import httpx
import pytest

from metered_billing import Account, HttpCredits
from metered_billing.charge import Deducted, Record, State, Unanswered, Unknown, Voided
from metered_billing.ledger import Grant, Ledger
from metered_billing.runtime import Runtime
from metered_billing.service import Tokens, create_app
from metered_billing.service.limits import Load


class World:
    """A clock that goes on by sleeping."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += seconds
        await asyncio.sleep(0)


def record(number: int) -> Record:
    return Record(
        id=f"charge-{number}",
        account=Account("acme"),
        amount_credits=1,
        units=1,
        state=State.OPENED,
        opened_at=0.0,
        owner="test",
    )


@pytest.mark.parametrize("batching", [True, False], ids=["in batches", "alone"])
@pytest.mark.parametrize("bound", ["rate", "load"])
async def test_too_many_is_waited_for_and_loses_nothing(tmp_path: Path, batching: bool, bound: str) -> None:
    """What was turned away was not done: each deduction is done once, or undone for good, and the books add up."""
    world = World()
    ledger = Ledger(tmp_path / "credits.db")
    await ledger.start()
    await ledger.decide(Grant(idempotency_key="g", tenant_id="acme", user_id=None, amount=100, reason="test"))
    runtime = Runtime(now=lambda: world.at, monotonic=lambda: world.at, sleep=world.sleep, random=Random(1))
    service = create_app(
        ledger,
        Tokens({"t": "*"}),
        max_calls_per_s=1 if bound == "rate" else None,
        load=Load(max_calls=1) if bound == "load" else None,
        runtime=runtime,
    )
    client = HttpCredits(
        "http://credits",
        token="t",
        transport=httpx.ASGITransport(service),
        batching=batching,
        breaker_failures=1000,
        runtime=runtime,
    )
    assert isinstance(await client.deduct(record(0)), Deducted)  # so that the next call is one too many
    records = [record(number) for number in range(1, 41)]
    answers = await asyncio.gather(*(client.deduct(each) for each in records))
    deducted = [each for each, answer in zip(records, answers, strict=True) if isinstance(answer, Deducted)]
    doubtful = [each for each, answer in zip(records, answers, strict=True) if isinstance(answer, Unknown)]
    assert len(deducted) + len(doubtful) == 40
    assert deducted
    if bound == "rate":
        assert max(world.slept) >= 1  # Retry-After is in whole seconds
    for each in doubtful:
        while isinstance(answer := await client.void(each), Unanswered):
            await world.sleep(answer.retry_after_s or 1.0)
        assert answer == Voided(0)
    assert await ledger.balance("acme", None) == 99 - len(deducted)
    await client.aclose()
    await ledger.close()
