"""Whatever is sent, the answer is a problem that says what is wrong: never a 500, and nothing moves."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from metered_billing.service.bodies import KEY_HEADER, idempotency_key

from .conftest import Connect

GOOD = {"tenant_id": "acme", "user_id": "alice", "amount": 1}
HEADERS = {"Idempotency-Key": "key-1", "Content-Type": "application/json"}


def problem(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    return response.status_code, body["type"].removeprefix("urn:metered-billing:")


def fields(response: httpx.Response) -> list[str]:
    return [error["field"] for error in response.json()["errors"]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"tenant_id": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"amount": ' + b"9" * 10_000 + b"}",
        b"null",
        b"[]",
        b'"text"',
        b"NaN",
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("path", ["/v1/deductions", "/v1/deductions/t/refunds", "/v1/voids", "/v1/grants", "/v1/batch"])
async def test_body_that_is_no_object(admin: httpx.AsyncClient, path: str, body: bytes) -> None:
    """400 for what is no JSON, 422 for other JSON; both are `invalid-request`."""
    response = await admin.post(path, content=body, headers=HEADERS)
    status, name = problem(response)
    assert (status in (400, 422), name) == (True, "invalid-request")
    assert fields(response) == ["body"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tenant_id": ""}, "tenant_id"),
        ({"tenant_id": "x" * 256}, "tenant_id"),
        ({"tenant_id": "a\nb"}, "tenant_id"),
        ({"tenant_id": "a\x00b"}, "tenant_id"),
        ({"tenant_id": "\ud800"}, "tenant_id"),
        ({"tenant_id": 7}, "tenant_id"),
        ({"tenant_id": None}, "tenant_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": ["alice"]}, "user_id"),
        ({"request_id": "a\x1bb"}, "request_id"),
        ({"amount": 1.0}, "amount"),
        ({"amount": True}, "amount"),
        ({"amount": "1"}, "amount"),
        ({"metadata": "text"}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": {"b": "c"}}}, "metadata.a"),
        ({"metadata": {"a": "x" * 2048}}, "metadata"),
        ({"metadata": {"a": "\x00"}}, "metadata"),
        ({"metadata": {"\udfff": "a"}}, "metadata"),
        ({"user": "alice"}, "user"),
        ({"\ud800": 1}, "body"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_field_that_is_wrong_is_named(admin: httpx.AsyncClient, change: dict[str, Any], field: str) -> None:
    """One error, for the field that is wrong; a misspelt field is wrong too."""
    response = await admin.post("/v1/deductions", content=json.dumps(GOOD | change), headers=HEADERS)
    assert problem(response) == (422, "invalid-request")
    assert fields(response) == [field]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"reason": ""}, "reason"),
        ({"reason": "x" * 2001}, "reason"),
        ({"reason": "\x00"}, "reason"),
        ({"reason": None}, "reason"),
        ({"items": ["x"] * 1001}, "items"),
        ({"items": ["x" * 256]}, "items.0"),
        ({"items": ["x", 1]}, "items.1"),
        ({"items": {"x": 1}}, "items"),
    ],
)
async def test_refund_field_that_is_wrong_is_named(
    admin: httpx.AsyncClient, change: dict[str, Any], field: str
) -> None:
    """Items and reason are bounded."""
    body = {"amount": 1, "reason": "test"} | change
    response = await admin.post("/v1/deductions/t/refunds", json=body, headers=HEADERS)
    assert problem(response) == (422, "invalid-request")
    assert fields(response) == [field]


@pytest.mark.parametrize("key", [None, "", '""', '"', '"a', "a b", '"a b"', "é", "x" * 256, '"a";p=1', '"a\\b"', "\t"])
async def test_idempotency_key_header_that_is_wrong(admin: httpx.AsyncClient, key: str | None) -> None:
    """Missing, empty, too long, unquoted half-way or not visible ASCII: 422, naming the header."""
    headers = [] if key is None else [(b"Idempotency-Key", key.encode("latin-1"))]
    response = await admin.post("/v1/deductions", json=GOOD, headers=headers)
    assert problem(response) == (422, "invalid-request")
    assert fields(response) == ["Idempotency-Key"]


async def test_idempotency_key_header_sent_twice_is_refused(admin: httpx.AsyncClient) -> None:
    """Which of the two would it be?"""
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    response = await admin.post("/v1/deductions", json=GOOD, headers=headers)
    assert fields(response) == ["Idempotency-Key"]


@pytest.mark.parametrize(
    ("value", "key"), [("abc", "abc"), ('"abc"', "abc"), (' "a\\"b\\\\c" ', 'a"b\\c'), ('a"b', 'a"b')]
)
def test_idempotency_key_bare_or_quoted(value: str, key: str) -> None:
    """A structured field's string, unescaped, or what stands there."""
    assert idempotency_key([value]) == key


