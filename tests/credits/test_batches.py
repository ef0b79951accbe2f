"""Many operations in one call: each has its own answer, and its own next step where there is none."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import httpx
import pytest
import respx
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import INVALID_SPAN

from metered_billing import names
from metered_billing.charge import (
    Account,
    AlreadyVoided,
    Declined,
    DeductAnswer,
    Deducted,
    NotSent,
    Record,
    Refunded,
    Refused,
    Unanswered,
    Unknown,
    Voided,
)
from metered_billing.credits import http
from metered_billing.credits.contract import Call, Contract
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.line import Line
from metered_billing.telemetry import Telemetry

from .test_http import URL, World, problem, record, stray

Results = Callable[[dict[str, Any]], dict[str, Any]]


def done(operation: dict[str, Any]) -> dict[str, Any]:
    """The answer to an operation that is done."""
    if operation["op"] == "deduct":
        body: dict[str, Any] = {"transaction_id": f"tx-{operation['idempotency_key']}", "tenant_id": "acme"}
        return {"status": 201, "body": {**body, "amount": operation["amount"], "balance": 90}}
    if operation["op"] == "refund":
        ids = {"refund_id": "re-1", "transaction_id": operation["transaction_id"]}
        return {"status": 201, "body": {**ids, "amount": operation["amount"], "balance": 92}}
    return {"status": 200, "body": {"status": "voided", "refunded": 10}}


class Service:
    """A credits service with batches, as far as a test says so."""

    def __init__(self, router: respx.MockRouter) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.singles: list[str] = []
        self.result: Results = done
        self.instead: list[httpx.Response | Exception] = []
        self.gate: asyncio.Event | None = None
        self.requests: list[httpx.Request] = []
        router.post("/v1/batch").mock(side_effect=self._batch)
        router.post("/v1/deductions").mock(side_effect=self._deduct)
        router.post("/v1/voids").mock(side_effect=self._single)
        router.post(path__regex="/v1/deductions/.*/refunds").mock(side_effect=self._single)

    async def _batch(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        operations = json.loads(request.content)["operations"]
        self.batches.append(operations)
        if self.gate is not None:
            await self.gate.wait()
        if self.instead:
            instead = self.instead.pop(0)
            if isinstance(instead, Exception):
                raise instead
            return instead
        return httpx.Response(200, json={"results": [self.result(operation) for operation in operations]})

    async def _deduct(self, request: httpx.Request) -> httpx.Response:
        return await self._single(request, op="deduct")

    async def _single(self, request: httpx.Request, op: str = "") -> httpx.Response:
        body = json.loads(request.content)
        op = op or ("void" if request.url.path.endswith("voids") else "refund")
        key = request.headers.get("idempotency-key") or body["idempotency_key"]
        self.singles.append(key)
        if self.gate is not None:
            await self.gate.wait()
        operation = {"op": op, "idempotency_key": key, "transaction_id": f"tx-{key.removesuffix(':refund')}", **body}
        result = self.result(operation)
        headers = {"content-type": "application/problem+json"} if result["status"] >= 400 else {}
        return httpx.Response(result["status"], headers=headers, json=result["body"])

    @property
    def keys(self) -> list[list[str]]:
        return [[operation["idempotency_key"] for operation in batch] for batch in self.batches]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def service() -> Iterator[Service]:
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        yield Service(router)


@pytest.fixture
async def make(world: World) -> AsyncIterator[Callable[..., HttpCredits]]:
    made: list[HttpCredits] = []

    def make(**options: Any) -> HttpCredits:
        made.append(HttpCredits(URL, **{"runtime": world.runtime, **options}))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


@pytest.fixture
def credits_(make: Callable[..., HttpCredits]) -> HttpCredits:
    return make()


def charge(key: object, **changes: Any) -> Record:
    return record(id=str(key), transaction_id=f"tx-{key}", **changes)


async def deduct_all(credits_: HttpCredits, *keys: object) -> list[DeductAnswer]:
    return await asyncio.gather(*(credits_.deduct(charge(key)) for key in keys))


async def under_way(credits_: HttpCredits, service: Service, number: int = http.DEDUCTIONS_AT_ONCE) -> Any:
    """So many calls in flight, each of one deduction, until the service's gate is opened."""
    service.gate = asyncio.Event()
    tasks = []
    for key in range(number):
        tasks.append(asyncio.create_task(credits_.deduct(charge(f"busy-{key}"))))
        await asyncio.sleep(0.005)
    return tasks


