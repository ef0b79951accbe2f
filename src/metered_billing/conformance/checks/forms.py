"""Saying it as the credits API does."""

from dataclasses import replace
from uuid import uuid4

from metered_billing.charge import Account, Deducted, Record
from metered_billing.conformance.bench import Bench, Broken, number
from metered_billing.conformance.checks.check import check
from metered_billing.conformance.checks.reading import NO_AMOUNTS, given, holds, need_voids, problem, refused, taken
from metered_billing.credits.contract import Contract


@check(
    "balance-told",
    "forms",
    2,
    tried="the `balance` of a deduction, a refund and a decline, next to GET /v1/balance",
    expected="they are the same",
    without="The response header Credits-Balance, and the balance in a 402, say what the service said: a wrong figure.",
)
async def balance_told(bench: Bench) -> None:
    deduction = await bench.deduct(10, bench.new_key())
    transaction = taken(deduction, 10)
    _same(number(deduction, "balance"), await bench.balance(), "the deduction")
    refund = await bench.refund(transaction, 4, bench.new_key())
    given(refund, 4)
    held = await bench.balance()
    _same(number(refund, "balance"), held, "the refund")
    decline = await bench.deduct(held + 1, bench.new_key())
    _same(number(decline, "balance"), held, "the decline")


def _same(told: int | None, held: int, what: str) -> None:
    if told != held:
        raise Broken(f"{what} told a balance of {told}, and GET /v1/balance one of {held}")


@check(
    "deduction-names-account",
    "forms",
    1,
    tried="the `tenant_id` and `user_id` that a deduction is answered with",
    expected="those that were sent, as texts, or none",
    without="The library takes an answer about another account for none: each client hears 503, and each deduction is "
    "voided.",
)
async def deduction_names_account(bench: Bench) -> None:
    reply = await bench.deduct(1, bench.new_key())
    taken(reply, 1)
    told = {name: value for name, value in reply.body.items() if name != "balance"}  # which has a check of its own
    record = Record(id="-", account=bench.account, amount_credits=1, units=1, opened_at=0.0)
    if not isinstance(Contract().read_deduction(record, replace(reply, body=told)), Deducted):
        raise Broken(f"it names {told.get('tenant_id')!r} and {told.get('user_id')!r}, not {bench.account}")


@check(
    "decline-says-why",
    "forms",
    1,
    tried="a deduction of more than the account holds",
    expected="402 as the problem insufficient-credits, with `required` and `balance`",
    without="A 402 with neither is taken for a proxy's: the client hears 402, and each decline costs a void more.",
)
async def decline_says_why(bench: Bench) -> None:
    held = await bench.balance()
    reply = await bench.deduct(held + 1, bench.new_key())
    told = (number(reply, "required"), number(reply, "balance"))
    problem(reply, 402, "insufficient-credits")
    if told != (held + 1, held):
        raise Broken(f"required and balance were {told}, not {(held + 1, held)}")


@check(
    "replay-says-so",
    "forms",
    3,
    tried="a deduction, and the same again",
    expected="201, then 200 with the very same body and `Idempotent-Replayed: true`",
    without="Nothing: the library reads both alike. People who read traces miss the word; another balance in the "
    "replay is shown in Credits-Balance.",
)
async def replay_says_so(bench: Bench) -> None:
    key = bench.new_key()
    first, again = await bench.deduct(10, key), await bench.deduct(10, key)
    if first.body != again.body:
        raise Broken("the bodies differ")
    told = [(reply.status, reply.headers.get("idempotent-replayed")) for reply in (first, again)]
    if told != [(201, None), (200, "true")]:
        raise Broken(f"status and header were {told}")


@check(
    "refund-replay",
    "forms",
    4,
    tried="a refund, and the same again",
    expected="201, then 200 with the very same body and `Idempotent-Replayed: true`",
    without="Where the first answer was lost, the refund is not known to be done: refused, the charge ends as "
    "disputed; else it is tried again without end. A missing header costs nothing.",
)
async def refund_replay(bench: Bench) -> None:
    transaction, key = taken(await bench.deduct(10, bench.new_key()), 10), bench.new_key()
    first, again = await bench.refund(transaction, 2, key), await bench.refund(transaction, 2, key)
    told = [(reply.status, reply.headers.get("idempotent-replayed")) for reply in (first, again)]
    if told != [(201, None), (200, "true")]:
        raise Broken(f"status and header were {told}")
    if first.body != again.body:
        raise Broken("the bodies differ")


