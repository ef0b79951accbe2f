"""The checks against services that break one promise each: it is seen, by the check that is meant for it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from metered_billing.conformance import CHECKS, CannotCheck, Report, Verdict, check_service
from metered_billing.ledger import Grant

from . import broken
from .broken import ACME, ADMIN, APP, Service

pytestmark = pytest.mark.no_cover


async def report(service: Service, **options: Any) -> Report:
    given = {"token": APP, "admin_token": ADMIN, "foreign_token": ACME, "timeout_s": 5.0, **options}
    try:
        return await check_service("http://credits", transport=service, **given)
    finally:
        await service.ledger.close()


def names(report: Report) -> set[str]:
    return {result.check.name for result in report.broken}


UNUSABLE = {
    broken.ChargesOnReplay: "deduct-once",
    broken.NewTransactionPerReplay: "replay-same-answer",
    broken.LooksAtTheBalanceFirstAndHasNoVoids: "replay-when-spent",
    broken.ForgetsKeys: "deduct-once",
    broken.TakesOtherPayloadForReplay: "key-reused",
    broken.RacesOnCopies: "concurrent-copies",
    broken.ConfirmsWhatIsDeclined: "declined-takes-nothing",
    broken.Overdraws: "never-overdrawn",
    broken.FallsBackToThePool: "pool-and-users-apart",
    broken.RefundsOnReplay: "refund-once",
    broken.RefundsToThePool: "refund-once",
    broken.RefundsTooMuch: "refund-never-exceeds",
    broken.ConfirmsUnknownRefunds: "refund-of-unknown",
    broken.ForgetsKeysOfWhatIsUndone: "late-copy-after-refund",
    broken.SharesKeysAcrossTenants: "keys-per-tenant",
    broken.TakesNegativeAmounts: "amounts-validated",
    broken.AsksNoToken: "token-needed",
    broken.LetsForeignersIn: "foreign-token-refused",
    broken.VoidsGiveTwice: "void-again",
    broken.NoTombstones: "tombstone",
    broken.RefundsWhatIsVoided: "refund-after-void",
    broken.BatchInAnyOrder: "batch-order",
    broken.BatchHasKeysOfItsOwn: "batch-same-keys",
    broken.ChokesOnTraces: "traceparent",
}

LIMITED = {
    broken.LooksAtTheBalanceFirst: "replay-when-spent",
    broken.NoVoids: "void-undoes",
    broken.NoVoids405: "void-undoes",
    broken.NoVoids501: "void-undoes",
    broken.VoidsOnlyWhatItKnows: "void-before-arrival",
    broken.VoidsForgetPartialRefunds: "void-after-partial-refund",
    broken.VoidsForAnybody: "void-of-others",
    broken.ForgetsDeclines: "declines-remembered",
    broken.VoidsTellNothingTheSecondTime: "void-same-answer",
    broken.NoBatch: "batch",
    broken.BatchAllOrNothing: "batch-stands-alone",
    broken.BatchOfDeductionsOnly: "batch-all-operations",
    broken.BatchHidesReplays: "batch-says-replayed",
    broken.BatchWithoutEnd: "batch-bounded",
    broken.BatchTakesAnything: "batch-malformed",
    broken.NoList: "find-by-key",
    broken.OldestFirst: "pages",
    broken.PagesWithoutCursor: "pages",
    broken.HidesRefunds: "transaction-with-refunds",
    broken.TellsWrongBalances: "balance-told",
    broken.DeclinesWithoutAWord: "decline-says-why",
    broken.NumbersItsUsers: "deduction-names-account",
    broken.HidesReplays: "replay-says-so",
    broken.NamelessUnauthorized: "problem-unauthorized",
    broken.NamelessNotFound: "problem-not-found",
    broken.NamelessKeyReused: "problem-idempotency-key-reused",
    broken.NamelessRefundExceeds: "problem-refund-exceeds-deduction",
    broken.NamelessVoided: "problem-charge-voided",
    broken.NamelessInvalid: "problem-invalid-request",
    broken.IgnoresWhatItDoesNotKnow: "unknown-field-refused",
    broken.QuotesBelongToTheKey: "long-and-quoted-keys",
    broken.AsciiOnly: "any-language",
    broken.SmallRefundsOnly: "large-refund",
    broken.TakesAnySize: "body-bounded",
    broken.NoHealth: "healthz",
    broken.ChokesOnOddTraces: "odd-traceparent",
    broken.RefusesSecondRefund: "refund-replay",
    broken.CrashesOnOddAmounts: "problem-invalid-request",
    broken.DeclinesBy400: "decline-says-why",
    broken.HtmlErrors: "decline-says-why",
}


KINDS = UNUSABLE | LIMITED


@pytest.mark.parametrize(("kind", "name"), KINDS.items(), ids=[kind.__name__ for kind in KINDS])
async def test_breakage_is_seen_by_its_check(kind: type[Service], name: str, tmp_path: Path) -> None:
    """And counts for as much as it costs."""
    seen = await report(kind(tmp_path), checks=[check for check in CHECKS if check.name == name])
    assert names(seen) == {name}
    assert seen.verdict is (Verdict.UNUSABLE if kind in UNUSABLE else Verdict.LIMITED)


def test_every_check_has_a_service_that_breaks_it() -> None:
    """A check that nothing fails proves nothing."""
    seen_elsewhere = {"concurrent-refunds", "late-copy-after-void", "void-of-declined"}
    assert {check.name for check in CHECKS} - seen_elsewhere == set(KINDS.values())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (broken.RefundsOnReplay, "concurrent-refunds"),
        (broken.ForgetsKeysOfWhatIsUndone, "late-copy-after-void"),
        (broken.VoidsOnlyWhatItKnows, "void-of-declined"),
    ],
)
async def test_breakage_is_seen_by_another_check_too(kind: type[Service], name: str, tmp_path: Path) -> None:
    """Those that come second."""
    seen = await report(kind(tmp_path), checks=[check for check in CHECKS if check.name == name])
    assert names(seen) == {name}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        broken.NoVoids,
        broken.VoidsOnlyWhatItKnows,
        broken.ForgetsDeclines,
        broken.NoBatch,
        broken.NoList,
        broken.AsciiOnly,
        broken.DeclinesBy400,
        broken.CrashesOnOddAmounts,
        broken.HtmlErrors,
    ],
)
async def test_service_with_limits_is_usable(kind: type[Service], tmp_path: Path) -> None:
    """No fatal check fails along with the one that is meant; and nothing is kept."""
    seen = await report(kind(tmp_path))
    assert LIMITED[kind] in names(seen)
    assert (seen.verdict, seen.exit_code, seen.kept) == (Verdict.LIMITED, 3, 0)


@pytest.mark.slow
async def test_service_without_voids_is_tried_for_the_rest(tmp_path: Path) -> None:
    """What needs a void is not called broken, nor kept."""
    seen = await report(broken.NoVoids(tmp_path))
    assert names(seen) == {"void-undoes"}
    untried = {result.check.name for result in seen.not_tried}
    assert {"void-again", "tombstone", "refund-after-void", "problem-charge-voided"} <= untried
    assert all("no voids" in result.came for result in seen.not_tried)


@pytest.mark.slow
async def test_service_that_double_charges_is_not_usable(tmp_path: Path) -> None:
    """One breakage hides no other, for the account is topped up: the whole list is looked through."""
    seen = await report(broken.ChargesOnReplay(tmp_path))
    assert (seen.verdict, seen.exit_code) == (Verdict.UNUSABLE, 1)
    assert seen.not_tried == []
    first = next(result for result in seen.broken if result.check.name == "deduct-once")
    assert "70 credits, which is 20 less" in first.came
    assert [exchange.status for exchange in first.exchanges if exchange.path == "/v1/deductions"] == [201, 200, 200]


@pytest.mark.slow
async def test_service_that_hangs_is_told_in_time(tmp_path: Path) -> None:
    """A check ends at its first silence, and after three of them the rest is not tried."""
    seen = await report(broken.HangsAfterAWhile(tmp_path), timeout_s=1.0)
    assert seen.verdict is Verdict.UNUSABLE
    assert "no answer within 1 s" in seen.broken[0].came
    assert len(seen.broken) == 3
    assert {result.came for result in seen.not_tried} == {"the service has stopped answering"}
    assert seen.kept is None


@pytest.mark.slow
async def test_service_that_hangs_on_one_call_is_tried_for_the_rest(tmp_path: Path) -> None:
    """Other checks go on; what was taken is given back by voids."""
    wanted = [check for check in CHECKS if check.name in ("refund-once", "deduct-once", "void-undoes")]
    seen = await report(broken.HangsOnRefunds(tmp_path), timeout_s=1.0, checks=wanted)
    assert names(seen) == {"refund-once"}
    assert seen.kept == 0


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (broken.NobodyThere, "no answer: ConnectError"),
        (broken.Trickles, "no answer within 0.3 s"),
        (broken.NoService, "without a balance"),
    ],
)
async def test_what_is_no_service_is_told(kind: type[Service], sentence: str, tmp_path: Path) -> None:
    """In a sentence, before anything is tried."""
    with pytest.raises(CannotCheck, match=sentence):
        await report(kind(tmp_path), timeout_s=0.3)


async def test_token_is_never_shown(tmp_path: Path) -> None:
    """Nor when the service quotes it."""
    wanted = [check for check in CHECKS if check.name in ("decline-says-why", "token-needed")]
    seen = await report(broken.EchoesTokens(tmp_path), checks=wanted)
    document = json.dumps(seen.to_json())
    assert "declined: Bearer (token)" in document
    assert not [secret for secret in (APP, ADMIN, ACME) if secret in document]


# The account.


async def test_conformant_service_is_called_so(tmp_path: Path) -> None:
    """Every check holds, and none is left out."""
    seen = await report(Service(tmp_path))
    assert [result.came for result in seen.broken + seen.not_tried] == []
    assert len(seen.results) == len(CHECKS)
    assert (seen.verdict, seen.exit_code, seen.kept) == (Verdict.CONFORMANT, 0, 0)


@pytest.mark.slow
async def test_account_of_ones_own_is_given_everything_back(tmp_path: Path) -> None:
    """No grant, no other account, and the balance is what it was."""
    service = Service(tmp_path)
    await granted(service, "acme", 150)
    await granted(service, "others", 150)
    seen = await check_service("http://credits", token=ACME, tenant_id="acme", transport=service)
    assert names(seen) == set()
    assert (seen.verdict, seen.kept, seen.account) == (Verdict.CONFORMANT, 0, "acme (shared pool)")
    assert [result.check.name for result in seen.not_tried] == ["keys-per-tenant"]
    assert await service.ledger.balance("acme", None) == 150
    assert "POST /v1/grants" not in service.calls
    assert len((await service.ledger.transactions("others")).items) == 1
    await service.ledger.close()


@pytest.mark.slow
async def test_tenant_with_an_admin_token_gets_a_user_for_the_checks(tmp_path: Path) -> None:
    """So that a token for one tenant can be tried, and the tenant's own credits stay out of it."""
    service = Service(tmp_path)
    await granted(service, "acme", 7)
    seen = await report(service, token=ACME, tenant_id="acme", foreign_token=None)
    assert seen.verdict is Verdict.CONFORMANT
    assert seen.account.startswith("acme / conformance-")