async def test_in_one_call(credits_: HttpCredits, service: Service) -> None:
    """What is asked for at the same time goes in one call, in order, and each gets its own answer."""
    assert await deduct_all(credits_, 1, 2, 3) == [Deducted(f"tx-{key}", 90) for key in (1, 2, 3)]
    assert service.keys == [["1", "2", "3"]]
    assert service.singles == []


async def test_alone_it_is_a_plain_call(credits_: HttpCredits, service: Service) -> None:
    """One after the other, nothing is a batch."""
    for key in (1, 2):
        assert await credits_.deduct(charge(key)) == Deducted(f"tx-{key}", 90)
    assert service.singles == ["1", "2"]
    assert service.batches == []


async def test_gather_while_calls_are_in_flight(credits_: HttpCredits, service: Service) -> None:
    """Two calls of deductions at once; what comes meanwhile waits for the first of them to come back."""
    busy = await under_way(credits_, service)
    late = []
    for key in range(5):
        late.append(asyncio.create_task(credits_.deduct(charge(key))))
        await asyncio.sleep(0.001)
    assert service.singles == ["busy-0", "busy-1"]
    assert service.batches == []
    assert service.gate is not None
    service.gate.set()
    await asyncio.gather(*busy, *late)
    assert service.keys == [["0", "1", "2", "3", "4"]]


async def test_batch_off(make: Callable[..., HttpCredits], service: Service) -> None:
    """Without batching, each is a call of its own, at once."""
    await deduct_all(make(batching=False), 1, 2, 3)
    assert sorted(service.singles) == ["1", "2", "3"]
    assert service.batches == []


async def test_undoing_is_not_held_up(credits_: HttpCredits, service: Service) -> None:
    """Deductions in flight, and more in line, keep no refund waiting."""
    busy = await under_way(credits_, service)
    busy.append(asyncio.create_task(credits_.deduct(charge("in line"))))
    await asyncio.sleep(0.005)
    gate, service.gate = service.gate, None
    assert await credits_.refund(charge(1)) == Refunded("re-1", 92)
    assert gate is not None
    assert not gate.is_set()
    gate.set()
    await asyncio.gather(*busy)


async def test_refunds_and_voids_together(credits_: HttpCredits, service: Service) -> None:
    """What is given back goes in one call, of both kinds, with all that a single call says."""
    items = charge(3, refund_items=("img-1", "img-2"), reason="failed items")
    got: tuple[object, ...] = await asyncio.gather(
        credits_.refund(charge(1)), credits_.void(charge(2)), credits_.refund(items)
    )
    assert tuple(got) == (Refunded("re-1", 92), Voided(10), Refunded("re-1", 92))
    account = {"tenant_id": "acme", "user_id": "alice"}
    refund = {"op": "refund", "amount": 2, "reason": "failed items"}
    assert service.batches == [
        [
            {**refund, "idempotency_key": "1:refund", "transaction_id": "tx-1"},
            {"op": "void", "idempotency_key": "2", **account},
            {**refund, "idempotency_key": "3:refund", "transaction_id": "tx-3", "items": ["img-1", "img-2"]},
        ]
    ]


async def test_batch_says_of_a_deduction_what_a_call_says(credits_: HttpCredits, service: Service) -> None:
    """Account, amount, request and metadata."""
    full = charge(1, request_id="req-1", metadata={"endpoint": "cut"})
    pool = charge(2, account=Account("acme"))
    await asyncio.gather(credits_.deduct(full), credits_.deduct(pool))
    first, second = service.batches[0]
    assert first == {
        "op": "deduct",
        "idempotency_key": "1",
        "tenant_id": "acme",
        "user_id": "alice",
        "amount": 10,
        "request_id": "req-1",
        "metadata": {"endpoint": "cut"},
    }
    assert second == {"op": "deduct", "idempotency_key": "2", "tenant_id": "acme", "amount": 10}


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u6587", "\U0001f4b8"])
def test_weight_is_no_less_than_the_bytes(letter: str) -> None:
    """Whatever its names are written in: what the line takes for a call is what the service reads."""
    account = Account(letter * 255, letter * 255)
    heavy = charge(1, account=account, reason=letter * 255, refund_items=(letter * 255,) * 50)
    for operation, call in (("deduct", Contract().deduction(heavy)), ("refund", Contract().refund(heavy))):
        asked = http._Asked(operation, heavy, call, 0.0, INVALID_SPAN)
        assert len(json.dumps(Contract().batched(operation, heavy, call))) <= http._weight(asked)


