"""The journal against the credits service's transactions: what should be there, and what is. Pure; moves nothing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metered_billing.charge import Record, State


@dataclass(frozen=True, slots=True)
class Entry:
    """A deduction, refund or void in the service's ledger; `amount` is signed."""

    id: str
    kind: str
    transaction_id: str
    idempotency_key: str
    tenant_id: str
    user_id: str | None
    amount: int
    created_at: str


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs about a charge.

    Attributes:
        kind: One of `KINDS`.
        says: What the journal has, and what the service has.
        credits: How many more than the journal says the service has taken (below 0: fewer).
    """

    charge_id: str
    tenant_id: str
    user_id: str | None
    kind: str
    says: str
    credits: int


KINDS: Mapping[str, str] = {
    "no deduction": "the journal has it as deducted, and the service has no such deduction",
    "other deduction": "the deduction is of another amount, account or transaction than the journal has",
    "deducted twice": "the service has more than one deduction under the charge's key",
    "not refunded": "the journal has the refund as confirmed, and the service has none or a smaller one",
    "refunded otherwise": "the service has given back more than the journal knows of, or under another key",
    "not undone": "the journal has it as moving nothing, and the service has kept credits",
    "unknown deduction": "the service has a deduction that the journal knows nothing of",
}
"""The kinds of differences there are."""

_MOVES_NOTHING = frozenset({State.DECLINED, State.ABANDONED, State.VOIDED})


def entry_of(item: Mapping[str, Any]) -> Entry:
    """An entry as the credits API has it.

    Raises:
        ValueError: It is none.
    """
    amount, user_id = item.get("amount"), item.get("user_id")
    names = [item.get(name) for name in ("id", "kind", "transaction_id", "idempotency_key", "tenant_id", "created_at")]
    if type(amount) is not int or not all(isinstance(name, str) for name in names):
        raise ValueError("not an entry of a credits service's ledger")
    entry_id, kind, transaction_id, key, tenant_id, created_at = map(str, names)
    user = None if user_id is None else str(user_id)
    return Entry(entry_id, kind, transaction_id, key, tenant_id, user, amount, created_at)


def net_of(entries: Iterable[Entry]) -> int:
    """What the service has taken by these and not given back, in credits."""
    return -sum(entry.amount for entry in entries)


def compare(record: Record, entries: Iterable[Entry]) -> Difference | None:
    """What differs between a charge as the journal has it, and all entries that belong to it.

    A charge that is not final can differ in nothing yet, and a disputed one is for a person to look at.
    """
    if not record.final or record.state is State.DISPUTED:
        return None
    found = list(entries)
    for kind, says in _differing(record, found):
        account, taken = record.account, net_of(found) - record.kept_credits
        return Difference(record.id, account.tenant_id, account.user_id, kind, says, taken)
    return None


def _differing(record: Record, entries: list[Entry]) -> Iterator[tuple[str, str]]:
    deductions = [entry for entry in entries if entry.kind == "deduction"]
    returned = [entry for entry in entries if entry.kind != "deduction"]
    back = sum(entry.amount for entry in returned)
    if len(deductions) > 1:
        yield "deducted twice", f"the service has deductions {', '.join(entry.id for entry in deductions)}"
    if record.state in _MOVES_NOTHING:
        if net_of(entries):
            taken = -sum(entry.amount for entry in deductions)
            yield "not undone", f"the journal has {record.state}; the service took {taken:,} and gave {back:,} back"
        return
    if not deductions:
        yield "no deduction", f"the journal has {record.amount_credits:,} in {record.transaction_id}"
        return
    one, account = deductions[0], record.account
    if -one.amount != record.amount_credits:
        yield "other deduction", f"the journal has {record.amount_credits:,}, the service {-one.amount:,}"
    if (one.tenant_id, one.user_id or None) != (account.tenant_id, account.user_id):
        yield "other deduction", f"the service took it from {one.tenant_id} / {one.user_id or '(shared pool)'}"
    if one.id != record.transaction_id:
        yield "other deduction", f"the journal has transaction {record.transaction_id}, the service {one.id}"
    if back < record.refund_credits:
        yield "not refunded", f"the journal has {record.refund_credits:,} refunded, the service {back:,}"
    others = [entry for entry in returned if entry.idempotency_key != record.refund_key]
    if back > record.refund_credits or others:
        keys = ", ".join(sorted({entry.idempotency_key for entry in others})) or record.refund_key
        yield (
            "refunded otherwise",
            f"the journal has {record.refund_credits:,} refunded, the service {back:,}, under {keys}",
        )
