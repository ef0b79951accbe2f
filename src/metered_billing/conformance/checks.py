"""The checks: each promise of the credits API, how it is looked at, and what the library does without it.

A check is given a bench and raises `Broken` with what came instead. It measures by the balance, never by
what an answer says was moved; it counts from what the account holds when it begins; and it leaves behind
whatever it took, for the bench gives all of it back.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from metered_billing.charge import Account, NoVoid, Record
from metered_billing.conformance.bench import Bench, Broken, Lost, NotTried, number, results, text
from metered_billing.credits.contract import Contract, Reply

GROUPS = {
    "required": "Once, and nothing lost",
    "voids": "Undoing what went unanswered",
    "declines": "Remembering declines",
    "batch": "Many at once",
    "transactions": "Looking things up",
    "forms": "Saying it as the API does",
}
"""What the checks are about, in order."""

PROMISES = {
    1: "Paid first",
    2: "Paid for what the response reports",
    3: "Once",
    4: "Nothing lost",
    5: "On record before the last byte",
    6: "The work is safe",
    7: "Free is free",
    8: "Nobody else's",
}
"""The promises of the library that the checks protect."""

NEEDED = 100
"""Credits that an account must hold for the checks."""

Run = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of a credits service.

    Attributes:
        promise: Which promise of the library it protects: a number of `PROMISES`; None: none.
        fatal: Where it is broken, credits can be lost, or taken or made twice, and the library cannot help it.
        tried: What is done.
        expected: What a service that keeps the promise does.
        without: What the library does where it is broken, and what that costs.
        needs: The name of the option without which the check is left out; else empty.
    """

    name: str
    group: str
    promise: int | None
    fatal: bool
    tried: str
    expected: str
    without: str
    run: Run
    needs: str = ""


NO_AMOUNTS: tuple[Any, ...] = (0, -1, 1.5, "1", True, None, 2**53, 10**400)

CHECKS: list[Check] = []
"""All of them, in the order in which they are run."""

DO_NOT = "Do not use this service. "


def check(
    name: str,
    group: str,
    promise: int | None,
    *,
    tried: str,
    expected: str,
    without: str,
    fatal: bool = False,
    needs: str = "",
) -> Callable[[Run], Run]:
    """Add a function to the checks."""

    def add(run: Run) -> Run:
        CHECKS.append(Check(name, group, promise, fatal, tried, expected, without, run, needs))
        return run

    return add


# Required.


