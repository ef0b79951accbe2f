"""The demo as its users run it: in a directory of its own, on free ports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from examples.fastapi_app.desk.untraced import untraced

from tests.serving import free_port

ROOT = Path(__file__).parents[2]


def eventually(check: Callable[[], bool], within_s: float, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Demo:
    """`make demo`, without make.

    Args:
        folder: Where it is run; `.demo/` is made there.
        settings: Environment variables.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.credits_port = free_port()
        self.metrics_port = free_port()
        ports = {"PORT": self.port, "CREDITS_PORT": self.credits_port, "METRICS_PORT": self.metrics_port}
        self.settings = {**{name: str(port) for name, port in ports.items()}, **settings}
        self.output = folder / f"output-{self.port}.txt"
        self.start()

    def start(self) -> None:
        """Run it, in a process group of its own, as a shell does."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("METERED_BILLING_")}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "examples.fastapi_app.run"],
                cwd=self.folder,
                env={**ours, "PYTHONPATH": path, **self.settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def says(self, text: str, within_s: float = 60, times: int = 1) -> str:
        """Wait until it has printed something; all that it has printed."""

        def said() -> bool:
            assert self.process.poll() is None, f"it ended:\n{self.output.read_text()}"
            return self.output.read_text().count(text) >= times

        eventually(said, within_s, f"{text!r} in\n{self.output.read_text()}")
        return self.output.read_text()

    def starts_again(self, name: str) -> None:
        """Kill one of its processes with -9, and wait until it is up again."""
        up_again = f"the {name} process is up again"
        times = self.output.read_text().count(up_again) + 1
        os.kill(self.pid(name), signal.SIGKILL)
        self.says(f"the {name} process was killed by SIGKILL", times=times)
        self.says(up_again, times=times)

    def up(self) -> str:
        """Wait until it is up; what it has printed."""
        return self.says("Ctrl-C stops both.", within_s=120)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, as a terminal does to the whole group for Ctrl-C; its exit code."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(30)

    def end(self) -> None:
        """Whatever state it is in: leave nothing of it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.stop()

    def pid(self, name: str) -> int:
        """The process id of `app` or `credits`."""
        return int((self.folder / ".demo" / f"{name}.pid").read_text())

    def post(self, path: str, body: object, token: str = "demo") -> httpx.Response:
        """Call the app."""
        return httpx.post(
            f"http://127.0.0.1:{self.port}{path}",
            json=body,
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
            trust_env=False,
            verify=False,
        )

    def desk(self, path: str, body: object = None, **params: str | int) -> Any:
        """Ask the desk, through the app, as the page does; a body is sent to a switch."""
        answer = httpx.request(
            "GET" if body is None else "POST",
            f"http://127.0.0.1:{self.port}/desk/{path}",
            params=params,
            json=body,
            headers={} if body is None else {"X-Demo": "1"},
            timeout=30,
            trust_env=False,
            verify=False,
        )
        return answer.raise_for_status().json()

    def breaks(self, kind: str, calls: str = "every") -> None:
        """Break calls between app and service in this way."""
        self.desk("fault", {"kind": kind, "calls": calls})

    def trace(self, trace_id: str) -> Any:
        """One trace, as far as it has arrived; None before that."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/desk/traces/{trace_id}", trust_env=False, verify=False)
        return answer.json() if answer.status_code == 200 else None

    def sample(self) -> Any:
        """The sample request's body."""
        return json.loads((self.folder / ".demo" / "request.json").read_text())

    def credits(self, path: str, body: object = None, **params: str) -> Any:
        """Ask the credits service, with the secret that the demo left for that."""
        secret = re.search(r"METERED_BILLING_TOKEN=(\S+)", (self.folder / ".demo" / "env").read_text())
        assert secret
        answer = httpx.request(
            "GET" if body is None else "POST",
            f"http://127.0.0.1:{self.credits_port}{path}",
            params=params,
            json=body,
            headers={
                "Authorization": f"Bearer {secret[1]}",
                "Idempotency-Key": f"test{time.time_ns()}",
                **untraced(),
            },
            trust_env=False,
            verify=False,
        )
        return answer.raise_for_status().json()

    def balance(self, user: str = "alice") -> int:
        """What a user has, in credits, as the service's books say."""
        balance: int = self.credits("/v1/balance", tenant_id="demo", user_id=user)["balance"]
        return balance

    def transactions(self, user: str = "alice") -> list[dict[str, Any]]:
        """All that happened to a user's account."""
        found: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            page = self.credits("/v1/transactions", tenant_id="demo", user_id=user, limit="200", **cursor)
            found += page["items"]
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}

    def movements(self, user: str = "alice") -> list[tuple[str, int]]:
        """The kind and amount, in credits, of each of them."""
        return [(entry["kind"], entry["amount"]) for entry in self.transactions(user)]

    def calm(self, request: object) -> None:
        """Wait until it works, after what a test before has done to it, and every refund has arrived.

        Args:
            request: For `POST /create-products`, of which some pictures fail.
        """

        def works() -> bool:
            return self.post("/create-products", request).status_code == 200

        def settled() -> bool:
            entries = self.transactions()
            returned = {entry["transaction_id"] for entry in entries if entry["kind"] in ("refund", "void")}
            return returned >= {entry["id"] for entry in entries if entry["kind"] == "deduction"}

        eventually(works, 30, "an answer, though the circuit may be open still")
        eventually(settled, 30, "the refunds")