async def granted(service: Service, tenant_id: str, amount: int) -> None:
    command = Grant(idempotency_key="g", tenant_id=tenant_id, amount=amount, reason="test")
    assert (await service.ledger.grant(command)).done


@pytest.mark.parametrize(
    ("held", "options", "sentence"),
    [
        (99, {"tenant_id": "acme"}, "holds 99 credits, and 100 are needed"),
        (10_001, {"tenant_id": "acme"}, "at most 10,000"),
        (100, {}, "give an admin token, or a tenant"),
        (100, {"user_id": "ann", "admin_token": ADMIN}, "a user belongs to a tenant"),
        (100, {"tenant_id": "acme", "token": "nonsense"}, "401 unauthorized"),
        (100, {"admin_token": "nonsense"}, "401 unauthorized"),
        (100, {"admin_token": APP}, "403 forbidden"),
    ],
)
async def test_account_that_will_not_do_is_refused(
    held: int, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    """Before anything is taken."""
    service = Service(tmp_path)
    await granted(service, "acme", held)
    with pytest.raises(CannotCheck, match=sentence):
        await report(service, **{"admin_token": None, "foreign_token": None, **options})
    assert "POST /v1/deductions" not in service.calls


@pytest.mark.parametrize(
    "url",
    ["credits", "ftp://credits", "http://", "sqlite:///credits.db", "http://u:secret@credits", "http://credits?a=b"],
)
async def test_url_that_is_none_is_refused(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(CannotCheck, match="URL") as refused:
        await check_service(url, token=APP, admin_token=ADMIN)
    assert refused.value.asked_wrongly
    assert "secret" not in str(refused.value)


class NamesNobodyCanSend(Service):
    """Its transactions are called by what no URL and no JSON can carry."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if not broken.is_deduction(request) or not response.is_success:
            return response
        body = json.dumps({**response.json(), "transaction_id": "\ud800\n/.."})  # in ASCII, so that it can be sent
        return httpx.Response(response.status_code, content=body.encode())


async def test_transaction_that_cannot_be_named_is_broken(tmp_path: Path) -> None:
    """It is told, and is no end of the run."""
    wanted = [check for check in CHECKS if check.name in ("deduct-once", "refund-once", "healthz")]
    seen = await report(NamesNobodyCanSend(tmp_path), checks=wanted)
    assert names(seen) == {"deduct-once", "refund-once"}
    assert seen.kept == 0


async def test_service_below_a_path_is_reached_there(tmp_path: Path) -> None:
    """The URL may have a path in front of /v1."""
    service = broken.NobodyThere(tmp_path)
    with pytest.raises(CannotCheck):
        await check_service("http://credits/billing/", token=APP, admin_token=ADMIN, transport=service)
    assert service.calls == ["POST /billing/v1/grants"]


class KeepsWhatItTook(Service):
    """Confirms every void and refund, and gives nothing back."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if broken.is_void(request):
            return httpx.Response(200, json={"status": "voided", "refunded": 10})
        if broken.is_refund(request):
            return httpx.Response(201, json={"refund_id": "r", "amount": broken.sent(request)["amount"]})
        return await self.real(request)


async def test_credits_that_do_not_come_back_are_told(tmp_path: Path) -> None:
    """By number."""
    service = KeepsWhatItTook(tmp_path)
    await granted(service, "acme", 100)
    wanted = [check for check in CHECKS if check.name in ("deduct-once", "refund-once")]
    seen = await report(service, token=ACME, admin_token=None, tenant_id="acme", checks=wanted)
    assert (seen.kept, seen.verdict) == (10, Verdict.UNKNOWN)
    assert [result.came for result in seen.not_tried] == ["the account holds 90 credits by now, and 100 are needed"]


async def test_checks_that_are_cut_off_give_back(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a check leaves nothing taken."""
    service = broken.HangsOnRefunds(tmp_path)
    await granted(service, "acme", 100)
    wanted = [check for check in CHECKS if check.name == "refund-once"]
    running = asyncio.create_task(
        check_service("http://credits", token=ACME, tenant_id="acme", transport=service, checks=wanted)
    )
    while not any(call.endswith("/refunds") for call in service.calls):
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await service.ledger.balance("acme", None) == 100
    await service.ledger.close()
