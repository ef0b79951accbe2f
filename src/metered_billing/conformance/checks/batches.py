"""Many at once."""

from typing import Any

from metered_billing.conformance.bench import Bench, Broken, NotTried, number, results, text
from metered_billing.conformance.checks.check import DO_NOT, check
from metered_billing.conformance.checks.reading import given, holds, need_batch, need_voids, refused, taken, voided


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
