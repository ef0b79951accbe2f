"""A service of another shape, through a mapping: what it does well holds, and what either does badly is seen."""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered, settled
from metered_billing.charge import Declined, NotFound, Refunded, Refused, Unknown, Voided
from metered_billing.conformance import CannotCheck, Report, Verdict, check_service, checks_of, promises, what_happens
from metered_billing.credits.contract import Call, Contract, Record, RefundAnswer, Reply
from metered_billing.ledger import Grant
from tests.stand import serving

from .broken import APP, LooksAtTheBalanceFirst, Service

pytestmark = pytest.mark.no_cover

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

LACKS = {"void-undoes", "declines-remembered", "batch", "find-by-key"}
"""What the example's service and mapping have not."""


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's service, new."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("house_service", None)
    import house_service

    yield house_service
    sys.modules.pop("house_service", None)


@pytest.fixture
def mapping(house: ModuleType) -> type[Contract]:
    """The example's mapping."""
    from house_credits import HouseCredits

    return HouseCredits


async def report(house: ModuleType, contract: Contract, *names: str, **options: Any) -> Report:
    wanted = [check for check in checks_of(contract) if not names or check.name in names]
    transport = options.pop("transport", None) or httpx.ASGITransport(house.app)
    given = {"token": "house-secret", "tenant_id": "acme", **options}
    return await check_service("http://house", contract=contract, checks=wanted, transport=transport, **given)


def broken(report: Report) -> set[str]:
    return {result.check.name for result in report.broken}


async def test_house_service_is_usable_with_limits(house: ModuleType, mapping: type[Contract]) -> None:
    """What it does not have is named, and nothing else."""
    seen = await report(house, mapping())
    assert broken(seen) == LACKS
    assert (seen.verdict, seen.not_tried) == (Verdict.LIMITED, [])
    holds = {number: words for number, _, words in promises(seen)}
    assert holds[4] == "with limits: void-undoes, declines-remembered, find-by-key"
    assert [holds[number] for number in (1, 2, 3, 8)] == ["yes"] * 4
    happens = dict(what_happens(seen))
    assert not [result.came for result in seen.broken if "remembered this one" in result.came]
    assert "once more after 5 minutes" in happens["no answer to a deduction"]
    assert "402" in happens["too few credits"]


async def test_credits_api_as_a_mapping_holds(tmp_path: Path) -> None:
    """The reference service, asked through the credits API's own contract: nothing is lost on the way."""
    service = Service(tmp_path)
    await service.ledger.grant(Grant(idempotency_key="g", tenant_id="acme", user_id=None, amount=100, reason="test"))
    seen = await report(sys, Contract(), token=APP, transport=service)
    await service.ledger.close()
    assert broken(seen) == set()
    assert [result.check.name for result in seen.not_tried] == ["batch"]
    assert (seen.verdict, seen.kept) == (Verdict.CONFORMANT, 0)
    assert len(seen.results) == 38


