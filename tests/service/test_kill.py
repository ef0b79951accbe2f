"""The service, killed under load: what it confirmed is there, and all of it adds up."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ..postgres import NoPostgres, Server
from ..serving import start_service

ADMIN = {"Authorization": "Bearer admins"}

GRANTED = 1_000_000
PAUSE_S = 0.005
"""After each deduction: all are repeated in the end, and while something hangs there would be thousands."""

pytestmark = pytest.mark.slow


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def database(request: pytest.FixtureRequest) -> str:
    """Where the service keeps an empty ledger: in its directory, or on a server."""
    if request.param == "PostgreSQL":
        url: str = request.getfixturevalue("pg_url")
        return url
    return "sqlite:///credits.db"


@pytest.fixture
def server() -> Iterator[Server]:
    """A PostgreSQL server of the test's own, to be stopped."""
    try:
        server = Server()
    except NoPostgres as error:
        pytest.skip(str(error))
    yield server
    server.remove()


def connect(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers=ADMIN, trust_env=False, timeout=30, verify=False)


async def grant(client: httpx.AsyncClient) -> None:
    body = {"tenant_id": "acme", "amount": GRANTED, "reason": "test"}
    assert (await client.post("/v1/grants", json=body, headers={"Idempotency-Key": "g"})).is_success


async def deduct(client: httpx.AsyncClient, key: str) -> httpx.Response:
    body = {"tenant_id": "acme", "amount": 1}
    return await client.post("/v1/deductions", json=body, headers={"Idempotency-Key": key})


class Load:
    """Deductions of 1, one after another in each worker, until there is no answer or `done` is set."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.confirmed: dict[str, str] = {}
        self.refused: list[int] = []
        self.done = False

    async def run(self, client: httpx.AsyncClient, worker: str) -> None:
        for number in range(100_000):
            if self.done:
                return
            key = f"charge-{worker}-{number}"
            self.sent.append(key)
            try:
                response = await deduct(client, key)
            except httpx.TransportError:
                return
            if response.is_success:
                self.confirmed[key] = response.json()["transaction_id"]
                await asyncio.sleep(PAUSE_S)
            else:
                self.refused.append(response.status_code)
                await asyncio.sleep(0.02)

    def start(self, client: httpx.AsyncClient, name: str = "") -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.run(client, f"{name}{worker}")) for worker in range(4)]

    async def until_confirmed(self, more: int) -> None:
        wanted = len(self.confirmed) + more
        async with asyncio.timeout(60):
            while len(self.confirmed) < wanted:
                await asyncio.sleep(0.01)

    async def adds_up(self, client: httpx.AsyncClient) -> None:
        """What was confirmed is there; what was not is settled by the same key; each is deducted once."""
        answers: list[httpx.Response] = []
        for start in range(0, len(self.sent), 16):
            answers += await asyncio.gather(*(deduct(client, key) for key in self.sent[start : start + 16]))
        for key, again in zip(self.sent, answers, strict=True):
            assert again.is_success
            if key in self.confirmed:
                assert again.status_code == 200
                assert again.json()["transaction_id"] == self.confirmed[key]
        balance = (await client.get("/v1/balance?tenant_id=acme")).json()["balance"]
        assert balance == GRANTED - len(self.sent)


async def test_kill_under_load_loses_nothing_confirmed(tmp_path: Path, database: str) -> None:
    """Confirmed is confirmed; what went unanswered is settled, once, by the same key."""
    load = Load()
    with start_service(tmp_path, database) as (process, url):
        async with connect(url) as client:
            await grant(client)
            workers = load.start(client)
            await load.until_confirmed(100)
            process.kill()
            await asyncio.gather(*workers)
    assert len(load.confirmed) < len(load.sent)

    with start_service(tmp_path, database) as (_, url):
        async with connect(url) as client:
            await load.adds_up(client)


async def test_one_of_two_services_is_killed(tmp_path: Path, pg_url: str) -> None:
    """The other goes on, confirms what the first had not, and knows all that it had."""
    load = Load()
    with (
        start_service(tmp_path, pg_url) as (process, doomed_url),
        start_service(tmp_path, pg_url) as (_, url),
    ):
        async with connect(doomed_url) as doomed, connect(url) as client:
            await grant(client)
            ending, going_on = load.start(doomed, "doomed-"), load.start(client)
            await load.until_confirmed(100)
            process.kill()
            await asyncio.gather(*ending)
            await load.until_confirmed(50)
            load.done = True
            await asyncio.gather(*going_on)
            assert load.refused == []
            assert len(load.confirmed) < len(load.sent)
            await load.adds_up(client)


async def test_service_that_is_frozen_holds_nobody_up(tmp_path: Path, pg_url: str) -> None:
    """The server ends the transaction that it was in; what it goes on with later, it does once."""
    load = Load()
    with (
        start_service(tmp_path, pg_url) as (process, frozen_url),
        start_service(tmp_path, pg_url) as (_, url),
    ):
        async with connect(frozen_url) as frozen, connect(url) as client:
            await grant(client)
            workers = load.start(frozen, "frozen-")
            await load.until_confirmed(50)
            process.send_signal(signal.SIGSTOP)
            workers += load.start(client)
            await load.until_confirmed(50)
            await asyncio.sleep(5)  # longer than a transaction may be left idle
            process.send_signal(signal.SIGCONT)
            await load.until_confirmed(50)
            load.done = True
            await asyncio.gather(*workers)
            await load.adds_up(client)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "killed"])
async def test_database_restarted_under_a_service(tmp_path: Path, server: Server, how: signal.Signals) -> None:
    """503 while it is away; then all goes on by itself, and nothing is done twice."""
    load = Load()
    with start_service(tmp_path, server.url) as (_, url):
        async with connect(url) as client:
            await grant(client)
            workers = load.start(client)
            await load.until_confirmed(50)
            await asyncio.to_thread(server.stop, how)
            async with asyncio.timeout(60):
                while len(load.refused) < 20:
                    await asyncio.sleep(0.01)
            assert (await client.get("/healthz")).status_code == 503
            await asyncio.to_thread(server.start)
            await load.until_confirmed(50)
            load.done = True
            await asyncio.gather(*workers)
            assert set(load.refused) == {503}
            await load.adds_up(client)


async def test_database_that_hangs_under_a_service(tmp_path: Path, server: Server) -> None:
    """Stopped where it is (SIGSTOP), it is 503 within seconds; then all goes on, and nothing is done twice."""
    load = Load()
    with start_service(tmp_path, server.url) as (_, url):
        async with connect(url) as client:
            await grant(client)
            workers = load.start(client)
            await load.until_confirmed(50)
            server.pause()
            try:
                async with asyncio.timeout(60):
                    while not load.refused:
                        await asyncio.sleep(0.01)
            finally:
                server.resume()
            await load.until_confirmed(50)
            load.done = True
            await asyncio.gather(*workers)
            assert set(load.refused) == {503}
            await load.adds_up(client)
