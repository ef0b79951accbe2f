"""Run the demo: a credits service and the app, as two processes, and the sample pictures through both.

`make demo`. Settings, from the environment: PORT (the app, 8000), CREDITS_PORT (the service, 8080), METRICS_PORT
(the service's Prometheus metrics, 9464), KEEP=1 (go on with the files in `.demo/`). Where
OTEL_EXPORTER_OTLP_ENDPOINT is set, all spans are passed on to there.
"""

import asyncio
import fcntl
import io
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .desk.sockets import bound, listening
from .samples import sample_request
from .supervisor import CannotStart, Process, check_port, keep_running

if TYPE_CHECKING:
    from .desk.desk import Desk

FOLDER = Path(".demo")

GRANTS = {"alice": 100, "tour": 100, "poor": 3}
"""Credits that the users of tenant `demo` start with."""


def say(line: str) -> None:
    """One line for whoever watches, at once, even into a pipe."""
    with suppress(BrokenPipeError):
        print(line, flush=True)


def main() -> int:
    """Run until Ctrl-C or SIGTERM; the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ✓ is no reason to fail
    try:
        ports = _port("PORT", 8000), _port("CREDITS_PORT", 8080)
        with _lock(FOLDER):
            check_port(ports[0], "PORT")
            check_port(ports[1], "CREDITS_PORT")
            metrics_port = _metrics_port()
            prepare(FOLDER, keep=os.environ.get("KEEP") == "1")
            asyncio.run(_until_stopped(*ports, metrics_port))
    except CannotStart as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _until_stopped(app_port: int, credits_port: int, metrics_port: int) -> None:
    app_token, admin_token = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    # Bound before anybody is told of them; that they are served can wait until the processes are under way.
    address, holder = listening(), bound()
    desk_url, proxy_url = (f"http://127.0.0.1:{made.getsockname()[1]}" for made in (address, holder))
    service = _service(credits_port, f"{app_token}=tenant:demo,{admin_token}=admin", desk_url, metrics_port)
    app = _app(app_port, proxy_url, app_token, desk_url)
    demo = _Demo(app, service, address, holder, admin_token, metrics_port)
    running = asyncio.ensure_future(demo.run())
    _on_signals(running.cancel)
    try:
        with suppress(asyncio.CancelledError):
            await running
    finally:
        say("\n· stopping (Ctrl-C again: at once)")
        _on_signals(partial(_kill, app, service))
        await demo.stop()
        say("· stopped")


@dataclass
class _Demo:
    """The two processes, and the desk between them."""

    app: Process
    service: Process
    address: socket.socket
    holder: socket.socket
    admin_token: str
    metrics_port: int
    desk: "Desk | None" = None

    async def run(self) -> None:
        """Start all, show what it does, and keep it running until cancelled."""
        app, service = self.app, self.service
        app_url, credits_url = (f"http://127.0.0.1:{process.port}" for process in (app, service))
        _write_private(
            FOLDER / "env",
            f"export METERED_BILLING_CREDITS={credits_url}\nexport METERED_BILLING_TOKEN={self.admin_token}\n",
        )
        say("metered-billing demo: starting …")
        service.start()
        app.start()
        # Only now: while these are imported the processes start.
        from . import tour
        from .desk.desk import Desk

        desk = Desk(app, service, self.address, self.holder, self.admin_token, FOLDER / "journal")
        await desk.start()
        self.desk = desk
        for process, what in ((service, "credits service"), (app, "app")):
            took_s = await process.up()
            await desk.process_changed(process)
            say(f"  {what:16} http://localhost:{process.port}  pid {process.pid}  up after {took_s:.1f} s")
        await tour.give(app_url, credits_url, self.admin_token, GRANTS, say)
        tour.explain(app.port, service.port, self.metrics_port, say)
        await keep_running((app, service), say, desk.process_changed)

    async def stop(self) -> None:
        """End all, in order: the app settles what it has begun, and needs the service and the proxy for that."""
        if self.desk is not None:
            self.desk.close_waiting()
        await self.app.stop()
        await self.service.stop()
        if self.desk is not None:
            await self.desk.stop()
        self.address.close()
        self.holder.close()


def _kill(*processes: Process) -> None:
    for process in processes:
        process.kill()


def _on_signals(do: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            asyncio.get_running_loop().add_signal_handler(number, do)


def _service(port: int, tokens: str, desk_url: str, metrics_port: int) -> Process:
    command = Path(sysconfig.get_path("scripts")) / "metered-billing"
    database = f"sqlite:///{FOLDER}/credits.db"
    return Process(
        name="credits",
        command=[str(command), "serve", "--database", database, "--port", str(port)],
        environment={
            "METERED_BILLING_TOKENS": tokens,
            **_traced("credits", desk_url),
            "OTEL_METRICS_EXPORTER": "prometheus",
            "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_EXPORTER_PROMETHEUS_PORT": str(metrics_port),
        },
        port=port,
        health="/healthz",
        folder=FOLDER,
        without="OTEL_",
    )


def _app(port: int, credits_url: str, token: str, desk_url: str) -> Process:
    arguments = ["examples.fastapi_app.app:app", "--port", str(port), "--timeout-graceful-shutdown", "8"]
    return Process(
        name="app",
        command=[sys.executable, "-m", "uvicorn", *arguments],
        environment={
            "METERED_BILLING_CREDITS": credits_url,
            "METERED_BILLING_TOKEN": token,
            "METERED_BILLING_JOURNAL": str(FOLDER / "journal"),
            "METERED_BILLING_DEMO_IMAGES": str(FOLDER / "images"),
            "METERED_BILLING_DEMO_DESK": desk_url,
            **_traced("app", desk_url),
        },
        port=port,
        health="/",
        folder=FOLDER,
        without="OTEL_",
    )


def _traced(name: str, desk_url: str) -> dict[str, str]:
    """The standard variables that send a process's spans to the desk, and soon enough to watch them arrive."""
    # What the user says of the place that it runs in stays said, in their backend too.
    place = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {
        "OTEL_RESOURCE_ATTRIBUTES": place,
        "OTEL_SERVICE_NAME": name,
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{desk_url}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_BSP_MAX_QUEUE_SIZE": "16384",
    }


def _metrics_port() -> int:
    """Where the service shows its metrics. Unless a port is named, a taken one is no reason to fail."""
    port = _port("METRICS_PORT", 9464)
    try:
        check_port(port, "METRICS_PORT")
    except CannotStart:
        if os.environ.get("METRICS_PORT"):
            raise
        with bound() as free:
            port = free.getsockname()[1]
    return port


def _port(setting: str, default: int) -> int:
    text = os.environ.get(setting, "") or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise CannotStart(f"{setting}={text} is not a port: a number from 1 to 65535 is.")
    return int(text)


def _lock(folder: Path) -> IO[str]:
    """Hold the folder for this process alone; released when it is closed or we die."""
    folder.mkdir(exist_ok=True)
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise CannotStart(f"Another demo is running on {folder.resolve()}.") from None
    return lock


def prepare(folder: Path, *, keep: bool) -> None:
    """Make the folder ready: what the last run left goes, unless it is to be kept."""
    for path in folder.iterdir():
        if keep or path.name == "lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / "request.json").write_text(json.dumps(sample_request()))


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
