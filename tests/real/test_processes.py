"""Real uvicorn, real sockets, real signals: what is deducted comes back, whatever happens to the process."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from metered_billing import SqlCredits
from tests.serving import free_port

pytestmark = pytest.mark.slow


@dataclass
class Process:
    """A uvicorn that serves `tests.real.app`, on files in a directory of its own."""

    directory: Path
    port: int
    running: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(cls, directory: Path, *options: str, port: int | None = None) -> "Process":
        process = cls(directory, port or free_port())
        await process.up(*options)
        return process

    async def up(self, *options: str) -> None:
        environment = {
            **os.environ,
            "METERED_BILLING_CREDITS": f"sqlite:////{self.directory}/credits.db",
            "METERED_BILLING_JOURNAL": str(self.directory / "journal"),
        }
        command = ("-m", "uvicorn", "tests.real.app:app", "--port", str(self.port), "--log-level", "warning", *options)
        self.running = await asyncio.create_subprocess_exec(sys.executable, *command, env=environment)
        async with httpx.AsyncClient(verify=False) as client, asyncio.timeout(30):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await client.get(self.url("/up"))
                    return
                await asyncio.sleep(0.05)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def end(self, by: signal.Signals) -> int:
        assert self.running is not None
        self.running.send_signal(by)
        async with asyncio.timeout(30):
            return await self.running.wait()

    async def moves(self) -> list[tuple[str, int]]:
        """What the ledger says; only while no process has it."""
        credits = SqlCredits(self.directory / "credits.db")  # noqa: A001
        try:
            page = await credits.transactions("acme", limit=1000)
            return [(entry["kind"], entry["amount"]) for entry in reversed(page.items) if entry["kind"] != "grant"]
        finally:
            await credits.aclose()


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    credits = SqlCredits(tmp_path / "credits.db")  # noqa: A001
    await credits.grant("acme", amount=100_000, reason="test", idempotency_key="grant")
    await credits.aclose()
    process = await Process.start(tmp_path, "--timeout-graceful-shutdown", "1")
    yield process
    if process.running is not None and process.running.returncode is None:
        process.running.kill()
        await process.running.wait()


async def request_in_flight(process: Process, path: str) -> "asyncio.Task[httpx.Response]":
    """Begin a request, and wait until its route runs, which is when its credits are gone."""

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(timeout=60, verify=False) as client:
            return await client.post(process.url(path))

    task = asyncio.create_task(post())
    await asyncio.sleep(0.5)
    assert not task.done()
    return task


async def lost(task: "asyncio.Task[httpx.Response]") -> None:
    with contextlib.suppress(httpx.HTTPError):
        await task


@pytest.mark.parametrize("path", ["/work?good=8", "/sync?good=8", "/stream?good=8"])
async def test_partial_refund_over_a_real_socket(process: Process, path: str) -> None:
    """Ten deducted, two back, and a shutdown that waits for it."""
    async with httpx.AsyncClient(verify=False) as client:
        response = await client.post(process.url(path))
    assert (response.status_code, response.headers["credits-deducted"]) == (200, "10")
    assert await process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert await process.moves() == [("deduction", -10), ("refund", 2)]


async def test_shutdown_in_the_middle_of_a_request_refunds_all(process: Process) -> None:
    """uvicorn cancels it at the end of its grace, and does not wait for what its `finally` began."""
    task = await request_in_flight(process, "/work?seconds=30")
    await process.end(signal.SIGTERM)
    await lost(task)
    assert await process.moves() == [("deduction", -10), ("refund", 10)]


async def test_kill_in_the_middle_of_a_request_refunds_all_after_a_restart(process: Process) -> None:
    """Nothing of it is left but the journal."""
    task = await request_in_flight(process, "/work?seconds=30")
    await process.end(signal.SIGKILL)
    await lost(task)
    assert await process.moves() == [("deduction", -10)]
    await process.up()
    await asyncio.sleep(1)
    await process.end(signal.SIGTERM)
    assert await process.moves() == [("deduction", -10), ("refund", 10)]


async def test_stream_that_is_left_over_a_real_socket_keeps_what_it_reported(process: Process) -> None:
    """The client hangs up after a few lines."""
    async with (
        httpx.AsyncClient(verify=False) as client,
        client.stream("POST", process.url("/stream?seconds=0.2")) as response,
    ):
        lines = 0
        async for _ in response.aiter_lines():
            lines += 1
            if lines == 3:
                break
    await asyncio.sleep(1)
    await process.end(signal.SIGTERM)
    [(deduction, taken), (refund, back)] = await process.moves()
    assert (deduction, taken, refund) == ("deduction", -10, "refund")
    assert 5 <= back <= 7  # three had arrived; one or two more may have been under way


async def test_client_that_hangs_up_before_the_answer_pays_nothing(process: Process) -> None:
    """uvicorn does not cancel the route, and its `send` drops what nobody hears: we look."""
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.3, verify=False) as client:
            await client.post(process.url("/work?seconds=0.8"))
    await asyncio.sleep(1)
    await process.end(signal.SIGTERM)
    assert await process.moves() == [("deduction", -10), ("refund", 10)]


async def test_many_at_once_balance_to_the_credit(process: Process) -> None:
    """300 requests, 32 at once, each with a refund: deducted = kept + refunded."""
    limit = asyncio.Semaphore(32)

    async def post(client: httpx.AsyncClient, number: int) -> None:
        async with limit:
            response = await client.post(process.url(f"/work?good={number % 11}"))
            assert response.status_code == 200

    async with httpx.AsyncClient(timeout=60, verify=False) as client:
        await asyncio.gather(*(post(client, number) for number in range(300)))
    await process.end(signal.SIGTERM)
    moves = await process.moves()
    kept = sum(number % 11 for number in range(300))
    assert sum(amount for _, amount in moves) == -kept
    assert sum(amount for kind, amount in moves if kind == "deduction") == -3000


async def test_second_owner_of_a_ledger_in_process_is_told_what_to_do(process: Process) -> None:
    """One process owns a SQLite ledger; the next gets a sentence that names `serve`."""
    command = ("-m", "uvicorn", "tests.real.app:app", "--port", str(free_port()))
    environment = {
        **os.environ,
        "METERED_BILLING_CREDITS": f"sqlite:////{process.directory}/credits.db",
        "METERED_BILLING_JOURNAL": str(process.directory / "journal"),
    }
    second = await asyncio.create_subprocess_exec(
        sys.executable, *command, env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await second.communicate()
    assert second.returncode != 0
    assert b"metered-billing serve" in errors


async def test_setting_that_is_refused_ends_the_server() -> None:
    """By itself, uvicorn takes an error for an app that has no lifespan, and answers 500 from then on."""
    command = ("-m", "uvicorn", "tests.real.app:app", "--port", str(free_port()))
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        env={**os.environ, "METERED_BILLING_CREDITS": "ftp://x"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(running.communicate(), 30)
    assert running.returncode == 3
    assert b"METERED_BILLING_CREDITS" in said
