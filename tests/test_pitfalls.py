"""Mistakes seen in published packages of this kind: each is a test of ours."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered, settled
from metered_billing.ledger import Ledger
from metered_billing.service.app import create_app
from metered_billing.service.tokens import Tokens
from tests.faults import Faulty
from tests.stand import serving

ANN = Account("acme", "ann")
BOTH = {"Authorization": "Bearer secret"}


class Shop:
    """An app with a route of ten credits, and the credits service that it pays at."""

    def __init__(self, directory: Path) -> None:
        self.service = create_app(
            Ledger(directory / "credits.db"), Tokens({"secret": "admin", "other": "tenant:other"})
        )
        self.line = Faulty(httpx.ASGITransport(self.service))
        self.office = httpx.AsyncClient(transport=httpx.ASGITransport(self.service), base_url="http://credits")
        self.response: Any = {"done": True}
        self.app = FastAPI()
        credits = HttpCredits(  # noqa: A001
            "http://credits", token="secret", transport=self.line, breaker_failures=1000
        )
        self.app.add_middleware(
            MeteredBillingMiddleware, credits=credits, journal=directory / "journal", account=lambda: ANN
        )

        @self.app.post("/work")
        @metered(cost=10)
        async def work() -> Any:
            if isinstance(self.response, BaseException):
                raise self.response
            if callable(self.response) and not isinstance(self.response, Response):
                return await self.response()
            return self.response

    async def grant(self, amount: int, key: str) -> None:
        body = {"tenant_id": "acme", "user_id": "ann", "amount": amount, "reason": "test"}
        answer = await self.office.post("/v1/grants", json=body, headers={**BOTH, "Idempotency-Key": key})
        assert answer.status_code == 201, answer.text

    async def moves(self) -> list[tuple[str, int]]:
        await settled()
        params = {"tenant_id": "acme", "user_id": "ann"}
        answer = await self.office.get("/v1/transactions", params=params, headers=BOTH)
        return [(item["kind"], item["amount"]) for item in reversed(answer.json()["items"]) if item["kind"] != "grant"]

    async def until(self, moves: list[tuple[str, int]]) -> None:
        """Wait until the ledger says so; it goes by the recovery's own time."""
        async with asyncio.timeout(20):
            while await self.moves() != moves:
                await asyncio.sleep(0.02)


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    shop = Shop(tmp_path)
    await shop.grant(100, "grant")
    yield shop
    await shop.office.aclose()
    await shop.service.state.ledger.close()


async def post(shop: Shop) -> httpx.Response:
    async with serving(shop.app) as client:
        return await client.post("/work")


async def test_answered_500_does_not_keep_the_charge(shop: Shop) -> None:
    """Not only exceptions refund."""
    shop.response = JSONResponse({}, 500)
    assert (await post(shop)).status_code == 500
    assert await shop.moves() == [("deduction", -10), ("refund", 10)]


async def test_cancelled_request_does_not_keep_its_credits(shop: Shop) -> None:
    """`except Exception` would miss `CancelledError`."""
    running = asyncio.Event()

    async def forever() -> None:
        running.set()
        await asyncio.sleep(60)

    shop.response = forever
    async with serving(shop.app) as client:
        task = asyncio.create_task(client.post("/work"))
        await running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await shop.until([("deduction", -10), ("refund", 10)])


@pytest.mark.parametrize("fault", ["refused", "lost request", "500"])
async def test_outage_is_not_answered_402(shop: Shop, fault: str) -> None:
    """Customers would pay again for what they have: it is 503, and nothing runs."""
    shop.line.always = fault
    response = await post(shop)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["type"] == "urn:metered-billing:credits-unavailable"
    assert await shop.moves() == []


@pytest.mark.parametrize("fault", ["lost reply", "500 after"])
async def test_deduction_that_was_done_unheard_is_not_done_again(shop: Shop, fault: str) -> None:
    """It is sent again under the same key, never under a new one."""
    shop.line.faults = [fault, fault]
    assert (await post(shop)).status_code == 200
    assert await shop.moves() == [("deduction", -10)]
    keys = {call.headers["idempotency-key"] for call in shop.line.calls}
    assert (len(shop.line.calls), len(keys)) == (3, 1)


@pytest.mark.parametrize("fault", ["lost reply", "500 after"])
async def test_deduction_whose_answer_is_never_heard_is_voided(shop: Shop, fault: str) -> None:
    """The client hears 503, the route does not run, and what was taken comes back."""
    shop.line.faults = [fault] * 3
    shop.response = pytest.fail
    assert (await post(shop)).status_code == 503
    assert await shop.moves() == [("deduction", -10), ("void", 10)]


