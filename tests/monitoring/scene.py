"""A scene for the alerts: an app and a credits service, watched by a real Prometheus with the hurried rules."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

from tests.chaos.processes import Process
from tests.serving import free_port

from .programs import program
from .shipped import ROOT

HURRY = 60
"""A minute is a second."""

SCRAPE_EVERY = "500ms"
TOKEN = "watched"
_MAIN = "from metered_billing.cli import main; main()"

Alert = tuple[str, str]
"""Its name, without the prefix, and its severity."""


class Scene:
    """What runs, and what Prometheus says of it.

    Attributes:
        texts: The annotations of the alerts that were seen.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ports = {name: free_port() for name in ("app", "credits", "of credits", "prometheus")}
        self.credits_url = f"http://127.0.0.1:{self._ports['credits']}"
        self.environment = {
            "METERED_BILLING_CREDITS": self.credits_url,
            "METERED_BILLING_TOKEN": TOKEN,
            "METERED_BILLING_JOURNAL": str(directory / "journal"),
        }
        self.service = self._service(TOKEN)
        self.app = self._process(
            "app", ("-m", "uvicorn", "tests.monitoring.app:app", "--log-level", "warning"), "/up", self.environment
        )
        self.client = httpx.AsyncClient(trust_env=False, timeout=20, verify=False)
        self.texts: set[str] = set()
        self._asked: set[asyncio.Task[None]] = set()

    # What runs.

    def _process(self, name: str, command: tuple[str, ...], health: str, environment: dict[str, str]) -> Process:
        port = self._ports[name]
        command = (sys.executable, *command, "--port", str(port))
        return Process(name, command, environment, port, health, self.directory / f"{name}.log")

    def _service(self, token: str) -> Process:
        environment = {
            "METERED_BILLING_TOKENS": f"{token}=admin",
            "OTEL_METRICS_EXPORTER": "prometheus",
            "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_EXPORTER_PROMETHEUS_PORT": str(self._ports["of credits"]),
        }
        database = f"sqlite:////{self.directory}/credits.db"
        return self._process("credits", ("-c", _MAIN, "serve", "--database", database), "/healthz", environment)

    async def restart_service(self, token: str = TOKEN) -> None:
        """Start it, with this as its only token."""
        self.service.kill()
        self.service = self._service(token)
        self.service.start()
        await self.service.wait_until_up()

    def prometheus(self, textfiles: int) -> Process:
        """Prometheus, told of all of them, and of the files' server."""
        rules = self.directory / "rules"
        targets = {"app": self._ports["app"], "credits": self._ports["of credits"], "node": textfiles}
        config = {
            "global": {"scrape_interval": SCRAPE_EVERY, "scrape_timeout": SCRAPE_EVERY, "evaluation_interval": "500ms"},
            "rule_files": [str(rules / "alerts.yml")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for job, port in targets.items()
            ],
        }
        (self.directory / "prometheus.yml").write_text(json.dumps(config))
        command = (
            program("prometheus"),
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.directory / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self._ports['prometheus']}",
            "--log.level=warn",
        )
        log = self.directory / "prometheus.log"
        return Process("prometheus", command, {}, self._ports["prometheus"], "/-/ready", log)

    async def make_rules(self) -> None:
        """By the script, as it says."""
        await self._run("docs/make_monitoring.py", "--hurry", str(HURRY), "--to", str(self.directory / "rules"))

    async def reconcile(self) -> int:
        """As cron does. Returns the exit code."""
        return await self._run("-c", _MAIN, "reconcile", "--metrics", str(self.directory / "textfiles" / "metrics"))

    async def _run(self, *arguments: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await process.wait()

    # What it is asked for.

    async def post(self, path: str, user: str = "ann") -> httpx.Response:
        """Ask the app for something."""
        return await self.client.post(f"http://127.0.0.1:{self.app.port}{path}", headers={"x-user": user})

    async def ask_service(self, path: str, body: dict[str, Any], key: str) -> None:
        """Ask the service itself."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": key}
        answer = await self.client.post(f"{self.credits_url}{path}", headers=headers, json=body)
        assert answer.is_success, answer.text

    async def load(self) -> None:
        """A few requests a second, without end: most go well, some fail in part, some accounts are empty."""
        number = 0
        while True:
            number += 1
            path, user = ("/work?failed=2" if number % 5 == 0 else "/work"), ("poor" if number % 9 == 0 else "ann")
            self._begin(self.post(path, user))
            if number % 9 == 0:
                # The library sends none so far. Undoing what never was moves nothing.
                void = {"op": "void", "idempotency_key": f"never-{number}", "tenant_id": "acme"}
                self._begin(self.ask_service("/v1/batch", {"operations": [void]}, f"batch-{number}"))
            await asyncio.sleep(0.15)

    def _begin(self, asking: Coroutine[Any, Any, object]) -> None:
        async def quietly() -> None:
            with contextlib.suppress(httpx.TransportError, AssertionError):  # the service may be down
                await asking

        task = asyncio.ensure_future(quietly())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    # What Prometheus says.

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The result of a query, now."""
        answer = await self.client.get(
            f"http://127.0.0.1:{self._ports['prometheus']}/api/v1/query", params={"query": expr}
        )
        document = answer.json()
        assert document["status"] == "success", f"{expr}: {document}"
        found: list[dict[str, Any]] = document["data"]["result"]
        return found

    async def alerts(self) -> list[dict[str, Any]]:
        """Those that are pending or fire, with their texts."""
        answer = await self.client.get(f"http://127.0.0.1:{self._ports['prometheus']}/api/v1/alerts")
        found: list[dict[str, Any]] = answer.json()["data"]["alerts"]
        return found

    async def firing(self) -> set[Alert]:
        """Those that fire."""
        return {named(alert["labels"]) for alert in await self.alerts() if alert["state"] == "firing"}

    async def fired(self) -> set[Alert]:
        """Those that have ever fired."""
        found = await self.query('count by (alertname, severity) (count_over_time(ALERTS{alertstate="firing"}[1h]))')
        return {named(one["metric"]) for one in found}

    async def until_fired(self, wanted: set[Alert]) -> None:
        """Wait until all of these have fired, in whatever order, and for however short a time."""
        await self._until(self.fired, lambda fired: fired >= wanted, f"waiting for {sorted(wanted)}")

    async def until_over(self, ended: set[Alert]) -> None:
        """Wait until none of these fires."""
        await self._until(self.firing, lambda firing: not firing & ended, f"waiting for the end of {sorted(ended)}")

    async def _until(
        self, look: Callable[[], Awaitable[set[Alert]]], done: Callable[[set[Alert]], bool], what: str
    ) -> None:
        deadline = time.monotonic() + 90
        while not done(seen := await look()):
            assert time.monotonic() < deadline, f"{what}: {sorted(seen)}"
            self.texts |= {text for alert in await self.alerts() for text in alert["annotations"].values()}
            await asyncio.sleep(0.2)


def named(labels: dict[str, str]) -> Alert:
    return labels["alertname"].removeprefix("MeteredBilling"), labels["severity"]


class _Quiet(SimpleHTTPRequestHandler):
    """A node_exporter that shows one file: as text, which Prometheus asks for."""

    def log_message(self, *_: Any) -> None:
        pass

    def guess_type(self, path: Any) -> str:
        return "text/plain; version=0.0.4"


@contextlib.asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    """All of it running, with credits for `ann`, the books compared once, and load."""
    it = Scene(directory)
    (directory / "textfiles").mkdir()
    files = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(directory / "textfiles")))
    Thread(target=files.serve_forever, daemon=True).start()
    prometheus = it.prometheus(files.server_port)
    load: asyncio.Task[None] | None = None
    try:
        it.service.start()
        it.app.start()
        await it.make_rules()
        await it.service.wait_until_up()
        await it.app.wait_until_up()
        grant = {"tenant_id": "acme", "user_id": "ann", "amount": 1_000_000, "reason": "test"}
        await it.ask_service("/v1/grants", grant, "grant")
        load = asyncio.ensure_future(it.load())
        await it.post("/work")
        assert await it.reconcile() == 0
        prometheus.start()
        await prometheus.wait_until_up()
        yield it
    finally:
        if load is not None:
            load.cancel()
        for process in (it.app, it.service, prometheus):
            process.kill()
        await it.client.aclose()
        await asyncio.to_thread(files.shutdown)
        files.server_close()
