"""Spans as app and credits service send them: made by OpenTelemetry's SDK, over the wire, into a collector."""

from collections.abc import Mapping
from typing import Any

from examples.fastapi_app.desk.collector import Collector
from examples.fastapi_app.desk.otlp import decode
from examples.fastapi_app.desk.reading import Reading
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

BEGAN_NS = 1_764_000_000_000_000_000
APP, APP_AGAIN, CREDITS = 101, 102, 201
"""Process ids."""

WHOSE: Mapping[str, Any] = {
    "metered_billing.tenant.id": "demo",
    "metered_billing.user.id": "alice",
    "metered_billing.charge.id": "c-1",
    "metered_billing.amount": 10,
}
"""What stands on every span of a charge."""


class Scene:
    """What some processes have sent so far.

    Attributes:
        running: The ids of those that run.
    """

    def __init__(self) -> None:
        self.collector = Collector()
        self.running = {APP, CREDITS}
        self.reading = Reading(self.collector, lambda: frozenset(self.running))
        self._sent = InMemorySpanExporter()
        self._tracers = {pid: self._tracer(pid) for pid in (APP, APP_AGAIN, CREDITS)}

    def _tracer(self, pid: int) -> trace.Tracer:
        name = "credits" if pid == CREDITS else "app"
        provider = TracerProvider(resource=Resource({"service.name": name, "process.pid": pid}), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._sent))
        return provider.get_tracer("tests")

    def begin(
        self,
        name: str,
        parent: Span | None = None,
        at_ms: float = 0,
        *,
        pid: int = APP,
        kind: SpanKind = SpanKind.INTERNAL,
        link: Span | None = None,
        attributes: Mapping[str, Any] | None = None,
        charge: bool = False,
    ) -> Span:
        """A span that is under way.

        Args:
            charge: Put onto it what stands on every span of a charge.
        """
        return self._tracers[pid].start_span(
            name,
            trace.set_span_in_context(parent, Context()) if parent is not None else Context(),
            kind=kind,
            attributes={**(WHOSE if charge else {}), **(attributes or {})},
            links=[Link(link.get_span_context())] if link is not None else [],
            start_time=BEGAN_NS + round(at_ms * 1e6),
        )

    def span(self, name: str, parent: Span | None = None, at_ms: float = 0, for_ms: float = 1, **more: Any) -> Span:
        """One that has ended."""
        error = more.pop("error", None)
        span = self.begin(name, parent, at_ms, **more)
        self.end(span, at_ms + for_ms, error=error)
        return span

    def end(self, span: Span, at_ms: float, *, error: str | None = None, status: int = 0, **attributes: Any) -> None:
        """End it; a request with the status of its answer."""
        span.set_attributes({**({"http.response.status_code": status} if status else {}), **attributes})
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(BEGAN_NS + round(at_ms * 1e6))

    def send(self) -> "Scene":
        """All spans that have ended arrive, as bytes."""
        spans = self._sent.get_finished_spans()
        self._sent.clear()
        self.collector.add(decode(encode_spans(spans).SerializeToString()))
        return self

    # What there is to be read.

    def whole(self, span: Span) -> dict[str, Any]:
        """The trace that a span belongs to."""
        self.send()
        found = self.reading.trace(trace_id(span))
        assert found is not None
        return found

    def summary(self, span: Span) -> dict[str, Any]:
        """Its line in the list, which says the same as the whole."""
        whole: dict[str, Any] = self.whole(span)["summary"]
        (listed,) = (one for one in self.reading.summaries() if one["trace_id"] == whole["trace_id"])
        assert listed == whole
        return whole

    def answers(self, span: Span) -> dict[str, str]:
        """Its story: the answers by their questions."""
        return {told["question"]: told["answer"] for told in self.whole(span)["story"]}

    # Pieces of what requests leave.

    def request(self, at_ms: float = 0, *, parent: Span | None = None) -> Span:
        """The server span of `POST /create-products`."""
        return self.begin("POST /create-products", parent, at_ms, kind=SpanKind.SERVER)

    def attempt(
        self,
        operation: Span,
        at_ms: float = 1,
        for_ms: float = 2,
        *,
        status: int | None = None,
        error: str | None = None,
        resend: int = 0,
        pid: int = APP,
        ledger: str | None = None,
        **told: Any,
    ) -> Span:
        """One HTTP attempt; with `ledger` also what the service did."""
        attributes: dict[str, Any] = {"server.port": 8080}
        if status is not None:
            attributes["http.response.status_code"] = status
        if error is not None:
            attributes["error.type"] = error
        if resend:
            attributes["http.request.resend_count"] = resend
        span = self.begin("POST", operation, at_ms, kind=SpanKind.CLIENT, attributes=attributes, pid=pid)
        if ledger is not None:
            self.span(
                f"metered_billing.ledger.{ledger}",
                remote(span),
                at_ms + 0.5,
                0.5,
                pid=CREDITS,
                attributes={"metered_billing.status_code": status or 201, **prefixed(told)},
            )
        self.end(span, at_ms + for_ms, error=error)
        return span


def prefixed(told: Mapping[str, Any]) -> dict[str, Any]:
    """`{"kept": 8}` as `{"metered_billing.kept": 8}`."""
    return {f"metered_billing.{name}": value for name, value in told.items()}


def remote(span: Span) -> Span:
    """The same, as another process hears of it."""
    context = span.get_span_context()
    return NonRecordingSpan(SpanContext(context.trace_id, context.span_id, True, TraceFlags(1)))


def trace_id(span: Span) -> str:
    return trace.format_trace_id(span.get_span_context().trace_id)


def span_id(span: Span) -> str:
    return trace.format_span_id(span.get_span_context().span_id)
