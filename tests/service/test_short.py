"""The short way through the service: the same answers as the routes', for less."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from starlette.types import Receive, Scope, Send

from metered_billing.ledger import Ledger
from metered_billing.runtime import Runtime
from metered_billing.service import Tokens, create_app, short
from tests.ledger.asking import InTheLoop

ACCOUNT = {"tenant_id": "acme", "user_id": "alice"}
DEDUCT = ACCOUNT | {"op": "deduct", "idempotency_key": "k1", "amount": 4}
REFUND = {"op": "refund", "idempotency_key": "k1:refund", "transaction_id": "id-1", "amount": 1, "reason": "failed"}
VOID = ACCOUNT | {"op": "void", "idempotency_key": "k1"}

Answered = tuple[int, dict[str, str], Any]


class Twins:
    """Two services that have been asked the same, one of them without the short way."""

    def __init__(self, *clients: httpx.AsyncClient) -> None:
        self._clients = clients

    async def ask(self, path: str, body: Any, token: str = "all", **headers: str) -> Answered:
        """What both have answered."""
        with pytest.MonkeyPatch.context() as patch:
            one = await self._answer(self._clients[0], path, body, token, headers)
            patch.setattr(short, "_may_be_short", lambda scope: False)
            other = await self._answer(self._clients[1], path, body, token, headers)
        assert one == other
        return one

    async def _answer(
        self, client: httpx.AsyncClient, path: str, body: Any, token: str, headers: dict[str, str]
    ) -> Answered:
        sent = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"} | headers
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post(path, content=content, headers=sent)
        return response.status_code, dict(response.headers), response.json()


def service(file: Path) -> FastAPI:
    numbers = itertools.count()
    ledger = Ledger(file, Runtime(now=lambda: 0.0, new_id=lambda: f"id-{next(numbers)}"))
    return create_app(ledger, Tokens({"all": "*", "one": "tenant:acme", "admin": "admin", "reader": "read"}))


@pytest.fixture
async def twins(tmp_path: Path) -> AsyncIterator[Twins]:
    async with AsyncExitStack() as stack:
        clients = []
        for name in ("one.db", "other.db"):
            app = service(tmp_path / name)
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app)
            clients.append(
                await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://credits"))
            )
        twins = Twins(*clients)
        body = ACCOUNT | {"amount": 10, "reason": "x"}
        await twins.ask("/v1/grants", body, "admin", **{"Idempotency-Key": "grant"})
        yield twins


async def test_story_is_told_alike(twins: Twins) -> None:
    """Done, replayed, refused, voided: status, headers and body are those of the routes."""
    key, other = {"Idempotency-Key": "k1"}, {"Idempotency-Key": '"k2"'}
    deduction = ACCOUNT | {"amount": 4, "request_id": "r", "metadata": {"route": "/ö"}}
    assert (await twins.ask("/v1/deductions", deduction, **key))[0] == 201
    assert (await twins.ask("/v1/deductions", deduction, **key))[1]["idempotent-replayed"] == "true"
    assert (await twins.ask("/v1/deductions", deduction | {"amount": 7}, **other))[0] == 402
    assert (await twins.ask("/v1/deductions", deduction, **other))[0] == 422
    refund = {"amount": 1, "reason": "failed", "items": ["a", "b"]}
    assert (await twins.ask("/v1/deductions/id-1/refunds", refund, **other))[0] == 422
    assert (await twins.ask("/v1/deductions/id-1/refunds", refund, **{"Idempotency-Key": "r1"}))[0] == 201
    assert (await twins.ask("/v1/deductions/nope/refunds", refund, **other))[0] == 404
    void = ACCOUNT | {"idempotency_key": "k1"}
    assert (await twins.ask("/v1/voids", void))[2] == {"status": "voided", "refunded": 3}
    assert (await twins.ask("/v1/deductions", deduction, **{"Idempotency-Key": "k1"}))[1].get("idempotent-replayed")
    status, _, body = await twins.ask("/v1/batch", {"operations": [DEDUCT, REFUND, VOID, DEDUCT]})
    assert (status, [result["status"] for result in body["results"]]) == (200, [200, 409, 200, 200])


async def test_tokens_open_the_same_doors(twins: Twins) -> None:
    """A token for one tenant reaches no other's credits, alone or in a batch."""
    for token, tenant in itertools.product(["all", "one", "admin", "reader", "nobody"], ["acme", "globex"]):
        account = {"tenant_id": tenant, "user_id": "alice"}
        status, _, _ = await twins.ask(
            "/v1/deductions", account | {"amount": 1}, token, **{"Idempotency-Key": f"{token}-{tenant}"}
        )
        assert (status == 403) == (token == "reader" or (token == "one" and tenant == "globex"))
        await twins.ask("/v1/voids", account | {"idempotency_key": "k"}, token)
        await twins.ask("/v1/batch", {"operations": [DEDUCT | account, VOID | account, REFUND]}, token)


ODD: list[Any] = [
    [DEDUCT | {"only_tenant": "globex"}],
    [REFUND | {"only_tenant": None}],
    [REFUND | {"access": 1}],
    [REFUND | {"items": "abc"}],
    [REFUND | {"items": None}],
    [DEDUCT | {"metadata": [["a", "b"]]}],
    [DEDUCT | {"metadata": None, "user_id": None, "request_id": None, "traceparent": None}],
    [DEDUCT | {"traceparent": 1}, VOID],
    [DEDUCT | {"traceparent": "x" * 256}, VOID],
    [DEDUCT | {"tenant_id": ["acme"]}, VOID],
    [DEDUCT | {"idempotency_key": None}, VOID],
    [DEDUCT | {"amount": True}, VOID],
    [DEDUCT | {"amount": 2**53}, VOID],
    [DEDUCT, DEDUCT, None, "deduct", VOID],
    [VOID] * 1001,
    {"0": VOID},
    None,
]


