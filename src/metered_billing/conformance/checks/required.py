"""Once, and nothing lost: without these the library cannot keep what it promises."""

import asyncio
from uuid import uuid4

from metered_billing.charge import Account
from metered_billing.conformance.bench import Bench, Broken, Lost, NotTried, results, text
from metered_billing.conformance.checks.check import DO_NOT, check
from metered_billing.conformance.checks.reading import NO_AMOUNTS, given, holds, not_done, taken, unknown_like


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
    "refund-once",
    "required",
    3,
    fatal=True,
    tried="a refund three times under one key, with other words and items",
    expected="the account gets its credits back, once",
    without=DO_NOT
    + "The library repeats a refund until it is confirmed. Counted each time, it would make credits out of "
    "nothing; never counted, customers would not have theirs back.",
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
