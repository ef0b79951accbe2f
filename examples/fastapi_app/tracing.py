"""The app's telemetry: spans to the desk, metrics at `/metrics`. Nothing of it is needed for billing.

A real app configures OpenTelemetry in a place like this one, and sends everything to its own backend.
"""

import os
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

DESK = "METERED_BILLING_DEMO_DESK"
"""Names the desk's URL. Without it the app sends no spans."""

TRACE_HEADER = "X-Trace-Id"
"""Says, on each answer to a traced request, which trace it has left."""


def set_up() -> "TracerProvider | None":
    """Send spans to where `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` says, and keep metrics for `/metrics`.

    Returns:
        What is to be shut down at the end; None where the app runs without a desk.
    """
    if not os.environ.get(DESK):
        return None
    # Only here: tests of the app do without.
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class ExportOverHttp(SpanExporter):
        """What sends spans takes a while to import: in the exporting thread, with the first span, it delays nobody."""

        def __init__(self) -> None:
            self._exporter: SpanExporter | None = None

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if self._exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                self._exporter = OTLPSpanExporter()
            return self._exporter.export(spans)

        def shutdown(self) -> None:
            if self._exporter is not None:
                self._exporter.shutdown()

    class HandOnTheName(SpanProcessor):
        """Of a process that is killed, only spans that had ended are left: these say what they were part of."""

        def on_start(self, span: Span, parent_context: Any = None) -> None:
            parent = trace.get_current_span(parent_context)
            if isinstance(parent, ReadableSpan) and parent.context.trace_id == span.context.trace_id:
                known = (parent.attributes or {}).get("demo.request")
                name = known or (parent.name if parent.kind is trace.SpanKind.SERVER else None)
                if name:
                    span.set_attribute("demo.request", name)

    provider = TracerProvider(resource=Resource.create({"service.name": "app", "process.pid": os.getpid()}))
    provider.add_span_processor(HandOnTheName())
    provider.add_span_processor(BatchSpanProcessor(ExportOverHttp()))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider(metric_readers=[PrometheusMetricReader()]))
    return provider


def is_quiet(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request leaves no spans: pages poll, and pictures and metrics are fetched; what is work is a POST."""
    return scope.get("method") != "POST" or scope["path"].startswith("/desk/")


class TellTraceId:
    """ASGI middleware: says on each answer which trace it has left, so that a page can link to it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = trace.get_current_span().get_span_context()
        if scope["type"] != "http" or not context.is_valid:
            await self.app(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[TRACE_HEADER] = trace.format_trace_id(context.trace_id)
            await send(message)

        await self.app(scope, receive, tell)
