"""Telemetry: a span and a log line for every credit operation, with the ids that somebody looks for."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.metrics._internal import _ProxyMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs

from metered_billing import HttpCredits, MeteredBillingMiddleware, metered, names, settled
from metered_billing.biller import Biller
from metered_billing.charge import Account, Record
from metered_billing.credits import sender
from metered_billing.credits.contract import Contract
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.outcomes import Paid
from metered_billing.service import Tokens, create_app
from metered_billing.telemetry import Telemetry
from tests.faults import Faulty
from tests.stand import ANN, GRANTED, Connection, Stand, lifespan


def app_with(bench: Stand, *, cost: int = 10, good: int = 8, bad: int = 2) -> Starlette:
    @metered(cost=cost)
    async def work(request: Request) -> Response:
        return JSONResponse({"results": [{"status": "ok"}] * good + [{"status": "failed"}] * bad})

    return Starlette(
        routes=[Route("/work", work, methods=["POST"])],
        middleware=[Middleware(MeteredBillingMiddleware, **bench.options())],
    )


async def run(bench: Stand, **changes: Any) -> None:
    app = app_with(bench, **changes)
    async with lifespan(app):
        connection = Connection(app, "/work")
        connection.scope["headers"].append((b"x-request-id", b"req-1"))
        await connection.run()
        await settled()


def spans(bench: Stand) -> dict[str, Any]:
    return {span.name: span for span in bench.spans}


async def test_partial_refund_is_one_trace(bench: Stand) -> None:
    """charge over deduct and refund; the refund links to the deduction."""
    with bench.tracers.get_tracer("test").start_as_current_span("request") as request:
        await run(bench)
    by_name = spans(bench)
    charge, deduct, refund = (by_name[f"metered_billing.{name}"] for name in ("charge", "deduct", "refund"))
    assert charge.parent.span_id == request.get_span_context().span_id
    assert deduct.parent.span_id == refund.parent.span_id == charge.context.span_id
    assert [link.context.span_id for link in refund.links] == [deduct.context.span_id]
    assert refund.attributes[names.REASON] == "failed items"
    assert {span.context.trace_id for span in (charge, deduct, refund)} == {request.get_span_context().trace_id}


async def test_charge_span_tells_the_whole_story(bench: Stand) -> None:
    """What it cost, what was kept, what came back, whose it was, and how it ended."""
    await run(bench)
    attributes = dict(spans(bench)["metered_billing.charge"].attributes)
    [deduction, _] = await bench.entries()
    assert attributes.pop(names.CHARGE_ID) == deduction["idempotency_key"]
    assert attributes == {
        names.TENANT_ID: "acme",
        names.USER_ID: "ann",
        names.REQUEST_ID: "req-1",
        names.AMOUNT: 10,
        names.UNITS: 10,
        names.KEPT: 8,
        names.REFUNDED: 2,
        names.OUTCOME: "refunding",
        names.TRANSACTION_ID: deduction["transaction_id"],
        names.REASON: "failed items",
    }


async def test_charge_span_of_a_decline_is_marked(bench: Stand) -> None:
    """A 402 is found by its error type."""
    await run(bench, cost=GRANTED + 1)
    charge, deduct = spans(bench)["metered_billing.charge"], spans(bench)["metered_billing.deduct"]
    assert charge.attributes["error.type"] == "InsufficientCredits"
    assert deduct.attributes["error.type"] == "declined"
    assert deduct.status.status_code is StatusCode.ERROR


async def test_charge_that_is_cancelled_before_it_is_paid_is_marked(bench: Stand) -> None:
    """The route did not run: in the same words as the deduction below it."""
    biller = Biller(bench.credits, SqliteJournal(bench.directory / "journal"), telemetry=bench.telemetry)
    await biller.start()
    task = asyncio.ensure_future(biller.deduct(ANN, Paid(1)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await settled()
    await biller.drain(1)
    for name in (names.SPAN_CHARGE, names.SPAN_DEDUCT):
        assert spans(bench)[name].attributes["error.type"] == "cancelled"


class Choosy(Sampler):
    """Drops what is the other tenant's, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def should_sample(
        self,
        parent_context: Any,
        trace_id: int,
        name: str,
        kind: Any = None,
        attributes: Any = None,
        links: Any = None,
        *_: Any,
    ) -> SamplingResult:
        tenant = (attributes or {}).get(names.TENANT_ID)
        self.asked.append((name, tenant))
        return SamplingResult(Decision.DROP if tenant == "other" else Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self) -> str:
        return "choosy"


