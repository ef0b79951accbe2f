"""The service's ledger, as a test reads it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Entry:
    """One movement of credits.

    Attributes:
        kind: What it was.
        amount: Signed: what the balance changed by.
        balance: The account's, after it.
        transaction_id: The deduction that a refund or void belongs to; else its own id.
        idempotency_key: The charge's id, for a deduction; `{charge id}:refund`, for its refund.
        items: The ids of the items that a refund is for.
    """

    id: str
    kind: Literal["grant", "deduction", "refund", "void"]
    tenant_id: str
    user_id: str | None
    amount: int
    balance: int
    transaction_id: str
    idempotency_key: str
    reason: str | None
    request_id: str | None
    metadata: Mapping[str, str]
    items: tuple[str, ...]

    def __str__(self) -> str:
        why = "" if self.reason is None else f", {self.reason}"
        of = f" of {self.transaction_id}" if self.kind in ("refund", "void") else f" {self.id}"
        items = f": {', '.join(self.items)}" if self.items else ""
        return f"{self.kind} {self.amount:+}, balance {self.balance},{of}{why}{items}"


@dataclass(frozen=True, slots=True)
class Totals:
    """What came of an account's deductions, in credits."""

    charges: int
    kept: int
    refunded: int


def entry_of(item: Mapping[str, Any]) -> Entry:
    """An entry of `GET /v1/transactions`."""
    return Entry(
        item["id"],
        item["kind"],
        item["tenant_id"],
        item["user_id"],
        item["amount"],
        item["balance"],
        item["transaction_id"],
        item["idempotency_key"],
        item["reason"],
        item["request_id"],
        item["metadata"],
        tuple(item["items"]),
    )


def totals_of(entries: Iterable[Entry]) -> Totals:
    deducted = refunded = charges = 0
    for entry in entries:
        if entry.kind == "deduction":
            charges, deducted = charges + 1, deducted - entry.amount
        elif entry.kind in ("refund", "void"):
            refunded += entry.amount
    return Totals(charges, deducted - refunded, refunded)


def faults_in(entries: Sequence[Entry]) -> list[str]:
    """What is wrong with the entries of all accounts, whatever the app may have meant."""
    wrong = []
    balances: dict[tuple[str, str | None], int] = {}
    left: dict[str, int] = {}
    keys: set[tuple[str, str]] = set()
    for entry in entries:
        account = entry.tenant_id, entry.user_id
        balances[account] = balances.get(account, 0) + entry.amount
        if balances[account] != entry.balance:
            wrong.append(f"the balance after it should be {balances[account]}: {entry}")
        if entry.kind == "deduction":
            left[entry.id] = -entry.amount
        elif entry.kind in ("refund", "void"):
            left[entry.transaction_id] = left.get(entry.transaction_id, 0) - entry.amount
            if left[entry.transaction_id] < 0:
                wrong.append(f"more than was deducted has come back: {entry}")
        # A void has its deduction's key.
        if entry.kind != "void" and (entry.tenant_id, entry.idempotency_key) in keys:
            wrong.append(f"its key has been used before: {entry}")
        keys.add((entry.tenant_id, entry.idempotency_key))
    return wrong
