"""What the reference service does beyond what `conformance` asks of any. Runs against any service: see `running`."""

import asyncio
from typing import Any
from uuid import uuid4

import httpx
import pytest

from .running import Client

PROBLEM = "application/problem+json"


def problem(response: httpx.Response) -> tuple[int, str]:
    """A problem's status and name; it must be one of ours in every respect."""
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert body["status"] == response.status_code
    assert body["title"]
    assert body["detail"]
    prefix, _, name = body["type"].rpartition(":")
    assert prefix == "urn:metered-billing"
    return response.status_code, name


async def deducted(service: Client, amount: int = 10, key: str = "charge-1") -> str:
    """Grant 100, deduct; the transaction's id."""
    assert (await service.grant(100)).is_success
    response = await service.deduct(amount, key)
    assert response.status_code == 201
    transaction_id: str = response.json()["transaction_id"]
    return transaction_id


async def test_deduct_tells_account_amount_and_balance(service: Client) -> None:
    """And a fresh one has no word of a replay."""
    await service.grant(100)
    first = await service.deduct(10, user_id=None)
    assert first.status_code == 201
    assert "idempotent-replayed" not in first.headers
    body = first.json()
    assert (body["tenant_id"], body["user_id"]) == (service.tenant, None)
    assert (body["amount"], body["balance"]) == (10, 90)


async def test_key_of_another_operation_is_reused(service: Client) -> None:
    """Deductions, refunds, voids and grants share one namespace, and nothing moves."""
    transaction = await deducted(service)
    assert problem(await service.grant(10, key="charge-1")) == (422, "idempotency-key-reused")
    assert problem(await service.refund(transaction, 1, key="charge-1")) == (422, "idempotency-key-reused")
    assert problem(await service.void(key="grant-1")) == (422, "idempotency-key-reused")
    assert problem(await service.void(user_id="bob")) == (422, "idempotency-key-reused")
    assert await service.balance() == 90


async def test_replay_comes_before_the_void(service: Client) -> None:
    """Late copies of what was done, and voided since, are answered as they were the first time."""
    transaction = await deducted(service)
    await service.refund(transaction, 4)
    await service.void()
    assert (await service.deduct(10)).status_code == 200
    assert (await service.refund(transaction, 4)).status_code == 200
    assert problem(await service.refund(transaction, 1, key="another")) == (409, "charge-voided")
    assert await service.balance() == 100


async def test_balance_of_unknown_account(service: Client) -> None:
    """0, and no error."""
    assert await service.balance() == 0
    assert await service.balance("nobody") == 0


async def test_transactions_tell_signed_amounts_and_balances(service: Client) -> None:
    """Newest first, page by page, to a last one; and one that there is not is not found."""
    transaction = await deducted(service)
    await service.refund(transaction, 2)
    await service.void()
    page = await service.transactions(limit=3)
    assert [(entry["kind"], entry["amount"], entry["balance"]) for entry in page["items"]] == [
        ("void", 8, 100),
        ("refund", 2, 92),
        ("deduction", -10, 90),
    ]
    assert {entry["transaction_id"] for entry in page["items"]} == {transaction}
    rest = await service.transactions(cursor=page["next_cursor"])
    assert [entry["kind"] for entry in rest["items"]] == ["grant"]
    assert rest["next_cursor"] is None
    assert problem(await service.http.get(f"/v1/transactions/{uuid4()}")) == (404, "not-found")


async def test_batch_answers_what_cannot_be_read(service: Client) -> None:
    """Each with a problem of its own."""
    account: dict[str, Any] = {"tenant_id": service.tenant}
    results = await service.batch(
        {"op": "deduct", "idempotency_key": "charge-4", "amount": "ten", **account}, {"op": "dance"}
    )
    assert [result["status"] for result in results] == [422, 422]
    assert results[0]["body"]["type"] == "urn:metered-billing:invalid-request"


@pytest.mark.slow
async def test_concurrent_deductions_never_overdraw(service: Client) -> None:
    """500 at once on an account for 300 of them: 300 succeed, and the balance ends at zero."""
    await service.grant(300)
    responses = await asyncio.gather(*(service.deduct(1, key=f"charge-{number}") for number in range(500)))
    assert sorted(response.status_code for response in responses) == [201] * 300 + [402] * 200
    assert await service.balance() == 0


@pytest.mark.parametrize("amount", [0, -1, 1.5, 1.0, "1", True, None, 2**53, 10**400], ids=repr)
async def test_amount_is_a_whole_number_within_bounds(service: Client, amount: Any) -> None:
    """From 1 to 2^53-1, and nothing that merely looks like it."""
    response = await service.deduct(amount)
    assert problem(response) == (422, "invalid-request")
    assert [error["field"] for error in response.json()["errors"]] == ["amount"]


async def test_token_is_needed(service: Client) -> None:
    """401 without one, and with one that is none."""
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer nonsense"}):
        response = await service.http.get("/v1/balance?tenant_id=acme", headers=headers)
        assert problem(response)[0] == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