def result(status: int, name: str = "", **body: Any) -> dict[str, Any]:
    return {"status": status, "body": {**({"type": f"urn:metered-billing:{name}"} if name else {}), **body}}


NO_CREDITS = result(402, "insufficient-credits", balance=3, required=10)


@pytest.mark.parametrize(
    ("bad", "answer"),
    [
        (NO_CREDITS, Declined(3)),
        (result(409, "charge-voided"), Unknown("it was voided before it arrived")),
        (result(422, "idempotency-key-reused"), Unknown("HTTP 422 idempotency-key-reused", misconfigured=True)),
        (result(403, "forbidden"), Unknown("HTTP 403 forbidden")),
        (result(201, transaction_id="tx-2", amount=11), Unknown("broken reply (HTTP 201)")),
    ],
)
async def test_one_that_is_refused_spoils_nothing(
    credits_: HttpCredits, service: Service, bad: dict[str, Any], answer: DeductAnswer
) -> None:
    """Its neighbours are paid, and it is answered as if it had been alone."""
    service.result = lambda operation: bad if operation["idempotency_key"] == "2" else done(operation)
    got = await deduct_all(credits_, 1, 2, 3)
    assert got[0] == Deducted("tx-1", 90)
    assert got[2] == Deducted("tx-3", 90)
    if isinstance(answer, Unknown) and "broken" in answer.reason:
        assert service.singles == ["2", "2"]  # it may have happened: asked again
    assert got[1] == answer


async def test_refunds_refused_in_a_batch(credits_: HttpCredits, service: Service) -> None:
    """The service's own words in a batch are as good as in a call."""
    said = {
        "1:refund": result(409, "charge-voided"),
        "2:refund": result(422, "refund-exceeds-deduction"),
        "3:refund": result(503, "ledger-unavailable"),
    }
    service.result = lambda operation: said[operation["idempotency_key"]]
    got = await asyncio.gather(*(credits_.refund(charge(key)) for key in (1, 2, 3)))
    assert got == [
        AlreadyVoided(),
        Refused("HTTP 422 refund-exceeds-deduction"),
        Unanswered("HTTP 503 ledger-unavailable"),
    ]


UNANSWERED: list[httpx.Response | Exception] = [
    httpx.ReadTimeout("late"),
    httpx.RemoteProtocolError("gone"),
    stray(500),
    stray(502),
    stray(429),
    stray(400),
    stray(402),
    problem(413, "body-too-large"),
    problem(422, "invalid-request"),
    stray(200),
    httpx.Response(200, json={"results": []}),
    httpx.Response(200, json={"results": [{"status": 201}] * 4}),
    httpx.Response(200, json={"results": {"0": 1, "1": 2, "2": 3}}),
    httpx.Response(200, json=[1, 2, 3]),
    httpx.Response(200, json={"results": [None, {"status": True}, {"status": 99, "body": {}}]}),
    httpx.Response(200, json={"results": ["yes", {"status": "201"}, {"body": {}}]}),
]


@pytest.mark.parametrize("instead", UNANSWERED, ids=repr)
async def test_no_answer_leaves_each_unknown(
    credits_: HttpCredits, service: Service, instead: httpx.Response | Exception
) -> None:
    """Each is asked for again by itself, under its own key; one that is declined then is in doubt."""
    service.instead = [instead]
    service.result = lambda operation: NO_CREDITS if operation["idempotency_key"] == "2" else done(operation)
    got = await deduct_all(credits_, 1, 2, 3)
    assert got[0] == Deducted("tx-1", 90)
    assert got[1] == Declined(3, after_unknown=True)
    assert got[2] == Deducted("tx-3", 90)
    assert sorted(service.singles) == ["1", "2", "3"]
    assert len(service.batches) == 1


