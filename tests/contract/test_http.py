"""The credits service's contract over HTTP, call by call. Runs against any service: see `running`."""

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


async def test_deduct_and_replay(service: Client) -> None:
    """201, then 200 with the very same answer and a header that says so."""
    await service.grant(100)
    first = await service.deduct(10)
    assert first.status_code == 201
    assert "idempotent-replayed" not in first.headers
    body = first.json()
    assert (body["tenant_id"], body["user_id"]) == (service.tenant, None)
    assert (body["amount"], body["balance"]) == (10, 90)
    again = await service.deduct(10, metadata={"attempt": "2"})
    assert (again.status_code, again.json()) == (200, body)
    assert again.headers["idempotent-replayed"] == "true"
    assert await service.balance() == 90


async def test_deduct_quoted_key_is_the_bare_key(service: Client) -> None:
    """A header as the IETF draft writes it names the same key."""
    await service.grant(100)
    assert (await service.deduct(10, key='"charge-1"')).status_code == 201
    assert (await service.deduct(10, key="charge-1")).status_code == 200


async def test_deduct_declined_is_remembered(service: Client) -> None:
    """402 with what is required and held; again 402 after a top-up."""
    for _ in range(2):
        declined = await service.deduct(10)
        assert problem(declined) == (402, "insufficient-credits")
        assert (declined.json()["required"], declined.json()["balance"]) == (10, 0)
        await service.grant(100)
    assert await service.balance() == 100


async def test_deduct_key_reused(service: Client) -> None:
    """Another payload under the same key: 422, and nothing moves."""
    await deducted(service)
    assert problem(await service.deduct(11)) == (422, "idempotency-key-reused")
    assert problem(await service.deduct(10, user_id="alice")) == (422, "idempotency-key-reused")
    assert problem(await service.grant(10, key="charge-1")) == (422, "idempotency-key-reused")
    assert await service.balance() == 90


async def test_refund_and_replay(service: Client) -> None:
    """201, then 200; items and reason make no other payload."""
    transaction = await deducted(service)
    first = await service.refund(transaction, 2, items=["img-3"])
    assert first.status_code == 201
    body = first.json()
    assert (body["transaction_id"], body["amount"], body["balance"]) == (transaction, 2, 92)
    again = await service.refund(transaction, 2, reason="other words")
    assert (again.status_code, again.json()) == (200, body)
    assert await service.balance() == 92


async def test_refund_refused(service: Client) -> None:
    """Unknown transaction, too much, a key of something else."""
    transaction = await deducted(service)
    assert problem(await service.refund(str(uuid4()), 1)) == (404, "not-found")
    assert problem(await service.refund(transaction, 11)) == (422, "refund-exceeds-deduction")
    assert problem(await service.refund(transaction, 1, key="charge-1")) == (422, "idempotency-key-reused")
    assert await service.balance() == 90


async def test_void_and_late_copies(service: Client) -> None:
    """All is back, again the same; the replay is still the first answer; a refund is refused."""
    transaction = await deducted(service)
    await service.refund(transaction, 4)
    for _ in range(2):
        void = await service.void()
        assert (void.status_code, void.json()) == (200, {"status": "voided", "refunded": 6})
    assert (await service.deduct(10)).status_code == 200
    assert (await service.refund(transaction, 4)).status_code == 200
    assert problem(await service.refund(transaction, 1, key="another")) == (409, "charge-voided")
    assert await service.balance() == 100


async def test_void_never_seen(service: Client) -> None:
    """A tombstone: the deduction gets 409, should it still arrive."""
    await service.grant(100)
    assert (await service.void()).json() == {"status": "voided", "refunded": 0}
    assert problem(await service.deduct(10)) == (409, "charge-voided")
    assert await service.balance() == 100


async def test_void_of_something_else(service: Client) -> None:
    """Another user's charge, or no charge at all: refused."""
    await deducted(service)
    assert problem(await service.void(user_id="bob")) == (422, "idempotency-key-reused")
    assert problem(await service.void(key="grant-1")) == (422, "idempotency-key-reused")


async def test_balance_of_unknown_account(service: Client) -> None:
    """0, and no error."""
    assert await service.balance() == 0
    assert await service.balance("nobody") == 0


async def test_transactions_list_and_one(service: Client) -> None:
    """Newest first, page by page; one with its refunds."""
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
    one = (await service.http.get(f"/v1/transactions/{transaction}")).json()
    assert one["id"] == transaction
    assert [refund["kind"] for refund in one["refunds"]] == ["refund", "void"]
    assert problem(await service.http.get(f"/v1/transactions/{uuid4()}")) == (404, "not-found")


async def test_batch_is_as_single_calls(service: Client) -> None:
    """In order, each with its own status; a malformed one spoils nothing, and keys are the same keys."""
    transaction = await deducted(service)
    account: dict[str, Any] = {"tenant_id": service.tenant}
    results = await service.batch(
        {"op": "deduct", "idempotency_key": "charge-1", "amount": 10, **account},
        {"op": "deduct", "idempotency_key": "charge-2", "amount": 20, **account},
        {"op": "deduct", "idempotency_key": "charge-3", "amount": 1000, **account},
        {"op": "deduct", "idempotency_key": "charge-4", "amount": "ten", **account},
        {
            "op": "refund",
            "idempotency_key": "charge-1:refund",
            "transaction_id": transaction,
            "amount": 2,
            "reason": "failed items",
        },
        {"op": "void", "idempotency_key": "charge-2", **account},
        {"op": "dance"},
    )
    assert [result["status"] for result in results] == [200, 201, 402, 422, 201, 200, 422]
    assert [result.get("replayed", False) for result in results] == [True] + [False] * 6
    assert results[3]["body"]["type"] == "urn:metered-billing:invalid-request"
    assert results[5]["body"] == {"status": "voided", "refunded": 20}
    assert (await service.refund(transaction, 2)).status_code == 200
    assert await service.balance() == 92


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


async def test_healthz(service: Client) -> None:
    """200, without a token."""
    assert (await service.http.get("/healthz", headers={"Authorization": ""})).status_code == 200
