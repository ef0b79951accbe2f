"""A directory in which the commands of a page are run, as its reader would run them.

Servers run in threads, the command line in this process: what is shown is real, and quick to check.
"""

import asyncio
import base64
import contextlib
import hashlib
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from metered_billing import cli, settled
from metered_billing.ledger import Ledger
from metered_billing.service import TokenFile, Tokens, create_app
from metered_billing.settler import _SETTLERS
from tests.serving import free_port

from .pages import EXAMPLES


class Sandbox:
    """Runs commands, one after the other."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self._directory = directory
        # What the pages call 8000 and 8080.
        self._ports = {8000: free_port(), 8080: free_port()}
        self._servers: dict[str, contextlib.ExitStack] = {}
        for example in EXAMPLES.glob("*.py"):
            shutil.copy(example, directory)
        monkeypatch.chdir(directory)
        monkeypatch.syspath_prepend(str(directory))
        for name in [name for name in os.environ if name.startswith(("METERED_BILLING", "OTEL_", "PYTEST_ADDOPTS"))]:
            monkeypatch.delenv(name)
        # Secrets that are the same each time, so that what a page shows of one can be used further down.
        numbers = itertools.count()
        monkeypatch.setattr("secrets.token_urlsafe", lambda size: _secret(next(numbers), size))

    def run(self, command: str) -> str:
        """What a command prints."""
        words = shlex.split(self._to_real(command), comments=True)
        runs: dict[str, Callable[[list[str]], str]] = {
            "export": self._export,
            "uvicorn": self._uvicorn,
            "metered-billing": self._metered_billing,
            "curl": self._curl,
            "python": self._python,
            # With what the reader has, and none of this project's plugins but its own.
            "pytest": lambda arguments: self._python(
                ["-m", "pytest", "-p", "anyio", "-p", "pytest_metered_billing", *arguments]
            ),
        }
        return self._to_shown(runs[words[0]](words[1:]))

    def stop(self, server: str) -> None:
        """As Ctrl-C does."""
        self._servers.pop(server).close()

    def close(self) -> None:
        for server in reversed(list(self._servers)):
            self.stop(server)

    # Commands.

    def _export(self, words: list[str]) -> str:
        for word in words:
            name, _, value = word.partition("=")
            self._monkeypatch.setenv(name, value)
        return ""

    def _uvicorn(self, words: list[str]) -> str:
        options = dict(itertools.pairwise(words))
        module_name, _, attribute = next(word for word in words if ":" in word).partition(":")
        spec = importlib.util.spec_from_file_location(
            f"{module_name}_{time.monotonic_ns()}", self._directory / f"{module_name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # FastAPI looks annotations up there.
        self._monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        app = getattr(module, attribute)
        name = "uvicorn" if "--port" not in options else module_name
        port = self._ports[int(options.get("--port", 8000))]
        self._serve(name, app() if "--factory" in words else app, port)
        return ""

    def _metered_billing(self, words: list[str]) -> str:
        if words[0] == "serve":
            options = dict(zip(words[1::2], words[2::2], strict=True))
            file = options.get("--tokens-file")
            # Nobody types as fast as this does: what has changed counts at once.
            tokens = Tokens.load() if file is None else TokenFile(self._directory / file, look_again_s=0)
            ledger = Ledger(options.get("--database", "sqlite:///credits.db"))
            self._serve("serve", create_app(ledger, tokens), self._ports[8080])
            return ""
        self._monkeypatch.setattr(sys, "argv", ["metered-billing", *words])
        self._capsys.readouterr()
        with contextlib.suppress(SystemExit):
            cli.main()
        captured = self._capsys.readouterr()
        return captured.out + captured.err

    def _curl(self, words: list[str]) -> str:
        method, url, body, headers, show = None, "", None, {}, False
        rest = iter(words)
        for word in rest:
            if word == "-X":
                method = next(rest)
            elif word == "-H":
                name, _, value = next(rest).partition(":")
                headers[name] = value.strip()
            elif word == "-d":
                body = next(rest)
            elif word.startswith("-"):
                show = show or "i" in word
            else:
                url = word
        with httpx.Client(trust_env=False, timeout=20, verify=False) as client:
            answer = client.request(
                method or ("GET" if body is None else "POST"), f"http://{url}", content=body, headers=headers
            )
        asyncio.run(_as_slow_as_people())
        if not show:
            return answer.text
        head = [f"{answer.http_version} {answer.status_code} {answer.reason_phrase}"]
        head += [f"{name}: {value}" for name, value in answer.headers.multi_items()]
        return "\n".join([*head, "", answer.text])

    def _python(self, words: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self._directory,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    # Around them.

    def _serve(self, name: str, app: Any, port: int) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(serving_thread(app, port))
        self._servers[name] = stack

    def _to_real(self, text: str) -> str:
        for shown, real in self._ports.items():
            text = text.replace(f":{shown}", f":{real}")
        return text

    def _to_shown(self, text: str) -> str:
        for shown, real in self._ports.items():
            text = text.replace(f":{real}", f":{shown}")
        return text


def _secret(number: int, size: int) -> str:
    digest = hashlib.sha256(f"a secret of the docs: {number}".encode()).digest()
    return base64.urlsafe_b64encode(digest[:size]).rstrip(b"=").decode()


async def _as_slow_as_people() -> None:
    """Wait for the refund: one that is about to begin on the app's loop, or is tried again on a busy machine, too."""
    deadline = time.monotonic() + 2
    while any(settler._live for settler in list(_SETTLERS)) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await settled()


@contextlib.contextmanager
def serving_thread(app: Any, port: int) -> Iterator[None]:
    """The app under a real uvicorn, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, ws="none", log_config=None, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive(), "the app did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(15)
