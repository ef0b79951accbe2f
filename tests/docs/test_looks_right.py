"""The program that looks right: what its customer pays, row by row of the page that tells why it is not."""

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import httpx
import pytest

from metered_billing.testing import Billing, in_memory

from .pages import DOCS, EXAMPLES, Page, table

PAGE = DOCS / "explanation" / "why-the-journal-comes-first.md"
ROWS = table(Page(PAGE), "What goes wrong without one")

Work = Callable[[], Awaitable[int]]


class Killed(BaseException):
    """As sudden as a `kill -9`, as far as this program can tell: nothing catches it."""


async def two_fail() -> int:
    return 2


async def raises() -> int:
    raise RuntimeError("the model is out of memory")


async def is_killed() -> int:
    raise Killed


async def never_ends() -> int:
    await asyncio.sleep(60)
    return 0


@pytest.fixture
def program() -> ModuleType:
    """`looks_right.py`, from its file."""
    spec = importlib.util.spec_from_file_location("looks_right", EXAMPLES / "looks_right.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def fine(sell: Any, billing: Billing) -> None:
    await sell(two_fail)


async def work_raises(sell: Any, billing: Billing) -> None:
    with pytest.raises(RuntimeError):
        await sell(raises)


async def killed_at_work(sell: Any, billing: Billing) -> None:
    with pytest.raises(Killed):
        await sell(is_killed)


async def cancelled_at_work(sell: Any, billing: Billing) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sell(never_ends), 0.05)


async def answer_lost(sell: Any, billing: Billing) -> None:
    billing.fail_next("deduct", "lost reply")
    with pytest.raises(httpx.HTTPError):
        await sell(two_fail)


async def answer_lost_then_again(sell: Any, billing: Billing) -> None:
    await answer_lost(sell, billing)
    await sell(two_fail)


async def down_at_the_refund(sell: Any, billing: Billing) -> None:
    billing.fail_next("refund", "503")
    with pytest.raises(httpx.HTTPError):
        await sell(two_fail)


async def killed_before_the_refund(sell: Any, billing: Billing) -> None:
    async def refund(*_: Any) -> None:
        raise Killed

    sell.credits.refund = refund
    with pytest.raises(Killed):
        await sell(two_fail)


async def refund_tried_again(sell: Any, billing: Billing) -> None:
    billing.fail_next("refund", "lost reply")
    with pytest.raises(httpx.HTTPError):
        await sell(two_fail)
    transaction = next(entry.transaction_id for entry in billing.entries("acme") if entry.kind == "deduction")
    await sell.credits.refund(transaction, 2)


HAPPENS = [
    fine,
    work_raises,
    killed_at_work,
    cancelled_at_work,
    answer_lost,
    answer_lost_then_again,
    down_at_the_refund,
    killed_before_the_refund,
    refund_tried_again,
]
"""In the order of the rows."""


class Sell:
    """`sell` of the program, to one customer."""

    def __init__(self, program: ModuleType, client: httpx.AsyncClient) -> None:
        self.credits = program.Credits(client)
        self._sell = program.sell

    async def __call__(self, work: Work) -> None:
        await self._sell(self.credits, work)


CASES = [pytest.param(*case, id=case[1].__name__) for case in zip(ROWS, HAPPENS, strict=True)]


@pytest.mark.parametrize(("row", "happens"), CASES)
async def test_customer_pays_what_the_page_says(row: list[str], happens: Any, program: ModuleType) -> None:
    """Which is not what he should, but for the first two."""
    async with in_memory() as billing:
        billing.grant("acme", 100)
        headers = {"Authorization": f"Bearer {billing.token}"}
        async with httpx.AsyncClient(base_url=billing.url, headers=headers, verify=False) as client:
            await happens(Sell(program, client), billing)
        assert 100 - billing.balance("acme") == int(row[2])
    assert (row[1] == row[2]) == (happens in (fine, work_raises))