@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_sampler_is_told_whose_charge_it_is(tenant: str) -> None:
    """Its decision holds for what is below the charge, which costs next to nothing where that is dropped."""
    sampler, exporter = Choosy(), InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = Telemetry(provider)
    record = Record(id="charge-1", account=Account(tenant), amount_credits=1, units=1, opened_at=0.0)
    charge = telemetry.charge_span(record)
    with telemetry.operation(names.SPAN_DEDUCT, record, parent=charge) as deduct:
        deduct.note(names.BALANCE, 9)
        assert trace.get_current_span() is deduct.span
    charge.end()
    with telemetry.operation(names.SPAN_REFUND, record, parent=charge):  # later, when the charge's span is over
        pass
    with telemetry.operation(names.SPAN_RECOVER, record):
        pass
    charge_and_recovery = [(names.SPAN_CHARGE, tenant), (names.SPAN_RECOVER, tenant)]
    assert [asked for asked in sampler.asked if asked[1] is not None] == charge_and_recovery
    if tenant == "other":
        assert len(sampler.asked) == 2
        assert deduct.span.get_span_context() == charge.get_span_context()  # what goes along says: not sampled
        assert exporter.get_finished_spans() == ()
    else:
        made = {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}
        assert set(made) == {names.SPAN_CHARGE, names.SPAN_DEDUCT, names.SPAN_REFUND, names.SPAN_RECOVER}
        assert {attributes[names.CHARGE_ID] for attributes in made.values()} == {"charge-1"}
        assert made[names.SPAN_DEDUCT][names.BALANCE] == 9


async def test_operation_that_is_cancelled_or_fails_is_marked(bench: Stand) -> None:
    """OpenTelemetry would leave the one UNSET and the other without an error type."""
    for error, kind in ((asyncio.CancelledError(), "cancelled"), (KeyError("x"), "KeyError")):
        with pytest.raises(type(error)), bench.telemetry.operation("metered_billing.void", None):
            raise error
        span = bench.spans[-1]
        assert span.attributes is not None
        assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, kind)


def data_points(bench: Stand, name: str) -> dict[tuple[Any, ...], Any]:
    data = bench.reader.get_metrics_data()
    assert data is not None
    [metric] = [
        metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
    ]
    return {tuple((point.attributes or {}).values()): point for point in metric.data.data_points}


async def test_metrics_count_credits_and_time_without_ids(bench: Stand) -> None:
    """By kind and outcome alone: an id as an attribute would be a time series a customer."""
    await run(bench)
    credits = data_points(bench, "metered_billing.credits")  # noqa: A001
    assert {key: point.value for key, point in credits.items()} == {
        ("deducted",): 10,
        ("kept",): 8,
        ("refunded",): 2,
        ("voided",): 0,
    }
    durations = data_points(bench, "metered_billing.operation.duration")
    assert {key: point.count for key, point in durations.items()} == {("deduct", "ok"): 1, ("refund", "ok"): 1}


async def test_unsettled_charges_are_counted_by_state(bench: Stand) -> None:
    """And go back to 0 when there are none."""
    bench.telemetry.unsettled({"refunding": (3, 12.5)})
    assert data_points(bench, "metered_billing.unsettled")[("refunding",)].value == 3
    assert data_points(bench, "metered_billing.unsettled.age")[("refunding",)].value == 12.5
    bench.telemetry.unsettled({})
    assert data_points(bench, "metered_billing.unsettled")[("refunding",)].value == 0


def test_breaker_and_anomalies_are_counted(bench_sync: Stand) -> None:
    """Each change of the breaker, its state, and each charge that somebody should look at."""
    for number, state in ((0, "closed"), (2, "open"), (1, "half-open")):
        bench_sync.telemetry.breaker_changed(state)
        assert data_points(bench_sync, "metered_billing.breaker.state")[()].value == number
    bench_sync.telemetry.log(names.LOG_DISPUTED)
    assert data_points(bench_sync, "metered_billing.breaker.changes")[("open",)].value == 1
    assert data_points(bench_sync, "metered_billing.anomalies")[(names.LOG_DISPUTED,)].value == 1


@pytest.mark.parametrize(
    ("error_type", "outcome"),
    [
        ("ok", "ok"),
        ("unanswered", "unanswered"),
        ("429", "4xx"),
        ("503", "5xx"),
        ("600", "error"),
        ("ConnectError", "notsent"),
        ("PoolTimeout", "notsent"),
        ("ReadTimeout", "timeout"),
        ("RemoteProtocolError", "error"),
        ("SomethingOfTheUsers", "error"),
    ],
)
def test_outcomes_of_metrics_are_few(bench_sync: Stand, error_type: str, outcome: str) -> None:
    """Whatever is raised, or answered, makes no time series of its own."""
    bench_sync.telemetry.measured("attempt", error_type, 0.1)
    assert list(data_points(bench_sync, names.METRIC_DURATION)) == [("attempt", outcome)]


