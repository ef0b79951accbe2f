"""An app that is killed at work: the next one that starts gives the credits back."""

import asyncio
import subprocess
import sys
import time
from contextlib import suppress
from threading import Thread

import httpx
from fastapi import FastAPI

from metered_billing import Account, MeteredBillingMiddleware, metered
from metered_billing.testing import Billing

URL = "http://127.0.0.1:8123"

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, account=lambda: Account("acme"))  # the environment says where credits are


@app.post("/work")
@metered(cost=3)
async def work() -> None:
    await asyncio.sleep(60)


def start() -> subprocess.Popen[bytes]:
    """The app in a process of its own, when it listens."""
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", "test_killed:app", "--port", "8123"])
    while process.poll() is None:
        with suppress(httpx.ConnectError):
            httpx.get(f"{URL}/openapi.json")
            return process
        time.sleep(0.1)
    raise RuntimeError("the app did not start")


def ask() -> None:
    with suppress(httpx.TransportError):  # no answer: the app is killed
        httpx.post(f"{URL}/work", timeout=60)


def test_killed_app_gives_back_what_it_took(billing_server: Billing) -> None:
    billing_server.grant("acme", 10)
    first, client = start(), Thread(target=ask)
    client.start()
    while billing_server.balance("acme") == 10:
        time.sleep(0.05)
    first.kill()
    first.wait()
    client.join()
    second = start()
    try:
        billing_server.assert_charged("acme", kept=0, refunded=3)
        billing_server.assert_balanced()
    finally:
        second.terminate()
        second.wait()