@pytest.mark.parametrize("instead", UNANSWERED, ids=repr)
async def test_no_answer_to_refunds_and_voids(
    credits_: HttpCredits, service: Service, instead: httpx.Response | Exception
) -> None:
    """Each has no answer; when it is tried again, it goes by itself."""
    service.instead = [instead]
    refunded, voided = await asyncio.gather(credits_.refund(charge(1)), credits_.void(charge(2)))
    assert isinstance(refunded, Unanswered)
    assert isinstance(voided, Unanswered)
    assert refunded.sent
    assert voided.sent
    assert await credits_.refund(charge(1, tries=1)) == Refunded("re-1", 92)
    assert await credits_.void(charge(2, tries=1)) == Voided(10)
    assert service.singles == ["1:refund", "2"]


async def test_not_sent(credits_: HttpCredits, service: Service) -> None:
    """Where no connection existed, nothing of the batch was sent."""
    service.instead = [httpx.ConnectError("refused")]
    got = await asyncio.gather(*(credits_.refund(charge(key)) for key in (1, 2)))
    assert got == [Unanswered("ConnectError", sent=False)] * 2


async def test_retry_after_of_a_batch(credits_: HttpCredits, service: Service, world: World) -> None:
    """How long a batch is to wait, each waits."""
    service.instead = [httpx.Response(503, headers={"Retry-After": "2"})]
    assert await deduct_all(credits_, 1, 2) == [Deducted("tx-1", 90), Deducted("tx-2", 90)]
    assert world.slept == [2.0, 2.0]


@pytest.mark.parametrize("status", [401, 403])
async def test_rejected_token(credits_: HttpCredits, service: Service, status: int) -> None:
    """Nothing is tried again with a token that the service rejects."""
    service.instead = [stray(status)]
    assert await deduct_all(credits_, 1, 2) == [Unknown(f"HTTP {status}")] * 2
    assert service.singles == []


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_no_batches_here(credits_: HttpCredits, service: Service, status: int) -> None:
    """A service without batches is asked one by one from then on; nobody waits, nobody fails for it."""
    service.instead = [stray(status)] * 2
    assert await deduct_all(credits_, *range(60)) == [Deducted(f"tx-{key}", 90) for key in range(60)]
    assert len(service.batches) == 1
    assert len(service.singles) == 60
    await deduct_all(credits_, "a", "b")
    await asyncio.gather(credits_.refund(charge("c")), credits_.void(charge("d")))
    assert len(service.batches) == 1


async def test_no_batches_for_refunds(credits_: HttpCredits, service: Service) -> None:
    """So it is with what is given back."""
    service.instead = [stray(404)]
    refunded, voided = await asyncio.gather(credits_.refund(charge(1)), credits_.void(charge(2)))
    assert refunded == Refunded("re-1", 92)
    assert voided == Voided(10)


async def test_stray_404_may_have_been_passed_on(credits_: HttpCredits, service: Service) -> None:
    """Perhaps a proxy spoke, after the deduction was done: a decline is in doubt, and has to be undone."""
    service.instead = [stray(404)]
    service.result = lambda _: NO_CREDITS
    got = await deduct_all(credits_, 1, 2)
    assert all(isinstance(each, Declined) and each.after_unknown for each in got)


async def test_stray_404_later(credits_: HttpCredits, service: Service) -> None:
    """A service that has answered batches has them: the next ones go together again."""
    await deduct_all(credits_, 1, 2)
    service.instead = [stray(404)]
    assert await deduct_all(credits_, 3, 4) == [Deducted("tx-3", 90), Deducted("tx-4", 90)]
    assert service.singles == ["3", "4"]
    await deduct_all(credits_, 5, 6)
    assert service.keys == [["1", "2"], ["3", "4"], ["5", "6"]]


class Elsewhere(Contract):
    """A service with a path of its own for deductions."""

    def deduction(self, record: Record) -> Call:
        return super().deduction(record)


class ElsewhereInBatches(Elsewhere):
    """It has batches as well, and says so."""

    batches = True


class Forgetful(Contract):
    remembers_declines = False


def test_contract_of_another_shape_has_no_batches() -> None:
    """Unless it says so: what a batch looks like there nobody knows."""
    assert [each.batches for each in (Contract, Elsewhere, ElsewhereInBatches, Forgetful)] == [True, False, True, True]


async def test_contract_without_batches(make: Callable[..., HttpCredits], service: Service) -> None:
    """It is asked one by one."""
    await deduct_all(make(contract=Elsewhere()), 1, 2)
    assert service.batches == []
    assert service.singles == ["1", "2"]


