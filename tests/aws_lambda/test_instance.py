"""The example's handler in a real process, on a real service and PostgreSQL: frozen between requests, killed in one."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import psycopg
import pytest
from examples.fastapi_app.lambda_recover import handler as recover
from examples.fastapi_app.samples import sample_request

from tests.aws_lambda.events import Context, headers_of, http_api, json_of
from tests.serving import start_service

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKEN = "admins"
GRANTED = 100


class Between:
    """What stands between an app and a service, and drops connections that are idle: a load balancer."""

    def __init__(self, url: str) -> None:
        self._to = (httpx.URL(url).host, httpx.URL(url).port or 80)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.connections = 0
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(self._to)
                self.connections += 1
                self._open += (here, there)
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()

    def drop(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.drop()


def _pass_on(come: socket.socket, go: socket.socket) -> None:
    with contextlib.suppress(OSError), come:
        while data := come.recv(65536):
            go.sendall(data)
        go.shutdown(socket.SHUT_WR)


class Instance:
    """A process that runs the handler while it is called, and is stopped otherwise."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log = directory / "instance.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.aws_lambda.instance", "examples.fastapi_app.lambda_handler"],
                cwd=directory,
                env={**os.environ, **environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._read() == "up\n"
        self._process.send_signal(signal.SIGSTOP)

    def begin(self, event: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(event) + "\n")
        self._process.stdin.flush()

    def call(self, event: dict[str, Any]) -> dict[str, Any]:
        self.begin(event)
        answer = json.loads(self._read())
        self._process.send_signal(signal.SIGSTOP)
        return cast(dict[str, Any], answer)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 60)[0], self.log.read_text()
        return self._process.stdout.readline()


class Ledger:
    """What the service says."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, verify=False
        )
        grant = {"tenant_id": "demo", "user_id": "alice", "amount": GRANTED, "reason": "test"}
        self._client.post("/v1/grants", json=grant, headers={"Idempotency-Key": "grant"}).raise_for_status()

    def moves(self) -> list[tuple[str, int]]:
        reply = self._client.get("/v1/transactions?tenant_id=demo&user_id=alice&limit=100")
        return [(item["kind"], item["amount"]) for item in reversed(reply.json()["items"]) if item["kind"] != "grant"]

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Between, Ledger]]:
    with start_service(tmp_path) as (_, url):
        between, ledger = Between(url), Ledger(url)
        yield between, ledger
        ledger.close()
        between.close()


def cut_out(*images: dict[str, str]) -> dict[str, Any]:
    body = {"product_groups": [{"name": "Cup", "images": images}]} if images else sample_request()
    return http_api(
        "POST",
        "/create-products",
        body=json.dumps(body).encode(),
        authorization="Bearer demo",
        content_type="application/json",
    )


GOOD = next(image for group in sample_request()["product_groups"] for image in group["images"] if image["id"] == "mug")
BROKEN = {"id": "text", "data": "MiBjdXBz"}


def sql(url: str, statement: str) -> list[Any]:
    with psycopg.connect(url, options="-c search_path=metered_billing") as connection:
        done = connection.execute(statement.encode())
        return done.fetchall() if done.description else []


def test_instance_that_is_frozen_and_killed_costs_nobody_anything(
    tmp_path: Path, pg_url: str, service: tuple[Between, Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is settled when the answer is out; a long freeze costs no request; of a killed one everything comes back."""
    between, ledger = service
    environment = {
        "METERED_BILLING_CREDITS": between.url,
        "METERED_BILLING_TOKEN": TOKEN,
        "METERED_BILLING_JOURNAL": pg_url,
        "AWS_LAMBDA_FUNCTION_NAME": "cutouts",  # so that settling is inline
        "METERED_BILLING_DEMO_CUTOUT": "flood",
        "METERED_BILLING_DEMO_IMAGES": str(tmp_path / "images"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    instance = Instance(tmp_path, environment)
    try:
        poor = cut_out(GOOD)
        poor["headers"]["authorization"] = "Bearer poor"
        answer = instance.call(poor)
        assert (answer["statusCode"], json.loads(answer["body"])["balance"]) == (402, 0)  # no base64

        for number in (1, 2):
            answer = instance.call(cut_out(GOOD, BROKEN))
            assert answer["statusCode"] == 200, answer
            assert headers_of(answer)["credits-refunded"] == "1"
            assert ledger.moves() == [("deduction", -2), ("refund", 1)] * number
            assert sql(pg_url, "SELECT state FROM charges WHERE closed_at IS NULL") == []

        # Frozen for long: its lease runs out, its place is given away, and every connection that it had is gone.
        [(place,)] = sql(pg_url, "SELECT owner FROM owners")
        sql(pg_url, "UPDATE owners SET expires_at = clock_timestamp() - interval '1 hour'")
        assert recover(None, Context()) == {"tried": 0, "left": 0}
        assert sql(pg_url, "SELECT owner FROM owners") == []
        between.drop()
        sql(pg_url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%journal'")
        connections = between.connections

        answer = instance.call(cut_out(GOOD, BROKEN))
        assert answer["statusCode"] == 200, json_of(answer)
        assert ledger.moves() == [("deduction", -2), ("refund", 1)] * 3
        assert between.connections > connections
        [(other,)] = sql(pg_url, "SELECT owner FROM owners")
        assert other != place

        # Killed in the middle, as a function is that takes too long. Nobody hears of it but by its lease.
        instance.begin(cut_out())
        deadline = time.monotonic() + 30
        while len(ledger.moves()) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        instance.kill()
        assert ledger.moves()[6:] == [("deduction", -10)]
        assert recover(None, Context(left_ms=6_000)) == {"tried": 0, "left": 0}
        assert ledger.moves()[6:] == [("deduction", -10)]
        sql(pg_url, "UPDATE owners SET expires_at = clock_timestamp() - interval '1 s'")
        came_of_it = recover(None, Context())
        assert (came_of_it["tried"] > 0, came_of_it["left"]) == (True, 0)  # on a busy machine a try may be late
        # Killed before it had the answer on record, it is undone by a void.
        assert ledger.moves()[6:] in ([("deduction", -10), (kind, 10)] for kind in ("refund", "void"))
    finally:
        instance.kill()
