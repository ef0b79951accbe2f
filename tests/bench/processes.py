"""The processes under measurement: started, asked, stopped; and what they cost, from /proc."""

import asyncio
import atexit
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.serving import free_port

ROOT = Path(__file__).parents[2]
TOKEN = "bench-admin"
TENANT = "bench"
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """A process of `tests.bench.serve`."""

    def __init__(self, kind: str, what: str, core: int, directory: Path, environment: Mapping[str, str]) -> None:
        self.what = what
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = directory / f"{kind}-{what.replace('/', '-')}.log"
        command = [sys.executable, "-m", "tests.bench.serve", kind, what, str(self.port), str(core)]
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.pid = self._popen.pid

    async def up(self, path: str) -> None:
        """Until it answers.

        Raises:
            RuntimeError: It ended, or does not.
        """
        until = time.monotonic() + 30
        while time.monotonic() < until and self._popen.poll() is None:
            try:
                await self.get(path)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return
        raise RuntimeError(f"{self.what} does not answer:\n{self.logged()}")

    def logged(self) -> str:
        """The end of what it said."""
        return "\n".join(self._log.read_text().splitlines()[-30:])

    async def get(self, path: str) -> Any:
        """Ask something that is not measured."""
        return await asyncio.to_thread(ask, self.url + path)

    def signal(self, number: int) -> None:
        """Tell it."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Nicely, then not."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(15)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()


def ask(url: str, body: Mapping[str, Any] | None = None, key: str = "") -> Any:
    """A GET, or a POST of a body, with the service's token."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    if key:
        headers["Idempotency-Key"] = key
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
        return json.load(response)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else on this machine measures meanwhile."""
    with (Path(tempfile.gettempdir()) / "metered-billing-bench.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pin(core: int) -> bool:
    """Keep this process to a core, whatever its parent keeps to. Returns whether there is such a core."""
    try:
        os.sched_setaffinity(0, {core})
    except OSError:
        return False
    return True


def go_first() -> None:
    """This process and its children, before whatever else this machine does; where root may say so."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    # Linux may weigh whole sessions against each other, and niceness within each alone.
    group = Path("/proc/self/autogroup")
    with contextlib.suppress(OSError):
        group.write_text("-20")
        atexit.register(group.write_text, "0")


def cpu_s(pid: int) -> float:
    """What a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main_thread_cpu_s(pid: int) -> float:
    """What its first thread has used: the one of the event loop."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def busy_s(core: int) -> float:
    """How long a core has been busy, whoever kept it so."""
    line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{core} "))
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) / TICKS


def rss_kib(pid: int) -> int:
    """What it holds in memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS:")).split()[1])
