"""Keep a few processes running: start them, start them again when they die, stop them all."""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

Say = Callable[[str], None]
Changed = Callable[["Process"], Awaitable[None]]

STARTED_WITHIN_S = 60.0
"""A process that does not answer by then has failed to start. Generous: the box may be busy."""

STOPPED_WITHIN_S = 12.0
"""A process that has not ended by then is killed. Longer than the app takes to finish its requests."""

LIVED_S = 5.0
"""Who dies sooner than this is started again a little later each time, up to `LONGEST_PAUSE_S`."""

LONGEST_PAUSE_S = 10.0

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


class CannotStart(Exception):
    """The demo cannot run; the message says why, for whoever started it."""


@dataclass
class Process:
    """One of the processes.

    Args:
        name: What people call it; its files are `{name}.pid` and `{name}.log`.
        command: How it is started.
        environment: What is added to ours.
        port: Where it listens on 127.0.0.1.
        health: The path that answers 200 when it is up.
        folder: Where its files are.
        without: Variables of our own environment that it does not get: those whose names begin so.

    Attributes:
        is_up: Whether it answered when it was last looked at, and has not been seen to end since.
        restarts: How often it was started again.
        last_end: How it ended the last time, in words.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    port: int
    health: str
    folder: Path
    without: str | None = None
    is_up: bool = field(default=False, init=False)
    restarts: int = field(default=0, init=False)
    last_end: str | None = field(default=None, init=False)
    popen: subprocess.Popen[bytes] | None = field(default=None, init=False)
    started_at: float = field(default=0.0, init=False)
    quick_deaths: int = field(default=0, init=False)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    @property
    def pid(self) -> int:
        return self.popen.pid if self.popen else 0

    def start(self) -> None:
        """Start it; returns before it is up."""
        without = self.without
        inherited = {name: value for name, value in os.environ.items() if not without or not name.startswith(without)}
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command,
                env={**inherited, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal is for us alone: we stop them in order.
                process_group=0,
                preexec_fn=_die_with_the_parent if sys.platform == "linux" else None,
            )
        self.started_at = time.monotonic()
        self.pid_file.write_text(f"{self.pid}\n")

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        code = self.popen.poll() if self.popen else 0
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def pause_s(self) -> float:
        """How long to wait before it is started again: nothing at first, longer when it dies at once."""
        self.quick_deaths = 0 if time.monotonic() - self.started_at > LIVED_S else self.quick_deaths + 1
        return min(0.5 * 2.0 ** (self.quick_deaths - 2), LONGEST_PAUSE_S) if self.quick_deaths > 1 else 0.0

    async def up(self) -> float:
        """Wait until it answers.

        Returns:
            Seconds since it was started.

        Raises:
            CannotStart: It ended instead, or does not answer.
        """
        while time.monotonic() - self.started_at < STARTED_WITHIN_S:
            if ended := self.ended():
                raise CannotStart(f"The {self.name} process {ended}:\n{self.last_words()}")
            if await _answers(self.port, self.health):
                self.is_up = True
                return time.monotonic() - self.started_at
            await asyncio.sleep(_POLL_S)
        raise CannotStart(f"The {self.name} process does not answer:\n{self.last_words()}")

    async def stop(self) -> None:
        """Ask it to end, and see that it does."""
        if self.popen is None:
            return
        self.popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.popen.wait, STOPPED_WITHIN_S)
        self.kill()
        self.popen.wait()
        self.pid_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it at once; nothing if it has ended."""
        if self.popen is not None:
            self.popen.kill()

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-15:])


async def _unwatched(process: Process) -> None:
    pass


async def keep_running(processes: Sequence[Process], say: Say, changed: Changed = _unwatched) -> None:
    """Start whichever has died again, on the same files, until cancelled.

    Args:
        changed: Told of each that has died, or is up again.
    """
    async with asyncio.TaskGroup() as group:
        for process in processes:
            group.create_task(_keep_running(process, say, changed))


async def _keep_running(process: Process, say: Say, changed: Changed) -> None:
    while True:
        await asyncio.sleep(_POLL_S)
        if (ended := process.ended()) is None:
            continue
        process.is_up, process.last_end = False, ended
        await changed(process)
        pause_s = process.pause_s()
        later = f" in {pause_s:g} s" if pause_s else ""
        say(f"· the {process.name} process {ended}; starting it again{later}, on the same files")
        await asyncio.sleep(pause_s)
        process.restarts += 1
        process.start()
        try:
            await process.up()
        except CannotStart:
            continue  # it has died again, or will be seen to
        await changed(process)
        say(f"· the {process.name} process is up again (pid {process.pid})")


def check_port(port: int, setting: str) -> None:
    """See that a port is free.

    Raises:
        CannotStart: It is not; names the setting that moves it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise CannotStart(
                f"Port {port} cannot be used ({error.strerror}). Choose another: {setting}=… make demo"
            ) from None


async def _answers(port: int, path: str) -> bool:
    # By hand: an HTTP library takes longer to import than this whole module, and people wait.
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with closing(writer):
                writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
    except (OSError, TimeoutError):
        return False  # not yet


def _die_with_the_parent() -> None:
    # Runs in the child before its program: if we are killed with -9, it gets a SIGTERM, and no orphan stays.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
