"""The service's spans and metrics: one for each operation on the ledger, in the caller's trace.

The OpenTelemetry API only: without an SDK they cost next to nothing and go nowhere.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, ProxyTracer, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from metered_billing import names
from metered_billing.ledger import Answer, Command, Deduct, Grant, LedgerCorrupt, LedgerUnavailable, Refund, Void

_SPANS: Final[Mapping[type[Command], tuple[str, str]]] = {
    kind: (name, name.rpartition(".")[2])
    for kind, name in (
        (Deduct, names.SPAN_LEDGER_DEDUCT),
        (Refund, names.SPAN_LEDGER_REFUND),
        (Void, names.SPAN_LEDGER_VOID),
        (Grant, names.SPAN_LEDGER_GRANT),
    )
}
"""A command's span, and the operation's short name."""

_propagator = TraceContextTextMapPropagator()


class Instruments:
    """What the service measures; OpenTelemetry's global provider by default, also one that is set later."""

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        meter = metrics.get_meter(names.SERVICE_SCOPE, meter_provider=meter_provider)
        self.durations = meter.create_histogram(
            names.METRIC_LEDGER_DURATION,
            "s",
            "Time that the ledger took to answer",
            explicit_bucket_boundaries_advisory=names.SECONDS,
        )
        self.batch_sizes = meter.create_histogram(
            names.METRIC_LEDGER_BATCH_SIZE,
            "{operation}",
            "Operations that came in one batch",
            explicit_bucket_boundaries_advisory=names.SIZES,
        )


# Once, and not for each app: OpenTelemetry keeps what it was asked for, for ever.
INSTRUMENTS = Instruments()


@dataclass(slots=True)
class Operation:
    """A command under way; `close_span` or `fail_span` ends it."""

    name: str
    span: Span
    began: float

    def end(self, outcome: str) -> None:
        self.span.end()
        attributes = {names.OPERATION: self.name, names.OUTCOME: outcome}
        INSTRUMENTS.durations.record(time.perf_counter() - self.began, attributes)


def tracer() -> Tracer | None:
    """What makes the spans; None where no provider is set, so that nobody would see them."""
    found = trace.get_tracer(names.SERVICE_SCOPE)
    return None if isinstance(found, ProxyTracer | NoOpTracer) else found


def open_span(tracer: Tracer | None, command: Command, *carriers: Mapping[str, str]) -> Operation:
    """Begin the span of a command.

    Args:
        carriers: Where the caller's trace context may stand, the most particular first: an operation of a
            batch, then the request's headers. What is no valid traceparent counts as none.
    """
    span_name, operation = _SPANS[type(command)]
    if tracer is None:
        return Operation(operation, INVALID_SPAN, time.perf_counter())
    attributes: dict[str, str | int] = {names.OPERATION: operation}
    if isinstance(command, Refund):
        attributes[names.TRANSACTION_ID] = command.transaction_id
    else:
        attributes[names.TENANT_ID] = command.tenant_id
        if command.user_id is not None:
            attributes[names.USER_ID] = command.user_id
    if not isinstance(command, Void):
        attributes[names.AMOUNT] = command.amount
    span = tracer.start_span(span_name, context=_parent(carriers), kind=SpanKind.INTERNAL, attributes=attributes)
    return Operation(operation, span, time.perf_counter())


def close_span(operation: Operation, answer: Answer) -> None:
    """End a command that was answered. A refusal is an answer, not an error."""
    span, refusal = operation.span, answer.refusal
    if span.is_recording():
        span.set_attribute(names.STATUS_CODE, answer.status)
        span.set_attribute(names.REPLAYED, answer.replayed)
        if refusal is not None:
            span.set_attribute(names.ERROR_TYPE, refusal)
        for attribute, member in (
            (names.TRANSACTION_ID, "transaction_id"),
            (names.BALANCE, "balance"),
            (names.REFUNDED, "refunded"),
        ):
            if member in answer.body:
                span.set_attribute(attribute, answer.body[member])
    operation.end(refusal or "ok")


def fail_span(operation: Operation, error: BaseException) -> None:
    """End a command without an answer."""
    name = "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
    operation.span.set_attribute(names.ERROR_TYPE, name)
    operation.span.set_status(Status(StatusCode.ERROR, name))
    operation.end(_kind_of(error))


def count_batch(size: int) -> None:
    """A batch of so many operations has come."""
    INSTRUMENTS.batch_sizes.record(size)


def _kind_of(error: BaseException) -> str:
    """The error as a metric has it, one of few."""
    if isinstance(error, LedgerUnavailable):
        return "unavailable"
    if isinstance(error, LedgerCorrupt):
        return "corrupt"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "error"


def _parent(carriers: Sequence[Mapping[str, str]]) -> Context | None:
    for carrier in carriers[:-1]:
        if "traceparent" in carrier:
            return _propagator.extract(carrier)
    if trace.get_current_span().get_span_context().is_valid:
        # An instrumented server has made a span for the request already, in the caller's trace.
        return None
    return _propagator.extract(carriers[-1])
