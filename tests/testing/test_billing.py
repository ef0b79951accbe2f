"""The kit as its users have it: one face, whatever answers behind it."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from metered_billing import MeteredBillingMiddleware, SqlCredits, metered, settled
from metered_billing.testing import FAULTS, Billing, Fault, Operation, in_memory, in_process, on_a_socket

from .shop import TEN, account_of, app

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


async def test_partial_failure_is_told(each: Billing) -> None:
    """The account, its entries, and the calls in their order."""
    each.grant("acme", 100)
    async with each.client(app) as client:
        response = await client.post("/work", json=TEN)
    assert response.headers["Credits-Refunded"] == "2"
    each.assert_charged("acme", kept=8, refunded=2)
    each.assert_balanced()
    assert each.balance("acme") == 92
    grant, deduction, refund = each.entries("acme")
    assert (grant.kind, grant.amount, deduction.kind, deduction.amount) == ("grant", 100, "deduction", -10)
    assert (refund.kind, refund.amount, refund.balance, refund.items) == ("refund", 2, 92, ("bad-1", "bad-2"))
    assert refund.transaction_id == deduction.id == response.headers["Credits-Transaction-Id"]
    assert [(call.operation, call.amount, call.status, call.fault) for call in each.calls] == [
        ("deduct", 10, 201, None),
        ("refund", 2, 201, None),
    ]


def test_a_test_without_an_event_loop_need_not_wait(each: Billing) -> None:
    """Each assertion does, with a client that has ended each loop, with one that runs, and after both."""
    each.grant("acme", 100)
    assert TestClient(app).post("/work", json=TEN).status_code == 200
    each.assert_charged("acme", kept=8, refunded=2)
    with TestClient(app) as client:
        assert client.post("/work", json=TEN).status_code == 200
        each.assert_charged("acme", kept=16, refunded=4, charges=2)
        each.assert_balanced()
    each.assert_balanced()


async def test_lost_reply_is_charged_once(each: Billing) -> None:
    """It is sent again under its key, and replayed."""
    each.grant("acme", 100)
    each.fail_next("deduct", "lost reply")
    async with each.client(app) as client:
        await client.post("/work", json=TEN)
    each.assert_charged("acme", kept=8, refunded=2)
    assert [(call.status, call.replayed, call.fault) for call in each.calls if call.operation == "deduct"] == [
        (None, False, "lost reply"),
        (200, True, None),
    ]


async def test_service_that_is_down_is_503_and_comes_up_again(each: Billing) -> None:
    """Nothing ran and nothing is charged; and what is due meanwhile goes through afterwards."""
    each.grant("acme", 100)
    async with each.client(app) as client:
        each.down()
        assert (await client.post("/work", json=TEN)).status_code == 503
        each.up()
        each.assert_not_charged("acme")
        each.assert_balanced()
        assert (await client.post("/work", json=TEN)).status_code == 200
    each.assert_charged("acme", kept=8, refunded=2)


async def test_too_few_credits_are_402(each: Billing) -> None:
    """The account's own answer, and one that the test wants."""
    each.grant("acme", 9)
    each.grant("acme", 100, user_id="ann")
    async with each.client(app) as client:
        assert (await client.post("/work", json=TEN)).status_code == 402
        each.fail_next("deduct", "insufficient")
        assert (await client.post("/work", json=TEN, headers={"X-User": "ann"})).status_code == 402
    each.assert_not_charged("acme")
    each.assert_not_charged("acme", "ann")
    assert (each.balance("acme"), each.balance("acme", "ann")) == (9, 100)
    each.assert_balanced()


def test_account_that_nobody_knows_fails_an_assertion_that_it_was_not_charged(billing: Billing) -> None:
    """A name that is mistyped was never charged: such an assertion would hold whatever the app did."""
    billing.grant("acme", 100)
    billing.grant("acme", 100, user_id="ann")
    unknown = r"(?s)acme / an was neither granted credits nor asked for any; the accounts that were: "
    accounts = r"acme \(shared pool\), acme / ann\n\nacme \(shared pool\), in the service's ledger"
    with pytest.raises(AssertionError, match=unknown + accounts):
        billing.assert_not_charged("acme", "an")
    with pytest.raises(AssertionError, match=unknown):
        billing.assert_charged("acme", "an", kept=0, charges=0)
    with pytest.raises(
        AssertionError, match=r"(?s)acmee \(shared pool\) was neither .*\n\nacme \(shared pool\), in the"
    ):
        billing.assert_charged("acmee", kept=8, refunded=2)  # the account that was meant is there to be seen
    with pytest.raises(ValueError, match="user_id"):
        billing.assert_not_charged("acme", "")
    billing.assert_not_charged("acme", "ann")


