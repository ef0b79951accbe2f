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
from .collector import Collector, Trace
from .faults import Calls, FaultyProxy, Kind
from .forwarding import Forwarder
from .otlp import decode, unpack
from .routes import create_app
from .spans import CREDITS, Span
from .story import story
from .traces import DEDUCT, ERROR, NOT_SENT, REFUND, VOID, Facts, summary, waterfall

MAX_KILLS = 16
"""How many may be waiting for their time."""

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
        self.proxy = FaultyProxy(self.service.port, self.holder)
        self.forwarder = Forwarder(self.environment)
        self.books = Books(f"http://127.0.0.1:{self.service.port}", self.admin_token, self.journal)
        self._summaries: dict[str, tuple[object, dict[str, Any]]] = {}
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
            if span.name in _OPERATIONS and span.start_ns >= self.proxy.fault.chosen_ns:
                await self.proxy.refused(self._refused_attempts(span))

    def _refused_attempts(self, operation: Span) -> int:
        trace = self.collector.get(operation.trace_id)
        return sum(
            1
            for span in (trace.spans.values() if trace else ())
            if span.parent_id == operation.span_id and span.kind == "client" and span.get(ERROR) in NOT_SENT
        )

    def summaries(self) -> list[dict[str, Any]]:
        """All that are kept, the latest first."""
        running = self._running()
        current: dict[str, tuple[object, dict[str, Any]]] = {}
        for trace in self.collector:
            state = (trace.changed, running)
            known = self._summaries.get(trace.trace_id)
            if known is None or known[0] != state:
                known = state, summary(self._facts(trace, running))
            current[trace.trace_id] = known
        self._summaries = current
        return sorted((known for _, known in current.values()), key=lambda one: str(one["started_at"]), reverse=True)

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """One, whole; None where it is not here, or not any more."""
        trace = self.collector.get(trace_id)
        if trace is None:
            return None
        facts = self._facts(trace, self._running())
        linked: dict[tuple[str, str], Span] = {}
        for other_id, span_id in (link for span in facts.spans for link in span.links):
            other = self.collector.get(other_id)
            if other is not None and span_id in other.spans:
                linked[other_id, span_id] = other.spans[span_id]
        return {"summary": summary(facts), "story": story(facts), "spans": waterfall(facts, linked)}

    def _facts(self, trace: Trace, running: frozenset[int]) -> Facts:
        return Facts(trace.spans.values(), self.collector.linking(trace.trace_id), running)

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
            await asyncio.sleep(after_ms / 1000)
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
