"""Credits around some work, as most people write it. It looks right, and is not."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx

PRICE = 10


class Credits:
    """One customer's credits, at a credits service."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def deduct(self, amount: int) -> str:
        answer = await self.ask("/v1/deductions", {"tenant_id": "acme", "amount": amount})
        return str(answer["transaction_id"])

    async def refund(self, transaction: str, amount: int) -> None:
        await self.ask(f"/v1/deductions/{transaction}/refunds", {"amount": amount, "reason": "failed items"})

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.client.post(path, json=body, headers={"Idempotency-Key": uuid4().hex})
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


async def sell(credits_: Credits, work: Callable[[], Awaitable[int]]) -> None:
    """Run `work`, which says how many of its ten items have failed."""
    transaction = await credits_.deduct(PRICE)
    try:
        failed = await work()
    except Exception:
        await credits_.refund(transaction, PRICE)
        raise
    if failed:
        await credits_.refund(transaction, failed)
