"""Looking things up."""

from typing import Any
from urllib.parse import quote

from metered_billing.conformance.bench import Bench, Broken, text
from metered_billing.conformance.checks.check import check
from metered_billing.conformance.checks.reading import entries, given, taken


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