async def test_late_copy_of_a_voided_deduction_is_refused(shop: Shop) -> None:
    """The tombstone stands: credits that were never taken cannot be taken afterwards."""
    shop.line.faults = ["lost request"] * 3
    await post(shop)
    assert await shop.moves() == []
    copy = shop.line.calls[0]
    late = await shop.office.post("/v1/deductions", content=copy.content, headers=copy.headers)
    assert (late.status_code, late.json()["type"]) == (409, "urn:metered-billing:charge-voided")
    assert await shop.moves() == []


async def test_refund_that_fails_does_not_turn_success_into_503(shop: Shop) -> None:
    """The work is safe; the refund is tried until it has gone through."""
    shop.response = {"results": [{"status": "ok"}] * 8 + [{"status": "failed"}] * 2}
    shop.line.faults = ["ok", "500", "lost reply"]
    async with serving(shop.app) as client:
        response = await client.post("/work")
        assert (response.status_code, response.json()) == (200, shop.response)
        assert response.headers["credits-refunded"] == "2"
        await shop.until([("deduction", -10), ("refund", 2)])


async def test_late_copy_of_a_refund_moves_nothing(shop: Shop) -> None:
    """One refund takes effect, however often it arrives."""
    shop.response = JSONResponse({}, 500)
    shop.line.faults = ["ok", "late duplicate"]
    await post(shop)
    assert await shop.line.deliver_late() == [200]
    assert await shop.moves() == [("deduction", -10), ("refund", 10)]


async def test_late_copy_of_a_deduction_moves_nothing(shop: Shop) -> None:
    """Likewise."""
    shop.line.faults = ["late duplicate"]
    await post(shop)
    assert await shop.line.deliver_late() == [200]
    assert await shop.moves() == [("deduction", -10)]


async def test_decline_is_not_replayed_after_a_top_up(shop: Shop) -> None:
    """A new request is a new charge, with a new key."""
    shop.response = JSONResponse({"results": [{"status": "ok"}] * 10})
    for _ in range(10):
        assert (await post(shop)).status_code == 200
    assert (await post(shop)).status_code == 402
    await shop.grant(10, "top-up")
    assert (await post(shop)).status_code == 200


async def test_keys_are_scoped_to_the_tenant(shop: Shop) -> None:
    """One customer is never served another's transaction."""
    await post(shop)
    call = shop.line.calls[0]
    stolen = await shop.office.post(
        "/v1/deductions",
        json={"tenant_id": "other", "amount": 10},
        headers={"Authorization": "Bearer other", "Idempotency-Key": call.headers["idempotency-key"]},
    )
    assert stolen.status_code == 402  # a deduction of its own, of an account without credits
    assert await shop.moves() == [("deduction", -10)]


async def test_token_is_looked_at_in_full(shop: Shop) -> None:
    """No cache of keys that ignores the secret: the right one first, then one that begins alike."""
    params = {"tenant_id": "acme"}
    for token, status in (("secret", 200), ("secret2", 401), ("secre", 401), ("SECRET", 401), ("", 401)):
        answer = await shop.office.get("/v1/balance", params=params, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status


async def test_same_key_with_another_amount_is_refused(shop: Shop) -> None:
    """Not silently taken for the same."""
    await post(shop)
    call = shop.line.calls[0]
    body = {"tenant_id": "acme", "user_id": "ann", "amount": 11}
    answer = await shop.office.post(
        "/v1/deductions", json=body, headers={**BOTH, "Idempotency-Key": call.headers["idempotency-key"]}
    )
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:metered-billing:idempotency-key-reused")


async def test_refund_names_the_charge_that_it_refunds(shop: Shop) -> None:
    """In the ledger, by its transaction, and under a key that is made of the charge's id."""
    shop.response = JSONResponse({}, 500)
    await post(shop)
    assert len(await shop.moves()) == 2
    answer = await shop.office.get("/v1/transactions", params={"tenant_id": "acme", "user_id": "ann"}, headers=BOTH)
    refund, deduction, _ = answer.json()["items"]
    assert refund["transaction_id"] == deduction["transaction_id"]
    assert refund["idempotency_key"] == f"{deduction['idempotency_key']}:refund"


@pytest.mark.parametrize("outside", [True, False])
async def test_402_behind_base_http_middleware_is_not_a_500(shop: Shop, outside: bool) -> None:
    """An exception raised inside `BaseHTTPMiddleware` would be one; ours is an answer."""

    async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    shop.response = JSONResponse({"results": [{"status": "ok"}] * 10})
    if outside:
        shop.app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    else:
        shop.app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=pass_on))
    for _ in range(10):
        assert (await post(shop)).status_code == 200
    assert (await post(shop)).status_code == 402
    assert len(await shop.moves()) == 10