@check(
    "deduct-once",
    "required",
    3,
    fatal=True,
    tried="the same deduction three times under one key, with other metadata and request ids",
    expected="its credits are taken once",
    without=DO_NOT + "The library repeats a deduction whose answer was lost: customers would pay twice.",
)
async def deduct_once(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    taken(await bench.deduct(10, key, request_id="first"), 10)
    for number_ in range(2):
        await bench.deduct(10, key, request_id=f"again-{number_}", metadata={"attempt": str(number_ + 2)})
    await holds(bench, before - 10)


@check(
    "replay-same-answer",
    "required",
    3,
    fatal=True,
    tried="a deduction again under its key",
    expected="200 or 201 with the same transaction and amount as the first time",
    without=DO_NOT
    + "Where an answer was lost, the library learns the transaction from a replay, and refunds that one: "
    "a refund of another transaction is lost.",
)
async def replay_same_answer(bench: Bench) -> None:
    key = bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    again = await bench.deduct(10, key)
    if taken(again, 10) != transaction:
        raise Broken(f"another transaction each time: {transaction!r}, then {text(again, 'transaction_id')!r}")


@check(
    "replay-when-spent",
    "required",
    4,
    tried="a deduction of all that the account holds, again under its key",
    expected="the same transaction as the first time: the key is looked up before the balance",
    without="Where an answer was lost, the library hears of too few credits. It voids the deduction, and the client "
    "hears 503. Without voids these credits stay taken, and nobody will know: do not use this service then.",
)
async def replay_when_spent(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    transaction = taken(await bench.deduct(before, key), before)
    again = await bench.deduct(before, key)
    if text(again, "transaction_id") != transaction:
        came = f"the first took the last credits, as {transaction!r}; the second was answered {again}"
        undone = (await bench.void(key)).status == 200
        raise (Broken if undone else Lost)(came)
    await holds(bench, 0)


@check(
    "key-reused",
    "required",
    3,
    fatal=True,
    tried="another amount, and another user, under the key of a deduction",
    expected="both are refused, and nothing moves",
    without=DO_NOT + "What it keeps under a key is not the answer to one operation.",
)
async def key_reused(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    taken(await bench.deduct(10, key), 10)
    not_done(await bench.deduct(11, key), "another amount")
    other = Account(bench.account.tenant_id, f"{bench.prefix}-nobody")
    not_done(await bench.deduct(10, key, account=other), "another user")
    await holds(bench, before - 10)


@check(
    "concurrent-copies",
    "required",
    3,
    fatal=True,
    tried="10 copies of one deduction at the same time",
    expected="its credits are taken once, and whoever is answered with a transaction hears of the same one",
    without=DO_NOT + "A retry overtakes the first attempt now and then: customers would pay twice.",
)
async def concurrent_copies(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    replies = await asyncio.gather(*(bench.deduct(7, key) for _ in range(10)))
    told = {text(reply, "transaction_id") for reply in replies if reply.status in (200, 201)}
    if len(told) != 1:
        raise Broken(f"{len(told)} transactions were told")
    await holds(bench, before - 7)


@check(
    "declined-takes-nothing",
    "required",
    1,
    fatal=True,
    tried="a deduction of one credit more than the account holds",
    expected="it is refused, and nothing is taken",
    without=DO_NOT + "The library runs a route when its deduction is confirmed: routes would run that nobody paid for.",
)
async def declined_takes_nothing(bench: Bench) -> None:
    before = await bench.balance()
    not_done(await bench.deduct(before + 1, bench.new_key()), f"a deduction of {before + 1} from {before} credits")
    await holds(bench, before)


@check(
    "never-overdrawn",
    "required",
    1,
    fatal=True,
    tried="50 deductions at the same time, of which the account can pay a part",
    expected="no more are confirmed than it can pay, and the balance is what they leave of it",
    without=DO_NOT + "Routes would run that nobody has paid for.",
)
async def never_overdrawn(bench: Bench) -> None:
    before = await bench.balance()
    amount = max(1, -(-before // 34))
    can_pay = before // amount
    replies = await asyncio.gather(*(bench.deduct(amount, bench.new_key()) for _ in range(50)))
    confirmed = sum(reply.status in (200, 201) for reply in replies)
    if confirmed > can_pay:
        raise Broken(f"{confirmed} were confirmed, and {before} credits pay for {can_pay}")
    await holds(bench, before - confirmed * amount)


@check(
    "pool-and-users-apart",
    "required",
    8,
    fatal=True,
    tried="a deduction from a user who has nothing, where the tenant's shared pool has enough",
    expected="it is refused: a user does not fall back to the pool",
    without=DO_NOT + "Who pays would not be who the app says.",
)
async def pool_and_users_apart(bench: Bench) -> None:
    if bench.account.user_id is not None:
        raise NotTried("the account is a user's, so that the pool is not ours to try")
    before = await bench.balance()
    reply = await bench.deduct(1, bench.new_key(), account=Account(bench.account.tenant_id, f"{bench.prefix}-nobody"))
    not_done(reply, "it")
    await holds(bench, before)


@check(
    "refund-once",
    "required",
    3,
    fatal=True,
    tried="a refund three times under one key, with other words and items",
    expected="the account gets its credits back, once",
    without=DO_NOT + "The library repeats a refund until it is confirmed: credits would be made out of nothing.",
)
async def refund_once(bench: Bench) -> None:
    before = await bench.balance()
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    key = bench.new_key()
    given(await bench.refund(transaction, 2, key, items=["img-3"]), 2)
    await holds(bench, before - 8)
    for _ in range(2):
        await bench.refund(transaction, 2, key, reason="other words")
    await holds(bench, before - 8)


@check(
    "concurrent-refunds",
    "required",
    3,
    fatal=True,
    tried="10 copies of one refund at the same time",
    expected="its credits come back once",
    without=DO_NOT + "Credits would be made out of nothing.",
)
async def concurrent_refunds(bench: Bench) -> None:
    before = await bench.balance()
    transaction = taken(await bench.deduct(50, bench.new_key()), 50)
    key = bench.new_key()
    replies = await asyncio.gather(*(bench.refund(transaction, 5, key) for _ in range(10)))
    if not any(reply.status in (200, 201) for reply in replies):
        raise Broken(f"none was confirmed; the last was answered {replies[-1]}")
    await holds(bench, before - 45)


@check(
    "refund-never-exceeds",
    "required",
    3,
    fatal=True,
    tried="a refund of 11 of a deduction of 10, then one of 8 and one of 3",
    expected="what would exceed the deduction is refused, and moves nothing",
    without=DO_NOT + "The library asks for one refund a charge and never for more than was taken; anybody else's slip "
    "would make credits out of nothing.",
)
async def refund_never_exceeds(bench: Bench) -> None:
    before = await bench.balance()
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    not_done(await bench.refund(transaction, 11, bench.new_key()), "11 of 10")
    await holds(bench, before - 10)
    given(await bench.refund(transaction, 8, bench.new_key()), 8)
    not_done(await bench.refund(transaction, 3, bench.new_key()), "3 more after 8 of 10")
    await holds(bench, before - 2)


@check(
    "refund-of-unknown",
    "required",
    4,
    fatal=True,
    tried="a refund of a transaction that there is not",
    expected="it is refused, and nothing moves",
    without=DO_NOT + "A refund that is confirmed and not made is one that the customer never gets.",
)
async def refund_of_unknown(bench: Bench) -> None:
    before = await bench.balance()
    unknown = unknown_like(taken(await bench.deduct(1, bench.new_key()), 1))
    not_done(await bench.refund(unknown, 1, bench.new_key()), "a refund of an unknown transaction")
    await holds(bench, before - 1)


@check(
    "late-copy-after-refund",
    "required",
    3,
    fatal=True,
    tried="a copy of a deduction that arrives when all of it was refunded",
    expected="it takes nothing",
    without=DO_NOT + "A copy that a slow network delivers late would take the credits again.",
)
async def late_copy_after_refund(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    given(await bench.refund(transaction, 10, bench.new_key()), 10)
    await bench.deduct(10, key)
    await holds(bench, before)


@check(
    "keys-per-tenant",
    "required",
    8,
    fatal=True,
    tried="the key of one tenant's deduction, used by another tenant that has no credits",
    expected="402: it is another key, so the other tenant's own account decides",
    without=DO_NOT + "One tenant would be served another's answer.",
)
async def keys_per_tenant(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    reply = await bench.deduct(10, key, account=Account(f"{bench.prefix}-other"))
    if text(reply, "transaction_id") == transaction or transaction in str(reply.body):
        raise Broken("the other tenant was told the transaction of the first")
    if reply.status in (401, 403):
        raise NotTried("the token is for one tenant alone, so it cannot speak for another")
    if reply.problem == "idempotency-key-reused":
        raise Broken("the other tenant was told that its key had been used")
    not_done(reply, "it")
    await holds(bench, before - 10)


@check(
    "amounts-validated",
    "required",
    1,
    fatal=True,
    tried='amounts of 0, -1, 1.5, "1", true, null, 2^53 and 10^400, and a refund of -1',
    expected="each is refused, and nothing moves",
    without=DO_NOT + "The library sends whole numbers from 1; but an amount below zero would put credits in.",
)
async def amounts_validated(bench: Bench) -> None:
    before = await bench.balance()
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    for amount in NO_AMOUNTS:
        not_done(await bench.deduct(amount, bench.new_key()), f"an amount of {str(amount)[:20]}")
    not_done(await bench.refund(transaction, -1, bench.new_key()), "a refund of -1")
    await holds(bench, before - 10)


@check(
    "token-needed",
    "required",
    8,
    fatal=True,
    tried="balance, deduction, refund, void, transactions and batch without a token, and with a wrong one",
    expected="all of it is refused, and nothing moves",
    without=DO_NOT + "Whoever reaches it could spend.",
)
async def token_needed(bench: Bench) -> None:
    key = bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    before = await bench.balance()
    for token in (None, f"not-a-token-{uuid4()}"):
        await _refused_without_rights(bench, key, transaction, token)
    await holds(bench, before)


@check(
    "foreign-token-refused",
    "required",
    8,
    fatal=True,
    needs="foreign_token",
    tried="balance, deduction, refund, void, transactions and batch with a token of another tenant",
    expected="all of it is refused, and nothing moves",
    without=DO_NOT + "One customer could spend another's credits.",
)
async def foreign_token_refused(bench: Bench) -> None:
    key = bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    before = await bench.balance()
    await _refused_without_rights(bench, key, transaction, bench.foreign_token)
    await holds(bench, before)


async def _refused_without_rights(bench: Bench, key: str, transaction: str, token: str | None) -> None:
    not_done(await bench.ask_balance(token=token), "the balance")
    not_done(await bench.deduct(1, bench.new_key(), token=token), "a deduction")
    not_done(await bench.refund(transaction, 1, bench.new_key(), token=token), "a refund")
    if "transactions" not in bench.lacks:
        not_done(await bench.transactions(token=token), "the list of transactions")
    if "voids" not in bench.lacks:
        not_done(await bench.void(key, token=token), "a void")
    if "batch" in bench.lacks:
        return
    batched = await bench.batch([bench.operation("deduct", bench.new_key(), amount=1)], token=token)
    if any(result.status < 400 for result in results(batched)):
        raise Broken("a deduction in a batch was done")


# Voids.


@check(
    "void-undoes",
    "voids",
    4,
    tried="a void of a deduction",
    expected="200, status voided, and all its credits are back",
    without="After a timeout the library sends the deduction again under its key and refunds what comes back. A "
    "customer may see a deduction and its refund where nothing had been taken. A copy that arrives still later "
    "is answered as the first one was, if keys are kept; where it was declined, see declines-remembered.",
)
async def void_undoes(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    taken(await bench.deduct(10, key), 10)
    voided(await bench.void(key), 10)
    await holds(bench, before)


@check(
    "void-again",
    "voids",
    3,
    fatal=True,
    tried="a void three times",
    expected="the credits are back once",
    without=DO_NOT + "The library repeats a void until it is confirmed: credits would be made out of nothing. "
    "A Contract whose `void` returns None uses no voids.",
)
async def void_again(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    taken(await bench.deduct(10, key), 10)
    await need_voids(bench, key)
    for _ in range(2):
        await bench.void(key)
    await holds(bench, before)


@check(
    "void-same-answer",
    "voids",
    4,
    tried="a void again",
    expected="200 with the same amount as the first time",
    without="Answered otherwise, the void is tried again without end, or the charge ends as disputed; another amount "
    "is only written into the log.",
)
async def void_same_answer(bench: Bench) -> None:
    key = bench.new_key()
    taken(await bench.deduct(10, key), 10)
    await need_voids(bench, key, 10)
    voided(await bench.void(key), 10)


@check(
    "void-before-arrival",
    "voids",
    4,
    tried="a void of a key that was never seen",
    expected="200, status voided, 0 refunded",
    without="Answered 404 without a problem of this API, it counts as having no voids (void-undoes); as a problem, "
    "the charge ends as disputed, for a person to look at.",
)
async def void_before_arrival(bench: Bench) -> None:
    before = await bench.balance()
    await need_voids(bench)
    voided(await bench.void(bench.new_key()), 0)
    await holds(bench, before)


@check(
    "tombstone",
    "voids",
    4,
    fatal=True,
    tried="a void of a key that was never seen; then its deduction arrives",
    expected="it is refused, and nothing is taken",
    without=DO_NOT + "The library takes the confirmed void for the end of it: a copy that arrives late takes credits, "
    "and nobody will know. A Contract whose `void` returns None is better: see void-undoes.",
)
async def tombstone(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    await need_voids(bench)
    if (await bench.void(key)).status != 200:
        raise NotTried("it does not void what it has not seen: see void-before-arrival")
    late = await bench.deduct(10, key)
    await holds(bench, before)
    not_done(late, "the late deduction")


@check(
    "void-of-declined",
    "voids",
    4,
    tried="a void of a deduction that was declined; then the deduction again, when the account holds enough",
    expected="200, 0 refunded; then the deduction is refused, 402 or 409",
    without="The library voids a decline only where it is in doubt: the charge is tried again, or ends as disputed.",
)
async def void_of_declined(bench: Bench) -> None:
    await need_voids(bench)
    key, amount = await declined(bench)
    voided(await bench.void(key), 0)
    before = await bench.balance()
    again = await bench.deduct(amount, key)
    await holds(bench, before)
    refused(again, "the deduction after its void")


@check(
    "void-after-partial-refund",
    "voids",
    3,
    tried="a void of a deduction of 10 of which 4 were refunded",
    expected="6 come back, so that nothing is kept and nothing is made",
    without="The library voids only what it has not refunded. For people who void by hand the sum may be wrong.",
)
async def void_after_partial_refund(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    given(await bench.refund(transaction, 4, bench.new_key()), 4)
    await need_voids(bench, key, 6)
    await holds(bench, before)


@check(
    "refund-after-void",
    "voids",
    3,
    fatal=True,
    tried="a refund of a deduction that was voided",
    expected="it is refused, and nothing moves",
    without=DO_NOT + "Where a void and a refund cross, credits would be made out of nothing.",
)
async def refund_after_void(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    await need_voids(bench, key, 10)
    not_done(await bench.refund(transaction, 10, bench.new_key()), "a refund after the void")
    await holds(bench, before)


@check(
    "late-copy-after-void",
    "voids",
    3,
    fatal=True,
    tried="a copy of a deduction that arrives when it was voided",
    expected="it takes nothing",
    without=DO_NOT + "A copy that a slow network delivers late would take the credits again.",
)
async def late_copy_after_void(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    taken(await bench.deduct(10, key), 10)
    await need_voids(bench, key, 10)
    await bench.deduct(10, key)
    await holds(bench, before)


@check(
    "void-of-others",
    "voids",
    8,
    tried="a void that names another user than the deduction did",
    expected="it is refused, and nothing moves",
    without="The library names the account of the charge. Another caller's slip would undo somebody else's.",
)
async def void_of_others(bench: Bench) -> None:
    before, key = await bench.balance(), bench.new_key()
    taken(await bench.deduct(10, key), 10)
    await need_voids(bench)
    refused(await bench.void(key, account=Account(bench.account.tenant_id, f"{bench.prefix}-nobody")), "it")
    await holds(bench, before - 10)


# Declines.


@check(
    "declines-remembered",
    "declines",
    4,
    tried="a deduction that was declined, again under its key when the account holds enough",
    expected="402 again, and nothing is taken",
    without="Say so in a Contract: `remembers_declines = False`. Each decline is then followed by a void, for a copy "
    "may yet arrive and be paid. Without voids the library sends the deduction again, and where that is declined, "
    "looks for it after 5 minutes in GET /v1/transactions; a copy that arrives still later cannot be undone.",
)
async def declines_remembered(bench: Bench) -> None:
    key, amount = await declined(bench)
    before = await bench.balance()
    again = await bench.deduct(amount, key)
    if again.status != 402:
        raise Broken(f"after a top-up it was answered {again}")
    await holds(bench, before)


# Batch.


@check(
    "batch",
    "batch",
    None,
    tried="a batch of two deductions",
    expected="200, a result for each, and both are taken",
    without="The library makes single calls: nothing is lost but speed.",
)
async def batch(bench: Bench) -> None:
    before = await bench.balance()
    reply = await bench.batch([bench.operation("deduct", bench.new_key(), amount=amount) for amount in (2, 3)])
    found = results(reply)
    if len(found) != 2:
        raise Broken(f"it was answered {reply}, with {len(found)} results for 2 operations")
    for result, amount in zip(found, (2, 3), strict=True):
        taken(result, amount)
    await holds(bench, before - 5)


@check(
    "batch-order",
    "batch",
    3,
    fatal=True,
    tried="a batch of five deductions of different amounts",
    expected="the results are in the order of the operations",
    without=DO_NOT + "One charge's answer would be taken for another's. A service that answers 404 to POST /v1/batch "
    "gets single calls.",
)
async def batch_order(bench: Bench) -> None:
    await need_batch(bench)
    amounts = [3, 1, 5, 2, 4]
    reply = await bench.batch([bench.operation("deduct", bench.new_key(), amount=amount) for amount in amounts])
    told = [number(result, "amount") for result in results(reply)]
    if len(told) != len(amounts) or None in told:
        raise NotTried(f"it was answered {reply}, not with five deductions")
    if told != amounts:
        raise Broken(f"amounts of {amounts} were answered with {told}")


@check(
    "batch-stands-alone",
    "batch",
    4,
    tried="a batch of one that is declined, one that is malformed, one that is none, and two that are good",
    expected="each has its own status, and the bad ones spoil nothing",
    without="A batch that fails as a whole leaves all in it unknown: the library repeats them singly.",
)
async def batch_stands_alone(bench: Bench) -> None:
    await need_batch(bench)
    before = await bench.balance()
    reply = await bench.batch(
        [
            bench.operation("deduct", bench.new_key(), amount=2),
            bench.operation("deduct", bench.new_key(), amount=before + 1),
            bench.operation("deduct", bench.new_key(), amount="ten"),
            {"op": "dance", "idempotency_key": bench.new_key()},
            bench.operation("deduct", bench.new_key(), amount=3),
        ]
    )
    told = [result.status for result in results(reply)]
    if len(told) != 5 or [status // 100 for status in told] != [2, 4, 4, 4, 2] or told[1] != 402:
        raise Broken(f"it was answered {reply} with {told}, not 201, 402, 422, 422, 201")
    await holds(bench, before - 5)


@check(
    "batch-same-keys",
    "batch",
    3,
    fatal=True,
    tried="a deduction alone, then under the same key in a batch, twice; and one in a batch, then alone",
    expected="each is taken once",
    without=DO_NOT + "What a batch left unknown is repeated singly: customers would pay twice. A service that answers "
    "404 to POST /v1/batch gets single calls.",
)
async def batch_same_keys(bench: Bench) -> None:
    await need_batch(bench)
    before, first, second = await bench.balance(), bench.new_key(), bench.new_key()
    transaction = taken(await bench.deduct(10, first), 10)
    operation = bench.operation("deduct", first, amount=10)
    replies = results(await bench.batch([operation, operation, bench.operation("deduct", second, amount=20)]))
    told = [text(reply, "transaction_id") for reply in replies]
    if None in told or len(told) != 3:
        raise NotTried(f"such a batch was answered with {told}")
    if told[:2] != [transaction, transaction]:
        raise Broken(f"the transaction {transaction!r} was told as {told[:2]} in a batch")
    if [taken(await bench.deduct(20, second), 20)] != told[2:]:
        raise Broken("alone, the batch's deduction was told another transaction")
    await holds(bench, before - 30)


@check(
    "batch-all-operations",
    "batch",
    4,
    tried="a batch of a refund and a void",
    expected="both are done, as single calls are",
    without="The library repeats singly what a batch does not do.",
)
async def batch_all_operations(bench: Bench) -> None:
    await need_batch(bench)
    before, key = await bench.balance(), bench.new_key()
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    taken(await bench.deduct(20, key), 20)
    await need_voids(bench)
    refund = bench.operation("refund", bench.new_key(), transaction_id=transaction, amount=2, reason="failed items")
    found = results(await bench.batch([refund, bench.operation("void", key)]))
    if len(found) != 2:
        raise Broken(f"{len(found)} results for 2 operations")
    given(found[0], 2)
    voided(found[1], 20)
    await holds(bench, before - 8)


@check(
    "batch-says-replayed",
    "batch",
    3,
    tried="a deduction in a batch that was done before",
    expected="status 200 and `replayed: true`; 201 and no such member on what is new",
    without="Nothing: the library reads replays as it reads first answers. People who read traces miss the word.",
)
async def batch_says_replayed(bench: Bench) -> None:
    await need_batch(bench)
    key = bench.new_key()
    taken(await bench.deduct(2, key), 2)
    new = bench.operation("deduct", bench.new_key(), amount=1)
    reply = await bench.batch([bench.operation("deduct", key, amount=2), new])
    found = reply.body.get("results") if isinstance(reply.body, dict) else None
    told = [(each.get("status"), each.get("replayed", False)) for each in found or [] if isinstance(each, dict)]
    if told != [(200, True), (201, False)]:
        raise Broken(f"status and replayed were {told}")


@check(
    "batch-bounded",
    "batch",
    None,
    tried="a batch of 1,001 operations",
    expected="it is refused, and nothing moves",
    without="Nothing: the library sends no such batch.",
)
async def batch_bounded(bench: Bench) -> None:
    await need_batch(bench)
    before = await bench.balance()
    reply = await bench.batch([bench.operation("deduct", bench.new_key(), amount=1)] * 1001)
    refused(reply, "it")
    await holds(bench, before)


@check(
    "batch-malformed",
    "batch",
    None,
    tried="a batch without operations, one that is a list, and one whose operations are a string",
    expected="each is refused",
    without="Nothing: the library sends no such batch.",
)
async def batch_malformed(bench: Bench) -> None:
    await need_batch(bench)
    bodies: list[Any] = [{}, [], {"operations": "all"}]
    for body in bodies:
        refused(await bench.call("POST", "/v1/batch", body), str(body))


# Transactions.


@check(
    "find-by-key",
    "transactions",
    4,
    tried="GET /v1/transactions after a deduction",
    expected="the deduction is in it, with its key, transaction and amount (below zero)",
    without="A deduction in doubt cannot be looked for, which the library does where there are no voids and declines "
    "are forgotten: such a charge stays open. Nor can support answer why somebody was charged.",
)
async def find_by_key(bench: Bench) -> None:
    key = bench.new_key()
    transaction = taken(await bench.deduct(10, key), 10)
    entry = next((entry for entry in entries(await bench.transactions()) if entry.get("idempotency_key") == key), None)
    if entry is None:
        raise Broken("the deduction is not in the list")
    told = tuple(entry.get(name) for name in ("kind", "transaction_id", "amount", "tenant_id", "user_id"))
    account = (bench.account.tenant_id, bench.account.user_id)
    if told != ("deduction", transaction, -10, *account):
        raise Broken(f"it is told as {told}")


@check(
    "pages",
    "transactions",
    4,
    tried="six entries in pages of two, by `next_cursor`",
    expected="newest first, none twice and none left out",
    without="What is looked for may be missed where there are many transactions: such a charge is closed though its "
    "credits are taken. Only where there are no voids and declines are forgotten.",
)
async def pages(bench: Bench) -> None:
    keys = [bench.new_key() for _ in range(6)]
    for key in keys:
        taken(await bench.deduct(1, key), 1)
    seen: list[Any] = []
    cursor: str | None = None
    for _ in range(200):
        reply = await bench.transactions(2, cursor)
        page = entries(reply)
        if len(page) > 2:
            raise Broken(f"a page of {len(page)} entries where 2 were asked for")
        seen += [entry.get("idempotency_key") for entry in page if entry.get("kind") == "deduction"]
        cursor = text(reply, "next_cursor")
        if cursor is None or keys[0] in seen:
            break
    told = [key for key in seen if key in keys]
    if told != keys[::-1]:
        raise Broken(f"of six deductions the pages told {[keys.index(key) + 1 for key in told]}, not 6 to 1")


@check(
    "transaction-with-refunds",
    "transactions",
    2,
    tried="GET /v1/transactions/{id} of a deduction of which 2 were refunded",
    expected="the deduction, with its refund, which names reason and items",
    without="Nothing the library does: support cannot see on one page what came back, and for which items.",
)
async def transaction_with_refunds(bench: Bench) -> None:
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    given(await bench.refund(transaction, 2, bench.new_key(), items=["img-3"]), 2)
    reply = await bench.call("GET", f"/v1/transactions/{quote(transaction, safe='')}")
    refunds = reply.body.get("refunds") if isinstance(reply.body, dict) else None
    if reply.status != 200 or text(reply, "id") != transaction or not isinstance(refunds, list):
        raise Broken(f"it was answered {reply}, without the transaction and its refunds")
    told = [(each.get("kind"), each.get("amount"), each.get("items")) for each in refunds if isinstance(each, dict)]
    if told != [("refund", 2, ["img-3"])]:
        raise Broken(f"its refunds are told as {told}")


# Forms.


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


# What the checks share. Deductions, refunds and voids are confirmed where the library reads them so.


def taken(reply: Reply, amount: int) -> str:
    """The transaction of a deduction that is confirmed."""
    transaction = text(reply, "transaction_id")
    if reply.status not in (200, 201) or not transaction or number(reply, "amount") != amount:
        raise Broken(f"a deduction of {amount} was answered {reply}, not with a transaction of that amount")
    return transaction


def unknown_like(transaction: str) -> str:
    """The id of a transaction that there is not: where they are numbers one that they have not come to."""
    if not (transaction.isascii() and transaction.isdigit()):
        return str(uuid4())
    return str(2**31 - 1 if int(transaction) < 2**31 - 1 else 2**63 - 1)


def given(reply: Reply, amount: int) -> str:
    """The id of a refund that is confirmed."""
    refund_id = text(reply, "refund_id")
    if reply.status not in (200, 201) or not refund_id or number(reply, "amount") != amount:
        raise Broken(f"a refund of {amount} was answered {reply}, not with a refund of that amount")
    return refund_id


def voided(reply: Reply, refunded_: int) -> None:
    """Raises: it is not confirmed, or gave back another amount."""
    if reply.status not in (200, 201) or text(reply, "status") != "voided":
        raise Broken(f"a void was answered {reply}")
    if number(reply, "refunded") != refunded_:
        raise Broken(f"a void told {number(reply, 'refunded')} refunded, not {refunded_}")


def not_done(reply: Reply, what: str) -> None:
    """Raises: it is confirmed. How it is refused is for the checks of forms."""
    if 200 <= reply.status < 300:
        raise Broken(f"{what} was answered {reply}")


def refused(reply: Reply, what: str) -> None:
    """Raises: it is anything but an answer that says no."""
    if not 400 <= reply.status < 500:
        raise Broken(f"{what} was answered {reply}")


def problem(reply: Reply, status: int, name: str) -> None:
    """Raises: it is not this problem, in a form that the library reads."""
    if reply.status != status or reply.problem != name:
        raise Broken(f"it was answered {reply} ({reply.headers.get('content-type', 'no type')}), not {status} {name}")
    if number(reply, "status") != status or not text(reply, "title"):
        raise Broken(f"the problem {name} lacks its status or title")


async def holds(bench: Bench, credits_: int) -> None:
    """Raises: the account holds anything else."""
    held = await bench.balance()
    if held != credits_:
        more = f"{held - credits_} more" if held > credits_ else f"{credits_ - held} less"
        raise Broken(f"the account then held {held} credits, which is {more} than it should")


def entries(reply: Reply) -> list[dict[str, Any]]:
    """A page's entries."""
    items = reply.body.get("items") if isinstance(reply.body, dict) else None
    if reply.status != 200 or not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Broken(f"GET /v1/transactions was answered {reply}, without a list of entries")
    return items


async def declined(bench: Bench) -> tuple[str, int]:
    """Have a deduction declined that the account could pay for afterwards: its key and amount."""
    key = bench.new_key()
    held = await bench.balance()
    transaction = taken(await bench.deduct(10, bench.new_key()), 10)
    reply = await bench.deduct(held - 5, key)
    if reply.status != 402:
        raise Broken(f"a deduction of {held - 5} from {held - 10} credits was answered {reply}")
    given(await bench.refund(transaction, 10, bench.new_key()), 10)
    return key, held - 5


_NO_VOIDS = "the service has no voids"
_NO_BATCH = "the service has no batches"


async def need_voids(bench: Bench, key: str | None = None, refunded_: int | None = None) -> None:
    """Void the key, or one that was never seen, where there are voids at all."""
    reply = await bench.void(key or bench.new_key())
    record = Record(id="-", account=bench.account, amount_credits=1, units=1, opened_at=0.0)
    if isinstance(Contract().read_void(record, reply), NoVoid) and (key or not await _voids_what_it_knows(bench)):
        raise NotTried(_NO_VOIDS)
    if refunded_ is not None:
        voided(reply, refunded_)


async def _voids_what_it_knows(bench: Bench) -> bool:
    """Whether it has voids, but answers 404 to keys that it has not seen."""
    key = bench.new_key()
    taken(await bench.deduct(1, key), 1)
    return (await bench.void(key)).status == 200


async def need_batch(bench: Bench) -> None:
    """Raises: there is none."""
    reply = await bench.call("POST", "/v1/batch", {"operations": []})
    if reply.status in (404, 405, 501):
        raise NotTried(_NO_BATCH)
