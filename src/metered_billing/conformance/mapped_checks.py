"""The checks of a service behind a mapping: those that hold for any service, and what the mapping must read right.

What only the credits API itself has (its problems, batches, limits of fields) is left out.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from metered_billing.charge import (
    Account,
    Declined,
    Found,
    NoVoid,
    Refunded,
    Refused,
    State,
    Unanswered,
    Unknown,
)
from metered_billing.conformance.bench import Bench, Broken, Lost, NotTried
from metered_billing.conformance.checks import CHECKS, DO_NOT, Check
from metered_billing.conformance.checks.reading import declined, given, holds, not_done, taken, unknown_like
from metered_billing.conformance.checks.required import replay_when_spent
from metered_billing.conformance.mapped import MappedBench, as_read, lacks, mapped, record_of
from metered_billing.credits.contract import Contract, Reply

AS_THEY_ARE = {
    "deduct-once",
    "replay-same-answer",
    "replay-when-spent",
    "concurrent-copies",
    "declined-takes-nothing",
    "never-overdrawn",
    "refund-once",
    "concurrent-refunds",
    "refund-never-exceeds",
    "refund-of-unknown",
    "late-copy-after-refund",
    "keys-per-tenant",
    "token-needed",
    "foreign-token-refused",
    "void-again",
    "void-same-answer",
    "void-before-arrival",
    "tombstone",
    "void-of-declined",
    "void-after-partial-refund",
    "refund-after-void",
    "late-copy-after-void",
    "void-of-others",
    "large-refund",
    "traceparent",
}
"""Checks that ask nothing which a mapping could not build or read."""

_THERE_ARE_NONE = "the mapping has none"


def checks_of(contract: Contract) -> list[Check]:
    """What a service is held to through this contract, in the order of the credits API's own checks."""
    other = {changed.name: changed for changed in _others(contract)}
    without = {"voids"} & lacks(contract)
    found = []
    for check in CHECKS:
        if check.name in other:
            found.append(other[check.name])
        elif check.name in AS_THEY_ARE and check.group not in without:
            found.append(check)
        if check.name == "pool-and-users-apart":
            found += [_IDS_QUOTED, _PROXY_ANSWERS]
    return found


def _others(contract: Contract) -> list[Check]:
    known = {check.name: check for check in CHECKS}
    missing = lacks(contract)
    remembers = contract.remembers_declines
    looked_in = "voids" in missing and not remembers and "transactions" not in missing
    missed = (
        "A deduction in doubt that is not found is taken for one that never was: the charge is closed though its "
        "credits are taken. A `transactions` that returns None is better."
    )
    forgotten = (
        "The mapping says that declines are remembered: set `remembers_declines = False`. As it is, a copy of a "
        "decline that arrives late takes credits, and nobody will know."
    )
    return [
        *(
            [
                replace(
                    known["replay-when-spent"],
                    without="Where an answer was lost, the library hears of too few credits: the client hears 503, and "
                    "the deduction is found in the list 5 minutes later, and refunded.",
                    run=_replay_when_spent,
                )
            ]
            if looked_in
            else []
        ),
        replace(
            known["key-reused"],
            fatal=False,
            without="Nothing: each of the library's keys is one charge's, always with the same payload. Whoever else "
            "uses a key twice is told that something was taken which was not.",
        ),
        replace(
            known["pool-and-users-apart"],
            fatal=False,
            without="Users of a tenant share its credits: name tenants alone, `Account(tenant_id)`.",
        ),
        replace(
            known["void-undoes"],
            without="A deduction without an answer is sent again and refunded, instead of voided: see below.",
            run=_no_voids if "voids" in missing else known["void-undoes"].run,
        ),
        replace(
            known["declines-remembered"],
            fatal=remembers,
            expected="it is declined again, and nothing is taken",
            without=DO_NOT + forgotten if remembers else "A decline is not the last word: see below.",
            run=_try_a_decline_again if remembers else _declines_forgotten,
        ),
        replace(known["batch"], without="The library makes single calls: nothing is lost but speed.", run=_batch),
        replace(
            known["find-by-key"],
            tried="the list of transactions after a deduction",
            expected="`find` finds the deduction under its key, and none under another",
            without="A deduction in doubt cannot be looked for: see below."
            if "transactions" in missing
            else DO_NOT + missed
            if looked_in
            else "Nothing the library does: with this mapping it does not look.",
            fatal=looked_in,
            run=_no_list if "transactions" in missing else _find_by_key,
        ),
        *(
            []
            if "transactions" in missing
            else [
                replace(
                    known["pages"],
                    tried="six deductions, the first of which is looked for in pages of two",
                    expected="it is found",
                    without=DO_NOT + missed if looked_in else "Nothing the library does: it does not look.",
                    fatal=looked_in,
                    run=_pages,
                )
            ]
        ),
        replace(
            known["balance-told"],
            without="The response header Credits-Balance, and the balance in a 402, say what the mapping reads: a "
            "wrong figure, or none where it reads none.",
        ),
        replace(
            known["decline-says-why"],
            expected="it is read as Declined, with the balance",
            without="Read as anything else, a customer with too few credits hears 500 or 503, and the charge is asked "
            "for again and again. Without a balance, the 402 has no figures.",
            run=_decline_is_read,
        ),
        replace(
            known["refund-replay"],
            expected="both are read as Refunded",
            without="Where the first answer was lost, a refund that is done is not known to be done: read as Refused, "
            "the charge ends as disputed; as Unanswered, it is asked for again without end.",
            run=_refund_replay_is_read,
        ),
        replace(
            known["problem-not-found"],
            expected="it is read as Refused",
            without="It is taken for a service that is unwell and asked again, ever more seldom, without end: the "
            "charge is never shown to a person as disputed.",
            run=_unknown_refund_is_refused,
        ),
        replace(
            known["any-language"],
            tried="a request id, metadata and a reason of 255 characters in several scripts",
            run=_any_language,
        ),
    ]


