"""The nginx.conf of the docs in a real nginx: what is charged, for whom, and when."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered
from tests.deploy.nginx import Nginx, NoNginx, program
from tests.serving import start_service

pytestmark = pytest.mark.slow

LINES = 64
"""Of half a megabyte each: more than the sockets in between hold."""


def an_app(directory: Path, streamed: threading.Event) -> FastAPI:
    app = FastAPI()
    app.add_middleware(
        MeteredBillingMiddleware,
        credits=f"sqlite:////{directory}/credits.db",
        journal=directory / "journal",
        account=lambda: Account("acme"),
    )

    @app.post("/work")
    @metered(cost=10)
    async def work(seconds: float = 0) -> dict[str, list[dict[str, str]]]:
        await asyncio.sleep(seconds)
        return {"results": [{"status": "ok"}] * 10}

    @app.post("/stream")
    @metered(cost=LINES)
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for _ in range(LINES):
                await asyncio.sleep(0.001)  # at work
                yield json.dumps({"status": "ok", "picture": "x" * (1 << 19)}) + "\n"
            streamed.set()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.post("/headers")
    async def headers(request: Request) -> dict[str, str]:
        return dict(request.headers)

    return app


class Front:
    """nginx before one app that listens at two ports, as two processes would."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.streamed = threading.Event()
        self._app = an_app(directory, self.streamed)
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.ports = [each.getsockname()[1] for each in self._sockets]

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        server = uvicorn.Server(uvicorn.Config(self._app, log_config=None, log_level="error"))
        thread = threading.Thread(target=server.run, args=(self._sockets,))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield
        finally:
            server.should_exit = True
            thread.join(15)

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    async def moves(self) -> list[tuple[str, int]]:
        """What has moved, once the app has stopped."""
        credits = SqlCredits(self._directory / "credits.db")  # noqa: A001
        try:
            page = await credits.transactions("acme", limit=100)
        finally:
            await credits.aclose()
        return [(entry["kind"], entry["amount"]) for entry in reversed(page.items) if entry["kind"] != "grant"]


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    credits = SqlCredits(tmp_path / "credits.db")  # noqa: A001
    await credits.grant("acme", amount=1000, reason="test", idempotency_key="grant")
    await credits.aclose()
    front = Front(tmp_path)
    yield front
    front.close()


