"""Two apps, one PostgreSQL journal, a credits service: one app is stopped or killed, the other finishes its charges."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import postgres
from tests.serving import free_port, start_service

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("shared-journal")]


@dataclass
class App:
    """A uvicorn that serves `tests.real.app`; what it logs stands in a file."""

    url: str
    log: Path
    running: asyncio.subprocess.Process

    async def work(self, seconds: float = 0) -> httpx.Response:
        async with httpx.AsyncClient(timeout=120, verify=False) as client:
            return await client.post(f"{self.url}/work?good=8&seconds={seconds}")

    def signal(self, how: signal.Signals) -> None:
        self.running.send_signal(how)


@dataclass
class Stand:
    """The service, the journal's server, and the apps."""

    service: str
    server: postgres.Server
    directory: Path
    apps: list[App]

    async def app(self) -> App:
        port = free_port()
        url, log = f"http://127.0.0.1:{port}", self.directory / f"app-{port}.log"
        environment = {
            **os.environ,
            "METERED_BILLING_CREDITS": self.service,
            "METERED_BILLING_TOKEN": "acmes",
            "METERED_BILLING_JOURNAL": self.server.url,
        }
        command = ("-m", "uvicorn", "tests.real.app:app", "--port", str(port), "--log-level", "warning")
        with log.open("wb") as output:
            running = await asyncio.create_subprocess_exec(
                sys.executable, *command, env=environment, stdout=output, stderr=output
            )
        app = App(url, log, running)
        self.apps.append(app)
        async with httpx.AsyncClient(verify=False) as client, asyncio.timeout(60):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await client.get(f"{url}/up")
                    return app
                await asyncio.sleep(0.05)

    async def moves(self) -> list[tuple[str, int]]:
        """What the service says has been moved, the oldest first."""
        async with httpx.AsyncClient(headers={"Authorization": "Bearer acmes"}, verify=False) as client:
            reply = await client.get(f"{self.service}/v1/transactions?tenant_id=acme&limit=1000")
            items: list[dict[str, Any]] = reply.json()["items"]
        return [(item["kind"], item["amount"]) for item in reversed(items) if item["kind"] != "grant"]

    async def until(self, moves: list[tuple[str, int]], within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while sorted(await self.moves()) != sorted(moves):
                    await asyncio.sleep(0.2)
        assert sorted(await self.moves()) == sorted(moves)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    try:
        server = postgres.Server()
    except postgres.NoPostgres as error:
        pytest.skip(str(error))
    yield server
    server.remove()


@pytest.fixture
async def stand(tmp_path: Path, server: postgres.Server) -> AsyncIterator[Stand]:
    with start_service(tmp_path) as (_, url):
        async with httpx.AsyncClient(headers={"Authorization": "Bearer admins"}, verify=False) as client:
            grant = {"tenant_id": "acme", "amount": 10_000, "reason": "test"}
            granted = await client.post(f"{url}/v1/grants", json=grant, headers={"Idempotency-Key": "grant"})
            assert granted.status_code == 201
        stand = Stand(url, server, tmp_path, [])
        yield stand
        for app in stand.apps:
            if app.running.returncode is None:
                app.signal(signal.SIGCONT)
                app.running.kill()
                await app.running.wait()


async def test_app_that_is_stopped_across_its_lease_settles_each_charge_once(stand: Stand) -> None:
    """The other app refunds what it had under way. When it goes on, its response goes out, and it serves the next."""
    stopped, _ = await stand.app(), await stand.app()
    request = asyncio.create_task(stopped.work(seconds=3))
    await stand.until([("deduction", -10)], 10)
    stopped.signal(signal.SIGSTOP)
    await stand.until([("deduction", -10), ("refund", 10)], 60)
    stopped.signal(signal.SIGCONT)
    response = await request
    assert response.status_code == 200
    async with asyncio.timeout(20):
        while (await stopped.work()).status_code != 200:
            await asyncio.sleep(0.2)
    await stand.until([("deduction", -10), ("refund", 10), ("deduction", -10), ("refund", 2)], 20)
    assert "charge.ownership_lost" in stopped.log.read_text()


async def test_what_a_killed_app_left_is_settled_by_the_other(stand: Stand) -> None:
    """When its lease has run out, without a restart."""
    killed, _ = await stand.app(), await stand.app()
    requests = [asyncio.create_task(killed.work(seconds=60)) for _ in range(5)]
    await stand.until([("deduction", -10)] * 5, 10)
    killed.signal(signal.SIGKILL)
    await asyncio.gather(*requests, return_exceptions=True)
    await stand.until([("deduction", -10)] * 5 + [("refund", 10)] * 5, 60)


async def test_database_that_restarts_under_load_costs_nobody_anything(stand: Stand) -> None:
    """Each request is served or answered 503; what is kept is what was delivered, or less."""
    apps = [await stand.app(), await stand.app()]
    statuses: list[int] = []

    back_again = asyncio.Event()

    async def load(app: App) -> None:
        left = 10
        while left:
            left -= back_again.is_set()
            statuses.append((await app.work(seconds=0.1)).status_code)
            await asyncio.sleep(0.05)

    async def restart() -> None:
        await asyncio.sleep(1)
        stand.server.stop(signal.SIGQUIT)
        await asyncio.sleep(1)
        await asyncio.to_thread(stand.server.start)
        back_again.set()

    await asyncio.gather(restart(), *(load(app) for app in apps for _ in range(4)))
    assert set(statuses) <= {200, 503}
    assert statuses[-1] == 200
    async with asyncio.timeout(60):
        while True:
            moves = await stand.moves()
            deducted = [amount for kind, amount in moves if kind == "deduction"]
            back = [amount for kind, amount in moves if kind != "deduction"]
            if len(deducted) == len([amount for amount in back if amount]):
                break
            await asyncio.sleep(0.5)
    assert set(back) <= {0, 2, 10}
    kept = -sum(deducted) - sum(back)
    assert 0 < kept <= 8 * statuses.count(200)