async def test_without_keys_it_is_not_usable(
    house: ModuleType, mapping: type[Contract], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that takes a deduction as often as it comes: customers would pay twice."""

    class Keyless(mapping):  # type: ignore[misc, valid-type]
        def deduction(self, record: Record) -> Call:
            self.number = getattr(self, "number", 0) + 1
            call: Call = super().deduction(record)
            return Call(call.method, call.path, {**(call.body or {}), "reference": str(self.number)})

    seen = await report(house, Keyless(), "deduct-once", "concurrent-copies")
    assert (broken(seen), seen.verdict) == ({"deduct-once", "concurrent-copies"}, Verdict.UNUSABLE)
    assert {number: words for number, _, words in promises(seen)}[3] == "no: deduct-once, concurrent-copies"


@pytest.mark.parametrize(("listed", "verdict"), [(False, Verdict.UNUSABLE), (True, Verdict.LIMITED)])
async def test_balance_before_the_key_is_not_usable_without_voids_and_list(
    listed: bool, verdict: Verdict, tmp_path: Path
) -> None:
    """A list would show what the replay hides."""

    class Voidless(Contract):
        remembers_declines = False

        def void(self, record: Record) -> None:
            return None

        def transactions(self, tenant_id: str, user_id: str | None, cursor: str | None, limit: int) -> Call | None:
            return super().transactions(tenant_id, user_id, cursor, limit) if listed else None

    service = LooksAtTheBalanceFirst(tmp_path)
    await service.ledger.grant(Grant(idempotency_key="g", tenant_id="acme", user_id=None, amount=100, reason="test"))
    seen = await report(sys, Voidless(), "replay-when-spent", token=APP, transport=service)
    await service.ledger.close()
    assert (broken(seen), seen.verdict, seen.kept) == ({"replay-when-spent"}, verdict, 0)


def in_path(account: Account) -> str:
    return f"/wallets/{account.user_id}"


def quoted(account: Account) -> str:
    return f"/wallets/{quote(account.user_id or '', safe='')}"


def refused(account: Account) -> str:
    if "/" in (account.user_id or ""):
        raise ValueError("no such user")
    return in_path(account)


def looked_up(account: Account) -> str:
    return {"ann": "/wallets/7"}[account.user_id or ""]


@pytest.mark.parametrize(
    ("path", "outcome"), [(in_path, "broken"), (quoted, "held"), (refused, "held"), (looked_up, "not tried")]
)
async def test_ids_that_are_not_quoted_are_seen(
    house: ModuleType, mapping: type[Contract], path: Any, outcome: str
) -> None:
    """A user who is called `ann/charges?` would pay with the credits of ann."""

    class InPaths(mapping):  # type: ignore[misc, valid-type]
        def deduction(self, record: Record) -> Call:
            return Call("POST", path(record.account))

    seen = await report(house, InPaths(), "ids-quoted")
    assert [result.outcome for result in seen.results] == [outcome]
    if outcome == "broken":
        assert seen.verdict is Verdict.UNUSABLE
        assert "for the user user/%41?# is /wallets/user/%41?#" in seen.broken[0].came


async def test_unknown_transaction_is_a_number_where_transactions_are(
    house: ModuleType, mapping: type[Contract]
) -> None:
    """A service whose ids are numbers answers anything else with an error of its framework's."""

    class Numbered(mapping):  # type: ignore[misc, valid-type]
        def read_deduction(self, record: Record, reply: Reply) -> Any:
            answer = super().read_deduction(record, reply)
            return replace(answer, transaction_id=answer.transaction_id.removeprefix("tx-"))

        def refund(self, record: Record) -> Call:
            asked.append(record.transaction_id)
            call: Call = super().refund(record)
            return replace(call, body={**(call.body or {}), "transactionId": f"tx-{int(record.transaction_id or 0)}"})

    asked: list[str | None] = []
    seen = await report(house, Numbered(), "refund-of-unknown", "problem-not-found")
    assert (broken(seen), seen.kept) == (set(), 0)
    assert asked == ["2147483647", "1", "2147483647", "2"]


async def test_refunds_as_often_as_asked_are_not_usable(house: ModuleType, mapping: type[Contract]) -> None:
    """Credits would be made out of nothing."""

    class Forgets(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return None

    house.refunds = Forgets()  # type: ignore[attr-defined]
    seen = await report(house, mapping(), "refund-once", "concurrent-refunds", "refund-never-exceeds")
    assert broken(seen) == {"refund-once", "concurrent-refunds", "refund-never-exceeds"}
    assert seen.verdict is Verdict.UNUSABLE


class NoRefunds:
    """Of a mapping: refunds go to a path that there is not."""

    def refund(self, record: Record) -> Call:
        return Call("POST", "/nowhere", {})


async def test_service_that_gives_nothing_back_is_not_usable(house: ModuleType, mapping: type[Contract]) -> None:
    """And that is seen before all that the account holds is taken."""
    seen = await report(house, type("Keeps", (NoRefunds, mapping), {})())
    assert (broken(seen), seen.verdict, seen.exit_code) == ({"refund-once"}, Verdict.UNUSABLE, 1)
    assert (seen.kept, house.held["acme", None]) == (20, 980)
    assert {result.came for result in seen.prevented} == {"nothing that was taken came back"}
    assert len(seen.prevented) == len(seen.results) - 2


async def test_account_that_runs_short_leaves_it_unknown(house: ModuleType, mapping: type[Contract]) -> None:
    """What is refunded once a transaction eats it up: of what was not tried nothing is promised."""
    house.held["acme", None] = 110
    seen = await report(house, mapping(), "refund-once", "concurrent-refunds", "refund-of-unknown", "find-by-key")
    assert (seen.verdict, seen.exit_code) == (Verdict.UNKNOWN, 1)
    assert [result.check.name for result in seen.prevented] == ["refund-of-unknown", "find-by-key"]
    assert {number: words for number, _, words in promises(seen)}[4] == "not known: 2 of 2 not tried"
    assert dict(what_happens(seen)) == {}


async def test_answers_of_proxies_are_no_answers(house: ModuleType, mapping: type[Contract]) -> None:
    """Read as the service's, they lose credits, or send a person after nothing."""

    class Declines(mapping):  # type: ignore[misc, valid-type]
        def read_deduction(self, record: Record, reply: Reply) -> Any:
            return Declined() if 400 <= reply.status < 500 else super().read_deduction(record, reply)

    class Believes(mapping):  # type: ignore[misc, valid-type]
        def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
            return Refunded() if reply.status < 504 else super().read_refund(record, reply)

    class Disputes(mapping):  # type: ignore[misc, valid-type]
        def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
            return Refused("no") if reply.status == 404 else super().read_refund(record, reply)

    class Chokes(mapping):  # type: ignore[misc, valid-type]
        def read_deduction(self, record: Record, reply: Reply) -> Any:
            return reply.body["error"] and None

    class Voids(Declines):
        def void(self, record: Record) -> Call:
            return Call("POST", "/voids")

        def read_void(self, record: Record, reply: Reply) -> Any:
            return Voided()

        read_deduction = mapping.read_deduction

    for slip, verdict, came in (
        (Declines, Verdict.UNUSABLE, "HTTP 400 to a deduction, without JSON, is read as Declined"),
        (Believes, Verdict.UNUSABLE, "HTTP 400 to a refund, without JSON, is read as Refunded"),
        (Disputes, Verdict.LIMITED, "HTTP 404 to a refund, without JSON, is read as Refused"),
        (Voids, Verdict.UNUSABLE, "HTTP 400 to a void, without JSON, is read as Voided"),
        (Chokes, Verdict.LIMITED, "the mapping raised TypeError"),
    ):
        seen = await report(house, slip(), "proxy-answers")
        assert [result.came[: len(came)] for result in seen.results] == [came]
        assert seen.verdict is verdict
    assert "(in read_deduction, line" in seen.broken[0].came
    assert "the mapping's, not the service's" in seen.broken[0].check.without


@pytest.mark.parametrize(
    ("balance", "sentence"),
    [(1000.0, "read 1000.0 for a balance"), (None, "/balance.* HTTP 200, and `read_balance` made no balance")],
)
async def test_balance_that_is_none_is_told(
    house: ModuleType, mapping: type[Contract], balance: Any, sentence: str
) -> None:
    """Before anything is taken, and by the name of what has to be mended."""
    said = type("Odd", (mapping,), {"read_balance": lambda self, reply: balance})()
    with pytest.raises(CannotCheck, match=sentence):
        await report(house, said)


async def test_what_the_mapping_gets_wrong(house: ModuleType, mapping: type[Contract]) -> None:
    """Each slip is seen by the check that is meant for it."""

    class Remembers(mapping):  # type: ignore[misc, valid-type]
        remembers_declines = True

    class RefusesReplays(mapping):  # type: ignore[misc, valid-type]
        def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
            return Refused("no") if reply.status == 409 else super().read_refund(record, reply)

    class PatientWithStrangers(mapping):  # type: ignore[misc, valid-type]
        def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
            return (
                Contract.read_refund(self, record, reply) if reply.status == 404 else super().read_refund(record, reply)
            )

    class NoDeclines(mapping):  # type: ignore[misc, valid-type]
        def read_deduction(self, record: Record, reply: Reply) -> Any:
            return Unknown("no") if reply.status == 409 else super().read_deduction(record, reply)

    class NoBalance(mapping):  # type: ignore[misc, valid-type]
        def read_deduction(self, record: Record, reply: Reply) -> Any:
            answer = super().read_deduction(record, reply)
            return type(answer)(answer.transaction_id) if reply.status == 200 else answer

    class Raises(mapping):  # type: ignore[misc, valid-type]
        def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
            raise KeyError("refundId")

    for slip, name, verdict in (
        (Remembers, "declines-remembered", Verdict.UNUSABLE),
        (RefusesReplays, "refund-replay", Verdict.LIMITED),
        (PatientWithStrangers, "problem-not-found", Verdict.LIMITED),
        (NoDeclines, "decline-says-why", Verdict.LIMITED),
        (NoBalance, "balance-told", Verdict.LIMITED),
        (Raises, "refund-once", Verdict.UNUSABLE),
    ):
        house.held["acme", None] = 1000
        seen = await report(house, slip(), name)
        assert (broken(seen), seen.verdict) == ({name}, verdict), name
    assert "the mapping raised KeyError" in seen.broken[0].came


async def test_service_that_remembers_declines_is_found_out(tmp_path: Path) -> None:
    """A mapping that says otherwise costs each customer who is declined five minutes of doubt."""

    class Humble(Contract):
        remembers_declines = False

    service = Service(tmp_path)
    await service.ledger.grant(Grant(idempotency_key="g", tenant_id="acme", user_id=None, amount=100, reason="test"))
    seen = await report(sys, Humble(), "declines-remembered", token=APP, transport=service)
    await service.ledger.close()
    assert (seen.verdict, seen.kept) == (Verdict.LIMITED, 0)
    assert "the service remembered this one" in seen.broken[0].came


async def test_list_that_is_looked_in_badly_is_not_usable(tmp_path: Path) -> None:
    """Where the library would look in it: what it misses is closed though its credits are taken."""

    class Misses(Contract):
        remembers_declines = False

        def void(self, record: Record) -> None:
            return None

        def find(self, record: Record, page: Any) -> Any:
            return NotFound()

    service = Service(tmp_path)
    await service.ledger.grant(Grant(idempotency_key="g", tenant_id="acme", user_id=None, amount=100, reason="test"))
    seen = await report(sys, Misses(), "find-by-key", "pages", token=APP, transport=service)
    await service.ledger.close()
    assert (broken(seen), seen.verdict) == ({"find-by-key", "pages"}, Verdict.UNUSABLE)


@pytest.mark.parametrize("options", [{"tenant_id": None}, {"admin_token": "a"}])
async def test_account_must_be_given(house: ModuleType, mapping: type[Contract], options: dict[str, Any]) -> None:
    """A mapping grants nothing."""
    with pytest.raises(CannotCheck, match="a mapping cannot grant") as why:
        await report(house, mapping(), **options)
    assert why.value.asked_wrongly


async def test_mapping_that_cannot_be_asked_is_one_sentence(house: ModuleType) -> None:
    """It says what it raised."""

    class Raises(Contract):
        def balance(self, account: Any) -> Call:
            raise LookupError("no such account")

    with pytest.raises(CannotCheck, match="the mapping raised LookupError: no such account"):
        await report(house, Raises())


class Losing(httpx.AsyncBaseTransport):
    """Loses the answers to the first calls of a path, after they were done."""

    def __init__(self, house: ModuleType, path: str, count: int) -> None:
        self.calls: list[str] = []
        self._house, self._path, self._left = httpx.ASGITransport(house.app), path, count

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request.url.path.rpartition("/")[2])
        response = await self._house.handle_async_request(request)
        if request.url.path.endswith(self._path) and self._left:
            self._left -= 1
            raise httpx.ReadTimeout("nothing came", request=request)
        return response


@pytest.mark.parametrize(
    ("lost", "status", "left", "calls"),
    [
        ("nothing", 200, 996, ["deduct", "refund"]),
        ("refund", 200, 996, ["deduct", "refund", "refund"]),
        ("deduct", 503, 1000, ["deduct", "deduct", "refund"]),
    ],
)
async def test_served_app_pays_for_what_succeeded(
    house: ModuleType,
    mapping: type[Contract],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    status: int,
    left: int,
    calls: list[str],
) -> None:
    """Two texts of three, at 2 credits each; whatever answer is lost, nothing is taken or given back twice."""
    monkeypatch.setattr("metered_billing.settler.FIRST_BACKOFF_S", 0.01)
    transport = Losing(house, lost, 1)
    app = FastAPI()
    app.add_middleware(
        MeteredBillingMiddleware,
        credits=HttpCredits("http://house", token="house-secret", transport=transport, contract=mapping(), attempts=1),
        journal=tmp_path / "journal",
        account=lambda: Account("acme"),
    )

    @app.post("/translate")
    @metered(cost=3, price=2, outcomes="$.results[*]")
    async def translate() -> dict[str, list[bool]]:
        return {"results": [True, True, False]}

    async with serving(app) as client:
        assert (await client.post("/translate")).status_code == status
        async with asyncio.timeout(5):
            while len(transport.calls) < len(calls):
                await asyncio.sleep(0.02)
        await settled()
    assert (transport.calls, house.held["acme", None]) == (calls, left)
