"""The service, killed under load: what it confirmed is there, and all of it adds up."""

import asyncio
from pathlib import Path

import httpx
import pytest

from ..serving import start_service

ADMIN = {"Authorization": "Bearer admins"}

pytestmark = pytest.mark.slow


async def deduct(client: httpx.AsyncClient, key: str) -> httpx.Response:
    body = {"tenant_id": "acme", "amount": 1}
    return await client.post("/v1/deductions", json=body, headers={"Idempotency-Key": key})


async def test_kill_under_load_loses_nothing_confirmed(tmp_path: Path) -> None:
    """Confirmed is confirmed; what went unanswered is settled, once, by the same key."""
    confirmed: dict[str, str] = {}
    sent: list[str] = []

    async def load(client: httpx.AsyncClient, worker: int) -> None:
        for number in range(10_000):
            key = f"charge-{worker}-{number}"
            sent.append(key)
            try:
                response = await deduct(client, key)
            except httpx.TransportError:
                return
            confirmed[key] = response.json()["transaction_id"]

    with start_service(tmp_path) as (process, url):
        async with httpx.AsyncClient(base_url=url, headers=ADMIN, trust_env=False) as client:
            grant = {"tenant_id": "acme", "amount": 1_000_000, "reason": "test"}
            assert (await client.post("/v1/grants", json=grant, headers={"Idempotency-Key": "g"})).is_success
            workers = [asyncio.create_task(load(client, worker)) for worker in range(8)]
            while len(confirmed) < 200:
                await asyncio.sleep(0.01)
            process.kill()
            await asyncio.gather(*workers)
    assert len(confirmed) < len(sent)

    with start_service(tmp_path) as (_, url):
        async with httpx.AsyncClient(base_url=url, headers=ADMIN, trust_env=False) as client:
            for key in sent:
                again = await deduct(client, key)
                if key in confirmed:
                    assert again.status_code == 200
                    assert again.json()["transaction_id"] == confirmed[key]
            balance = (await client.get("/v1/balance?tenant_id=acme")).json()["balance"]
            assert balance == 1_000_000 - len(sent)
