"""Telemetry: a span and a log line for every credit operation, with the ids that somebody looks for."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs

from metered_billing import MeteredBillingMiddleware, metered, names, settled
from metered_billing.telemetry import Telemetry
from tests.stand import GRANTED, Connection, Stand, lifespan


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
    """Each change of the breaker, and each charge that somebody should look at."""
    bench_sync.telemetry.breaker_changed("open")
    bench_sync.telemetry.log(names.LOG_DISPUTED)
    assert data_points(bench_sync, "metered_billing.breaker.changes")[("open",)].value == 1
    assert data_points(bench_sync, "metered_billing.anomalies")[(names.LOG_DISPUTED,)].value == 1


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
    assert logs[1]["transaction_id"] == deduction["transaction_id"]
    assert (logs[2]["refunded"], logs[2]["refund_id"]) == (2, refund["id"])
    assert (logs[3]["kept"], logs[3]["refunded"]) == (8, 2)
    deduct = spans(bench)["metered_billing.deduct"]
    assert logs[1]["span_id"] == trace.format_span_id(deduct.context.span_id)


async def test_log_goes_to_the_standard_library_where_structlog_is_not_configured(
    bench: Stand, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """structlog unconfigured would print to the app's stdout."""
    assert not structlog.is_configured()
    with caplog.at_level(logging.INFO, "metered_billing"):
        await run(bench)
    assert [record.message.split()[0] for record in caplog.records if record.name == "metered_billing"] == [
        names.LOG_COST_COMPUTED,
        names.LOG_DEDUCTED,
        names.LOG_REFUNDED,
        names.LOG_SETTLED,
    ]
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
