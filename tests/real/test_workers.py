"""uvicorn's workers with one journal in a directory: what their signals do to requests and credits."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import free_port, start_service

pytestmark = pytest.mark.slow


@dataclass
class Workers:
    """Two of them, and the service; `acme` has credits."""

    parent: subprocess.Popen[bytes]
    url: str
    service: str

    @property
    def pids(self) -> set[int]:
        children = Path(f"/proc/{self.parent.pid}/task/{self.parent.pid}/children").read_text().split()
        return {int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}

    async def work(self, seconds: float = 0) -> int | None:
        """On a connection of its own: one that is kept is closed by a worker that stops."""
        async with httpx.AsyncClient(timeout=60, trust_env=False, verify=False) as client:
            try:
                return (await client.post(f"{self.url}/work?good=8&seconds={seconds}")).status_code
            except httpx.HTTPError:
                return None

    async def moves(self) -> Counter[tuple[str, int]]:
        async with httpx.AsyncClient(
            headers={"Authorization": "Bearer acmes"}, trust_env=False, verify=False
        ) as client:
            reply = await client.get(f"{self.service}/v1/transactions?tenant_id=acme&limit=1000")
            items: list[dict[str, Any]] = reply.json()["items"]
        return Counter((item["kind"], item["amount"]) for item in items if item["kind"] != "grant")


async def until(true: Callable[[], Awaitable[bool]], within_s: float = 40) -> None:
    async with asyncio.timeout(within_s):
        while not await true():
            await asyncio.sleep(0.1)


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    with start_service(tmp_path) as (_, service):
        async with httpx.AsyncClient(
            headers={"Authorization": "Bearer admins"}, trust_env=False, verify=False
        ) as client:
            grant = {"tenant_id": "acme", "amount": 10_000, "reason": "test"}
            await client.post(f"{service}/v1/grants", json=grant, headers={"Idempotency-Key": "grant"})
        port = free_port()
        environment = {
            **os.environ,
            "METERED_BILLING_CREDITS": service,
            "METERED_BILLING_TOKEN": "acmes",
            "METERED_BILLING_JOURNAL": str(tmp_path / "journal"),
        }
        # A new worker that is not up by the end of the last of these is given up, and the old one stays.
        patience = ("--timeout-graceful-shutdown", "10", "--timeout-worker-healthcheck", "60")
        command = ("-m", "uvicorn", "tests.real.app:app", "--port", str(port), "--workers", "2", *patience)
        with subprocess.Popen([sys.executable, *command, "--log-level", "error"], env=environment) as parent:
            found = Workers(parent, f"http://127.0.0.1:{port}", service)

            async def two_serve() -> bool:
                # Each has its file as soon as it has started.
                serving = len(list((tmp_path / "journal").glob("*.lock"))) == 2
                return serving and await found.work() == 200

            await until(two_serve)
            yield found
            if parent.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    for pid in found.pids:
                        os.kill(pid, signal.SIGKILL)
                parent.kill()


async def test_workers_are_killed_replaced_and_stopped_under_load(workers: Workers) -> None:
    """Who got an answer paid for it, and who got none paid nothing; only kill -9 costs more than a stray connection."""
    sent: Counter[int | None] = Counter()
    done = asyncio.Event()

    async def load() -> None:
        while not done.is_set():
            sent[await workers.work(seconds=0.05)] += 1
            await asyncio.sleep(0.1)

    # Killed, with long requests under way in both.
    killed = min(workers.pids)
    long = [asyncio.create_task(workers.work(seconds=1.5)) for _ in range(12)]
    await until(lambda: has(workers, ("deduction", -10), 13))
    os.kill(killed, signal.SIGKILL)
    answers = Counter(await asyncio.gather(*long))
    assert answers.keys() <= {200, None}
    lost = answers[None]
    await until(lambda: has(workers, ("refund", 10), lost))
    await until(lambda: as_many(workers, 2))

    # Replaced, one after the other.
    before = workers.pids
    clients = [asyncio.create_task(load()) for _ in range(3)]
    workers.parent.send_signal(signal.SIGHUP)

    async def replaced() -> bool:
        return len(workers.pids) == 2 and not workers.pids & before

    await until(replaced)
    done.set()
    await asyncio.gather(*clients)
    # uvicorn closes a connection on which no request has come yet, and one may be on its way.
    assert sent.keys() <= {200, None}
    assert sent[200] > 10 * sent[None]

    # Stopped: what is under way is finished, and its refund too.
    last = asyncio.create_task(workers.work(seconds=1))
    await asyncio.sleep(0.5)
    workers.parent.send_signal(signal.SIGTERM)
    assert await last == 200
    assert await asyncio.to_thread(workers.parent.wait, 20) in (0, -signal.SIGTERM)
    served = 1 + answers[200] + sent[200] + 1
    moves = await workers.moves()
    assert moves[("refund", 2)] == served
    assert moves[("deduction", -10)] == served + moves[("refund", 10)]
    assert lost <= moves[("refund", 10)] <= lost + sent[None]


async def has(workers: Workers, move: tuple[str, int], many: int) -> bool:
    return (await workers.moves())[move] >= many


async def as_many(workers: Workers, many: int) -> bool:
    return len(workers.pids) == many
