"""Every span, attribute, metric and log event that the library emits: the names, and how they are made.

The library uses the OpenTelemetry *API* and sets no provider: what is emitted goes wherever the app's SDK
sends it, or nowhere. Logs go to structlog where the app has configured it, else to
`logging.getLogger("metered_billing")`. Ids stand on spans and logs, never on metrics.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextvars import Token
from types import TracebackType
from typing import Any, Final, Self

import structlog
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from metered_billing.charge import Record

SCOPE: Final = "metered_billing"

# Spans.
SPAN_CHARGE: Final = "metered_billing.charge"
SPAN_DEDUCT: Final = "metered_billing.deduct"
SPAN_REFUND: Final = "metered_billing.refund"
SPAN_VOID: Final = "metered_billing.void"
SPAN_RECOVER: Final = "metered_billing.recover"

# Span attributes of ours; those of HTTP attempts are OpenTelemetry's own.
CHARGE_ID: Final = "metered_billing.charge.id"
CHARGE_STATE: Final = "metered_billing.charge.state"
TENANT_ID: Final = "metered_billing.tenant.id"
USER_ID: Final = "metered_billing.user.id"
REQUEST_ID: Final = "metered_billing.request.id"
TRANSACTION_ID: Final = "metered_billing.transaction.id"
AMOUNT: Final = "metered_billing.amount"
UNITS: Final = "metered_billing.units"
KEPT: Final = "metered_billing.kept"
REFUNDED: Final = "metered_billing.refunded"
OUTCOME: Final = "metered_billing.outcome"
REASON: Final = "metered_billing.reason"
TRIES: Final = "metered_billing.tries"
MISMATCH: Final = "metered_billing.outcomes_mismatch"
UNREADABLE: Final = "metered_billing.outcomes_unreadable"
ERROR_TYPE: Final = "error.type"

# Metric attributes.
OPERATION: Final = "metered_billing.operation"

# Log events.
LOG_COST_COMPUTED: Final = "credits.cost_computed"
LOG_DEDUCTED: Final = "credits.deducted"
LOG_DECLINED: Final = "credits.declined"
LOG_UNAVAILABLE: Final = "credits.unavailable"
LOG_REFUNDED: Final = "credits.refunded"
LOG_VOIDED: Final = "credits.voided"
LOG_POSTPONED: Final = "credits.postponed"
LOG_REJECTED: Final = "credits.token_rejected"
LOG_SETTLED: Final = "charge.settled"
LOG_ABANDONED: Final = "charge.abandoned"
LOG_DISPUTED: Final = "charge.disputed"
LOG_RECOVERED: Final = "charge.recovered"
LOG_OWNERSHIP_LOST: Final = "charge.ownership_lost"
LOG_MISMATCH: Final = "charge.outcomes_mismatch"
LOG_UNREADABLE: Final = "charge.outcomes_unreadable"
LOG_READER_RAISED: Final = "charge.outcomes_raised"
LOG_JOURNAL_FAILED: Final = "journal.failed"
LOG_MISCONFIGURED: Final = "billing.misconfigured"
LOG_BUG: Final = "billing.bug"

_LEVELS: Final[Mapping[str, int]] = {
    LOG_DECLINED: logging.WARNING,
    LOG_UNAVAILABLE: logging.ERROR,
    LOG_POSTPONED: logging.WARNING,
    LOG_REJECTED: logging.CRITICAL,
    LOG_DISPUTED: logging.ERROR,
    LOG_OWNERSHIP_LOST: logging.WARNING,
    LOG_MISMATCH: logging.WARNING,
    LOG_UNREADABLE: logging.WARNING,
    LOG_READER_RAISED: logging.ERROR,
    LOG_JOURNAL_FAILED: logging.CRITICAL,
    LOG_MISCONFIGURED: logging.ERROR,
    LOG_BUG: logging.CRITICAL,
}

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_STDLIB: Final = logging.getLogger(SCOPE)


class Telemetry:
    """What the biller and its clients tell the people who run them.

    Args:
        tracer_provider: OpenTelemetry's global one by default.
        meter_provider: Likewise.
        clock: For durations, in seconds.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._durations = meter.create_histogram(
            "metered_billing.operation.duration",
            "s",
            "Time that a credit operation took",
        )
        self._credits = meter.create_counter(
            "metered_billing.credits", "{credit}", "Credits deducted, kept, refunded and voided"
        )
        self._retries = meter.create_counter(
            "metered_billing.retries", "{attempt}", "Attempts after the first, by operation"
        )
        self._anomalies = meter.create_counter(
            "metered_billing.anomalies", "{charge}", "Charges that somebody should look at, by log event"
        )
        self._breaker = meter.create_counter(
            "metered_billing.breaker.changes", "{change}", "Changes of the circuit breaker, by new state"
        )
        self._unsettled = meter.create_gauge(
            "metered_billing.unsettled", "{charge}", "Charges that are not final, by state"
        )
        self._oldest = meter.create_gauge(
            "metered_billing.unsettled.age", "s", "Age of the oldest charge that is not final, by state"
        )
        self._seen_states: set[str] = set()

    # Spans.

    def charge_span(self, record: Record) -> Span:
        """The span of a whole charge: begun here, ended by whoever puts its outcome on record."""
        return self._tracer.start_span(SPAN_CHARGE, attributes=_attributes(record))

    def operation(
        self, name: str, record: Record | None, *, parent: Span | None = None, linked: bool = False
    ) -> "Operation":
        """A span and a duration for one credit operation, as a context manager.

        Args:
            name: One of the `SPAN_` names.
            parent: The span that it belongs under; by default whichever is current.
            linked: Link it to the span of the record's deduction.
        """
        links = []
        if linked and record is not None and record.traceparent is not None:
            carrier = {"traceparent": record.traceparent}
            deduction = trace.get_current_span(_PROPAGATOR.extract(carrier, otel_context.Context()))
            links = [Link(deduction.get_span_context())]
        context = trace.set_span_in_context(parent) if parent is not None else None
        span = self._tracer.start_span(
            name, context, attributes=_attributes(record) if record is not None else None, links=links
        )
        return Operation(span, name.rpartition(".")[2], self)

    def attempt(self, method: str, server: str, port: int, resend: int, operation: str) -> "Operation":
        """A client span for one HTTP attempt."""
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "server.address": server,
            "server.port": port,
        }
        if resend:
            attributes["http.request.resend_count"] = resend
            self._retries.add(1, {OPERATION: operation})
        span = self._tracer.start_span(method, kind=SpanKind.CLIENT, attributes=attributes)
        return Operation(span, "attempt", self)

    # Metrics.

    def measured(self, operation: str, outcome: str, duration_s: float) -> None:
        self._durations.record(duration_s, {OPERATION: operation, OUTCOME: outcome})

    def moved(self, kind: str, amount: int) -> None:
        """Credits that were `deducted`, `kept`, `refunded` or `voided`."""
        if amount:
            self._credits.add(amount, {"metered_billing.kind": kind})

    def breaker_changed(self, state: str) -> None:
        self._breaker.add(1, {"metered_billing.breaker.state": state})

    def unsettled(self, states: Mapping[str, tuple[int, float]]) -> None:
        """How many charges are in each state, and the age of the oldest, in seconds."""
        self._seen_states |= states.keys()
        for state in self._seen_states:
            count, age_s = states.get(state, (0, 0.0))
            self._unsettled.set(count, {CHARGE_STATE: state})
            self._oldest.set(age_s, {CHARGE_STATE: state})

    # Logs.

    def log(
        self,
        event: str,
        record: Record | None = None,
        *,
        span: Span | None = None,
        exc_info: BaseException | None = None,
        **fields: Any,
    ) -> None:
        """One event, with the ids of its charge and span. Never a secret, never a body. Never raises."""
        try:
            self._log(event, record, span, exc_info, fields)
        except Exception:
            # A processor of the app's own: what it cannot bear must not stand between two moves of credits.
            with contextlib.suppress(Exception):
                _STDLIB.exception("%s could not be logged", event)

    def _log(
        self,
        event: str,
        record: Record | None,
        span: Span | None,
        exc_info: BaseException | None,
        fields: dict[str, Any],
    ) -> None:
        level = _LEVELS.get(event, logging.INFO)
        if event in (LOG_DISPUTED, LOG_MISMATCH, LOG_UNREADABLE, LOG_READER_RAISED, LOG_OWNERSHIP_LOST):
            self._anomalies.add(1, {"metered_billing.event": event})
        structured = structlog.is_configured()
        if not structured and not _STDLIB.isEnabledFor(level):
            return
        if record is not None:
            fields = {
                "tenant_id": record.account.tenant_id,
                "user_id": record.account.user_id,
                "amount": record.amount_credits,
                "transaction_id": record.transaction_id,
                "charge_id": record.id,
                "request_id": record.request_id,
                **fields,
            }
        at = (span or trace.get_current_span()).get_span_context()
        if at.is_valid:
            fields["trace_id"] = trace.format_trace_id(at.trace_id)
            fields["span_id"] = trace.format_span_id(at.span_id)
        if structured:
            if exc_info is not None:
                fields["exc_info"] = exc_info
            structlog.get_logger(SCOPE).log(level, event, **fields)
        else:
            # JSON keeps a line break in a value from starting a line of its own.
            values = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in fields.items())
            _STDLIB.log(level, "%s %s", event, values, exc_info=exc_info, extra={"metered_billing": fields})