def test_histograms_have_buckets_of_their_own(bench_sync: Stand) -> None:
    """The SDK's are made for milliseconds: all that we do would be in the first."""
    bench_sync.telemetry.measured("deduct", "ok", 0.0007)
    bench_sync.telemetry.committed("journal")(3, 0.3)
    for name, bounds, value in (
        (names.METRIC_DURATION, names.SECONDS, 0.0007),
        (names.METRIC_COMMIT_DURATION, names.SECONDS, 0.3),
        (names.METRIC_COMMIT_SIZE, names.SIZES, 3),
    ):
        (point,) = data_points(bench_sync, name).values()
        assert point.explicit_bounds == bounds
        assert bounds[0] < value < bounds[-1]


def test_counters_begin_at_zero_with_a_provider_that_is_set_late() -> None:
    """After the middleware was made, as apps do in their start-up."""
    provider = _ProxyMeterProvider()
    telemetry = Telemetry(meter_provider=provider)
    reader = InMemoryMetricReader()
    provider.on_set_meter_provider(MeterProvider([reader]))
    telemetry.start()
    data = reader.get_metrics_data()
    assert data is not None
    counters = {metric.name: metric.data for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    assert {name: len(counter.data_points) for name, counter in counters.items()} == {
        names.METRIC_CREDITS: 4,
        names.METRIC_RETRIES: 3,
        names.METRIC_ANOMALIES: 10,
        names.METRIC_BREAKER_CHANGES: 3,
        names.METRIC_RECOVERY_ROUNDS: 2,
        names.METRIC_CROWDED_OUT: 1,
    }


@pytest.fixture
def bench_sync(tmp_path: Any) -> Stand:
    from metered_billing import SqlCredits

    return Stand(tmp_path, SqlCredits(tmp_path / "credits.db"))


@pytest.fixture
def configured() -> Iterator[None]:
    """structlog as an app configures it."""
    structlog.configure()
    yield
    structlog.reset_defaults()


async def test_log_is_one_line_an_operation_with_all_ids(bench: Stand, configured: None) -> None:
    """The cost, the deduction, the refund, the end; the same ids as the spans."""
    with capture_logs() as logs:
        await run(bench)
    assert [log["event"] for log in logs] == [
        names.LOG_COST_COMPUTED,
        names.LOG_DEDUCTED,
        names.LOG_REFUNDED,
        names.LOG_SETTLED,
    ]
    [deduction, refund] = await bench.entries()
    for log in logs:
        assert (log["tenant_id"], log["user_id"], log["amount"], log["request_id"]) == ("acme", "ann", 10, "req-1")
        assert log["charge_id"] == deduction["idempotency_key"]
        assert log["trace_id"]
        assert log["span_id"]
    assert logs[0]["units"] == 10
    assert (logs[1]["transaction_id"], logs[1]["units"]) == (deduction["transaction_id"], 10)
    assert (logs[2]["refunded"], logs[2]["refund_id"]) == (2, refund["id"])
    assert (logs[3]["kept"], logs[3]["refunded"]) == (8, 2)
    deduct = spans(bench)["metered_billing.deduct"]
    assert logs[1]["span_id"] == trace.format_span_id(deduct.context.span_id)


async def test_log_goes_to_the_standard_library_where_structlog_is_not_configured(
    bench: Stand, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """structlog unconfigured would print to the app's stdout. At level INFO there is a line for each operation."""
    assert not structlog.is_configured()
    with caplog.at_level(logging.INFO, "metered_billing"):
        await run(bench)
    lines = [record for record in caplog.records if record.name == "metered_billing"]
    assert [line.message.split()[0] for line in lines] == [names.LOG_DEDUCTED, names.LOG_REFUNDED]
    assert [(line.module, line.funcName) for line in lines] == [("telemetry", "log")] * 2
    assert capsys.readouterr().out == ""


def test_log_cannot_be_broken_into_lines_by_a_value(caplog: pytest.LogCaptureFixture) -> None:
    """A line break in a value stays within it."""
    Telemetry().log(names.LOG_DISPUTED, reason="x\ncharge.settled kept=0\x1b[31m")
    [record] = caplog.records
    assert "\n" not in record.message
    assert "\x1b" not in record.message


def test_log_below_the_level_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is put together that nobody wants."""
    with caplog.at_level(logging.ERROR, "metered_billing"):
        Telemetry().log(names.LOG_DEDUCTED)
    assert caplog.records == []


def test_log_of_an_error_carries_it(configured: None) -> None:
    """For whoever formats tracebacks."""
    error = KeyError("x")
    with capture_logs() as logs:
        Telemetry().log(names.LOG_JOURNAL_FAILED, exc_info=error)
    assert logs == [{"event": names.LOG_JOURNAL_FAILED, "log_level": "critical", "exc_info": error}]


# As apps configure structlog.

SECRET = "hunter2-hunter2"


def as_json(locals_shown: bool) -> list[Any]:
    shown = structlog.tracebacks.ExceptionDictTransformer(show_locals=locals_shown)
    return [structlog.processors.ExceptionRenderer(shown), structlog.processors.JSONRenderer()]


def as_text(tracebacks: Any) -> list[Any]:
    return [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=tracebacks)]


RENDERERS = {
    "JSON": as_json(False),
    "JSON with locals": as_json(True),
    "console": as_text(structlog.dev.plain_traceback),
    "console with locals": as_text(structlog.dev.rich_traceback),
}


@pytest.fixture
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What a real configuration writes."""
    written = io.StringIO()
    structlog.configure(
        processors=[structlog.processors.add_log_level, *RENDERERS[request.param]],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(written),
        cache_logger_on_first_use=False,
    )
    yield written
    structlog.reset_defaults()


class Broken(Contract):
    """A user's own, with a bug that shows what it is given."""

    def read_deduction(self, record: Any, reply: Any) -> Any:
        raise RuntimeError(f"{reply.status}")


def broken_reader(received: bytes) -> Any:
    raise RuntimeError("a bug of ours, just after the call")


@pytest.mark.parametrize(
    "written",
    [
        "JSON",
        "JSON with locals",
        "console",
        pytest.param("console with locals", marks=pytest.mark.slow),
    ],
    indirect=True,
)
async def test_secrets_are_in_no_log(bench: Stand, written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the token, whatever fails, and not where tracebacks show local variables; nor what the client sent."""
    service = create_app(bench.credits.ledger, Tokens({SECRET: "*"}))
    line = Faulty(httpx.ASGITransport(service))

    async def one(faults: list[str], **options: Any) -> None:
        line.faults = faults
        client = HttpCredits("http://credits", token=SECRET, transport=line, telemetry=bench.telemetry, **options)
        app = Starlette(
            routes=[Route("/work", metered(cost=2)(work), methods=["POST"])],
            middleware=[Middleware(MeteredBillingMiddleware, **bench.options(credits=client))],
        )
        async with lifespan(app):
            connection = Connection(app, "/work", body=b"the client's own words")
            connection.scope["headers"].append((b"authorization", b"Bearer the-clients-own-secret"))
            await connection.run()
            await settled()

    async def work(request: Request) -> Response:
        await request.body()
        return JSONResponse({"results": [{"status": "ok", "text": "for the client's eyes"}, {"status": "failed"}]})

    await one(["ok", "ok"])
    await one(["lost reply", "500 after", "ok", "500"])
    await one(["refused"], attempts=1)
    await one(["ok"], contract=Broken())
    with monkeypatch.context() as patch:
        patch.setattr(sender, "read_json", broken_reader)
        await one(["ok"])
    text = written.getvalue()
    assert text.count(names.LOG_COST_COMPUTED) == 5
    assert text.count(names.LOG_MISCONFIGURED) == 5  # twice for each deduction, and for a void
    assert "a bug of ours" in text
    for secret in (SECRET, "the-clients-own-secret", "the client's own words", "for the client's eyes"):
        assert secret not in text


@pytest.mark.parametrize("written", ["JSON", "console"], indirect=True)
async def test_each_operation_is_one_line(bench: Stand, written: io.StringIO) -> None:
    """With the ids of its span, whichever way an app has its lines; what comes before and after it is for debugging."""
    await run(bench)
    lines = written.getvalue().splitlines()
    events = [names.LOG_COST_COMPUTED, names.LOG_DEDUCTED, names.LOG_REFUNDED, names.LOG_SETTLED]
    assert len(lines) == len(events)
    made = {trace.format_span_id(span.context.span_id) for span in bench.spans if span.context is not None}
    for line, event in zip(lines, events, strict=True):
        assert event in line
        assert "req-1" in line
        if line.startswith("{"):
            fields = json.loads(line)
            level = "info" if event in (names.LOG_DEDUCTED, names.LOG_REFUNDED) else "debug"
            assert (fields["event"], fields["level"], fields["amount"]) == (event, level, 10)
            assert fields["span_id"] in made
        else:
            assert any(f"span_id={span_id}" in line for span_id in made)