_PATIENT = "The library takes it for a proxy's word and tries again, ever more seldom, without end: "


@check(
    "problem-unauthorized",
    "forms",
    8,
    tried="GET /v1/balance with a wrong token",
    expected="401 as the problem unauthorized",
    without="Nothing: the library goes by the status, logs it as critical, and tries refunds until the token is right.",
)
async def problem_unauthorized(bench: Bench) -> None:
    params = {"tenant_id": bench.account.tenant_id}
    problem(await bench.call("GET", "/v1/balance", params=params, token=f"not-{uuid4()}"), 401, "unauthorized")


@check(
    "problem-not-found",
    "forms",
    4,
    tried="a refund of a transaction that there is not",
    expected="404 as the problem not-found",
    without=_PATIENT + "the charge is never shown to a person as disputed.",
)
async def problem_not_found(bench: Bench) -> None:
    problem(await bench.refund(str(uuid4()), 1, bench.new_key()), 404, "not-found")


@check(
    "problem-idempotency-key-reused",
    "forms",
    3,
    tried="another amount under the key of a deduction, and under that of a refund",
    expected="422 as the problem idempotency-key-reused",
    without="To a deduction, a client hears 500 either way. To a refund: " + _PATIENT + "nobody sees a dispute.",
)
async def problem_key_reused(bench: Bench) -> None:
    key, refund_key = bench.new_key(), bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    problem(await bench.deduct(11, key), 422, "idempotency-key-reused")
    given(await bench.refund(transaction, 2, refund_key), 2)
    problem(await bench.refund(transaction, 3, refund_key), 422, "idempotency-key-reused")


@check(
    "problem-refund-exceeds-deduction",
    "forms",
    3,
    tried="a refund of 11 of a deduction of 10",
    expected="422 as the problem refund-exceeds-deduction",
    without=_PATIENT + "the charge is never shown to a person as disputed.",
)
async def problem_refund_exceeds(bench: Bench) -> None:
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    problem(await bench.refund(transaction, 11, bench.new_key()), 422, "refund-exceeds-deduction")


@check(
    "problem-charge-voided",
    "forms",
    4,
    tried="a refund of a deduction that was voided, and a deduction that was voided before it arrived",
    expected="409 as the problem charge-voided",
    without="To a deduction: it is tried again, up to 3 times, then voided again. To a refund: " + _PATIENT + "the "
    "charge stays open, though its credits are back.",
)
async def problem_charge_voided(bench: Bench) -> None:
    key, never_seen = bench.new_key(), bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    await need_voids(bench, key, 10)
    problem(await bench.refund(transaction, 10, bench.new_key()), 409, "charge-voided")
    if (await bench.void(never_seen)).status == 200:
        problem(await bench.deduct(10, never_seen), 409, "charge-voided")


@check(
    "problem-invalid-request",
    "forms",
    1,
    tried="amounts that are none, a body that is not JSON, and a deduction without a key",
    expected="400 or 422 as the problem invalid-request, and nothing moves",
    without="To a deduction, a client hears 500 either way. To a refund: " + _PATIENT + "nobody sees a dispute.",
)
async def problem_invalid_request(bench: Bench) -> None:
    before = await bench.balance()
    for amount in NO_AMOUNTS:
        problem(await bench.deduct(amount, bench.new_key()), 422, "invalid-request")
    reply = await bench.call("POST", "/v1/deductions", content=b'{"tenant_id": ', key=bench.new_key())
    problem(reply, 400, "invalid-request")
    body = {"tenant_id": bench.account.tenant_id, "user_id": bench.account.user_id, "amount": 1}
    reply = await bench.call("POST", "/v1/deductions", body)
    await holds(bench, before)
    problem(reply, 422, "invalid-request")


@check(
    "unknown-field-refused",
    "forms",
    8,
    tried="a deduction with a field that there is not: a misspelt user_id",
    expected="422, and nothing moves",
    without="Nothing: the library spells it right. Another caller's slip is charged to the tenant's shared pool.",
)
async def unknown_field_refused(bench: Bench) -> None:
    before = await bench.balance()
    refused(await bench.deduct(1, bench.new_key(), user_idd="ann"), "it")
    await holds(bench, before)


