"""`make chaos`: real processes under load, kill -9 of one of them about every second, then the books.

Everything is real: uvicorn with two workers, the credits service (two on PostgreSQL), sockets, files. When the
storm is over every request is judged by what its client saw, and `metered-billing reconcile` has to print zero.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests import postgres
from tests.chaos.judge import Moves, Seen, judge, moves_of
from tests.chaos.processes import ADMIN, Balancer, Process, a_service, an_app, command_line

TENANTS = ("acme", "globex", "poor")
CLIENTS = 24
KINDS = ("worker",) * 5 + ("service",) * 3 + ("app", "cut", "database")
"""What is struck, as often as it stands here."""

QUIET_WITHIN_S = 120.0
"""How long the survivors may take to settle everything. A lease and a round of recovery take 30 s."""


class Storm:
    """The load, the blows, and what came of each request."""

    def __init__(self, directory: Path, seed: int, pg: "postgres.Server | None", kinds: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.requests: list[Seen] = []
        self.blows: Counter[str] = Counter()
        self._directory = directory
        self._pg = pg
        self._database_down = False
        self._ran = 0
        self._kinds = [kind for kind in kinds if pg is not None or kind != "database"]
        if pg is None:
            self.journal = str(directory / "journal")
            self.services = [a_service("service", f"sqlite:////{directory}/credits.db", directory)]
        else:
            self.journal = pg.url
            self.services = [a_service(f"service-{n}", pg.url, directory) for n in (1, 2)]
        self.balancer = Balancer([service.port for service in self.services])

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """All of it running; stopped afterwards, whatever happened."""
        async with await self.balancer.start():
            self.credits_url = f"http://127.0.0.1:{self.balancer.port}"
            self.app = an_app("app", self.credits_url, self.journal, self._directory)
            try:
                for process in (*self.services, self.app):
                    process.start()
                    await process.wait_until_up()
                yield
            finally:
                for process in (self.app, *self.services):
                    await asyncio.to_thread(process.stop)

    # Load.

    async def load(self, until: float) -> None:
        """So many clients, one request after the other."""
        url = f"http://127.0.0.1:{self.app.port}"
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False) as client:
            await asyncio.gather(*(self._client(client, until) for _ in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            self._ran += 1
            path = self.random.choice(("/work", "/work", "/sync", "/stream", "/raise"))
            seen = Seen(f"storm-{self._ran}", path, self.random.choice((0, 3, 8, 10, 10)))
            self.requests.append(seen)
            down = self._database_down
            seconds = self.random.choice((0.0, 0.02, 0.3))
            try:
                response = await client.post(
                    f"{path}?good={seen.good}&seconds={seconds}",
                    headers={"x-tenant": self.random.choice(TENANTS), "x-request-id": seen.request_id},
                )
                seen.status = response.status_code
            except httpx.HTTPError:
                await asyncio.sleep(0.3)
            seen.excused = down or self._database_down
            if seen.status == 503:
                await asyncio.sleep(0.2)

    async def grants(self, until: float) -> None:
        """Plenty for some; for one just enough now and then, so that it is declined in between."""
        async with self._books() as client:
            number = 0
            while number == 0 or time.monotonic() < until:
                for tenant, amount in (("acme", 10**9), ("globex", 10**9)) if number == 0 else (("poor", 70),):
                    with contextlib.suppress(httpx.HTTPError):
                        await client.post(
                            "/v1/grants",
                            json={"tenant_id": tenant, "amount": amount, "reason": "storm"},
                            headers={"Idempotency-Key": f"grant-{tenant}-{number}"},
                        )
                number += 1
                await asyncio.sleep(2)

    def _books(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return httpx.AsyncClient(base_url=self.credits_url, headers=headers, trust_env=False, timeout=30, verify=False)

    # Blows.

    async def blows_fall(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(self.random.uniform(0.6, 1.4))
            await getattr(self, f"_kill_{self.random.choice(self._kinds)}")()

    async def _kill_worker(self) -> None:
        if workers := self.app.workers:
            self.blows["kill -9 worker"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(workers), signal.SIGKILL)

    async def _kill_service(self) -> None:
        self.blows["kill -9 service"] += 1
        await self._restart(self.random.choice(self.services))

    async def _kill_app(self) -> None:
        self.blows["kill -9 app"] += 1
        await self._restart(self.app)

    async def _kill_cut(self) -> None:
        self.blows["connections cut"] += self.balancer.cut_all()

    async def _kill_database(self) -> None:
        if self._pg is not None:
            self.blows["crash of PostgreSQL"] += 1
            self._database_down = True
            await asyncio.to_thread(self._pg.stop, signal.SIGQUIT)
            await asyncio.sleep(self.random.uniform(0, 2))
            await asyncio.to_thread(self._pg.start)
            await self.app.wait_until_up()
            await asyncio.sleep(1)
            self._database_down = False
            await asyncio.sleep(4)  # or hardly anything would be under way when the next one falls

    async def _restart(self, process: Process) -> None:
        process.kill()
        await asyncio.sleep(self.random.uniform(0, 1.0))
        process.start()
        # A storm on what is down already shows nothing.
        await process.wait_until_up()

    # Afterwards.

    async def moves(self) -> Mapping[str, Moves]:
        entries: list[dict[str, Any]] = []
        async with self._books() as client:
            for tenant in TENANTS:
                cursor: str | None = None
                while True:
                    params = {"tenant_id": tenant, "limit": "1000"} | ({"cursor": cursor} if cursor else {})
                    page = (await client.get("/v1/transactions", params=params)).raise_for_status().json()
                    entries += page["items"]
                    cursor = page["next_cursor"]
                    if cursor is None:
                        break
        return moves_of(entries)

    async def verdict(self) -> list[str]:
        """What is wrong once everything is settled. Waits for that."""
        for process in (*self.services, self.app):
            await process.wait_until_up()
        deadline = time.monotonic() + QUIET_WITHIN_S
        while True:
            ended, wrong = judge(self.requests, await self.moves())
            if not wrong or time.monotonic() > deadline:
                print("· requests: " + ", ".join(f"{n:,} x {status}" for status, n in sorted(ended.items())))
                return wrong
            print(f"· {len(wrong)} not settled yet: {wrong[0]}", flush=True)
            await asyncio.sleep(3)


async def storm(engine: str, seconds: float, seed: int, kinds: Sequence[str] = KINDS) -> bool:
    """Run one. Returns whether the books balance."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metered-billing-chaos-")))
        pg = None
        if engine == "postgres":
            # With its syncs to disk: what it has confirmed survives its crash.
            pg = postgres.Server("-c", "max_connections=100")
            stack.callback(pg.remove)
        one = Storm(directory, seed, pg, kinds)
        print(f"· {engine}: {seconds:.0f} s, {CLIENTS} clients, seed {seed}", flush=True)
        async with one.up():
            until = time.monotonic() + seconds
            work = asyncio.gather(one.load(until), one.grants(until), one.blows_fall(until))
            while not work.done():
                await asyncio.wait([work], timeout=10)
                blows = ", ".join(f"{n} x {kind}" for kind, n in sorted(one.blows.items()))
                left_s = max(until - time.monotonic(), 0)
                print(f"· {left_s:4.0f} s left: {len(one.requests):,} requests; {blows}", flush=True)
            await work
            wrong = await one.verdict()
            reconciled = await asyncio.to_thread(command_line, one.credits_url, one.journal, "reconcile")
        for line in wrong[:20]:
            print(f"✗ {line}")
        print(reconciled.stdout + reconciled.stderr, end="")
        good = not wrong and reconciled.returncode == 0
        if not good:
            for log in sorted(directory.glob("*.log")):
                print(f"--- the end of {log.name}\n" + "\n".join(log.read_text().splitlines()[-30:]))
        print(
            f"{'✓' if good else '✗'} {engine}: {len(wrong)} wrong, reconcile says {reconciled.returncode}", flush=True
        )
        return good


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--engine", choices=("sqlite", "postgres", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", choices=sorted(set(KINDS)), action="append", help="strike nothing else")
    options = parser.parse_args()
    engines = ("sqlite", "postgres") if options.engine == "both" else (options.engine,)
    results = [asyncio.run(storm(engine, options.seconds, options.seed, options.only or KINDS)) for engine in engines]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
