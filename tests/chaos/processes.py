"""The processes of a storm: started, killed without warning, and started again."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.serving import free_port

ADMIN = "storm-admin"
_MAIN = "from metered_billing.cli import main; main()"


class Process:
    """One process group on a port, that comes back whatever is done to it.

    Args:
        health: The path that answers 200 when it is up.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], port: int, health: str, log: Path
    ) -> None:
        self.name = name
        self.port = port
        self._command = command
        self._environment = {**os.environ, **environment}
        self._health = f"http://127.0.0.1:{port}{health}"
        self._log = log
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def workers(self) -> list[int]:
        """The processes below it that serve; none where it serves itself."""
        if self._popen is None:
            return []
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children").read_text().split()
            return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return []

    def kill(self) -> None:
        """kill -9 of all of it."""
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
            self._popen = None

    def stop(self) -> None:
        """As an orchestrator stops it, then for good."""
        if self._popen is not None:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(15)
        self.kill()

    async def wait_until_up(self, within_s: float = 60.0) -> None:
        """Until it answers. One that has ended is started again, as an orchestrator would.

        A worker that starts while PostgreSQL is down fails to, and uvicorn then ends all of the app.

        Raises:
            TimeoutError: It does not answer; the text ends with what it logged last.
        """
        deadline = time.monotonic() + within_s
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            while time.monotonic() < deadline:
                if self._popen is None or self._popen.poll() is not None:
                    self.kill()
                    self.start()
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(self._health)).is_success:
                        return
                await asyncio.sleep(0.1)
        logged = "\n".join(self._log.read_text().splitlines()[-30:])
        raise TimeoutError(f"{self.name} does not answer within {within_s:.0f} s:\n{logged}")


def a_service(name: str, database: str, directory: Path) -> Process:
    """The reference credits service."""
    port = free_port()
    command = (sys.executable, "-c", _MAIN, "serve", "--database", database, "--port", str(port))
    environment = {"METERED_BILLING_TOKENS": f"{ADMIN}=admin"}
    return Process(name, command, environment, port, "/healthz", directory / f"{name}.log")


def an_app(name: str, credits_url: str, journal: str, directory: Path) -> Process:
    """The app, under uvicorn with two workers."""
    port = free_port()
    options = ("--port", str(port), "--workers", "2", "--log-level", "warning")
    environment = {
        "METERED_BILLING_CREDITS": credits_url,
        "METERED_BILLING_TOKEN": ADMIN,
        "METERED_BILLING_JOURNAL": journal,
    }
    command = (sys.executable, "-m", "uvicorn", "tests.chaos.app:app", *options)
    return Process(name, command, environment, port, "/up", directory / f"{name}.log")


def command_line(credits_url: str, journal: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `metered-billing …` as a person would."""
    environment = {
        **os.environ,
        "METERED_BILLING_CREDITS": credits_url,
        "METERED_BILLING_TOKEN": ADMIN,
        "METERED_BILLING_JOURNAL": journal,
    }
    return subprocess.run(
        [sys.executable, "-c", _MAIN, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


class Balancer:
    """One address for several services: each connection goes to the next one that is up.

    It can keep an answer to itself: the connection is cut after the service has been asked.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = list(ports)
        self._next = 0
        self.cut: list[asyncio.StreamWriter] = []
        self.port = 0

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def cut_all(self) -> int:
        """Cut every connection as it stands. Returns how many."""
        cut, self.cut = self.cut, []
        for writer in cut:
            writer.transport.abort()
        return len(cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service = None
        for _ in list(self.ports):
            self._next = (self._next + 1) % len(self.ports)
            with contextlib.suppress(OSError):
                service = await asyncio.open_connection("127.0.0.1", self.ports[self._next])
                break
        if service is None:
            writer.transport.abort()
            return
        self.cut.append(writer)
        try:
            await asyncio.gather(_pass_on(reader, service[1]), _pass_on(service[0], writer))
        finally:
            with contextlib.suppress(ValueError):
                self.cut.remove(writer)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
    writer.transport.abort()