class Operation:
    """A span that is current while it lasts; its outcome is set before it ends.

    A cancelled span would end UNSET and a failed one without `error.type`: here both get theirs.
    """

    __slots__ = ("_began", "_name", "_telemetry", "_token", "outcome", "span")

    def __init__(self, span: Span, name: str, telemetry: Telemetry) -> None:
        self.span = span
        self.outcome = "ok"
        self._name = name
        self._telemetry = telemetry

    def __enter__(self) -> Self:
        self._began = self._telemetry.clock()
        self._token: Token[otel_context.Context] = otel_context.attach(trace.set_span_in_context(self.span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        otel_context.detach(self._token)
        if error is None or self.outcome != "ok":
            pass  # it went well, or said itself what went wrong
        elif isinstance(error, asyncio.CancelledError):
            self.failed("cancelled")
        else:
            self.failed(type(error).__qualname__)
        self.span.set_attribute(OUTCOME, self.outcome)
        self.span.end()
        self._telemetry.measured(self._name, self.outcome, self._telemetry.clock() - self._began)

    def failed(self, error_type: str, reason: str | None = None) -> None:
        """Mark it as failed: `error_type` is of few kinds, `reason` is for reading."""
        self.outcome = error_type
        self.span.set_attribute(ERROR_TYPE, error_type)
        self.span.set_status(Status(StatusCode.ERROR, reason))


def traceparent_of(span: Span) -> str | None:
    """The W3C `traceparent` of a span, or None where nothing is traced."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, otel_context.Context()))
    return carrier.get("traceparent")


def propagate(headers: dict[str, str]) -> None:
    """Add the current span's `traceparent` to the headers of a call."""
    _PROPAGATOR.inject(headers)


def _attributes(record: Record) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        CHARGE_ID: record.id,
        TENANT_ID: record.account.tenant_id,
        AMOUNT: record.amount_credits,
        UNITS: record.units,
    }
    if record.account.user_id is not None:
        attributes[USER_ID] = record.account.user_id
    if record.request_id is not None:
        attributes[REQUEST_ID] = record.request_id
    if record.transaction_id is not None:
        attributes[TRANSACTION_ID] = record.transaction_id
    if record.refund_credits:
        attributes[REFUNDED] = record.refund_credits
    return attributes
