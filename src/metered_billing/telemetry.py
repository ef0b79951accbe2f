"""How every span, metric and log event of the library is made; what they are called, `names` says.

The library uses the OpenTelemetry *API* and sets no provider: what is emitted goes wherever the app's SDK
sends it, or nowhere. Logs go to structlog where the app has configured it, else to
`logging.getLogger("metered_billing")`. Ids stand on spans and logs, never on metrics.
"""

import asyncio
import contextlib
import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from types import TracebackType
from typing import Any, Final, Self

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from metered_billing import names
from metered_billing.charge import FINAL, Account, Record, State
from metered_billing.commits import Committed

_LEVELS: Final[Mapping[str, int]] = {
    names.LOG_COST_COMPUTED: logging.DEBUG,
    names.LOG_SETTLED: logging.DEBUG,
    names.LOG_DECLINED: logging.WARNING,
    names.LOG_UNAVAILABLE: logging.ERROR,
    names.LOG_POSTPONED: logging.WARNING,
    names.LOG_REJECTED: logging.CRITICAL,
    names.LOG_STALE: logging.WARNING,
    names.LOG_DISPUTED: logging.ERROR,
    names.LOG_OWNERSHIP_LOST: logging.WARNING,
    names.LOG_MISMATCH: logging.WARNING,
    names.LOG_UNREADABLE: logging.WARNING,
    names.LOG_READER_RAISED: logging.ERROR,
    names.LOG_JOURNAL_FAILED: logging.CRITICAL,
    # So that whoever is shown the outage is shown its end.
    names.LOG_RESUMED: logging.WARNING,
    names.LOG_MISCONFIGURED: logging.ERROR,
    names.LOG_BUG: logging.CRITICAL,
}

_NOT_FINAL: Final = tuple(str(state) for state in State if state not in FINAL)

_GROUPS: Final[Mapping[str, str]] = {
    "ConnectError": "notsent",
    "ConnectTimeout": "notsent",
    "PoolTimeout": "notsent",
    "TimeoutError": "timeout",
    "ReadTimeout": "timeout",
    "WriteTimeout": "timeout",
}
"""What an attempt's `error.type` counts as in a metric."""

MAX_LINKS: Final = 128
"""Of one span: what the SDK keeps by default."""