@pytest.mark.parametrize("down", [False, True])
def test_account_without_credits_that_was_asked_for_some_is_known(each: Billing, down: bool) -> None:
    """It was declined, or no call got through: it could have been charged, and was not."""
    with pytest.raises(AssertionError, match="the accounts that were: none"):
        each.assert_not_charged("acme")
    if down:
        each.down()
    assert TestClient(app).post("/work", json=TEN).status_code == (503 if down else 402)
    each.assert_not_charged("acme")


async def test_batch_meets_the_fault_too(each: Billing) -> None:
    """What is asked for together: the one that it was meant for fails, and nothing is lost."""
    each.grant("acme", 100)
    each.fail_next("deduct", "ok")
    each.fail_next("deduct", "503")
    each.fail_next("refund", "500 after commit", 2)
    async with each.client(app) as client:
        answers = await asyncio.gather(*(client.post("/work", json=TEN) for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert max(call.batch for call in each.calls) > 1
    assert [call.fault for call in each.calls if call.fault] == ["503", "500 after commit", "500 after commit"]
    each.assert_charged("acme", kept=40, refunded=10, charges=5)
    each.assert_balanced()


async def test_apps_own_client_on_the_running_loop(each: Billing) -> None:
    """An assertion cannot wait for the refund there, and says what to write."""
    each.grant("acme", 100)
    each.fail_next("refund", "503", 2)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        await client.post("/work", json=TEN)
    with pytest.raises(AssertionError, match=r"write `await billing.settled\(\)` before it"):
        each.assert_charged("acme", kept=8, refunded=2)
    await each.settled()
    each.assert_charged("acme", kept=8, refunded=2)
    each.assert_balanced()


@pytest.mark.parametrize(("operation", "fault"), [(each, fault) for fault in FAULTS for each in FAULTS[fault].only])
async def test_every_fault_of_every_operation(billing: Billing, operation: Operation, fault: Fault) -> None:
    """Once, and so often that a request gives up: the app keeps its books in order, and the fault was met."""
    billing.grant("acme", 100)
    served = 0
    async with billing.client(app) as client:
        for times in (1, 5):
            if operation == "void":
                billing.fail_next("deduct", "lost reply", 3)
            billing.fail_next(operation, fault, times, optional=times > 1)
            answer = await client.post("/work", json=TEN)
            assert answer.status_code in (200, 402 if fault == "insufficient" else 503)
            served += answer.status_code == 200
            billing.assert_balanced()
            assert billing.balance("acme") == 100 - 8 * served
    assert (fault in [call.fault for call in billing.calls if call.operation == operation]) is (fault != "ok")


@pytest.mark.parametrize("kind", ["billing_service", "billing_server"])
async def test_faults_of_the_real_service(request: pytest.FixtureRequest, kind: str) -> None:
    """Each to a deduction, as in memory: what the app sees of it, and what the ledger has."""
    billing: Billing = request.getfixturevalue(kind)
    billing.grant("acme", 100)
    balance = 100
    async with billing.client(app) as client:
        for fault in FAULTS:
            if fault in ("ok", "refused"):
                continue
            billing.fail_next("deduct", fault)
            before = len(billing.calls)
            answer = await client.post("/work", json=TEN)
            assert answer.status_code == {"insufficient": 402, "401": 503}.get(fault, 200), fault
            assert billing.calls[before].fault == fault
            balance -= 8 if answer.status_code == 200 else 0
            assert billing.balance("acme") == balance
            billing.assert_balanced()


async def test_late_copies_arrive_in_the_end(billing: Billing) -> None:
    """After the void: refused; after the refund: replayed. Neither takes anything."""
    billing.grant("acme", 100)
    billing.fail_next("deduct", "late request", 3)
    billing.fail_next("refund", "late duplicate")
    async with billing.client(app) as client:
        assert (await client.post("/work", json=TEN)).status_code == 503
        assert (await client.post("/work", json=TEN)).status_code == 200
    assert [(call.late, call.status) for call in billing.calls if call.late] == [(True, 409)] * 3 + [(True, 200)]
    billing.assert_charged("acme", kept=8, refunded=2)
    billing.assert_balanced()


async def test_charge_that_cannot_be_settled_is_not_balanced(billing: Billing) -> None:
    """The refund does not go through: the failure tells whose, how many, and what was tried."""
    billing.grant("acme", 100)
    billing.fail_always("refund", "timeout")
    async with billing.client(app) as client:
        await client.post("/work", json=TEN)
    with pytest.raises(AssertionError) as failed:
        billing.assert_balanced()
    text = str(failed.value)
    assert "not settled:" in text
    assert "2 credits to be refunded; tried" in text
    assert "refund 2" in text
    assert "no answer [timeout]" in text
    assert "'timeout', always" in text
    billing.up()
    await billing.settled()
    billing.assert_balanced()


async def test_failed_assertion_tells_the_story(billing: Billing) -> None:
    """What was expected, what came, the entries, and the calls."""
    billing.grant("acme", 100)
    async with billing.client(app) as client:
        await client.post("/work", json=TEN)
    with pytest.raises(AssertionError) as failed:
        billing.assert_charged("acme", kept=10)
    first, *story = str(failed.value).splitlines()
    assert first == (
        "acme (shared pool) should have been charged 1 x, 10 kept and 0 refunded;"
        " it was charged 1 x, 8 kept and 2 refunded"
    )
    _, deduction, refund = billing.entries("acme")
    key = deduction.idempotency_key
    assert story[1:] == [
        "acme (shared pool), in the service's ledger:",
        f"  grant +100, balance 100, {billing.entries('acme')[0].id}, test",
        f"  deduction -10, balance 90, {deduction.id}",
        f"  refund +2, balance 92, of {refund.transaction_id}, failed items: bad-1, bad-2",
        "The app asked, in this order:",
        f"  deduct 10 {key}: 201",
        f"  refund 2 {key}:refund: 201",
    ]
    with pytest.raises(AssertionError, match=r"acme \(shared pool\) should not have paid; 8 credits were kept"):
        billing.assert_not_charged("acme")


def test_another_event_loop_is_named_as_the_trouble(billing: Billing) -> None:
    """On trio nothing of asyncio's runs: here each is started by hand, on no loop at all."""
    for coroutine in (billing.settled(), billing.client(app).__aenter__()):
        with pytest.raises(RuntimeError, match='add a fixture `anyio_backend` that returns "asyncio"'):
            coroutine.send(None)


async def test_what_moves_behind_the_apps_back_is_found(billing: Billing) -> None:
    """A deduction that no app has on record, and a refund that none has asked for."""
    billing.grant("acme", 100)
    async with billing.client(app) as client:
        await client.post("/work", json=TEN)
    headers = {"Authorization": f"Bearer {billing.token}", "Idempotency-Key": "by-hand"}
    async with httpx.AsyncClient(base_url=billing.url, headers=headers, verify=False) as service:
        await service.post("/v1/deductions", json={"tenant_id": "acme", "amount": 1})
        transaction = billing.entries("acme")[1].id
        headers["Idempotency-Key"] = "by-hand-2"
        body = {"amount": 3, "reason": "a mistake"}
        await service.post(f"/v1/deductions/{transaction}/refunds", json=body, headers=headers)
    with pytest.raises(AssertionError) as failed:
        billing.assert_balanced()
    assert "no app has it on record: deduction -1" in str(failed.value)
    assert "refunded otherwise" in str(failed.value)


async def test_fault_that_nobody_meets_is_told(billing: Billing) -> None:
    """At the end of the test; one that is optional need not be met, and what was down in vain is told too."""
    billing.fail_next("void", "503", 2)
    billing.fail_next("refund", "503", optional=True)
    billing.fail_always("deduct", "503")
    billing.down()
    billing.up()
    with pytest.raises(AssertionError) as failed:
        billing.assert_all_met()
    told = [line for line in str(failed.value).splitlines() if line.startswith("  - ")]
    assert told == [
        "  - void: '503', 2 x, happened 0 x",
        "  - deduct: '503', always, happened 0 x",
        "  - the service was down, and nobody called it meanwhile",
    ]
    billing._wire.plan._planned.clear()  # or this test would fail for them
    billing._wire.plan._was_down_in_vain = False


def test_refund_of_a_loop_that_stands_still(billing: Billing) -> None:
    """An asynchronous test has ended without waiting for it: it goes out all the same, and meets its fault."""
    billing.grant("acme", 100)
    billing.fail_next("refund", "503")

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            await client.post("/work", json=TEN)

    with asyncio.Runner() as runner:
        runner.run(ask())
        billing.assert_all_met()
        billing.assert_charged("acme", kept=8, refunded=2)


@pytest.mark.slow
def test_app_in_another_process(billing_server: Billing) -> None:
    """Its environment tells it where it is billed; assertions wait for its refunds, and look into its journal."""
    billing_server.grant("acme", 100)
    billing_server.fail_next("deduct", "lost reply")
    billing_server.fail_next("refund", "500 after commit")
    code = "from tests.testing.elsewhere import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"200\n"
            billing_server.assert_charged("acme", kept=8, refunded=2)
            billing_server.assert_balanced()
        finally:
            other.stdin.close()  # so it ends
    assert other.returncode == 0
    assert [call.fault for call in billing_server.calls] == ["lost reply", None, "500 after commit", None]


def test_what_there_is_not_is_refused_with_what_there_is(billing: Billing) -> None:
    """An unknown fault or operation, one that cannot happen, and accounts and amounts that are none."""
    with pytest.raises(ValueError, match=r"there is no fault 'lost replay': 'ok', 'refused', .*'lost reply'"):
        billing.fail_next("deduct", "lost replay")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no operation 'grant': 'deduct', 'refund', 'void'"):
        billing.fail_next("grant", "503")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'insufficient' can only happen to: deduct; not to 'refund'"):
        billing.fail_next("refund", "insufficient")
    with pytest.raises(ValueError, match="times must be a whole number from 1"):
        billing.fail_next("refund", "503", 0)
    with pytest.raises(ValueError, match="amount"):
        billing.grant("acme", 0)
    with pytest.raises(ValueError, match="tenant_id"):
        billing.balance("")


def test_socket_refuses_nobody(billing_server: Billing) -> None:
    """What listens cannot; it says what can."""
    with pytest.raises(ValueError, match=r"`down\(\)` and `up\(\)`"):
        billing_server.fail_next("deduct", "refused")


async def test_app_that_was_given_another_service(billing: Billing, tmp_path: Path) -> None:
    """For the time of the test it is billed here; afterwards it has its own again."""
    ledger = SqlCredits(tmp_path / "credits.db")
    other = FastAPI()
    other.post("/")(metered(cost=1, account=account_of)(shown))
    other.add_middleware(MeteredBillingMiddleware, credits=ledger, journal=tmp_path / "journal")
    billing.grant("acme", 1)
    async with billing.client(other) as client:
        assert (await client.post("/")).status_code == 200
    billing.assert_charged("acme", kept=1)
    assert list(tmp_path.iterdir()) == []


async def test_retries_never_run_out(billing: Billing) -> None:
    """A service that loses every other reply: each request is tried again, and none finds the circuit open."""
    billing.grant("acme", 300)
    async with billing.client(app) as client:
        for _ in range(25):
            billing.fail_next("deduct", "lost reply", 2)
            assert (await client.post("/work", json=TEN)).status_code == 200
    billing.assert_charged("acme", kept=200, refunded=50, charges=25)


@pytest.mark.parametrize("fault", [None, "503"])
async def test_app_that_settles_inline(billing: Billing, fault: Fault | None) -> None:
    """As it does where a process is frozen between requests: with the response all has gone out that can."""
    inline = FastAPI()
    inline.include_router(app.router)
    inline.add_middleware(MeteredBillingMiddleware, settle="inline")
    billing.grant("acme", 100)
    if fault is not None:
        billing.fail_next("refund", fault)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(inline), base_url="http://app") as client:
        await client.post("/work", json=TEN)
    assert [task.get_name() for task in asyncio.all_tasks() if "metered" in task.get_name()] == []
    assert billing.balance("acme") == (92 if fault is None else 90)
    await billing.settled()
    billing.assert_charged("acme", kept=8, refunded=2)
    billing.assert_balanced()


async def shown() -> dict[str, str]:
    return {}


async def test_nothing_is_left(tmp_path: Path) -> None:
    """No thread, no task, no variable; and an app that was billed here has what it was made with."""
    ledger = SqlCredits(tmp_path / "credits.db")
    await ledger.grant("acme", amount=1, reason="test", idempotency_key="grant")
    threads, before = set(threading.enumerate()), dict(os.environ)
    other = FastAPI()
    other.post("/")(metered(cost=1, account=account_of)(shown))
    other.add_middleware(MeteredBillingMiddleware, credits=ledger, journal=tmp_path / "journal")
    for opened in (in_memory, in_process, on_a_socket):
        async with (
            opened() as billing,
            httpx.AsyncClient(transport=httpx.ASGITransport(other), base_url="http://a") as client,
        ):
            assert os.environ["METERED_BILLING_CREDITS"] == billing.url
            billing.grant("acme", 1)
            assert (await client.post("/")).status_code == 200
            await billing.settled()
            billing.assert_charged("acme", kept=1)
        assert dict(os.environ) == before
        assert {task for task in asyncio.all_tasks() if "metered" in task.get_name()} == set()
        for thread in set(threading.enumerate()) - threads:
            if "metered" in thread.name:
                thread.join(5)
                assert not thread.is_alive()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(other), base_url="http://a") as client:
        assert (await client.post("/")).status_code == 200
        await settled()
        assert await ledger.balance("acme") == 0
    await ledger.aclose()


async def test_one_at_a_time(billing: Billing) -> None:
    """An app has one service: two are a mistake, and so is a plain `with` on a running loop."""
    with pytest.raises(RuntimeError, match="one of billing, billing_service and billing_server at a time"):
        async with in_memory():
            pass
    with pytest.raises(RuntimeError, match="async with"), in_memory():
        pass


def test_table_of_faults_has_them_all() -> None:
    """What a type checker allows is what there is."""
    assert tuple(FAULTS) == get_args(Fault)
