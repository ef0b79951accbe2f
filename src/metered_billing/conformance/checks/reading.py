"""What the checks share: deductions, refunds and voids are confirmed where the library reads them so."""

from typing import Any
from uuid import uuid4

from metered_billing.charge import NoVoid, Record
from metered_billing.conformance.bench import Bench, Broken, NotTried, number, text
from metered_billing.credits.contract import Contract, Reply

NO_AMOUNTS: tuple[Any, ...] = (0, -1, 1.5, "1", True, None, 2**53, 10**400)


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
