"""What the kit stands on: a ledger that is wrong is found, an app that does not start says why, and nothing runs on."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from metered_billing.testing import Billing, Entry, in_memory
from metered_billing.testing.entries import faults_in
from metered_billing.testing.wire import Request, Response, Unanswered, Wire

from .shop import TEN, app

pytestmark = pytest.mark.anyio

GRANT = Entry("1", "grant", "acme", None, 100, 100, "1", "k1", "test", None, {}, ())
TAKEN = replace(GRANT, id="2", kind="deduction", amount=-10, balance=90, transaction_id="2", idempotency_key="k2")
BACK = replace(TAKEN, id="3", kind="refund", amount=4, balance=94, idempotency_key="k2:refund")
VOID = replace(TAKEN, id="4", kind="void", amount=6, balance=100)


def test_ledger_that_is_right() -> None:
    """A void has its deduction's key, and two tenants may have the same."""
    other = replace(GRANT, id="5", tenant_id="other", transaction_id="5")
    assert faults_in([GRANT, TAKEN, BACK, VOID, other]) == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (replace(BACK, balance=95), "the balance after it should be 94"),
        (replace(BACK, amount=11, balance=101), "more than was deducted has come back"),
        (replace(TAKEN, id="3", transaction_id="3", balance=80), "its key has been used before"),
    ],
)
def test_ledger_that_is_wrong(entry: Entry, says: str) -> None:
    """Each in a sentence, with the entry."""
    (wrong,) = faults_in([GRANT, TAKEN, entry])
    assert wrong.startswith(says)
    assert str(entry) in wrong


def test_batch_without_an_answer() -> None:
    """It has none for all of its operations, and what was planned for those behind is for others."""
    wire = Wire()
    for fault in ("ok", "lost reply", "503"):
        wire.plan.add("deduct", fault)
    operations = [{"op": "deduct", "idempotency_key": f"k{n}", "tenant_id": "acme", "amount": 1} for n in range(3)]
    fate = wire.fate(Request("POST", "/v1/batch", {}, json.dumps({"operations": operations}).encode()))
    assert fate.request is not None
    assert json.loads(fate.request.body)["operations"] == operations
    with pytest.raises(Unanswered, match="lost reply"):
        fate.answer(Response(200, {}, b"{}"))
    assert [(call.fault, call.status, call.batch) for call in wire.calls] == [("lost reply", None, 3)] * 3
    assert wire.plan.left() == ["deduct: '503', 1 x, happened 0 x"]


async def test_app_that_does_not_start(billing: Billing) -> None:
    """What it raises there, the test gets."""

    @contextlib.asynccontextmanager
    async def lifespan(starting: FastAPI) -> AsyncIterator[None]:
        if starting.title == "without":
            raise LookupError("no database")
        yield

    with pytest.raises(LookupError, match="no database"):
        async with billing.client(FastAPI(title="without", lifespan=lifespan)):
            pass


async def test_app_that_knows_no_lifespan(billing: Billing) -> None:
    """It is just called."""

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(scope["type"])
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async with billing.client(plain) as client:
        assert (await client.get("/")).status_code == 204


def test_synchronous_client_meets_it_too(billing: Billing) -> None:
    """What the app's own clients ask for goes wrong likewise."""
    headers = {"Authorization": f"Bearer {billing.token}", "Idempotency-Key": "by-hand"}
    body = {"tenant_id": "acme", "amount": 1}
    with httpx.Client(base_url=billing.url, headers=headers, verify=False) as service:
        for fault, raised in (("refused", httpx.ConnectError), ("timeout", httpx.ReadTimeout)):
            billing.fail_next("deduct", fault)  # type: ignore[arg-type]
            with pytest.raises(raised):
                service.post("/v1/deductions", json=body)
        billing.fail_next("deduct", "insufficient")
        billing.grant("acme", 1)
        assert service.post("/v1/deductions", json=body).json()["balance"] == 0


@pytest.mark.parametrize("fault", [None, "503"])
def test_nothing_runs_on(fault: str | None) -> None:
    """A block that ends while apps are at work, on a loop in another thread and on one that stands still."""

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            await client.post("/work", json=TEN)

    async def left() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() if "metered" in task.get_name()]

    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        with in_memory() as billing:
            billing.grant("acme", 100)
            if fault is not None:
                billing.fail_always("refund", fault)  # type: ignore[arg-type]
            client = stack.enter_context(TestClient(app))
            assert client.post("/work", json=TEN).status_code == 200
            runner.run(ask())
        assert runner.run(left()) == []
        assert client.portal is not None
        assert client.portal.call(left) == []
