"""The desk itself: what is behind its routes."""

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import uvicorn

from ..supervisor import Process
from .books import Books
from .collector import Collector
from .faults import Calls, FaultyProxy, Kind
from .forwarding import Forwarder
from .otlp import decode, unpack
from .reading import Reading
from .routes import create_app
from .spans import CREDITS, Span
from .traces import DEDUCT, ERROR, NOT_SENT, REFUND, VOID

MAX_KILLS = 16
"""How many may be waiting for their time."""

ANSWER_FIRST_S = 0.1
"""Before the app is killed, the answer to the one who asked for it goes out, through the app."""

_OPERATIONS = frozenset({DEDUCT, REFUND, VOID})


class TooMany(Exception):
    """That is enough; the message says of what."""


@dataclass
class Desk:
    """Collects traces, breaks calls, kills processes, reads the books.

    Args:
        app: The app's process.
        service: The credits service's.
        address: Where it listens.
        holder: Bound to the faulty proxy's port.
        admin_token: The credits service's.
        journal: The app's.
        environment: As the demo was started in: it may name a backend for traces.
    """

    app: Process
    service: Process
    address: socket
    holder: socket
    admin_token: str
    journal: Path
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        self.collector = Collector()
        self.reading = Reading(self.collector, self._running)
        self.proxy = FaultyProxy(self.service.port, self.holder)
        self.forwarder = Forwarder(self.environment)
        self.books = Books(f"http://127.0.0.1:{self.service.port}", self.admin_token, self.journal)
        self._kills: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            create_app(self),
            http="h11",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)

    @property
    def processes(self) -> Sequence[Process]:
        return self.app, self.service

    async def start(self) -> None:
        """Serve, until `stop`."""
        self.forwarder.start()
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self.address]))

    def close_waiting(self) -> None:
        """Answer whoever waits for news: the app can end only when it has answered its requests."""
        self.collector.close()

    async def stop(self) -> None:
        """End it."""
        self.close_waiting()
        for task in self._kills:
            task.cancel()
        await self.proxy.stop()
        await self.forwarder.stop()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        await self.books.close()

    async def process_changed(self, process: Process) -> None:
        """Say that one has died, or is up again."""
        if process is self.service:
            await self.proxy.service_is(process.is_up)
        self.collector.touch()

    # Traces.

    async def ingest(self, body: bytes, encoding: str) -> None:
        """Keep the spans of an OTLP body, and pass it on.

        Raises:
            BadBody: It is none.
        """
        spans = decode(unpack(body, encoding))
        self.collector.add(spans)
        self.forwarder.put(body, encoding)
        for span in spans:
            if (
                span.name in _OPERATIONS
                and self.proxy.fault.kind == "down"
                and span.start_ns >= self.proxy.fault.chosen_ns
            ):
                await self.proxy.refused(self._refused_attempts(span))

    def _refused_attempts(self, operation: Span) -> int:
        trace = self.collector.get(operation.trace_id)
        return sum(
            1
            for span in (trace.spans.values() if trace else ())
            if span.parent_id == operation.span_id and span.kind == "client" and span.get(ERROR) in NOT_SENT
        )

    def _running(self) -> frozenset[int]:
        return frozenset(process.pid for process in self.processes if process.ended() is None)

    # Switches.

    async def choose_fault(self, kind: Kind, calls: Calls) -> None:
        """Break calls between app and service in this way."""
        await self.proxy.choose(kind, calls)

    def kill(self, name: str, after_ms: int) -> None:
        """kill -9, then. The supervisor starts it again.

        Raises:
            TooMany: Kills are waiting already.
        """
        if len(self._kills) >= MAX_KILLS:
            raise TooMany("There are kills enough waiting for their time.")
        process = self.service if name == CREDITS else self.app

        async def kill() -> None:
            await asyncio.sleep(max(after_ms / 1000, ANSWER_FIRST_S if process is self.app else 0))
            if process.popen is not None and process.ended() is None:
                process.popen.send_signal(signal.SIGKILL)

        task = asyncio.ensure_future(kill())
        self._kills.add(task)
        task.add_done_callback(self._kills.discard)

    # What there is.

    async def state(self) -> dict[str, Any]:
        """All that the page shows of the machinery."""
        fault = self.proxy.fault
        return {
            "fault": {"kind": fault.kind, "calls": fault.calls, "struck": fault.struck},
            "processes": [
                {
                    "name": process.name,
                    "pid": process.pid,
                    "up": process.is_up and process.ended() is None,
                    "restarts": process.restarts,
                    "ended": process.ended() or process.last_end,
                }
                for process in self.processes
            ],
            "books": await self.books.now() if self.service.ended() is None else None,
            "otlp": self.forwarder.shown,
        }


class _Server(uvicorn.Server):
    """uvicorn, that leaves the signals to the supervisor."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
