"""Short forms of commands, for tests that are about one field of them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metered_billing.ledger import Answer, Deduct, Grant, Ledger, Refund, Void


def deduct(amount: int = 10, key: str = "charge-1", user: str | None = "alice", **more: Any) -> Deduct:
    return Deduct(**{"idempotency_key": key, "tenant_id": "acme", "user_id": user, "amount": amount, **more})


def refund(transaction_id: str, amount: int = 2, key: str = "charge-1:refund", **more: Any) -> Refund:
    return Refund(
        **{
            "idempotency_key": key,
            "transaction_id": transaction_id,
            "amount": amount,
            "reason": "failed items",
            **more,
        }
    )


def void(key: str = "charge-1", user: str | None = "alice", tenant: str = "acme") -> Void:
    return Void(idempotency_key=key, tenant_id=tenant, user_id=user)


def grant(amount: int = 100, key: str = "grant-1", user: str | None = "alice", **more: Any) -> Grant:
    return Grant(
        **{
            "idempotency_key": key,
            "tenant_id": "acme",
            "user_id": user,
            "amount": amount,
            "reason": "test",
            **more,
        }
    )


async def granted(ledger: Ledger, amount: int = 100, user: str | None = "alice") -> None:
    """Put credits into the account."""
    answer = await ledger.grant(grant(amount, key=f"granted-{user}-{amount}", user=user))
    assert answer.done


async def deducted(ledger: Ledger, amount: int = 10, key: str = "charge-1") -> Answer:
    """Grant 100, deduct, and be sure of it."""
    await granted(ledger)
    answer = await ledger.deduct(deduct(amount, key=key))
    assert answer.status == 201
    return answer


def file_of(ledger: Ledger) -> Path:
    """The file that a SQLite ledger is in."""
    return Path(ledger.place.removeprefix("sqlite:///"))


class InTheLoop:
    """Works in the event loop when all who are ready have asked, so that they are one group."""

    def submit(self, fn: Callable[[], Any], /) -> None:
        asyncio.get_running_loop().call_soon(fn)

    def shutdown(self, wait: bool = True) -> None: ...
