"""Processes are started, started again when they die, and stopped."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from examples.fastapi_app.supervisor import CannotStart, Process, check_port, keep_running

from tests.serving import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SERVER = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]


def process(folder: Path, command: list[str] | None = None) -> Process:
    port = free_port()
    return Process("server", command or [*SERVER, str(port)], {}, port, "/", folder)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        yield client


async def test_keep_running_killed_process_is_started_again(tmp_path: Path, http: httpx.AsyncClient) -> None:
    """It is back within seconds, under a new pid that its file names, and that is said."""
    server, said = process(tmp_path), list[str]()
    server.start()
    await server.up()
    keeper = asyncio.ensure_future(keep_running([server], said.append))
    try:
        first = int(server.pid_file.read_text())
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(20):
            while len(said) < 2:
                await asyncio.sleep(0.05)
        assert "was killed by SIGKILL" in said[0]
        assert "up again" in said[1]
        assert int(server.pid_file.read_text()) == server.pid != first
        assert (await http.get(f"http://127.0.0.1:{server.port}/")).status_code == 200
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        await server.stop()
    assert server.ended()
    assert not server.pid_file.exists()


async def test_keep_running_process_that_dies_at_once_is_given_pauses(tmp_path: Path, http: httpx.AsyncClient) -> None:
    """It is started again a little later each time, not as fast as the machine can."""
    server, said = process(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"]), list[str]()
    server.start()
    keeper = asyncio.ensure_future(keep_running([server], said.append))
    async with asyncio.timeout(20):
        while len(said) < 3:
            await asyncio.sleep(0.05)
    keeper.cancel()
    with suppress(asyncio.CancelledError):
        await keeper
    await server.stop()
    assert "ended with code 3" in said[0]
    assert "again in 0.5 s" in said[1]
    assert "again in 1 s" in said[2]


async def test_up_process_that_ends_says_why(tmp_path: Path, http: httpx.AsyncClient) -> None:
    """The last lines of its log are in the message."""
    server = process(tmp_path, [sys.executable, "-c", "raise SystemExit('no such database')"])
    server.start()
    with pytest.raises(CannotStart, match=r"(?s)ended with code 1.*no such database"):
        await server.up()
    await server.stop()


async def test_stop_deaf_process_is_killed(
    tmp_path: Path, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that does not heed SIGTERM ends all the same."""
    monkeypatch.setattr("examples.fastapi_app.supervisor.STOPPED_WITHIN_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    server = process(tmp_path, [sys.executable, "-c", deaf])
    server.start()
    async with asyncio.timeout(10):
        while not server.log.read_bytes():
            await asyncio.sleep(0.02)
    await server.stop()
    assert server.ended() == "was killed by SIGKILL"


async def test_check_port_taken_names_the_setting() -> None:
    """Who has something on the port already is told which setting moves it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CannotStart, match="CREDITS_PORT="):
            check_port(taken.getsockname()[1], "CREDITS_PORT")
    check_port(free_port(), "PORT")