class BadTwo(Contract):
    """Cannot put one of them into words."""

    batches = True

    def batched(self, operation: str, record: Record, call: Call) -> Any:
        if record.id == "2":
            return {"amount": object()}
        return super().batched(operation, record, call)


class NoneAtAll(Contract):
    batches = True

    def batched(self, operation: str, record: Record, call: Call) -> Any:
        raise ZeroDivisionError


class BadReading(Contract):
    batches = True

    def read_batch(self, reply: Any, size: int) -> Any:
        raise ZeroDivisionError


class TestContractsWithBugs:
    async def test_one_that_cannot_be_said(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """It alone is our user's bug; its neighbours go."""
        first, second, third = await deduct_all(make(contract=BadTwo()), 1, 2, 3)
        assert (first, third) == (Deducted("tx-1", 90), Deducted("tx-3", 90))
        assert isinstance(second, Unknown)
        assert second.misconfigured
        assert service.keys == [["1", "3"]]

    async def test_none_that_can_be_said(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """Then nothing is sent."""
        got = await deduct_all(make(contract=NoneAtAll()), 1, 2)
        assert all(isinstance(each, Unknown) and each.misconfigured for each in got)
        assert service.batches == []

    async def test_bug_in_reading(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """What was sent is unknown."""
        got = await deduct_all(make(contract=BadReading()), 1, 2)
        assert all(isinstance(each, Unknown) and each.misconfigured for each in got)


class TestCancelling:
    async def test_in_line(self, credits_: HttpCredits, service: Service) -> None:
        """Whoever gives up in line is never sent."""
        busy = await under_way(credits_, service)
        tasks = [asyncio.create_task(credits_.deduct(charge(key))) for key in range(3)]
        await asyncio.sleep(0.005)
        tasks[1].cancel()
        assert service.gate is not None
        service.gate.set()
        got = await asyncio.gather(*busy, *tasks, return_exceptions=True)
        assert isinstance(got[3], asyncio.CancelledError)
        assert service.keys == [["0", "2"]]

    async def test_in_flight(self, credits_: HttpCredits, service: Service) -> None:
        """Whoever gives up in flight takes nobody's answer away."""
        service.gate = asyncio.Event()
        tasks = [asyncio.create_task(credits_.deduct(charge(key))) for key in range(3)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        service.gate.set()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert got[0] == Deducted("tx-0", 90)
        assert got[2] == Deducted("tx-2", 90)
        assert isinstance(got[1], asyncio.CancelledError)

    async def test_all_in_flight(self, credits_: HttpCredits, service: Service) -> None:
        """When nobody waits for a call any more, it is broken off: nothing is under way when they have gone."""
        service.gate = asyncio.Event()
        before = asyncio.all_tasks()
        tasks = [asyncio.create_task(credits_.deduct(charge(key))) for key in range(3)]
        await asyncio.sleep(0.01)
        assert service.keys == [["0", "1", "2"]]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert asyncio.all_tasks() == before
        service.gate = None
        assert await deduct_all(credits_, 3, 4) == [Deducted("tx-3", 90), Deducted("tx-4", 90)]

    @pytest.mark.parametrize("turns", range(8))
    async def test_at_any_turn(self, credits_: HttpCredits, service: Service, turns: int) -> None:
        """However far it has come, its place in the line is free afterwards."""
        for _ in range(2 * http.DEDUCTIONS_AT_ONCE):
            task = asyncio.create_task(credits_.deduct(charge("a")))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        service.gate = None
        assert await asyncio.wait_for(deduct_all(credits_, 1, 2), 5) == [Deducted("tx-1", 90), Deducted("tx-2", 90)]


class TestDeadlines:
    async def test_in_line(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """What has waited too long was not sent, and is not sent any more."""
        credits_ = make(timeout_s=0.1, attempt_timeout_s=0.08)
        busy = await under_way(credits_, service)
        late = asyncio.create_task(credits_.deduct(charge("late")))
        assert await late == NotSent("waited too long for the credits service")
        assert service.gate is not None
        service.gate.set()
        await asyncio.gather(*busy)
        assert service.keys == []
        assert "late" not in service.singles

    async def test_hurried_one(self, make: Callable[..., HttpCredits], service: Service, world: World) -> None:
        """One whose time is up is unknown by then; its neighbours have all of theirs."""
        credits_ = make(timeout_s=10, attempt_timeout_s=5)
        busy = await under_way(credits_, service)
        world.pass_by(-9.95)
        hurried = asyncio.create_task(credits_.deduct(charge("hurried")))
        await asyncio.sleep(0.001)
        world.pass_by(9.95)
        patient = asyncio.create_task(credits_.deduct(charge("patient")))
        await asyncio.sleep(0.001)
        gate, service.gate = service.gate, asyncio.Event()
        assert gate is not None
        gate.set()
        await asyncio.gather(*busy)
        await asyncio.sleep(0.01)
        assert service.keys == [["hurried", "patient"]]
        assert isinstance(await asyncio.wait_for(hurried, 2), Unknown)
        assert not patient.done()
        service.gate.set()
        assert await patient == Deducted("tx-patient", 90)


async def test_too_many(make: Callable[..., HttpCredits], service: Service) -> None:
    """Beyond the bound nothing is queued: not sent, and worth another try a little later."""
    credits_ = make(max_waiting=4)
    busy = await under_way(credits_, service)
    accounts = [Account("acme", str(number)) for number in range(6)]
    tasks = [asyncio.create_task(credits_.deduct(charge(n, account=each))) for n, each in enumerate(accounts)]
    await asyncio.sleep(0.005)
    refused = NotSent("too many are waiting for the credits service", retry_after_s=1.0)
    assert [task.result() for task in tasks if task.done()] == [refused] * 2
    assert service.gate is not None
    service.gate.set()
    await asyncio.gather(*busy, *tasks)
    assert service.keys == [["0", "1", "2", "3"]]


async def test_too_many_refunds(make: Callable[..., HttpCredits], monkeypatch: pytest.MonkeyPatch) -> None:
    """A refund that finds no room was not sent; it is tried again later."""
    monkeypatch.setattr(Line, "has_room", lambda *_: False)
    got = await make().refund(charge(1))
    assert got == Unanswered("too many are waiting for the credits service", retry_after_s=1.0, sent=False)


class TestBreaker:
    async def test_counts_calls(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """A failed call of fifty operations is one failure."""
        credits_ = make(breaker_failures=2, attempts=1)
        service.instead = [stray(500)] * 2
        await deduct_all(credits_, *range(50))
        assert await deduct_all(credits_, *range(50)) == [Unknown("HTTP 500", retry_after_s=10.0)] * 50
        assert await deduct_all(credits_, 1) == [NotSent("circuit open", retry_after_s=10.0)]
        assert len(service.batches) == 2

    async def test_answers_in_a_batch_are_no_failures(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """A service that answers is there, whatever it answers."""
        credits_ = make(breaker_failures=1, attempts=1)
        service.result = lambda _: NO_CREDITS
        await deduct_all(credits_, 1, 2)
        service.result = done
        assert await deduct_all(credits_, 3, 4) == [Deducted("tx-3", 90), Deducted("tx-4", 90)]

    async def test_opens_while_they_wait(self, make: Callable[..., HttpCredits], service: Service) -> None:
        """Those in line hear at once that the circuit is open, and were not sent."""
        credits_ = make(breaker_failures=1, attempts=1)
        busy = await under_way(credits_, service)
        tasks = [asyncio.create_task(credits_.deduct(charge(key))) for key in range(3)]
        await asyncio.sleep(0.005)
        service.result = lambda _: result(500)
        assert service.gate is not None
        service.gate.set()
        await asyncio.gather(*busy)
        assert await asyncio.gather(*tasks) == [NotSent("circuit open", retry_after_s=10.0)] * 3
        assert service.batches == []

    async def test_probe_may_be_a_batch(self, make: Callable[..., HttpCredits], service: Service, world: World) -> None:
        """Half open, one call goes through, however many operations are in it."""
        credits_ = make(breaker_failures=1, attempts=1)
        service.instead = [stray(500)]
        await deduct_all(credits_, 1, 2)
        world.pass_by(10)
        assert await deduct_all(credits_, 3, 4) == [Deducted("tx-3", 90), Deducted("tx-4", 90)]


async def test_close_while_in_line(make: Callable[..., HttpCredits], service: Service) -> None:
    """What waits was not sent, what is in flight may have been; and it can be used again."""
    credits_ = make(attempts=1)
    service.gate = asyncio.Event()
    in_flight = [asyncio.create_task(credits_.refund(charge(key))) for key in (1, 2)]
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(credits_.refund(charge(3)))
    await asyncio.sleep(0.01)
    await credits_.aclose()
    assert await asyncio.gather(*in_flight) == [Unanswered("the call was broken off", sent=True)] * 2
    assert await waiting == Unanswered("waited too long for the credits service", sent=False)
    service.gate = None
    assert await deduct_all(credits_, 4, 5) == [Deducted("tx-4", 90), Deducted("tx-5", 90)]


class Overheard(Contract):
    """Notes in whose context a batch is made."""

    batches = True
    heard: ClassVar[list[str]] = []

    def batch(self, operations: Sequence[bytes]) -> tuple[str, bytes]:
        self.heard.append(REQUEST.get())
        return super().batch(operations)


REQUEST = ContextVar("request", default="none")


async def test_batch_is_made_in_no_requests_context(make: Callable[..., HttpCredits], service: Service) -> None:
    """What a request has bound to its log lines does not stand on those of a call that carries others' operations."""
    credits_ = make(contract=Overheard())
    await credits_.start()
    REQUEST.set("of one request")
    await deduct_all(credits_, 1, 2)
    assert Overheard.heard == ["none"]


@pytest.mark.parametrize("status", [401, 403])
async def test_token_rejected_for_one_of_a_batch_is_loud(
    credits_: HttpCredits, service: Service, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the status that the service gave."""
    service.result = lambda operation: result(status) if operation["idempotency_key"] == "2" else done(operation)
    await deduct_all(credits_, 1, 2, 3)
    rejected = [record for record in caplog.messages if names.LOG_REJECTED in record]
    assert len(rejected) == 1
    assert f"status={status}" in rejected[0]


class TestTelling:
    @pytest.fixture
    def exporter(self) -> InMemorySpanExporter:
        return InMemorySpanExporter()

    @pytest.fixture
    def provider(self, exporter: InMemorySpanExporter) -> TracerProvider:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return provider

    async def test_one_span_for_all(
        self,
        make: Callable[..., HttpCredits],
        service: Service,
        provider: TracerProvider,
        exporter: InMemorySpanExporter,
    ) -> None:
        """The call's span is nobody's child, and linked with each operation's, both ways; the service hears of each."""
        credits_ = make(telemetry=Telemetry(tracer_provider=provider))
        tracer = provider.get_tracer("test")

        async def deduct(key: int) -> None:
            with tracer.start_as_current_span(f"deduct {key}"):
                await credits_.deduct(charge(key))

        with tracer.start_as_current_span("root"):
            await asyncio.gather(*(deduct(key) for key in range(3)))

        spans = {span.name: span for span in exporter.get_finished_spans()}
        call = spans["POST"]
        assert call.parent is None
        assert (call.attributes or {})[names.BATCH_SIZE] == 3
        assert (call.attributes or {})["url.full"] == f"{URL}/v1/batch"
        operations = [spans[f"deduct {key}"] for key in range(3)]
        assert [link.context for link in call.links] == [each.context for each in operations]
        for each, sent in zip(operations, service.batches[0], strict=True):
            assert [link.context for link in each.links] == [call.context]
            assert (each.attributes or {})[names.BATCH_SIZE] == 3
            assert sent["traceparent"][3:-3] == f"{each.context.trace_id:032x}-{each.context.span_id:016x}"
            assert int(sent["traceparent"][-2:], 16) & 1
        assert service.requests[0].headers["traceparent"][3:35] == f"{call.context.trace_id:032x}"

    async def test_sampled_out(
        self, make: Callable[..., HttpCredits], service: Service, exporter: InMemorySpanExporter
    ) -> None:
        """What is not sampled is not linked, and the service hears that it is not."""
        provider = TracerProvider(sampler=ALWAYS_OFF)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        credits_ = make(telemetry=Telemetry(tracer_provider=provider))
        with provider.get_tracer("test").start_as_current_span("root"):
            await deduct_all(credits_, 1, 2)
        assert exporter.get_finished_spans() == ()
        assert [int(each["traceparent"][-2:], 16) & 1 for each in service.batches[0]] == [0, 0]

    async def test_nothing_traced(self, credits_: HttpCredits, service: Service) -> None:
        """Where nobody traces, a batch says nothing of it."""
        await deduct_all(credits_, 1, 2)
        assert all("traceparent" not in each for each in service.batches[0])