@pytest.fixture
def nginx(front: Front, tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """Makes one that runs, with a few lines changed."""
    try:
        program()
    except NoNginx as error:
        pytest.skip(str(error))
    made: list[Nginx] = []

    def make(ports: list[int] | None = None, **changes: str) -> Nginx:
        directory = tmp_path / f"nginx-{len(made)}"
        directory.mkdir()
        one = Nginx(directory, ports or front.ports, changes)
        made.append(one)
        one.start()
        return one

    yield make
    for one in made:
        one.stop()


def client(nginx: Nginx, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=nginx.url, trust_env=False, **options)


async def test_configuration_is_right(front: Front, nginx: Callable[..., Nginx]) -> None:
    """`nginx -t` says so, and probes are not for the world."""
    one = nginx()
    assert "syntax is ok" in one.check()
    async with client(one) as anybody:
        assert (await anybody.get("/readyz")).status_code == 404


@pytest.mark.parametrize(
    ("retries", "deductions"),
    [("error timeout", 1), ("error timeout non_idempotent", 2)],
    ids=["ours", "non_idempotent"],
)
async def test_slow_request_is_sent_to_one_process_and_charged_once(
    front: Front, nginx: Callable[..., Nginx], retries: str, deductions: int
) -> None:
    """A request without an answer in time: 504, and all comes back. Sent again by nginx, it would be two charges."""
    with front.up():
        async with client(nginx(proxy_read_timeout="300ms", proxy_next_upstream=retries)) as customer:
            answer = await customer.post("/work?seconds=0.6")
            await asyncio.sleep(0.8)
        assert answer.status_code == 504
    assert sorted(await front.moves()) == [("deduction", -10)] * deductions + [("refund", 10)] * deductions


async def test_process_that_is_not_there_costs_nobody_a_request(front: Front, nginx: Callable[..., Nginx]) -> None:
    """It did not get the POST: the next process does, and it alone charges."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        one = nginx([nobody.getsockname()[1], front.ports[0]])
        with front.up():
            async with client(one) as customer:
                answers = [await customer.post("/work") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert await front.moves() == [("deduction", -10)] * 4


async def test_credits_service_that_is_killed_behind_nginx_is_noticed_by_nobody(
    nginx: Callable[..., Nginx], pg_url: str, tmp_path: Path
) -> None:
    """What it had not answered goes to the other one, and is done once: each call has its key."""
    headers = {"Authorization": "Bearer admins"}
    body = {"tenant_id": "acme", "amount": 1}
    answers: list[httpx.Response] = []

    async def deduct(client: httpx.AsyncClient, worker: int) -> None:
        for number in range(60):
            named = {"Idempotency-Key": f"charge-{worker}-{number}"}
            answers.append(await client.post("/v1/deductions", json=body, headers=named))

    with start_service(tmp_path, pg_url) as (process, doomed), start_service(tmp_path, pg_url) as (_, other):
        ports = [httpx.URL(url).port or 0 for url in (doomed, other)]
        front = nginx(ports, proxy_next_upstream="error timeout non_idempotent")
        async with client(front, headers=headers, timeout=30, verify=False) as through:
            grant = {"tenant_id": "acme", "amount": 1000, "reason": "test"}
            assert (await through.post("/v1/grants", json=grant, headers={"Idempotency-Key": "g"})).is_success
            workers = [asyncio.create_task(deduct(through, worker)) for worker in range(8)]
            while len(answers) < 100:
                await asyncio.sleep(0.001)
            process.kill()
            await asyncio.gather(*workers)
            assert {answer.status_code for answer in answers} <= {200, 201}
            balance = (await through.get("/v1/balance?tenant_id=acme")).json()["balance"]
    assert len(answers) == 480
    assert balance == 1000 - 480


@pytest.mark.parametrize(("ignored", "paid"), [("off", 0), ("on", 10)], ids=["ours", "ignored"])
async def test_client_that_leaves_is_seen_through_nginx(
    front: Front, nginx: Callable[..., Nginx], ignored: str, paid: int
) -> None:
    """on_disconnect="refund" works; with proxy_ignore_client_abort nobody would tell the app."""
    with front.up():
        one = nginx(proxy_ignore_client_abort=ignored)
        async with client(one, timeout=0.3) as customer:
            with pytest.raises(httpx.ReadTimeout):
                await customer.post("/work?seconds=0.6")
        await asyncio.sleep(0.6)
    assert sum(amount for _, amount in await front.moves()) == -paid


@pytest.mark.parametrize(("buffering", "taken_in"), [("off", False), ("on", True)], ids=["ours", "buffered"])
async def test_client_that_leaves_a_stream_pays_for_what_it_could_have(
    front: Front, nginx: Callable[..., Nginx], buffering: str, taken_in: bool
) -> None:
    """nginx's default takes in the whole stream ahead of its client: the app takes all of it for delivered."""
    with front.up():
        async with client(nginx(proxy_buffering=buffering)) as customer, customer.stream("POST", "/stream") as response:
            body = response.aiter_raw()
            assert await anext(body)
            # And reads no further.
            assert await asyncio.to_thread(front.streamed.wait, 20 if taken_in else 0.5) is taken_in
        await asyncio.sleep(0.2)
    moves = await front.moves()
    assert moves[0] == ("deduction", -LINES)
    assert (sum(amount for _, amount in moves) == -LINES) is taken_in


async def test_who_pays_and_what_it_is_called(front: Front, nginx: Callable[..., Nginx]) -> None:
    """A client names its request, if harmlessly; it does not name its tenant. Nothing but 10 MB gets in."""
    with front.up():
        async with client(nginx()) as customer:
            forged = {
                "X-Tenant-Id": "globex",
                "X-User-Id": "bob",
                "X-Request-ID": "req-1",
                "X-Forwarded-For": "1.2.3.4",
            }
            seen = await customer.post("/headers", headers=forged)
            assert seen.headers["x-request-id"] == seen.json()["x-request-id"] == "req-1"
            assert not {"x-tenant-id", "x-user-id"} & seen.json().keys()
            assert seen.json()["x-forwarded-for"] == "127.0.0.1"
            for name in ({}, {"X-Request-ID": "a b"}, {"X-Request-ID": "a" * 129}):
                seen = await customer.post("/headers", headers=name)
                assert len(seen.json()["x-request-id"]) == 32
            assert (await customer.post("/work", content=b" " * (10 << 20 | 1))).status_code == 413
    assert await front.moves() == []
