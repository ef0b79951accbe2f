"""What the service turns away has had no effect, and says when to come again."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from metered_billing.ledger import Ledger
from metered_billing.runtime import Runtime
from metered_billing.service import Tokens, create_app
from metered_billing.service.limits import _MAX_KEYS, Load, Rate

KEY = {"Idempotency-Key": "grant"}
GRANT = {"tenant_id": "acme", "amount": 10, "reason": "x"}

Open = Callable[..., httpx.AsyncClient]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def serve(ledger: Ledger, clock: Clock) -> AsyncIterator[Open]:
    """Make a client of a service with these bounds."""
    async with AsyncExitStack() as stack:

        def serve(token: str | None = "admins", address: str = "10.0.0.1", **options: Any) -> httpx.AsyncClient:
            app = options.pop("app", None) or create_app(
                ledger,
                Tokens.of_lines("admins admin\nothers *\nold expires=2001-01-01 *"),
                runtime=Runtime(monotonic=clock),
                **options,
            )
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            transport = httpx.ASGITransport(app, client=(address, 1), raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers)
            client.app = app  # type: ignore[attr-defined]
            stack.push_async_callback(client.aclose)
            return client

        yield serve


async def balance(client: httpx.AsyncClient) -> httpx.Response:
    return await client.get("/v1/balance?tenant_id=acme")


def name(response: httpx.Response) -> str:
    return str(response.json()["type"]).removeprefix("urn:metered-billing:")


class TestRate:
    def test_bucket_fills_again(self, clock: Clock) -> None:
        """Two a second: two at once, then one each half second; what was refused costs nothing."""
        rate = Rate(2, clock)
        assert [rate.take("a") for _ in range(3)] == [0, 0, 0.5]
        clock.now += 0.25
        assert rate.take("a") == 0.25
        clock.now += 0.25
        assert [rate.take("a") for _ in range(2)] == [0, 0.5]
        clock.now += 60
        assert [rate.take("a") for _ in range(3)] == [0, 0, 0.5]

    def test_each_key_has_its_own(self, clock: Clock) -> None:
        """One that asks too much holds up nobody else."""
        rate = Rate(1, clock)
        assert [rate.take("a"), rate.take("a"), rate.take("b")] == [0, 1, 0]

    def test_slower_than_one_a_second(self, clock: Clock) -> None:
        """One in ten seconds."""
        rate = Rate(0.1, clock)
        assert [rate.take("a"), rate.take("a")] == [0, 10]

    def test_memory_is_bounded(self, clock: Clock) -> None:
        """However many addresses there are; those that are full again go first."""
        rate = Rate(1, clock)
        for number in range(_MAX_KEYS):
            rate.take(f"old {number}")
        clock.now += 1
        for number in range(_MAX_KEYS):
            assert rate.take(f"new {number}") == 0
        assert len(rate._full_at) == _MAX_KEYS
        clock.now += 0.5
        rate.take("last")
        assert len(rate._full_at) == _MAX_KEYS // 2 + 1
        assert rate.take("last") > 0

    @pytest.mark.parametrize("number", [0, -1, float("nan")])
    def test_no_rate(self, clock: Clock, number: float) -> None:
        """Is refused."""
        with pytest.raises(ValueError):
            Rate(number, clock)


async def test_call_beyond_the_rate_moves_nothing(serve: Open, clock: Clock) -> None:
    """429 with a Retry-After that is obeyed with success; other tokens go on."""
    admin = serve(max_calls_per_s=1)
    assert (await admin.post("/v1/grants", json=GRANT, headers=KEY)).status_code == 201
    refused = await admin.post("/v1/grants", json=GRANT, headers={"Idempotency-Key": "second"})
    assert (refused.status_code, name(refused), refused.headers["retry-after"]) == (429, "rate-limited", "1")
    other = serve("others", app=admin.app)  # type: ignore[attr-defined]
    assert (await balance(other)).json() == {"balance": 10}
    clock.now += 1
    assert (await admin.post("/v1/grants", json=GRANT, headers={"Idempotency-Key": "second"})).status_code == 201


async def test_health_has_no_rate(serve: Open) -> None:
    """Who looks after the service may look as often as he likes."""
    admin = serve(max_calls_per_s=1)
    assert [(await admin.get("/healthz")).status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("token", [None, "guess", "old"])
async def test_refusals_have_a_rate_for_each_address(serve: Open, token: str | None) -> None:
    """Whoever has no token is told so once a second; whoever has one is served, from the same address too."""
    nobody = serve(token, max_calls_per_s=1)
    assert [(await balance(nobody)).status_code for _ in range(3)] == [401, 429, 429]
    app = nobody.app  # type: ignore[attr-defined]
    assert (await balance(serve(token, address="10.0.0.2", app=app))).status_code == 401
    assert (await balance(serve("others", app=app))).status_code == 200


async def test_expired_token_says_so(serve: Open) -> None:
    """401 with RFC 6750's word for it, and since when."""
    refused = await balance(serve("old"))
    assert (refused.status_code, name(refused)) == (401, "unauthorized")
    assert refused.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert "2001-01-01T00:00:00Z" in refused.json()["detail"]


async def test_token_expires_while_the_service_runs(ledger: Ledger) -> None:
    """By the wall clock, from one call to the next."""
    clock = Clock()
    app = create_app(
        ledger, Tokens.of_lines("t expires=1970-01-01T00:20:00Z *"), runtime=Runtime(now=clock, monotonic=clock)
    )
    headers = {"Authorization": "Bearer t"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://credits", headers=headers
    ) as client:
        clock.now = 1199.9
        assert (await balance(client)).status_code == 200
        clock.now = 1200.0
        assert (await balance(client)).status_code == 401


async def test_calls_under_way_are_bounded(serve: Open, monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> None:
    """503 `overloaded` beyond, with a Retry-After; and it ends with the crowd."""
    client = serve(load=Load(max_calls=2))
    go_on = asyncio.Event()

    async def slow(*_: Any) -> int:
        await go_on.wait()
        return 0

    monkeypatch.setattr(ledger, "balance", slow)
    waiting = [asyncio.create_task(balance(client)) for _ in range(2)]
    await asyncio.sleep(0.05)
    refused = await balance(client)
    assert (refused.status_code, name(refused), refused.headers["retry-after"]) == (503, "overloaded", "1")
    waiting[0].cancel()
    await asyncio.sleep(0.05)
    waiting.append(asyncio.create_task(balance(client)))
    await asyncio.sleep(0.05)
    go_on.set()
    assert [(await task).status_code for task in waiting[1:]] == [200, 200]


@pytest.mark.parametrize("path", ["/v1/grants", "/v1/deductions", "/v1/batch"])
async def test_bytes_under_way_are_bounded(serve: Open, path: str) -> None:
    """On the routes and on the short way; what was held is given back, also by those who were turned away."""
    load = Load(max_bytes=1000)
    client = serve(load=load)
    for _ in range(2):
        refused = await client.post(path, content=b" " * 1001, headers=KEY)
        assert (refused.status_code, name(refused)) == (503, "overloaded")
        assert (load.calls, load.held_bytes) == (0, 0)
    assert (await client.post("/v1/grants", json=GRANT, headers=KEY)).status_code == 201


@pytest.mark.parametrize(("calls", "held"), [(0, 1), (1, 0)])
def test_no_load(calls: int, held: int) -> None:
    """Is refused: nobody could call it."""
    with pytest.raises(ValueError):
        Load(calls, held)