async def _replay_when_spent(bench: Bench) -> None:
    try:
        await replay_when_spent(bench)
    except Lost as what:
        raise Broken(str(what)) from None  # but for the list


@mapped
async def _no_voids(bench: MappedBench) -> None:
    raise Broken(_THERE_ARE_NONE)


@mapped
async def _batch(bench: MappedBench) -> None:
    if not bench.contract.batches:
        raise Broken(_THERE_ARE_NONE)
    raise NotTried("the batches of a mapping are not tried")


async def _try_a_decline_again(bench: Bench) -> None:
    key, amount = await declined(bench)
    before = await bench.balance()
    again = await bench.deduct(amount, key)
    await holds(bench, before)
    not_done(again, "the deduction, when there was enough,")


async def _declines_forgotten(bench: Bench) -> None:
    said = "the mapping says that they are forgotten: `remembers_declines = False`"
    try:
        await _try_a_decline_again(bench)
    except Broken:
        raise Broken(said) from None
    raise Broken(f"{said}, and the service remembered this one: if it always does, say True, and a decline is the end")


@mapped
async def _no_list(bench: MappedBench) -> None:
    raise Broken(_THERE_ARE_NONE)


@mapped
async def _find_by_key(bench: MappedBench) -> None:
    key = bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    found = await bench.find(key)
    if found != Found(transaction):
        raise Broken(f"the deduction {transaction!r} was looked for, and the answer was {found}")
    other = await bench.find(bench.new_key())
    if isinstance(other, Found | Unanswered):
        raise Broken(f"what there is not was looked for, and the answer was {other}")


@mapped
async def _pages(bench: MappedBench) -> None:
    key = bench.new_key()
    transaction = taken(await bench.deduct(1, key), 1)
    for _ in range(5):
        taken(await bench.deduct(1, bench.new_key()), 1)
    found = await bench.find(key, 2)
    if found != Found(transaction):
        raise Broken(f"the answer was {found}")


@mapped
async def _decline_is_read(bench: MappedBench) -> None:
    held = await bench.balance()
    told = await bench.deduct(held + 1, bench.new_key())
    if not isinstance(told.answer, Declined):
        raise Broken(f"it was answered {told}")
    if told.answer.balance != held:
        raise Broken(f"a balance of {told.answer.balance} was read, and the account holds {held}")


@mapped
async def _refund_replay_is_read(bench: MappedBench) -> None:
    transaction, key = taken(await bench.deduct(10, bench.new_key()), 10), bench.new_key()
    given(await bench.refund(transaction, 2, key), 2)
    again = await bench.refund(transaction, 2, key)
    if not isinstance(again.answer, Refunded):
        raise Broken(f"the second was answered {again}")