@given(value=st.from_regex(KEY_HEADER) | st.text('"\\a !~', max_size=5))
def test_idempotency_key_is_described_as_it_is_read(value: str) -> None:
    """By the pattern in the description, no more and no less; spaces around it are the header's, not the key's."""
    described = re.fullmatch(KEY_HEADER, value.strip(" \t")) is not None
    try:
        idempotency_key([value])
    except ValueError:
        assert not described
    else:
        assert described


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "tenant_id"),
        ("tenant_id=", "tenant_id"),
        ("tenant_id=%00", "tenant_id"),
        ("tenant_id=acme&user_id=%0a", "user_id"),
        ("tenant_id=acme&limit=0", "limit"),
        ("tenant_id=acme&limit=1001", "limit"),
        ("tenant_id=acme&limit=ten", "limit"),
        ("tenant_id=acme&cursor=nonsense", "cursor"),
        ("tenant_id=acme&cursor=%ff", "cursor"),
        ("tenant_id=acme&user=alice", "user"),
        ("tenant_id=acme&=", ""),
        ("tenant_id=acme&tenant_id=globex", "tenant_id"),
    ],
)
async def test_query_that_is_wrong_is_named(admin: httpx.AsyncClient, query: str, field: str) -> None:
    """As for bodies."""
    response = await admin.get(f"/v1/transactions?{query}")
    assert problem(response) == (422, "invalid-request")
    assert fields(response) == [field]


@pytest.mark.parametrize("path", ["/v1/deductions", "/v1/deductions/t/refunds", "/v1/voids", "/v1/grants", "/v1/batch"])
async def test_query_of_a_post_is_refused(admin: httpx.AsyncClient, path: str) -> None:
    """It would be ignored, and the shared pool be charged for a user."""
    response = await admin.post(f"{path}?user_id=alice", json=GOOD, headers=HEADERS)
    assert problem(response) == (422, "invalid-request")
    assert fields(response) == ["user_id"]


async def test_health_may_be_asked_anyhow(connect: Connect) -> None:
    """Whoever looks after it may add what keeps his question out of caches."""
    assert (await connect(None).get("/healthz?at=1700000000")).status_code == 200


