"""`serve` is an application: it sets up OpenTelemetry's SDK, where the environment asks for that.

The variables are OpenTelemetry's own. Spans go out by OTLP over HTTP, metrics are shown to Prometheus.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from opentelemetry import metrics, trace

from metered_billing.cli.failure import Failure
from metered_billing.cli.serving import PatientServer
from metered_billing.cli.terminal import complain

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME: Final = "metered-billing"

FLUSH_WITHIN_S = 3.0
"""How long a stopping service waits for its last spans to go out: a collector that is down holds up nobody."""

SELDOM_S = 60.0
"""How often one and the same logger of the SDK may complain: a collector that is down is news once."""

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_METRICS: Final = "OTEL_METRICS_EXPORTER"
_HOST: Final = "OTEL_EXPORTER_PROMETHEUS_HOST"
_PORT: Final = "OTEL_EXPORTER_PROMETHEUS_PORT"
_EXPORTER_LOGGER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


class Exports:
    """What this process sends out and shows, until `flush`."""

    def __init__(self) -> None:
        self._tracers: TracerProvider | None = None

    def set_up(self, environment: Mapping[str, str] | None = None) -> None:
        """Set the providers that the environment asks for. Without the extra `otel`: complain, and go on.

        Raises:
            Failure: Metrics cannot be shown where they are to be.
        """
        env = os.environ if environment is None else environment
        if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return
        endpoint = next((name for name in _ENDPOINTS if env.get(name)), None)
        if env.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
            endpoint = None
        shown = "prometheus" in [word.strip().lower() for word in env.get(_METRICS, "").split(",")]
        asked = [name for name, wanted in ((endpoint, endpoint), (f"{_METRICS}=prometheus", shown)) if wanted]
        if not asked:
            return
        try:
            resource = _resource()
            if endpoint is not None:
                self._export_spans(resource, env)
            if shown:
                _show_metrics(resource, env)
        except ImportError:
            complain(
                f"{' and '.join(map(str, asked))} cannot be followed: "
                "pip install 'metered-billing[otel]'. The service runs without."
            )

    def _export_spans(self, resource: "Resource", env: Mapping[str, str]) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        protocol = next((env[name] for name in _PROTOCOLS if env.get(name)), "http/protobuf")
        if protocol != "http/protobuf":
            complain(f"OTLP goes out as http/protobuf, not as {protocol}: give it the collector's HTTP port.")
        logging.getLogger(_EXPORTER_LOGGER).addFilter(Seldom())
        # Not at exit: that would wait for as long as the exporter does.
        self._tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._tracers.sampler = _but_health(self._tracers.sampler)
        self._tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(self._tracers)

    def flush(self, within_s: float | None = None) -> None:
        """Send what is left, if it goes out in time, and nothing from then on. May be called again."""
        tracers, self._tracers = self._tracers, None
        if tracers is None:
            return
        flushing = threading.Thread(target=tracers.shutdown, name="metered-billing flush", daemon=True)
        flushing.start()
        flushing.join(FLUSH_WITHIN_S if within_s is None else within_s)


class Server(PatientServer):
    """Sends its last spans before it leaves: SIGTERM ends the process as soon as uvicorn has shut down."""

    def __init__(self, config: uvicorn.Config, exports: Exports) -> None:
        super().__init__(config)
        self._exports = exports

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        self._exports.flush()


class Seldom(logging.Filter):
    """Lets one record through, then none for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._quiet_until:
            return False
        self._quiet_until = now + SELDOM_S
        return True


def _resource() -> "Resource":
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    named = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    return Resource.create(
        {
            "service.name": SERVICE_NAME,
            "service.instance.id": str(uuid.uuid4()),
            "process.pid": os.getpid(),
            **named,
        }
    )


def _show_metrics(resource: "Resource", env: Mapping[str, str]) -> None:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import start_http_server

    host, port = env.get(_HOST) or "localhost", env.get(_PORT) or "9464"
    if not port.isdigit() or int(port) > 65_535:
        raise Failure(f"{_PORT} must be a port; this is {port!r}.", 2)
    try:
        start_http_server(int(port), addr=host)
    except OSError as error:
        why = error.strerror or error
        raise Failure(f"Metrics cannot be shown at {host}:{port} ({_HOST}, {_PORT}): {why}.") from None
    metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()], resource=resource))


def _but_health(inner: Any) -> Any:
    """A sampler that leaves out whoever asks every few seconds whether the service is well."""
    from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult

    class ButHealth(Sampler):
        def should_sample(
            self,
            parent_context: Any,
            trace_id: int,
            name: str,
            kind: Any = None,
            attributes: Any = None,
            links: Sequence[Any] | None = None,
            trace_state: Any = None,
        ) -> SamplingResult:
            if (attributes or {}).get("url.path") in ("/healthz", "/livez"):
                return SamplingResult(Decision.DROP)
            found: SamplingResult = inner.should_sample(
                parent_context, trace_id, name, kind, attributes, links, trace_state
            )
            return found

        def get_description(self) -> str:
            return f"ButHealth({inner.get_description()})"

    return ButHealth()
