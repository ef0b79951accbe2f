"""What the report says that the library does without a promise: it does so."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from metered_billing import HttpCredits, MeteredBillingMiddleware, metered, settled
from metered_billing.charge import (
    Account,
    Declined,
    Deducted,
    NoVoid,
    Record,
    Refunded,
    Refused,
    State,
    Unanswered,
    Unknown,
)
from metered_billing.credits.contract import Call, Contract
from metered_billing.ledger import Grant
from tests.stand import serving

from . import broken
from .broken import APP, Service

ANN = Account("acme", "ann")


class Lossy(httpx.AsyncBaseTransport):
    """A network in front of a service: it loses the first request, or the first reply, of a path."""

    def __init__(self, service: Service, request: str = "", reply: str = "") -> None:
        self._service, self._request, self._reply = service, request, reply
        self.lost: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if self._request and request.url.path.endswith(self._request):
            self._request = ""
            self.lost.append(request)
            raise httpx.ReadTimeout("nothing came", request=request)
        response = await self._service.handle_async_request(request)
        if self._reply and request.url.path.endswith(self._reply):
            self._reply = ""
            raise httpx.ReadTimeout("nothing came", request=request)
        return response

    async def deliver_late(self) -> None:
        for request in self.lost:
            await self._service.handle_async_request(request)


class Voidless(Contract):
    def void(self, record: Record) -> Call | None:
        return None


class Forgetful(Contract):
    remembers_declines = False


async def granted(service: Service, amount: int, key: str = "g") -> None:
    command = Grant(idempotency_key=key, tenant_id="acme", user_id="ann", amount=amount, reason="test")
    assert (await service.ledger.grant(command)).done


async def held(service: Service) -> int:
    return await service.ledger.balance("acme", "ann")


def http(transport: httpx.AsyncBaseTransport, *, attempts: int = 1, contract: Contract | None = None) -> HttpCredits:
    return HttpCredits("http://credits", token=APP, transport=transport, attempts=attempts, contract=contract)


async def request(directory: Path, credits_: HttpCredits) -> int:
    """One metered request for 10 credits, and quiet after it. Returns its status."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, credits=credits_, journal=directory / "journal", account=lambda: ANN)

    @app.post("/work")
    @metered(cost=10)
    async def work() -> str:
        return "done"

    async with serving(app) as client:
        response = await client.post("/work")
        await settled()
    return response.status_code


def record(**changes: Any) -> Record:
    return replace(
        Record(id="charge-1", account=ANN, amount_credits=10, units=10, state=State.OPENED, opened_at=0.0), **changes
    )


def refunding(transaction_id: str, **changes: Any) -> Record:
    return record(
        state=State.REFUNDING, transaction_id=transaction_id, refund_credits=2, reason="failed items", **changes
    )


async def deducted(credits_: HttpCredits) -> str:
    answer = await credits_.deduct(record())
    assert isinstance(answer, Deducted)
    return answer.transaction_id


# void-undoes


@pytest.mark.parametrize("kind", [broken.NoVoids, broken.NoVoids405, broken.NoVoids501])
async def test_without_voids_the_deduction_is_sent_again_and_refunded(kind: type[Service], tmp_path: Path) -> None:
    """Under its key, so that nothing is taken twice."""
    service = kind(tmp_path)
    await granted(service, 100)
    assert await request(tmp_path, http(Lossy(service, reply="/v1/deductions"))) == 503
    kinds = [entry["kind"] for entry in (await service.ledger.transactions("acme")).items]
    assert kinds == ["refund", "deduction", "grant"]
    assert await held(service) == 100
    await service.ledger.close()


# tombstone


@pytest.mark.parametrize(("contract", "left"), [(Contract(), 90), (Voidless(), 100)])
async def test_without_tombstones_a_contract_without_voids_is_safe(
    contract: Contract, left: int, tmp_path: Path
) -> None:
    """With voids that are believed, a late copy takes credits for good; without them it is a replay."""
    service = broken.NoTombstones(tmp_path)
    await granted(service, 100)
    network = Lossy(service, request="/v1/deductions")
    assert await request(tmp_path, http(network, contract=contract)) == 503
    await network.deliver_late()
    assert await held(service) == left
    await service.ledger.close()


# declines-remembered


@pytest.mark.parametrize(("contract", "left"), [(Contract(), 90), (Forgetful(), 100)])
async def test_where_declines_are_forgotten_a_contract_that_says_so_is_safe(
    contract: Contract, left: int, tmp_path: Path
) -> None:
    """The decline is then followed by a void, so that a copy after the top-up takes nothing."""
    service = broken.ForgetsDeclines(tmp_path)
    credits_ = http(service, contract=contract)
    assert await request(tmp_path, credits_) == 402
    assert ("POST /v1/voids" in service.calls) is isinstance(contract, Forgetful)
    await granted(service, 100)
    (key,) = service._declined
    body = {"tenant_id": "acme", "user_id": "ann", "amount": 10}
    copy = httpx.Request("POST", "http://credits/v1/deductions", json=body, headers=headers(key))
    await service.handle_async_request(copy)
    assert await held(service) == left
    await service.ledger.close()