@check(
    "long-and-quoted-keys",
    "forms",
    3,
    tried="a key of 255 characters, one of all visible signs, and one bare, then as the IETF draft's quoted string",
    expected="each is taken once; the quoted string is the bare key",
    without="Nothing: the library's keys are bare, and of 36 or 43 letters, digits, hyphens and a colon.",
)
async def long_and_quoted_keys(bench: Bench) -> None:
    before = await bench.balance()
    bare = bench.new_key()
    signs = bench.new_key() + "".join(map(chr, range(0x21, 0x7F)))
    for first, again in (((bench.new_key() + "-").ljust(255, "x"),) * 2, (signs, signs), (f'"{bare}"', bare)):
        transaction = taken(await bench.deduct(1, first), 1)
        if taken(await bench.deduct(1, again), 1) != transaction:
            raise Broken(f"{first[:60]} was taken twice")
    await holds(bench, before - 3)


@check(
    "any-language",
    "forms",
    2,
    tried="accounts, request ids, metadata, reasons and items of 255 characters in several scripts",
    expected="they are accepted as they are",
    without="A deduction that is refused is answered 500: billing-misconfigured. A refund is sent once more without "
    "the names of its items, then disputed.",
)
async def any_language(bench: Bench) -> None:
    before, long = await bench.balance(), ("Zoë 東京 ✂ 👩‍🔬 العربية / %2F ?&#; " * 9)[:255]
    reply = await bench.deduct(1, bench.new_key(), account=Account(bench.account.tenant_id, long))
    if reply.status != 402:
        raise Broken(f"a deduction from a user of such a name was answered {reply}, not 402")
    reply = await bench.deduct(10, bench.new_key(), request_id=long, metadata={"größe": long})
    transaction = taken(reply, 10)
    given(await bench.refund(transaction, 2, bench.new_key(), reason=long, items=[long]), 2)
    await holds(bench, before - 8)


@check(
    "large-refund",
    "forms",
    4,
    tried="a refund that names 1,000 items of 200 characters",
    expected="it is done",
    without="The library names as many as fit into 64 KiB; refused, it sends the refund once more without their "
    "names. A service that breaks off instead is asked again without end.",
)
async def large_refund(bench: Bench) -> None:
    before = await bench.balance()
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    items = [f"item-{number_}-".ljust(200, "x") for number_ in range(1000)]
    given(await bench.refund(transaction, 10, bench.new_key(), items=items), 10)
    await holds(bench, before)


@check(
    "body-bounded",
    "forms",
    None,
    tried="a deduction with 2 MiB of metadata",
    expected="413 or 422, and nothing moves",
    without="Nothing: the library sends no such body. Others could fill the service's memory or disk.",
)
async def body_bounded(bench: Bench) -> None:
    before = await bench.balance()
    refused(await bench.deduct(1, bench.new_key(), metadata={"text": "x" * (2 << 20)}), "it")
    await holds(bench, before)


@check(
    "traceparent",
    "forms",
    4,
    tried="a deduction with a traceparent and a tracestate",
    expected="it is done",
    without="The library sends the current traceparent with every call: no deduction would go through.",
    fatal=True,
)
async def traceparent(bench: Bench) -> None:
    before = await bench.balance()
    headers = {"traceparent": f"00-{uuid4().hex}-00f067aa0ba902b7-01", "tracestate": "vendor=1"}
    taken(await bench.deduct(1, bench.new_key(), headers=headers), 1)
    await holds(bench, before - 1)


@check(
    "odd-traceparent",
    "forms",
    None,
    tried="a deduction with a traceparent that is none",
    expected="it is done: a trace is no reason to refuse",
    without="Nothing: the library sends proper ones.",
)
async def odd_traceparent(bench: Bench) -> None:
    taken(await bench.deduct(1, bench.new_key(), headers={"traceparent": "nonsense"}), 1)


@check(
    "healthz",
    "forms",
    None,
    tried="GET /healthz without a token",
    expected="200",
    without="Nothing: the library does not ask. Whoever watches the service needs another question.",
)
async def healthz(bench: Bench) -> None:
    reply = await bench.call("GET", "/healthz", token=None)
    if reply.status != 200:
        raise Broken(f"it was answered {reply}")