async def test_route_that_is_unknown_is_not_taken_for_a_refusal(admin: httpx.AsyncClient) -> None:
    """404 and 405 have names of their own: a wrong address is not an unknown transaction."""
    assert problem(await admin.get("/nope")) == (404, "no-such-route")
    assert problem(await admin.post("/v1/nope")) == (404, "no-such-route")
    assert problem(await admin.post("/v1/balance/")) == (404, "no-such-route")
    response = await admin.get("/v1/deductions")
    assert problem(response) == (405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


class TestBounds:
    @pytest.mark.parametrize(("path", "bound"), [("/v1/deductions", 1 << 20), ("/v1/batch", 8 << 20)])
    async def test_body_announced_too_large(self, admin: httpx.AsyncClient, path: str, bound: int) -> None:
        """413 by its length alone; one at the bound is read."""
        assert problem(await admin.post(path, content=b" " * (bound + 1))) == (413, "body-too-large")
        assert problem(await admin.post(path, content=b" " * bound, headers=HEADERS))[0] == 400

    async def test_body_streamed_too_large(self, admin: httpx.AsyncClient) -> None:
        """Counted as it comes: no length was announced."""

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 65_536

        response = await admin.post("/v1/deductions", content=endless(), headers=HEADERS)
        assert problem(response) == (413, "body-too-large")

    async def test_bounds_can_be_chosen(self, ledger: Ledger) -> None:
        """For a service behind narrower doors."""
        app = create_app(ledger, Tokens({"t": "*"}), max_body_bytes=10, max_batch_bytes=20)
        headers = {"Authorization": "Bearer t"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://credits", headers=headers
        ) as client:
            assert problem(await client.post("/v1/voids", content=b" " * 11))[0] == 413
            assert problem(await client.post("/v1/batch", content=b" " * 21))[0] == 413

    async def test_batch_of_too_many(self, admin: httpx.AsyncClient) -> None:
        """1,000 operations go into one, and nothing is done of more."""
        operation = {"op": "void", "tenant_id": "acme"}
        operations = [operation | {"idempotency_key": f"k{n}"} for n in range(1001)]
        response = await admin.post("/v1/batch", json={"operations": operations})
        assert problem(response) == (422, "invalid-request")
        response = await admin.post("/v1/batch", json={"operations": operations[:1000]})
        assert {result["status"] for result in response.json()["results"]} == {200}


@pytest.mark.parametrize(
    ("operation", "field"),
    [
        (None, "body"),
        ([], "body"),
        ({}, "op"),
        ({"op": "grant"}, "op"),
        ({"op": ["deduct"]}, "op"),
        ({"op": "void", "tenant_id": "acme"}, "idempotency_key"),
        ({"op": "void", "tenant_id": "acme", "idempotency_key": "a b"}, "idempotency_key"),
        ({"op": "deduct", "idempotency_key": "k"} | GOOD | {"amount": True}, "amount"),
        ({"op": "deduct", "idempotency_key": "k"} | GOOD | {"metadata": {"\udfff": "x"}}, "metadata"),
        ({"op": "deduct", "idempotency_key": "k", "\ud800": 1} | GOOD, "body"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_batch_operation_that_is_malformed(admin: httpx.AsyncClient, operation: Any, field: str) -> None:
    """It gets its own 422, and its neighbours go through."""
    good = {"op": "void", "tenant_id": "acme", "idempotency_key": "k2"}
    body = json.dumps({"operations": [good, operation, good]})
    response = await admin.post("/v1/batch", content=body, headers=HEADERS)
    results = response.json()["results"]
    assert [result["status"] for result in results] == [200, 422, 200]
    assert [error["field"] for error in results[1]["body"]["errors"]] == [field]


async def test_batch_of_nothing(admin: httpx.AsyncClient) -> None:
    """Is done at once."""
    assert (await admin.post("/v1/batch", json={"operations": []})).json() == {"results": []}


FIELDS = [
    *("tenant_id", "user_id", "amount", "reason", "items", "metadata", "request_id", "idempotency_key"),
    *("operations", "op", "transaction_id"),
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
bodies = st.dictionaries(
    st.sampled_from(FIELDS) | st.text(st.characters(), max_size=5),
    json_values | st.lists(json_values, max_size=3),
    max_size=8,
)


@settings(
    max_examples=settings().max_examples * 3 // 2,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from(["/v1/deductions", "/v1/deductions/t/refunds", "/v1/voids", "/v1/grants", "/v1/batch"]),
    body=bodies | json_values,
)
async def test_anything_is_answered(app: FastAPI, path: str, body: Any) -> None:
    """Any JSON at all: an answer of the contract, never a 500."""
    transport = httpx.ASGITransport(app)
    headers = HEADERS | {"Authorization": "Bearer admin-token"}
    async with httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers) as client:
        response = await client.post(path, content=json.dumps(body))
    assert response.status_code in (200, 201, 400, 402, 404, 409, 422), response.text


async def test_anybody_may_look_at_health_and_description(connect: Connect) -> None:
    """A client without a token may ask for nothing but health and the API's description."""
    anybody = connect(None)
    assert (await anybody.get("/healthz")).json() == {"status": "ok"}
    assert (await anybody.get("/openapi.json")).status_code == 200
