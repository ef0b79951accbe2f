"""Everything that can happen to a charge, driven once through the real parts: what do they emit?

An app and the credits service in this process, with a line between them that fails when told to, in-memory
exporters on both, and structlog as an app configures it.
"""

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, biller, metered, settled
from metered_billing.charge import Record
from metered_billing.credits import line
from metered_billing.credits.token import RotatingToken, TokenUnreadable
from metered_billing.journal import JournalError
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger import Ledger, LedgerCorrupt, LedgerUnavailable
from metered_billing.outcomes import Paid
from metered_billing.runtime import Runtime
from metered_billing.service import Tokens, create_app, spans
from metered_billing.telemetry import Telemetry
from tests.faults import Faulty
from tests.stand import lifespan

ANN = Account("acme", "ann")
ADMIN = {"Authorization": "Bearer admin-secret"}
ITEMS = {f"img-{n}": 1 for n in range(1, 4)}
BAD = {"results": [{"status": "failed"}] * 10}


class Line(Faulty):
    """Also answers 401."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if (self.faults or [self.always])[0] == "401":
            await request.aread()
            self.faults = self.faults[1:]
            return httpx.Response(401, request=request)
        return await super().handle_async_request(request)


class Everything:
    """The app, the service, and what was seen of them: `spans`, `logs`, `metrics` and `prometheus`."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.logs: list[dict[str, Any]] = []
        self._patch = patch
        self._directory = directory
        self._later_s = 0.0
        self._exporter = InMemorySpanExporter()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._registry = CollectorRegistry()
        self._reader = InMemoryMetricReader()
        meters = MeterProvider([self._reader, PrometheusMetricReader(registry=self._registry)])
        patch.setattr(trace, "get_tracer", lambda name, **_: tracers.get_tracer(name))
        patch.setattr(spans, "INSTRUMENTS", spans.Instruments(meters))
        self.telemetry = Telemetry(tracers, meters)
        self.runtime = Runtime(
            now=lambda: time.time() + self._later_s,
            monotonic=lambda: time.monotonic() + self._later_s,
            sleep=lambda _: asyncio.sleep(0),
        )
        self.ledger = Ledger(directory / "credits.db", committed=self.telemetry.committed("ledger"))
        self.service = create_app(self.ledger, Tokens({"admin-secret": "admin", "other-secret": "admin"}))
        self._read_token: Any = lambda: "admin-secret"
        self.line = Line(httpx.ASGITransport(self.service, raise_app_exceptions=False))
        self.credits = HttpCredits(
            "http://credits",
            token=RotatingToken(
                lambda: self._read_token(),
                held=SecretStr("admin-secret"),
                runtime=self.runtime,
                telemetry=self.telemetry,
            ),
            transport=self.line,
            breaker_failures=6,
            runtime=self.runtime,
            telemetry=self.telemetry,
        )
        self.journal = SqliteJournal(directory / "journal", runtime=self.runtime, telemetry=self.telemetry)
        self._cost: Any = 10
        self._answer: Any = None
        self._app = self._new_app()

    def _new_app(self) -> Starlette:
        def cost() -> Any:
            if isinstance(self._cost, Exception):
                raise self._cost
            return self._cost

        def unread(returned: Any) -> Any:
            raise ZeroDivisionError

        async def work(request: Request) -> Response:
            answer = self._answer
            if inspect.iscoroutinefunction(answer):
                answer = await answer()
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        async def read(request: Request) -> Response:
            return JSONResponse({})

        return Starlette(
            routes=[
                Route("/work", metered(cost=cost)(work), methods=["POST"]),
                Route("/read", metered(cost=1, outcomes=unread)(read), methods=["POST"]),
            ]
        )

    # What was seen.

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    @property
    def metrics(self) -> list[Metric]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return [
            metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
        ]

    @property
    def prometheus(self) -> set[str]:
        """The names of the time series' families, as they are queried."""
        return {
            f"{family.name}_total" if family.type == "counter" else family.name
            for family in self._registry.collect()
            if family.name != "target"
        }

    # What happens.

    @contextlib.contextmanager
    def patched(self, target: Any, name: str, value: Any) -> Any:
        with self._patch.context() as patch:
            patch.setattr(target, name, value)
            yield

    async def post(
        self, path: str = "/work", *, cost: Any = 10, answer: Any = None, faults: list[str] | None = None
    ) -> int:
        """A request, and whatever follows from it at once."""
        self._cost, self._answer = cost, {} if answer is None else answer
        self.line.faults = faults or []
        headers = {"X-Request-ID": "req-1"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.middleware), base_url="http://app") as client:
            status = (await client.post(path, headers=headers)).status_code
        await settled()
        self.line.faults = []
        return status

    async def later(self) -> None:
        """Recovery, when everything that waits is due."""
        self._later_s += 1_000
        await self.middleware.biller.recover()
        await settled()

    async def call(self, path: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
        """The service, as others call it."""
        headers = {**ADMIN, **({"Idempotency-Key": key} if key else {})}
        transport = httpx.ASGITransport(self.service, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://credits") as client:
            return await client.post(path, json=body, headers=headers)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        structlog.configure(processors=[self._keep], cache_logger_on_first_use=False)
        (self._directory / "journal").mkdir()
        (self._directory / "journal" / "charges-0.db").write_bytes(b"a letter" * 100)
        self.middleware = MeteredBillingMiddleware(
            self._app,
            credits=self.credits,
            journal=self.journal,
            account=lambda: ANN,
            runtime=self.runtime,
            telemetry=self.telemetry,
        )
        try:
            async with lifespan(self.middleware):
                yield
        finally:
            structlog.reset_defaults()
            await self.ledger.close()

    def _keep(self, logger: Any, method: str, event: Any) -> Any:
        self.logs.append(dict(event, level=method))
        raise structlog.DropEvent

    async def happen(self) -> None:
        """All of it."""
        async with self.running():
            grant = {"tenant_id": "acme", "user_id": "ann", "amount": 10_000, "reason": "x"}
            assert (await self.call("/v1/grants", grant, "grant")).status_code == 201
            await self._outcomes()
            await self._crowds()
            await self._refusals()
            await self._rotation()
            await self._trouble_afterwards()
            await self._trouble_with_the_journal()
            await self._service()
            await self._breaker()

    async def _outcomes(self) -> None:
        assert await self.post(answer={"results": [{"status": "ok"}] * 10}) == 200
        two_of_three = {"results": [{"id": name, "status": "ok" if name != "img-3" else "failed"} for name in ITEMS]}
        assert await self.post(cost=ITEMS, answer=two_of_three) == 200
        assert await self.post(answer={"results": [{"status": "ok"}] * 11}) == 200
        assert await self.post(answer=Response("{", media_type="application/json")) == 200
        assert await self.post("/read") == 200

    async def _crowds(self) -> None:
        statuses = await asyncio.gather(*(self.post(answer=BAD) for _ in range(5)))
        assert statuses == [200] * 5
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.middleware), base_url="http://app") as client:
            await asyncio.gather(*(client.post("/work") for _ in range(5)))
        await settled()
        with self.patched(line.Line, "has_room", lambda *_: False):
            assert await self.post() == 503

    async def _refusals(self) -> None:
        assert await self.post(cost=100_000) == 402
        assert await self.post(faults=["refused"] * 3) == 503
        assert await self.post(faults=["lost reply", "ok"]) == 200
        assert await self.post(faults=["lost reply"] * 3) == 503
        assert await self.post(faults=["401", "ok"]) == 503
        assert await self.post(cost=ZeroDivisionError()) == 500

        def broken(*_: Any) -> Any:
            raise ZeroDivisionError

        with self.patched(self.credits._contract, "read_deduction", broken):
            assert await self.post() == 500
        with self.patched(self.credits, "deduct", broken):
            assert await self.post() == 503
        await self._cancelled(self.credits, "deduct", self.post())
        await self.later()

    async def _rotation(self) -> None:
        def unreadable() -> str:
            raise TokenUnreadable("no permission")

        for read, event in ((unreadable, "credits.token_stale"), (lambda: "other-secret", "credits.token_rotated")):
            self._read_token = read
            self._later_s += 1_000
            assert await self.post() == 200
            while not any(log["event"] == event for log in self.logs):
                await asyncio.sleep(0.001)
        assert await self.post() == 200

    async def _trouble_afterwards(self) -> None:
        assert await self.post(answer=BAD, faults=["ok", "500"]) == 200  # then the refund is put off
        self.line.always = "lost request"
        await self.later()
        self.line.always = "ok"
        await self.later()
        assert await self.post(faults=["lost reply"] * 3 + ["500"]) == 503  # and the void
        await self.later()

        async def refunded_by_hand() -> Any:
            page = await self.ledger.transactions("acme", "ann", limit=1)
            path = f"/v1/deductions/{page.items[0]['transaction_id']}/refunds"
            assert (await self.call(path, {"amount": 1, "reason": "x"}, f"hand-{path}")).status_code == 201
            return BAD

        assert await self.post(answer=refunded_by_hand) == 200  # disputed
        # A process that dies while the route runs.
        charge = await self.middleware.biller.deduct(ANN, Paid(1))
        assert charge.record is not None
        self.middleware.biller._settler.leave(charge.record)
        await self.later()

        def bug(*_: Any) -> Any:
            raise ZeroDivisionError

        with self.patched(self.credits, "refund", bug):
            assert await self.post(answer=BAD) == 200
        await self.later()
        with self.telemetry.operation("metered_billing.void", None), contextlib.suppress(AttributeError):
            await self.credits.find(charge.record)

    async def _trouble_with_the_journal(self) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise JournalError("disk full")

        with self.patched(self.journal, "open", fails):
            assert await self.post() == 503
        write = self.journal.write

        def hangs(before: Record, after: Record, *, durable: bool) -> Any:
            if not durable:
                return write(before, after, durable=durable)
            patch.setattr(biller, "JOURNAL_WITHIN_S", 0.01)
            return asyncio.sleep(0.05, True)

        with self.patched(self.journal, "write", hangs), self._patch.context() as patch:
            assert await self.post() == 200
        for state in ("opened", "deducted", "refunding"):
            await self._lose(state)
        await self._recovery_fails(JournalError("disk full"), "journal.failed")
        await self._recovery_fails(ZeroDivisionError(), "billing.bug")
        file = self._directory / "file"
        file.touch()
        other = MeteredBillingMiddleware(
            self._app, credits=self.credits, journal=file, account=lambda: ANN, telemetry=self.telemetry
        )
        with self.patched(self, "middleware", other):
            assert await self.post() == 503
        await self.later()

    async def _lose(self, state: str) -> None:
        """Another process has taken the charge, when it is to leave this state."""
        write = self.journal.write

        def loses(before: Record, after: Record, *, durable: bool) -> Any:
            return asyncio.sleep(0, False) if before.state == state else write(before, after, durable=durable)

        holds = self.patched(self.journal, "holds", lambda record: False)
        with holds, self.patched(self.journal, "write", loses):
            status = await self.post(answer=BAD, faults=["ok", "500"])
            assert status == (503 if state == "opened" else 200)
        await self.later()

    async def _cancelled(self, target: Any, name: str, work: Coroutine[Any, Any, object]) -> None:
        """What waits there, for ever."""
        reached = asyncio.Event()

        async def waits(*_: Any) -> None:
            reached.set()
            await asyncio.Event().wait()

        with self.patched(target, name, waits):
            task = asyncio.ensure_future(work)
            await reached.wait()
            task.cancel()
            await asyncio.wait([task])

    async def _recovery_fails(self, error: Exception, event: str) -> None:
        """By itself, as it does every ten seconds."""

        def fails(_: float) -> Any:
            raise error

        here = self.middleware.biller._settler._loops[asyncio.get_running_loop()]
        with self.patched(self.journal, "adopt", fails):
            self._later_s += 1_000
            while not any(
                log["event"] == event and str(log.get("reason")).startswith("recovery failed") for log in self.logs
            ):
                here._woken.set()
                await asyncio.sleep(0.001)
        self._later_s += 1_000
        while self.logs[-1]["event"] != "recovery.resumed":
            here._woken.set()
            await asyncio.sleep(0.001)

    async def _service(self) -> None:
        deduct = {"tenant_id": "acme", "user_id": "ann", "amount": 1}
        operations = [{"op": "deduct", "idempotency_key": "b1", **deduct}, {"op": "dance"}]
        assert (await self.call("/v1/batch", {"operations": operations})).status_code == 200
        taken = (await self.call("/v1/deductions", deduct, "d1")).json()["transaction_id"]
        assert (await self.call("/v1/deductions", {**deduct, "amount": 2}, "d1")).status_code == 422
        assert (await self.call("/v1/deductions/none/refunds", {"amount": 1, "reason": "x"}, "r1")).status_code == 404
        path = f"/v1/deductions/{taken}/refunds"
        assert (await self.call(path, {"amount": 2, "reason": "x"}, "r2")).status_code == 422
        void = {"tenant_id": "acme", "user_id": "ann", "idempotency_key": "d1"}
        assert (await self.call("/v1/voids", void)).status_code == 200
        assert (await self.call(path, {"amount": 1, "reason": "x"}, "r3")).status_code == 409
        assert (await self.call("/v1/voids", {**void, "user_id": "bob"})).status_code == 422
        grant = {**deduct, "amount": 2**53 - 1, "reason": "x"}
        assert (await self.call("/v1/grants", grant, "g2")).status_code == 422
        for error in (LedgerUnavailable("x"), LedgerCorrupt("x"), ZeroDivisionError()):

            async def fails(*_: Any, error: Exception = error) -> Any:
                raise error

            with self.patched(self.ledger, "decide", fails), contextlib.suppress(ZeroDivisionError):
                assert (await self.call("/v1/deductions", deduct, "d2")).status_code in (500, 503)
        await self._cancelled(self.ledger, "decide", self.call("/v1/deductions", deduct, "d3"))

    async def _breaker(self) -> None:
        self.line.always = "500"
        for _ in range(3):
            assert await self.post() == 503
        self.line.always = "ok"
        self._later_s += 1_000
        assert await self.post() == 200
