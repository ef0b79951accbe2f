"""Undoing what went unanswered, and remembering what was declined."""

from metered_billing.charge import Account
from metered_billing.conformance.bench import Bench, Broken, NotTried
from metered_billing.conformance.checks.check import DO_NOT, check
from metered_billing.conformance.checks.reading import (
    declined,
    given,
    holds,
    need_voids,
    not_done,
    refused,
    taken,
    voided,
)


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
