"""`serve` exports spans and shows metrics where OpenTelemetry's variables say so, and is held up by neither."""

import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import metrics, trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from metered_billing.cli.failure import Failure
from metered_billing.cli.telemetry import Exports, Seldom
from tests.serving import free_port, start_service

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
PROMETHEUS = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1"}


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The providers that would have been set for the whole process."""
    found: list[Any] = []
    monkeypatch.setattr(trace, "set_tracer_provider", found.append)
    monkeypatch.setattr(metrics, "set_meter_provider", found.append)
    return found


@pytest.fixture
def exports() -> Iterator[Exports]:
    exports = Exports()
    yield exports
    exports.flush(0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_METRICS_EXPORTER": "none"},
    ],
)
def test_nothing_is_set_up_unasked(exports: Exports, providers: list[Any], environment: dict[str, str]) -> None:
    """Without an endpoint the SDK's exporter would try one that nobody runs, and complain for ever."""
    exports.set_up(environment)
    assert providers == []


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_spans_are_exported_where_an_endpoint_is_set(
    exports: Exports, providers: list[Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `metered-billing`, unless the environment has another name; and without the calls that ask for health."""
    exports.set_up({name: "http://127.0.0.1:9"})
    (provider,) = providers
    assert provider.resource.attributes["service.name"] == "metered-billing"
    sampler = provider.sampler
    assert sampler.should_sample(None, 1, "GET", attributes={"url.path": "/v1/balance"}).decision.is_sampled()
    assert not sampler.should_sample(None, 1, "GET", attributes={"url.path": "/healthz"}).decision.is_recording()
    assert sampler.get_description().startswith("ButHealth(ParentBased")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "credits")
    other = Exports()
    other.set_up({name: "http://127.0.0.1:9"})
    other.flush(0)
    assert providers[1].resource.attributes["service.name"] == "credits"


def test_protocol_that_is_not_spoken_is_said(
    exports: Exports, providers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A collector's gRPC port would answer nothing that explains it."""
    exports.set_up({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert "as http/protobuf, not as grpc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "absent", "said"),
    [
        (ENDPOINT, "opentelemetry.sdk.resources", "OTEL_EXPORTER_OTLP_ENDPOINT cannot"),
        (ENDPOINT, "opentelemetry.exporter.otlp.proto.http.trace_exporter", "OTEL_EXPORTER_OTLP_ENDPOINT cannot"),
        (PROMETHEUS, "opentelemetry.exporter.prometheus", "OTEL_METRICS_EXPORTER=prometheus cannot"),
    ],
)
def test_without_the_extra_it_says_so_and_goes_on(
    exports: Exports,
    providers: list[Any],
    environment: dict[str, str],
    absent: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the variable and what to install."""
    monkeypatch.setitem(sys.modules, absent, None)
    exports.set_up(environment)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "pip install 'metered-billing[otel]'" in line
    assert providers == []


def test_metrics_on_a_port_that_is_taken_are_an_error(exports: Exports, providers: list[Any]) -> None:
    """A sentence with the port and the variables, before anything is served."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(Failure, match=rf"127\.0\.0\.1:{port} .*_PORT\): Address already in use"):
            exports.set_up({**PROMETHEUS, "OTEL_EXPORTER_PROMETHEUS_PORT": port})


@pytest.mark.parametrize("port", ["-1", "65536", "many"])
def test_metrics_port_that_is_none_is_an_error(exports: Exports, providers: list[Any], port: str) -> None:
    """Asked for wrongly: exit code 2."""
    with pytest.raises(Failure) as caught:
        exports.set_up({**PROMETHEUS, "OTEL_EXPORTER_PROMETHEUS_PORT": port})
    assert caught.value.exit_code == 2


def test_flush_does_not_wait_for_a_collector_that_does_not_answer() -> None:
    """Whatever the exporter does, the service stops."""

    class Stuck(TracerProvider):
        asked = threading.Event()
        answered = threading.Event()

        def shutdown(self) -> None:
            self.asked.set()
            self.answered.wait(60)

    exports = Exports()
    exports._tracers = stuck = Stuck(shutdown_on_exit=False)
    exports.flush(0.01)
    assert stuck.asked.wait(60)
    assert not stuck.answered.is_set()
    exports.flush(60)  # a second time there is nothing to wait for
    assert not stuck.answered.is_set()
    stuck.answered.set()


def test_exporter_that_fails_again_and_again_is_heard_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a minute."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    seldom, record = Seldom(), logging.makeLogRecord({})
    assert [seldom.filter(record) for _ in range(3)] == [True, False, False]
    now += 61
    assert [seldom.filter(record) for _ in range(2)] == [True, False]


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        received = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.mark.slow
def test_service_sends_its_spans_and_shows_its_metrics(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the caller's trace, also those that were made just before SIGTERM."""
    port = free_port()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # so that nothing goes out before the end
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(port))
    for name, value in PROMETHEUS.items():
        monkeypatch.setenv(name, value)
    with start_service(tmp_path) as (process, url):
        granted = httpx.post(
            f"{url}/v1/grants",
            json={"tenant_id": "acme", "amount": 5, "reason": "x"},
            headers={
                "Authorization": "Bearer admins",
                "Idempotency-Key": "k",
                "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            },
            trust_env=False,
            verify=False,
        )
        assert granted.status_code == 201
        shown = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, verify=False).text
        assert 'metered_billing_ledger_operation_duration_seconds_count{metered_billing_operation="grant"' in shown
        assert 'metered_billing_commit_size_count{metered_billing_store="ledger"' in shown
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    spans = {
        span.name: (resource, span)
        for request in collector.requests
        for resource_spans in request.resource_spans
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
        for resource in [{at.key: at.value for at in resource_spans.resource.attributes}]
    }
    resource, span = spans["metered_billing.ledger.grant"]
    assert span.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert resource["service.name"].string_value == "metered-billing"
    assert resource["process.pid"].int_value == process.pid
    assert not any("healthz" in name for name in spans)
