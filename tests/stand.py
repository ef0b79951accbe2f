"""A stand to try an app on: credits and a journal in a directory of its own, spans and logs to look at."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from metered_billing import Account, SqlCredits, settled
from metered_billing.telemetry import Telemetry

ANN = Account("acme", "ann")
GRANTED = 100

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


@dataclass
class Stand:
    """What a test needs around its app. `ann` of `acme` starts with 100 credits."""

    directory: Path
    credits: SqlCredits
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)

    def __post_init__(self) -> None:
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracers = tracers
        self.telemetry = Telemetry(tracers, MeterProvider([self.reader]))

    def options(self, **changes: Any) -> dict[str, Any]:
        """The middleware's arguments."""
        return {
            "credits": self.credits,
            "journal": self.directory / "journal",
            "account": lambda: ANN,
            "telemetry": self.telemetry,
            **changes,
        }

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    async def balance(self, account: Account = ANN) -> int:
        await settled()
        return await self.credits.balance(account.tenant_id, account.user_id)

    async def moves(self, account: Account = ANN) -> list[tuple[str, int]]:
        """Everything that moved credits since the grant, oldest first: kind and signed amount."""
        return [(entry["kind"], entry["amount"]) for entry in await self.entries(account)]

    async def entries(self, account: Account = ANN) -> list[dict[str, Any]]:
        await settled()
        page = await self.credits.transactions(account.tenant_id, account.user_id, limit=100)
        return [entry for entry in reversed(page.items) if entry["kind"] != "grant"]


@contextlib.asynccontextmanager
async def stand(directory: Path) -> AsyncIterator[Stand]:
    credits = SqlCredits(directory / "credits.db")  # noqa: A001
    await credits.grant(ANN.tenant_id, ANN.user_id, amount=GRANTED, reason="test", idempotency_key="grant")
    yield Stand(directory, credits)
    await credits.aclose()


@contextlib.asynccontextmanager
async def serving(app: App, *, raise_app_exceptions: bool = False) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, between the app's start-up and its shutdown."""
    async with (
        lifespan(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions),
            base_url="http://app",
        ) as client,
    ):
        yield client


class StartupFailed(Exception):
    pass


@contextlib.asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    """Start the app up and shut it down, as a server does."""
    to_app: asyncio.Queue[Message] = asyncio.Queue()
    from_app: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    running = asyncio.ensure_future(app(scope, to_app.get, from_app.put))
    await to_app.put({"type": "lifespan.startup"})
    answer = await from_app.get()
    if answer["type"] != "lifespan.startup.complete":
        await asyncio.wait([running])
        running.exception()
        raise StartupFailed(answer.get("message", ""))
    try:
        yield
    finally:
        await to_app.put({"type": "lifespan.shutdown"})
        assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
        await running


class Connection:
    """One request, message by message, for what no HTTP client can do: leaving at a chosen moment.

    Args:
        on_send: Sees each message as it is sent, and may wait or raise.
    """

    def __init__(
        self, app: App, path: str, body: bytes = b"", *, on_send: Callable[[Message], Awaitable[None]] | None = None
    ) -> None:
        self._app = app
        self._on_send = on_send
        self._left = asyncio.Event()
        self._unread = [{"type": "http.request", "body": body, "more_body": False}]
        self.sent: list[Message] = []
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"app"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        if self._unread:
            return self._unread.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._on_send is not None:
            await self._on_send(message)
        self.sent.append(message)

    async def run(self) -> None:
        await self._app(self.scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])