@mapped
async def _unknown_refund_is_refused(bench: MappedBench) -> None:
    transaction = taken(await bench.deduct(1, bench.new_key()), 1)
    told = await bench.refund(unknown_like(transaction), 1, bench.new_key())
    if not isinstance(told.answer, Refused):
        raise Broken(f"it was answered {told}")


@mapped
async def _any_language(bench: MappedBench) -> None:
    before, long = await bench.balance(), ("Zoë 東京 ✂ 👩‍🔬 العربية / %2F ?&#; " * 9)[:255]
    transaction = taken(await bench.deduct(10, bench.new_key(), request_id=long, metadata={"größe": long}), 10)
    given(await bench.refund(transaction, 2, bench.new_key(), reason=long, items=[long]), 2)
    await holds(bench, before - 8)


@mapped
async def _ids_are_quoted(bench: MappedBench) -> None:
    usual, odd = (Account(f"tenant{more}", f"user{more}") for more in ("", "/%41?#"))
    deduction = partial(record_of, key="key", amount=1, fields={})
    for what, ask in (
        ("deduction", lambda account: bench.contract.deduction(deduction(account))),
        ("balance", bench.contract.balance),
    ):
        try:
            known = as_read(partial(ask, usual)).path
        except Broken as why:
            raise NotTried(f"for an account that there is not, {why}") from None
        try:
            path = as_read(partial(ask, odd)).path
        except Broken:
            continue  # such ids are refused
        if any(path.count(mark) > known.count(mark) for mark in ("/", "%41", "?", "#")):
            raise Broken(f"the path of a {what} for the user {odd.user_id} is {path}")


@mapped
async def _proxies_are_not_believed(bench: MappedBench) -> None:
    deduction = record_of(bench.account, bench.new_key(), 10, {})
    refund = replace(deduction, state=State.REFUNDING, transaction_id="1", refund_credits=2, reason="failed items")
    void = replace(deduction, state=State.VOIDING)
    asked: list[tuple[str, Callable[[Reply], object]]] = [
        ("deduction", partial(bench.contract.read_deduction, deduction)),
        ("refund", partial(bench.contract.read_refund, refund)),
    ]
    if "voids" not in bench.lacks:
        asked.append(("void", partial(bench.contract.read_void, void)))
    for what, read in asked:
        for status in PROXY_STATUSES:
            for body in (None, {"message": "no"}):
                answer = as_read(partial(read, Reply(status, {}, body)))
                if not isinstance(answer, Unknown | Unanswered | NoVoid):
                    # What is refused is shown to a person; the others are believed.
                    kind = Broken if isinstance(answer, Refused) else Lost
                    words = "without JSON" if body is None else "with JSON that is not the service's"
                    raise kind(f"HTTP {status} to a {what}, {words}, is read as {type(answer).__name__}")


PROXY_STATUSES = (400, 401, 403, 404, 429, 500, 502, 503, 504)
"""What a proxy, a gateway or a deployment answers in place of the service."""

_PROXY_ANSWERS = Check(
    "proxy-answers",
    "required",
    4,
    False,
    tried="answers that are not the service's but a proxy's, read without sending anything: "
    + ", ".join(str(status) for status in PROXY_STATUSES),
    expected="none is an answer: a deduction is Unknown, a refund or void Unanswered, as `super()` says",
    without="What passes is taken for the service's last word. Read as done or as declined, credits are lost, or a "
    "route runs that nobody paid for; read as refused, each such moment leaves a charge for a person.",
    run=_proxies_are_not_believed,
)
"""Of mappings alone, likewise: with the credits API the library reads them itself."""

_IDS_QUOTED = Check(
    "ids-quoted",
    "required",
    8,
    True,
    tried="calls for a tenant and a user whose ids contain /, %, ? and #, without sending them",
    expected='where the path has an id, it is quoted: `urllib.parse.quote(id, safe="")`',
    without=DO_NOT + "Whoever is called `ann/` and so on would pay with the credits of `ann`.",
    run=_ids_are_quoted,
)
"""Of mappings alone: the credits API has no ids of accounts in its paths."""