_ANOMALIES: Final = frozenset(names.ANOMALIES)

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_STDLIB: Final = logging.getLogger(names.SCOPE)


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
        self._tracer = trace.get_tracer(names.SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(names.SCOPE, meter_provider=meter_provider)
        self._durations = meter.create_histogram(
            names.METRIC_DURATION,
            "s",
            "Time that a credit operation took",
            explicit_bucket_boundaries_advisory=names.SECONDS,
        )
        self._credits = meter.create_counter(
            names.METRIC_CREDITS, "{credit}", "Credits deducted, kept, refunded and voided"
        )
        self._retries = meter.create_counter(
            names.METRIC_RETRIES, "{attempt}", "Attempts after the first, by operation"
        )
        self._anomalies = meter.create_counter(
            names.METRIC_ANOMALIES, "{event}", "What somebody should look at, by log event"
        )
        self._breaker = meter.create_gauge(
            names.METRIC_BREAKER_STATE, "", "The circuit breaker: 0 closed, 1 half-open, 2 open"
        )
        self._breaker_changes = meter.create_counter(
            names.METRIC_BREAKER_CHANGES, "{change}", "Changes of the circuit breaker, by new state"
        )
        self._unsettled = meter.create_gauge(names.METRIC_UNSETTLED, "{charge}", "Charges that are not final, by state")
        self._oldest = meter.create_gauge(
            names.METRIC_UNSETTLED_AGE, "s", "Age of the oldest charge that is not final, by state"
        )
        self._rounds = meter.create_counter(
            names.METRIC_RECOVERY_ROUNDS, "{round}", "Times that recovery looked for what is due, by how it went"
        )
        self._batch_sizes = meter.create_histogram(
            names.METRIC_BATCH_SIZE,
            "{operation}",
            "Operations that one call to the credits service carried",
            explicit_bucket_boundaries_advisory=names.SIZES,
        )
        self._crowded_out = meter.create_counter(
            names.METRIC_CROWDED_OUT, "{operation}", "Operations refused since too many were waiting for the service"
        )
        self._commit_durations = meter.create_histogram(
            names.METRIC_COMMIT_DURATION,
            "s",
            "Time that a commit took which was synced to disk",
            explicit_bucket_boundaries_advisory=names.SECONDS,
        )
        self._commit_sizes = meter.create_histogram(
            names.METRIC_COMMIT_SIZE,
            "{operation}",
            "Operations that such a commit carried",
            explicit_bucket_boundaries_advisory=names.SIZES,
        )

    def start(self) -> None:
        """Let every counter begin at 0, so that whoever scrapes them sees the first increase. May be called again.

        Not at once: an app may set its provider after it has made its middleware.
        """
        for counter, attribute, values in (
            (self._credits, names.KIND, names.KINDS),
            (self._retries, names.OPERATION, names.RETRIED),
            (self._anomalies, names.EVENT, names.ANOMALIES),
            (self._breaker_changes, names.BREAKER_STATE, names.BREAKER_STATES),
            (self._rounds, names.OUTCOME, names.ROUNDS),
        ):
            for value in values:
                counter.add(0, {attribute: value})
        self._crowded_out.add(0)

    # Spans.

    def charge_span(self, record: Record) -> Span:
        """The span of a whole charge: begun here, ended by whoever puts its outcome on record."""
        return self._tracer.start_span(names.SPAN_CHARGE, attributes=_attributes(record))

    def operation(
        self, name: str, record: Record | None, *, parent: Span | None = None, linked: bool = False
    ) -> "Operation":
        """A span and a duration for one credit operation, as a context manager.

        Args:
            name: One of the `SPAN_` names.
            parent: The span that it belongs under; by default whichever is current. Where that one is not recorded,
                for nothing is or by its sampling, neither is this.
            linked: Link it to the span of the record's deduction.
        """
        kind = name.rpartition(".")[2]
        if type(parent) is trace.NonRecordingSpan:
            return Operation(parent, kind, self)
        attributes = None if record is None else _attributes(record)
        links = []
        if linked and record is not None and record.traceparent is not None:
            carrier = {"traceparent": record.traceparent}
            deduction = trace.get_current_span(_PROPAGATOR.extract(carrier, otel_context.Context()))
            links = [Link(deduction.get_span_context())]
        if parent is None:
            return Operation(self._tracer.start_span(name, attributes=attributes, links=links), kind, self)
        # It is sampled as its parent was, whatever its attributes: so they can wait, and be set with all the others.
        span = self._tracer.start_span(name, trace.set_span_in_context(parent), links=links)
        return Operation(span, kind, self, attributes)

    def not_begun(self, account: Account, amount: int, units: int, reason: str) -> "Operation":
        """The spans of a charge that could not even begin, because nothing could be opened: why it was 503."""
        attributes: dict[str, str | int] = {**_payer(account), names.AMOUNT: amount, names.UNITS: units}
        ended = {names.OUTCOME: "not run", names.ERROR_TYPE: "CreditsUnavailable"}
        charge = self._tracer.start_span(names.SPAN_CHARGE, attributes={**attributes, **ended})
        charge.end()
        deduct = self._tracer.start_span(names.SPAN_DEDUCT, trace.set_span_in_context(charge), attributes=attributes)
        operation = Operation(deduct, "deduct", self)
        operation.failed("notsent", reason)
        operation.note(names.REASON, reason)
        return operation

    def attempt(
        self,
        method: str,
        url: str,
        server: str,
        port: int,
        resend: int,
        operation: str,
        batched: Sequence[Span] = (),
    ) -> "Operation":
        """A client span for one HTTP attempt.

        Args:
            url: Without its query.
            resend: How many attempts there were before it.
            batched: The spans of the operations that go in one call: they and its span are linked.
        """
        attributes: dict[str, str | int] = {
            names.HTTP_METHOD: method,
            names.URL_FULL: url,
            names.SERVER_ADDRESS: server,
            names.SERVER_PORT: port,
        }
        if operation in names.RETRIED or batched:
            self._batch_sizes.record(len(batched) or 1)
        if resend:
            attributes[names.HTTP_RESEND_COUNT] = resend
            if operation in names.RETRIED:
                self._retries.add(1, {names.OPERATION: operation})
        recorded = [each for each in batched if each.is_recording()]
        links = [Link(each.get_span_context()) for each in recorded[:MAX_LINKS]]
        if batched:
            attributes[names.BATCH_SIZE] = len(batched)
        span = self._tracer.start_span(method, kind=SpanKind.CLIENT, attributes=attributes, links=links)
        if span.is_recording():
            for each in recorded:
                each.set_attribute(names.BATCH_SIZE, len(batched))
                each.add_link(span.get_span_context())
        return Operation(span, "attempt", self)

    # Metrics.

    def measured(self, operation: str, outcome: str, duration_s: float) -> None:
        self._durations.record(duration_s, _measured(operation, outcome))

    def crowded_out(self) -> None:
        """An operation found no room in the line."""
        self._crowded_out.add(1)

    def moved(self, kind: str, amount: int) -> None:
        """Credits that were `deducted`, `kept`, `refunded` or `voided`."""
        if amount:
            self._credits.add(amount, {names.KIND: kind})

    def breaker_is(self, state: str) -> None:
        self._breaker.set(names.BREAKER_STATES.index(state))

    def breaker_changed(self, state: str) -> None:
        self._breaker_changes.add(1, {names.BREAKER_STATE: state})
        self.breaker_is(state)

    def unsettled(self, states: Mapping[str, tuple[int, float]]) -> None:
        """How many charges are in each state, and the age of the oldest, in seconds."""
        for state in _NOT_FINAL:
            count, age_s = states.get(state, (0, 0.0))
            self._unsettled.set(count, {names.CHARGE_STATE: state})
            self._oldest.set(age_s, {names.CHARGE_STATE: state})

    def recovered(self, outcome: str) -> None:
        """A round of recovery, `ok` or `failed`."""
        self._rounds.add(1, {names.OUTCOME: outcome})

    def committed(self, store: str) -> Committed:
        """Whom a database tells of its commits: the `journal`'s, or the `ledger`'s."""
        attributes = {names.STORE: store}

        def measure(size: int, duration_s: float) -> None:
            self._commit_sizes.record(size, attributes)
            self._commit_durations.record(duration_s, attributes)

        return measure

    # Logs.

    def again(self, event: str, record: Record | None, *, reason: str) -> None:
        """What was logged before goes on: it is counted, so that an alert lasts, and not logged."""
        self._anomalies.add(1, {names.EVENT: event})

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
            level = _LEVELS.get(event, logging.INFO)
            if event in _ANOMALIES:
                self._anomalies.add(1, {names.EVENT: event})
            # Who has configured it has imported it; that takes a tenth of a second, which others need not wait for.
            structlog = sys.modules.get("structlog")
            if structlog is not None and structlog.is_configured():
                fields = _with_ids(fields, record, span)
                if exc_info is not None:
                    fields["exc_info"] = exc_info
                structlog.get_logger(names.SCOPE).log(level, event, **fields)
            elif _STDLIB.isEnabledFor(level):
                _line(event, level, _with_ids(fields, record, span), exc_info)
        except Exception:
            # A processor of the app's own: what it cannot bear must not stand between two moves of credits.
            with contextlib.suppress(Exception):
                _STDLIB.exception("%s could not be logged", event)


class Operation:
    """A span that is current while it lasts; its outcome is set before it ends.

    A cancelled span would end UNSET and a failed one without `error.type`: here both get theirs.
    """

    __slots__ = ("_attributes", "_began", "_name", "_telemetry", "_token", "outcome", "span")

    def __init__(self, span: Span, name: str, telemetry: Telemetry, attributes: dict[str, Any] | None = None) -> None:
        self.span: Span = span
        self.outcome: str = "ok"
        self._name = name
        self._telemetry = telemetry
        self._attributes = {} if attributes is None else attributes
        self._token: Token[otel_context.Context] | None = None

    def __enter__(self) -> Self:
        self._began = self._telemetry.clock()
        if self.span is not trace.INVALID_SPAN:
            self._token = otel_context.attach(trace.set_span_in_context(self.span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        if error is None or self.outcome != "ok":
            pass  # it went well, or said itself what went wrong
        elif isinstance(error, asyncio.CancelledError):
            self.failed("cancelled")
        else:
            self.failed(type(error).__qualname__)
        span = self.span
        if span.is_recording():
            self._attributes[names.OUTCOME] = self.outcome
            span.set_attributes(self._attributes)
        span.end()
        self._telemetry.measured(self._name, self.outcome, self._telemetry.clock() - self._began)

    def note(self, attribute: str, value: str | int | list[str]) -> None:
        """An attribute of the span. They are set together, at its end, for the SDK takes a lock each time."""
        self._attributes[attribute] = value

    def failed(self, error_type: str, reason: str | None = None) -> None:
        """Mark it as failed: `error_type` says as what, `reason` is for reading."""
        self.outcome = error_type
        self.note(names.ERROR_TYPE, error_type)
        self.span.set_status(Status(StatusCode.ERROR, reason))


def traceparent_of(span: Span) -> str | None:
    """The W3C `traceparent` of a span, or None where it is not traced."""
    at = span.get_span_context()
    if not at.is_valid:
        return None
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}"


def propagate(headers: dict[str, str]) -> None:
    """Add the current span's `traceparent` to the headers of a call."""
    _PROPAGATOR.inject(headers)


@functools.lru_cache(maxsize=256)
def _measured(operation: str, outcome: str) -> Mapping[str, str]:
    """A metric's attributes, made once each."""
    return {names.OPERATION: operation, names.OUTCOME: _grouped(outcome)}


def _with_ids(fields: dict[str, Any], record: Record | None, span: Span | None) -> dict[str, Any]:
    """What a log event says, with the ids of its charge and of its span."""
    if record is not None:
        account = record.account
        fields = {
            "tenant_id": account.tenant_id,
            "user_id": account.user_id,
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
    return fields


def _line(event: str, level: int, fields: dict[str, Any], error: BaseException | None) -> None:
    """Log an event through the standard library."""
    values = " ".join([f"{key}={_json(value)}" for key, value in fields.items()])
    exception = None if error is None else (type(error), error, error.__traceback__)
    extra = {"metered_billing": fields}
    # Not `_STDLIB.log`, which would look through the stack for its caller: that is always us.
    record = _STDLIB.makeRecord(names.SCOPE, level, __file__, 0, "%s %s", (event, values), exception, "log", extra)
    _STDLIB.handle(record)


def _json(value: object) -> str:
    """As JSON, which keeps a line break in a value from starting a line of its own."""
    if type(value) is str:
        return _text(value)
    if type(value) is int:
        return str(value)
    return "null" if value is None else _encode(value)


_text: Final = json.encoder.encode_basestring_ascii
_encode: Final = json.JSONEncoder(default=str).encode


def _grouped(outcome: str) -> str:
    """The outcome as a metric has it, one of few: every status or exception would be a time series of its own."""
    if outcome.isdigit():
        outcome = f"{outcome[0]}xx"
    outcome = _GROUPS.get(outcome, outcome)
    return outcome if outcome in names.OUTCOMES else "error"


def shown_items(record: Record) -> list[str]:
    """The first of its failed items: enough to see what they are."""
    return list(record.refund_items[: names.ITEMS_SHOWN])


def _payer(account: Account) -> dict[str, str]:
    user = {} if account.user_id is None else {names.USER_ID: account.user_id}
    return {names.TENANT_ID: account.tenant_id, **user}


def _attributes(record: Record) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.CHARGE_ID: record.id,
        **_payer(record.account),
        names.AMOUNT: record.amount_credits,
        names.UNITS: record.units,
    }
    if record.request_id is not None:
        attributes[names.REQUEST_ID] = record.request_id
    if record.transaction_id is not None:
        attributes[names.TRANSACTION_ID] = record.transaction_id
    if record.refund_credits:
        attributes[names.REFUNDED] = record.refund_credits
    return attributes