async def test_odd_batch_is_read_alike(twins: Twins) -> None:
    """What the one way takes the other takes, and what it refuses is refused in the same words."""
    for operations in ODD:
        await twins.ask("/v1/batch", {"operations": operations})
    await twins.ask("/v1/batch", {"operations": [DEDUCT], "more": 1})


@pytest.mark.parametrize("path", ["/v1/batch", "/v1/deductions/x/refunds", "/v1/deductionsx"])
async def test_odd_body_is_read_alike(twins: Twins, path: str) -> None:
    """Neither way breaks."""
    for body in (b"", b"[]", b"{", b'{"operations": [NaN]}', b"[" * 9999, b"\xff", b'"\\ud800"'):
        await twins.ask(path, body, **{"Idempotency-Key": "k1"})
    await twins.ask(path, {"operations": []}, **{"Content-Type": "text/plain"})


values: st.SearchStrategy[Any] = (
    st.sampled_from(["acme", "alice", "k1", "id-1", "", "\x00", "\ud800", "ö" * 200, 1, 0, -1, 1.0, True, None, {}, []])
    | st.text(max_size=4)
    | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none(), max_size=2)
    | st.lists(st.text(max_size=3) | st.none(), max_size=2)
)
changes = st.dictionaries(
    st.sampled_from([*DEDUCT, *REFUND, "metadata", "request_id", "items", "x"]), values, max_size=2
)
operations = st.builds(lambda operation, change: operation | change, st.sampled_from([DEDUCT, REFUND, VOID]), changes)


@settings(
    max_examples=settings().max_examples * 3 // 10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(operations, max_size=3))
async def test_anything_is_read_alike(twins: Twins, asked: list[dict[str, Any]]) -> None:
    """Whatever stands in an operation, in a batch and alone."""
    await twins.ask("/v1/batch", {"operations": asked})
    for operation in asked:
        body = {name: value for name, value in operation.items() if name not in ("op", "idempotency_key")}
        await twins.ask("/v1/deductions", body, **{"Idempotency-Key": "k9"})
        await twins.ask("/v1/voids", {name: value for name, value in operation.items() if name != "op"})


class TestWhich:
    @pytest.fixture
    def reached(self, twins: Twins, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The paths that the routes were asked for."""
        reached: list[str] = []
        call = short.ShortWay.__call__

        async def watch(self: short.ShortWay, scope: Scope, receive: Receive, send: Send) -> None:
            app = self.app

            async def note(scope: Scope, receive: Receive, send: Send) -> None:
                reached.append(scope["path"])
                await app(scope, receive, send)

            await call(short.ShortWay(note, ledger=self._ledger), scope, receive, send)

        monkeypatch.setattr(short.ShortWay, "__call__", watch)
        return reached

    async def asked(self, tmp_path: Path, reached: list[str]) -> list[str]:
        reached.clear()
        app = service(tmp_path / "third.db")
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            headers = {"Authorization": "Bearer all", "Idempotency-Key": "k3"}
            async with httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers) as client:
                await client.post("/v1/batch", json={"operations": [DEDUCT, REFUND, VOID]})
                await client.post("/v1/deductions", json=ACCOUNT | {"amount": 1})
                await client.post("/v1/deductions/x/refunds", json={"amount": 1, "reason": "x"})
                await client.post("/v1/voids", json=ACCOUNT | {"idempotency_key": "k"})
        return reached

    async def test_what_is_plain_does_not_reach_the_routes(self, tmp_path: Path, reached: list[str]) -> None:
        """None of it."""
        assert await self.asked(tmp_path, reached) == []

    async def test_what_a_server_traces_goes_by_the_routes(self, tmp_path: Path, reached: list[str]) -> None:
        """Its span takes its name from them."""
        with TracerProvider().get_tracer("server").start_as_current_span("POST"):
            assert len(await self.asked(tmp_path, reached)) == 4
        assert not trace.get_current_span().get_span_context().is_valid


async def test_requests_at_once_share_a_commit(tmp_path: Path) -> None:
    """32 deductions alone and 8 batches of 4: one group in the ledger, or two where they come a turn apart."""
    commits: list[int] = []
    ledger = Ledger(
        tmp_path / "credits.db",
        Runtime(executor=InTheLoop),
        committed=lambda operations, seconds: commits.append(operations),
    )
    app = create_app(ledger, Tokens({"all": "admin"}))
    headers = {"Authorization": "Bearer all"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers) as client:
        await client.post("/v1/grants", json=ACCOUNT | {"amount": 99, "reason": "x"}, headers={"Idempotency-Key": "g"})
        commits.clear()
        alone = [
            client.post("/v1/deductions", json=ACCOUNT | {"amount": 1}, headers={"Idempotency-Key": f"k{n}"})
            for n in range(32)
        ]
        batches = [
            client.post(
                "/v1/batch",
                json={"operations": [DEDUCT | {"amount": 1, "idempotency_key": f"b{batch}-{n}"} for n in range(4)]},
            )
            for batch in range(8)
        ]
        responses = await asyncio.gather(*alone, *batches)
    assert [response.status_code for response in responses] == [201] * 32 + [200] * 8
    assert await ledger.balance("acme", "alice") == 35
    assert sum(commits) == 40
    assert len(commits) <= 2
    await ledger.close()