def headers(key: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {APP}", "Idempotency-Key": key}


# void-before-arrival


class RefusesUnknownVoids(broken.VoidsOnlyWhatItKnows):
    name = "not-found"


async def test_void_of_an_unknown_key_is_no_void_or_a_dispute(tmp_path: Path) -> None:
    """As a problem it is a refusal; without one, the service has no voids."""
    service, other = broken.VoidsOnlyWhatItKnows(tmp_path), RefusesUnknownVoids(tmp_path / "other")
    (tmp_path / "other").mkdir()
    assert await http(service).void(record(state=State.VOIDING)) == NoVoid()
    assert isinstance(await http(other).void(record(state=State.VOIDING)), Refused)
    await service.ledger.close()
    await other.ledger.close()


# deduct-once, replay-same-answer, refund-once, and replay-when-spent without voids: what makes them fatal


async def test_double_charging_service_takes_twice_when_an_answer_is_lost(tmp_path: Path) -> None:
    """The library repeats the deduction, and cannot know."""
    service = broken.ChargesOnReplay(tmp_path)
    await granted(service, 100)
    assert await request(tmp_path, http(Lossy(service, reply="/v1/deductions"), attempts=3)) == 200
    assert await held(service) == 80
    await service.ledger.close()


async def test_new_transaction_per_replay_loses_the_refund(tmp_path: Path) -> None:
    """It goes to a transaction that there is not."""
    service = broken.NewTransactionPerReplay(tmp_path)
    await granted(service, 100)
    transaction = await deducted(http(Lossy(service, reply="/v1/deductions"), attempts=3))
    assert isinstance(await http(service).refund(refunding(transaction)), Refused)
    assert await held(service) == 90
    await service.ledger.close()


@pytest.mark.parametrize(
    ("kind", "left"), [(broken.LooksAtTheBalanceFirst, 10), (broken.LooksAtTheBalanceFirstAndHasNoVoids, 0)]
)
async def test_balance_before_the_key_loses_the_last_credits_where_there_are_no_voids(
    kind: type[Service], left: int, tmp_path: Path
) -> None:
    """The deduction was done, its answer is lost, and each replay is declined: too few are left."""
    service = kind(tmp_path)
    await granted(service, 10)
    assert await request(tmp_path, http(Lossy(service, reply="/v1/deductions"), attempts=3)) == 503
    assert await held(service) == left
    await service.ledger.close()


async def test_refund_on_replay_makes_credits_when_an_answer_is_lost(tmp_path: Path) -> None:
    """The library repeats the refund until it is confirmed."""
    service = broken.RefundsOnReplay(tmp_path)
    await granted(service, 100)
    due = refunding(await deducted(http(service)))
    credits_ = http(Lossy(service, reply="/refunds"))
    assert isinstance(await credits_.refund(due), Unanswered)
    assert isinstance(await credits_.refund(due), Refunded)
    assert await held(service) == 94
    await service.ledger.close()


# Forms.


async def test_without_batches_calls_are_single(tmp_path: Path) -> None:
    """And nothing is missed."""
    service = broken.NoBatch(tmp_path)
    await granted(service, 100)
    assert await request(tmp_path, http(service)) == 200
    assert await held(service) == 90
    await service.ledger.close()


async def test_decline_without_a_word_is_402_and_a_void(tmp_path: Path) -> None:
    """The client hears it, without figures; the void makes sure."""
    service = broken.DeclinesWithoutAWord(tmp_path)
    assert await http(service).deduct(record()) == Declined(None, certain=False)
    assert await request(tmp_path, http(service)) == 402
    assert "POST /v1/voids" in service.calls
    await service.ledger.close()


async def test_decline_by_400_is_500_and_a_void(tmp_path: Path) -> None:
    """Only 402 is a decline."""
    service = broken.DeclinesBy400(tmp_path)
    assert await request(tmp_path, http(service)) == 500
    assert "POST /v1/voids" in service.calls
    await service.ledger.close()


@pytest.mark.parametrize(("kind", "answer"), [(Service, Refused), (broken.NamelessNotFound, Unanswered)])
async def test_refusal_without_a_name_is_asked_again(kind: type[Service], answer: type, tmp_path: Path) -> None:
    """Only a problem of this API is a dispute."""
    service = kind(tmp_path)
    assert isinstance(await http(service).refund(refunding("nope")), answer)
    await service.ledger.close()


async def test_second_refund_that_is_refused_is_asked_again(tmp_path: Path) -> None:
    """Where the first answer was lost, it is not known to be done."""
    service = broken.RefusesSecondRefund(tmp_path)
    await granted(service, 100)
    due = refunding(await deducted(http(service)))
    credits_ = http(Lossy(service, reply="/refunds"))
    for _ in range(2):
        assert isinstance(await credits_.refund(due), Unanswered)
    assert await held(service) == 92
    await service.ledger.close()


async def test_refund_whose_items_are_refused_goes_back_without_them(tmp_path: Path) -> None:
    """Through the whole library: the credits come back, unnamed."""
    service = broken.AsciiOnly(tmp_path)
    await granted(service, 100)
    app = FastAPI()
    app.add_middleware(
        MeteredBillingMiddleware, credits=http(service), journal=tmp_path / "journal", account=lambda: ANN
    )

    @app.post("/work")
    @metered(cost=lambda: {"Zoë": 10}, outcomes="$[*]")
    async def work() -> list[dict[str, str]]:
        return [{"id": "Zoë", "status": "failed"}]

    async with serving(app) as client:
        assert (await client.post("/work")).status_code == 200
        await settled()
    newest = (await service.ledger.transactions("acme")).items[0]
    assert (newest["kind"], newest["amount"], newest["items"]) == ("refund", 10, [])
    assert await held(service) == 100
    await service.ledger.close()


async def test_key_reused_is_no_answer_to_a_deduction(tmp_path: Path) -> None:
    """With or without the problem's name: our bug, 500."""
    for number, kind in enumerate((Service, broken.NamelessKeyReused)):
        directory = tmp_path / str(number)
        directory.mkdir()
        service = kind(directory)
        await granted(service, 100)
        await deducted(http(service))
        answer = await http(service).deduct(record(amount_credits=11, units=11))
        assert isinstance(answer, Unknown)
        assert answer.misconfigured
        await service.ledger.close()
