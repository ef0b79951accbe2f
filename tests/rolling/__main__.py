"""`make rolling`: the docs' Kubernetes manifest on plain processes, every replica replaced under load, then the books.

Real nginx with the docs' configuration, real PostgreSQL, two replicas of the app and two of the credits service. Both
Deployments are restarted at once, replica by replica. No request may fail, each is judged by what its client saw, and
`metered-billing reconcile` has to print zero.
"""

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests import postgres
from tests.chaos.judge import Seen, judge, moves_of
from tests.chaos.processes import ADMIN, Balancer, command_line
from tests.deploy.kubernetes import read, workloads
from tests.deploy.nginx import Nginx
from tests.docs.pages import EXAMPLES, ROOT
from tests.rolling.kubelet import Deployment, job
from tests.rolling.picture import Answer, picture

TENANT = "acme"

QUIET_WITHIN_S = 40.0
"""How long it may take until all is settled."""


class Rolling:
    """The two Deployments and the load.

    Args:
        pace: 1 waits as the manifest says, less is for those in a hurry.
        pause_s: How long a client thinks between two requests.
    """

    def __init__(self, directory: Path, database: str, *, clients: int, pace: float, seed: int, pause_s: float) -> None:
        self.requests: list[Seen] = []
        self.answers: list[Answer] = []
        self.done = False
        self.began = 0.0
        self._random = random.Random(seed)
        self._clients = clients
        self._directory = directory
        self._database = database
        self._nginx = Nginx(directory, [1])
        self._balancer = Balancer([])
        self._pace = pace
        self._pause_s = pause_s

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """All of it running; stopped afterwards, whatever happened."""
        documents = read()
        found = workloads(documents)
        async with await self._balancer.start():
            self.credits_url = f"http://127.0.0.1:{self._balancer.port}"
            local = {
                "postgresql://owner@db.internal/credits": self._database,
                "postgresql://owner@db.internal/billing": self._database,
                "postgresql://credits@db.internal/credits": self._database,
                "postgresql://app@db.internal/billing": self._database,
                "http://credits:8080": self.credits_url,
                "0.0.0.0": "127.0.0.1",
                "/etc/credits/tokens": str(self._tokens()),
                "production:app": "tests.rolling.app:app",
            }
            for said in await asyncio.to_thread(job, documents, local):
                print(f"· {said}")
            paths = os.pathsep.join([str(ROOT), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
            environment = {"METERED_BILLING_TOKEN": ADMIN, "PYTHONPATH": paths}
            self.deployments = [
                Deployment(
                    found[name],
                    self._directory,
                    local=local,
                    environment=environment,
                    publish=publish,
                    pace=self._pace,
                )
                for name, publish in (("credits", self._to_services), ("app", self._nginx.send_to))
            ]
            try:
                for deployment in self.deployments:
                    await deployment.scale_up()
                await asyncio.to_thread(self._nginx.start)
                await self._grant()
                self.began = time.monotonic()
                yield
            finally:
                await asyncio.to_thread(self._nginx.stop)
                for deployment in reversed(self.deployments):
                    await deployment.stop()

    def _tokens(self) -> Path:
        file = self._directory / "tokens"
        file.write_text(f"{ADMIN} admin\n")
        return file

    def _to_services(self, ports: Sequence[int]) -> None:
        # Connections that are open stay: so does kube-proxy leave them.
        self._balancer.ports = list(ports)

    # Load.

    async def load(self) -> None:
        """So many clients, one request after the other, each on a connection of its own, until `done`."""
        # nginx closes idle connections when it is reloaded: on one that is kept, that could cost a request. An ingress
        # controller that learns of endpoints without a reload does not do that.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._nginx.url, timeout=30, trust_env=False, limits=limits, verify=False
        ) as client:
            await asyncio.gather(*(self._client(client) for _ in range(self._clients)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while not self.done:
            path = self._random.choice(("/work", "/work", "/sync", "/stream"))
            seen = Seen(f"rolling-{len(self.requests)}", path, self._random.choice((0, 3, 8, 10, 10)))
            self.requests.append(seen)
            replica = ""
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(
                    f"{path}?good={seen.good}&seconds={self._random.choice((0.0, 0.05, 0.3))}",
                    headers={"x-tenant": TENANT, "x-request-id": seen.request_id},
                )
                seen.status = answer.status_code
                replica = answer.headers.get("x-replica", "")
            self.answers.append(Answer(time.monotonic(), replica, seen.status))
            await asyncio.sleep(self._pause_s)

    async def _grant(self) -> None:
        async with self._books() as client:
            body = {"tenant_id": TENANT, "amount": 10**9, "reason": "rolling"}
            (await client.post("/v1/grants", json=body, headers={"Idempotency-Key": "grant"})).raise_for_status()

    def _books(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return httpx.AsyncClient(base_url=self.credits_url, headers=headers, trust_env=False, timeout=30, verify=False)

    # Afterwards.

    async def verdict(self) -> list[str]:
        """What is wrong, once everything is settled."""
        wrong = failures(self.answers, [each.name for each in self.deployments[1].all])
        for deployment in self.deployments:
            wrong += deployment.faults
        deadline = time.monotonic() + QUIET_WITHIN_S
        while True:
            _, unjust = judge(self.requests, moves_of(await self._entries()))
            if not unjust or time.monotonic() > deadline:
                return wrong + unjust
            await asyncio.sleep(0.5)

    async def _entries(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        cursor: str | None = None
        async with self._books() as client:
            while True:
                params = {"tenant_id": TENANT, "limit": "1000"} | ({"cursor": cursor} if cursor else {})
                page = (await client.get("/v1/transactions", params=params)).raise_for_status().json()
                entries += page["items"]
                cursor = page["next_cursor"]
                if cursor is None:
                    return entries


def failures(answers: Sequence[Answer], replicas: Sequence[str]) -> list[str]:
    """Requests that were not answered 200, and replicas that answered none: then nothing was tried."""
    ended = Counter(answer.status for answer in answers)
    answered = {answer.replica for answer in answers}
    return [
        *(f"{count} x {status or 'no answer'}" for status, count in ended.items() if status != 200),
        *(f"{name} answered nothing" for name in replicas if name not in answered),
    ]


async def roll(
    database: str, *, clients: int, pace: float, seed: int, pause_s: float = 0.02, to: Path | None = None
) -> bool:
    """Restart both Deployments under load. Returns whether nobody noticed and the books balance."""
    with tempfile.TemporaryDirectory(prefix="metered-billing-rolling-") as directory:
        one = Rolling(Path(directory), database, clients=clients, pace=pace, seed=seed, pause_s=pause_s)
        async with one.up():
            load = asyncio.create_task(one.load())
            await asyncio.sleep(2 * pace)
            await asyncio.gather(*(deployment.restart() for deployment in one.deployments))
            await asyncio.sleep(2 * pace)
            one.done = True
            await load
            ended = Counter(str(answer.status) for answer in one.answers)
            print(f"· {time.monotonic() - one.began:.1f} s")
            print("· requests: " + ", ".join(f"{n:,} x {status}" for status, n in sorted(ended.items())))
            by = Counter(answer.replica for answer in one.answers)
            print("· answered by " + ", ".join(f"{name} {n:,}" for name, n in sorted(by.items())))
            wrong = await one.verdict()
            reconciled = await asyncio.to_thread(command_line, one.credits_url, database, "reconcile")
        if to is not None:
            to.write_text(picture(one.began, one.answers, [each.all for each in one.deployments]), encoding="utf-8")
        for line in wrong[:20]:
            print(f"✗ {line}")
        print(reconciled.stdout + reconciled.stderr, end="")
        good = not wrong and reconciled.returncode == 0
        if not good:
            for log in sorted(Path(directory).glob("*.log")):
                print(f"--- the end of {log.name}\n" + "\n".join(log.read_text().splitlines()[-60:]))
        print(f"{'✓' if good else '✗'} {len(wrong)} wrong, reconcile says {reconciled.returncode}", flush=True)
        return good


def main() -> None:
    parser = argparse.ArgumentParser(prog="make rolling")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--pace", type=float, default=1.0, help="1 waits as the manifest says")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--picture", type=Path, help="draw what happened into this file")
    options = parser.parse_args()
    with postgres.running() as url, postgres.new_database(url) as database:
        good = asyncio.run(
            roll(database, clients=options.clients, pace=options.pace, seed=options.seed, to=options.picture)
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
