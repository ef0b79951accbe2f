"""Who may do what: each kind of token, on each call."""

from typing import Any

import httpx
import pytest

from .conftest import Connect

KEY = {"Idempotency-Key": "key-1"}


async def deduct(client: httpx.AsyncClient, tenant: str, key: str = "charge-1") -> httpx.Response:
    body = {"tenant_id": tenant, "amount": 10}
    return await client.post("/v1/deductions", json=body, headers={"Idempotency-Key": key})


async def grant(client: httpx.AsyncClient, tenant: str) -> httpx.Response:
    body = {"tenant_id": tenant, "amount": 100, "reason": "test"}
    return await client.post("/v1/grants", json=body, headers={"Idempotency-Key": "grant-1"})


def name(response: httpx.Response) -> str:
    return str(response.json()["type"]).removeprefix("urn:metered-billing:")


@pytest.mark.parametrize("token", ["all-token", "acme-token", "read-token", "acme-read-token"])
async def test_grant_needs_an_admin(connect: Connect, token: str) -> None:
    """A token that moves credits cannot make them."""
    response = await grant(connect(token), "acme")
    assert (response.status_code, name(response)) == (403, "forbidden")


async def test_token_of_a_tenant_works_for_that_tenant(connect: Connect, admin: httpx.AsyncClient) -> None:
    """Deduct, refund, void, look: all of it."""
    await grant(admin, "acme")
    acme = connect("acme-token")
    transaction = (await deduct(acme, "acme")).json()["transaction_id"]
    refund = {"amount": 2, "reason": "test"}
    assert (await acme.post(f"/v1/deductions/{transaction}/refunds", json=refund, headers=KEY)).status_code == 201
    assert (await acme.get(f"/v1/transactions/{transaction}")).status_code == 200
    assert (await acme.get("/v1/transactions", params={"tenant_id": "acme"})).status_code == 200
    void = {"tenant_id": "acme", "idempotency_key": "charge-1"}
    assert (await acme.post("/v1/voids", json=void)).json()["refunded"] == 8


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/deductions", {"tenant_id": "globex", "amount": 1}),
        ("POST", "/v1/voids", {"tenant_id": "globex", "idempotency_key": "k"}),
        ("GET", "/v1/balance?tenant_id=globex", None),
        ("GET", "/v1/transactions?tenant_id=globex", None),
    ],
)
async def test_another_tenant_that_is_named_is_forbidden(
    connect: Connect, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """403, whether the tenant exists or not."""
    response = await connect("acme-token").request(method, path, json=body, headers=KEY)
    assert (response.status_code, name(response)) == (403, "forbidden")


@pytest.mark.parametrize("token", ["read-token", "acme-read-token"])
async def test_token_that_reads_moves_nothing(connect: Connect, admin: httpx.AsyncClient, token: str) -> None:
    """403 to each call that would, alone and in a batch, also where the transaction is unknown; it sees all."""
    await grant(admin, "acme")
    transaction = (await deduct(admin, "acme")).json()["transaction_id"]
    reader = connect(token)
    refund = {"amount": 2, "reason": "test"}
    void = {"tenant_id": "acme", "idempotency_key": "charge-1"}
    refused = [
        await deduct(reader, "acme"),
        await deduct(reader, "acme", "new"),
        await reader.post(f"/v1/deductions/{transaction}/refunds", json=refund, headers=KEY),
        await reader.post("/v1/deductions/nope/refunds", json=refund, headers=KEY),
        await reader.post("/v1/voids", json=void),
    ]
    assert [(answer.status_code, name(answer)) for answer in refused] == [(403, "forbidden")] * 5
    operations = [
        {"op": "deduct", "tenant_id": "acme", "amount": 1, "idempotency_key": "k1"},
        {"op": "refund", "transaction_id": transaction, "amount": 1, "reason": "x", "idempotency_key": "k2"},
        {"op": "void", **void},
    ]
    answer = await reader.post("/v1/batch", json={"operations": operations})
    assert [result["status"] for result in answer.json()["results"]] == [403, 403, 403]
    assert (await reader.get("/v1/balance?tenant_id=acme")).json() == {"balance": 90}
    assert (await reader.get(f"/v1/transactions/{transaction}")).json()["refunds"] == []
    assert len((await reader.get("/v1/transactions?tenant_id=acme")).json()["items"]) == 2


async def test_token_that_reads_one_tenant_sees_no_other(connect: Connect, admin: httpx.AsyncClient) -> None:
    """As one that moves credits of one tenant."""
    await grant(admin, "globex")
    transaction = (await deduct(admin, "globex")).json()["transaction_id"]
    for token, status in (("acme-read-token", [403, 403, 404]), ("read-token", [200, 200, 200])):
        reader = connect(token)
        paths = ["balance?tenant_id=globex", "transactions?tenant_id=globex", f"transactions/{transaction}"]
        assert [(await reader.get(f"/v1/{path}")).status_code for path in paths] == status


async def test_another_tenants_transaction_is_not_found(connect: Connect, admin: httpx.AsyncClient) -> None:
    """404, as for one that does not exist, so that nobody can tell which is which."""
    await grant(admin, "globex")
    transaction = (await deduct(admin, "globex")).json()["transaction_id"]
    acme = connect("acme-token")
    refund = {"amount": 2, "reason": "test"}
    for seen, unseen in [
        (
            await acme.post(f"/v1/deductions/{transaction}/refunds", json=refund, headers=KEY),
            await acme.post("/v1/deductions/nope/refunds", json=refund, headers=KEY),
        ),
        (await acme.get(f"/v1/transactions/{transaction}"), await acme.get("/v1/transactions/nope")),
    ]:
        assert (seen.status_code, name(seen)) == (404, "not-found")
        assert (unseen.status_code, name(unseen)) == (404, "not-found")
    assert (await admin.get("/v1/balance?tenant_id=globex")).json() == {"balance": 90}


async def test_batch_of_several_tenants_does_what_the_token_may(connect: Connect, admin: httpx.AsyncClient) -> None:
    """403 and 404 for the others' operations, each for itself."""
    await grant(admin, "acme")
    await grant(admin, "globex")
    transaction = (await deduct(admin, "globex")).json()["transaction_id"]
    operations = [
        {"op": "deduct", "tenant_id": "globex", "amount": 1, "idempotency_key": "k1"},
        {"op": "void", "tenant_id": "globex", "idempotency_key": "charge-1"},
        {"op": "refund", "transaction_id": transaction, "amount": 1, "reason": "x", "idempotency_key": "k2"},
        {"op": "deduct", "tenant_id": "acme", "amount": 1, "idempotency_key": "k1"},
        {"op": "grant", "tenant_id": "acme", "amount": 1, "reason": "x", "idempotency_key": "k3"},
    ]
    response = await connect("acme-token").post("/v1/batch", json={"operations": operations})
    assert [result["status"] for result in response.json()["results"]] == [403, 403, 404, 201, 422]
    assert (await admin.get("/v1/balance?tenant_id=globex")).json() == {"balance": 90}


@pytest.mark.parametrize(
    "header",
    ["", "admin-token", "Basic admin-token", "Bearer", "Bearer ", "Bearer admin-token2", "Bearer admin", "\xff"],
)
async def test_request_without_a_known_token_is_unauthorized(connect: Connect, header: str) -> None:
    """401 on everything below /v1, whether there is such a route or not, before the body is looked at."""
    headers = {b"Authorization": header.encode("latin-1")}
    for path in ("/v1/deductions", "/v1/nope"):
        response = await connect(None).post(path, content=b"{", headers=headers)
        assert (response.status_code, name(response)) == (401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("second", ["Bearer nope", "Bearer admin-token", "Basic eDp5"])
async def test_token_sent_twice_is_none(connect: Connect, second: str) -> None:
    """Which of the two would it be? A proxy in front of it may have looked at the other."""
    headers = [("Authorization", "Bearer admin-token"), ("Authorization", second)]
    assert (await connect(None).get("/v1/balance?tenant_id=acme", headers=headers)).status_code == 401


async def test_token_scheme_is_read_in_any_case(connect: Connect) -> None:
    """RFC 9110 has it so."""
    headers = {"Authorization": "bEARER admin-token"}
    response = await connect(None).get("/v1/balance?tenant_id=acme", headers=headers)
    assert response.status_code == 200


async def test_mounted_service_still_needs_a_token(app: Any) -> None:
    """Below another app's path, nothing is left open."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    transport = httpx.ASGITransport(Starlette(routes=[Mount("/credits", app)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
        path = "/credits/v1/balance?tenant_id=acme"
        assert (await client.get(path)).status_code == 401
        headers = {"Authorization": "Bearer acme-token"}
        assert (await client.get(path, headers=headers)).status_code == 200
