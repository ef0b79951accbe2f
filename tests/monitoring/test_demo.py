"""The demo, scraped by a real Prometheus while its calls are broken: each panel of the dashboard has data."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

from tests.demo.running import Demo, eventually
from tests.serving import free_port

from .programs import program
from .shipped import ALERTS, queries

pytestmark = pytest.mark.slow

Query = Callable[[str], list[dict[str, Any]]]


def prometheus(directory: Path, *ports: int) -> tuple[subprocess.Popen[bytes], Query]:
    """Prometheus with the shipped rules, and what asks it."""
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "demo", "static_configs": [{"targets": [f"127.0.0.1:{p}" for p in ports]}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    arguments = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [program("prometheus"), *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )

    def query(expr: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query"
        document = httpx.get(url, params={"query": expr}, trust_env=False, verify=False).json()
        assert document["status"] == "success", f"{expr}: {document}"
        result: list[dict[str, Any]] = document["data"]["result"]
        return result

    return process, query


def test_panels_show_the_demo_under_faults(tmp_path: Path) -> None:
    """Samples, a 402, a lost reply and an outage stand in what both processes show; no query is refused."""
    program("prometheus")  # Without it: skipped, before anything runs that nobody would stop.
    demo = Demo(tmp_path, METERED_BILLING_DEMO_CUTOUT="stub")
    demo.up()
    watching, query = prometheus(tmp_path, demo.port, demo.metrics_port)
    try:

        def switch(kind: str, calls: str) -> None:
            body = {"kind": kind, "calls": calls}
            url = f"http://localhost:{demo.port}/desk/fault"
            httpx.post(url, json=body, headers={"X-Demo": "1"}, trust_env=False, verify=False).raise_for_status()

        def scraped() -> bool:
            try:
                return len(query("up == 1")) == 2
            except (httpx.TransportError, ValueError):  # it says so in words while it starts
                return False

        eventually(scraped, 30, "both are scraped")
        statuses = [demo.post("/create-products", demo.sample(), token).status_code for token in ("demo", "poor")]
        switch("lost reply", "next")
        statuses.append(demo.post("/create-products", demo.sample()).status_code)
        switch("down", "every")
        statuses.append(demo.post("/create-products", demo.sample()).status_code)
        switch("none", "every")
        assert statuses == [200, 402, 200, 503]

        def counted() -> bool:
            return bool(
                query('metered_billing_anomalies_total{metered_billing_event="credits.unavailable"} == 1')
                and query('sum(metered_billing_retries_total{metered_billing_operation="deduct"}) >= 3')
                and query('metered_billing_credits_total{metered_billing_kind="refunded"} >= 1')
                and query("sum(metered_billing_ledger_operation_duration_seconds_count) >= 4")
            )

        eventually(counted, 15, "what was done is counted")
        empty = [name for name, expr in queries().items() if not query(filled(expr)) and "reconcile" not in expr]
        # Whoever sends batches to the service: the app sends each operation alone.
        assert empty == ["Size of batches A"]
    finally:
        watching.kill()
        watching.wait()
        demo.end()


def filled(expr: str) -> str:
    """A panel's query as Grafana sends it."""
    for variable, value in (("$__rate_interval", "10s"), ("$__range", "60s"), ("$job", ".*")):
        expr = expr.replace(variable, value)
    return expr
