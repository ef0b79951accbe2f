"""Run the demo: a credits service and the app, as two processes, and the sample pictures through both.

`make demo`. Settings, from the environment: PORT (the app, 8000), CREDITS_PORT (the service, 8080),
KEEP=1 (go on with the files in `.demo/`).
"""

import asyncio
import fcntl
import io
import json
import os
import secrets
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from .samples import sample_request
from .supervisor import CannotStart, Process, check_port, keep_running

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
            prepare(FOLDER, keep=os.environ.get("KEEP") == "1")
            asyncio.run(_until_stopped(*ports))
    except CannotStart as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _until_stopped(app_port: int, credits_port: int) -> None:
    app_token, admin_token = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    service = _service(credits_port, f"{app_token}=tenant:demo,{admin_token}=admin")
    app = _app(app_port, f"http://127.0.0.1:{credits_port}", app_token)
    demo = asyncio.ensure_future(_run(app, service, admin_token))
    _on_signals(demo.cancel)
    try:
        with suppress(asyncio.CancelledError):
            await demo
    finally:
        say("\n· stopping (Ctrl-C again: at once)")
        _on_signals(partial(_kill, app, service))
        # The app first: it settles what it has begun, and needs the service for that.
        await app.stop()
        await service.stop()
        say("· stopped")


async def _run(app: Process, service: Process, admin_token: str) -> None:
    """Start both processes, show what they do, and keep them running until cancelled."""
    app_url, credits_url = (f"http://127.0.0.1:{process.port}" for process in (app, service))
    _write_private(
        FOLDER / "env",
        f"export METERED_BILLING_CREDITS={credits_url}\nexport METERED_BILLING_TOKEN={admin_token}\n",
    )
    say("metered-billing demo: starting …")
    service.start()
    app.start()
    from . import tour  # only now: while it is imported the processes start

    for process, what in ((service, "credits service"), (app, "app")):
        took_s = await process.up()
        say(f"  {what:16} http://localhost:{process.port}  pid {process.pid}  up after {took_s:.1f} s")
    await tour.give(app_url, credits_url, admin_token, GRANTS, say)
    tour.explain(app.port, service.port, say)
    await keep_running((app, service), say)


def _kill(*processes: Process) -> None:
    for process in processes:
        process.kill()


def _on_signals(do: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            asyncio.get_running_loop().add_signal_handler(number, do)


def _service(port: int, tokens: str) -> Process:
    command = Path(sysconfig.get_path("scripts")) / "metered-billing"
    database = f"sqlite:///{FOLDER}/credits.db"
    return Process(
        name="credits",
        command=[str(command), "serve", "--database", database, "--port", str(port)],
        environment={"METERED_BILLING_TOKENS": tokens},
        port=port,
        health="/healthz",
        folder=FOLDER,
    )


def _app(port: int, credits_url: str, token: str) -> Process:
    arguments = ["examples.fastapi_app.app:app", "--port", str(port), "--timeout-graceful-shutdown", "8"]
    return Process(
        name="app",
        command=[sys.executable, "-m", "uvicorn", *arguments],
        environment={
            "METERED_BILLING_CREDITS": credits_url,
            "METERED_BILLING_TOKEN": token,
            "METERED_BILLING_JOURNAL": str(FOLDER / "journal"),
            "METERED_BILLING_DEMO_IMAGES": str(FOLDER / "images"),
        },
        port=port,
        health="/",
        folder=FOLDER,
    )


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
