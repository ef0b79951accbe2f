"""The service as a whole: its description, its health, its spans, its start and end."""

import asyncio
import sqlite3
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from metered_billing import names
from metered_billing.ledger import Ledger, LedgerLocked, LedgerUnavailable
from metered_billing.ledger.books import SqliteBooks
from metered_billing.service import InvalidTokens, Tokens, create_app, health

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
OTHER = TRACEPARENT.replace("4bf9", "5bf9")


async def test_create_app_without_tokens_is_refused(ledger: Ledger) -> None:
    """Nobody could call it; the sentence says how to set one."""
    with pytest.raises(InvalidTokens, match="METERED_BILLING_TOKENS"):
        create_app(ledger, Tokens({}))


async def test_lifespan_opens_and_closes_the_ledger(app: FastAPI, ledger: Ledger) -> None:
    """A ledger in use fails the start; a stopped service leaves it to the next."""
    async with app.router.lifespan_context(app):
        with pytest.raises(LedgerLocked):
            await Ledger(ledger.place).start()
    other = Ledger(ledger.place)
    await other.start()
    with pytest.raises(LedgerLocked):
        async with app.router.lifespan_context(app):
            pass
    await other.close()


class TestOpenApi:
    @pytest.fixture
    def document(self, app: FastAPI) -> dict[str, Any]:
        return app.openapi()

    async def test_every_call_of_the_contract_is_described(self, document: dict[str, Any]) -> None:
        """With what it is for."""
        described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
        assert described == {
            ("POST", "/v1/deductions"),
            ("POST", "/v1/deductions/{transaction_id}/refunds"),
            ("POST", "/v1/voids"),
            ("GET", "/v1/balance"),
            ("POST", "/v1/grants"),
            ("GET", "/v1/transactions"),
            ("GET", "/v1/transactions/{transaction_id}"),
            ("POST", "/v1/batch"),
            ("GET", "/healthz"),
            ("GET", "/livez"),
        }

    async def test_every_problem_is_described_as_a_problem(self, document: dict[str, Any]) -> None:
        """With an example of each type; FastAPI's own validation error is nowhere."""
        for path, methods in document["paths"].items():
            for operation in methods.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        assert list(response["content"]) == ["application/problem+json"], path
                        for name, example in response["content"]["application/problem+json"]["examples"].items():
                            assert example["value"]["type"] == f"urn:metered-billing:{name}"
                            assert example["value"]["status"] == int(status)
        assert "HTTPValidationError" not in document["components"]["schemas"]

    async def test_every_body_has_an_example_that_is_valid(self, document: dict[str, Any]) -> None:
        """They are what people copy."""
        from metered_billing.service import bodies

        for name in ("DeductionBody", "RefundBody", "VoidBody", "GrantBody", "BatchBody"):
            (example,) = document["components"]["schemas"][name]["examples"]
            model = getattr(bodies, name).model_validate(example)
            assert not any(isinstance(op, bodies.Malformed) for op in getattr(model, "operations", []))

    async def test_token_and_key_are_described(self, document: dict[str, Any]) -> None:
        """So that a generated client sends them."""
        deduct = document["paths"]["/v1/deductions"]["post"]
        assert deduct["security"] == [{"HTTPBearer": []}]
        (key,) = [each for each in deduct["parameters"] if each["name"] == "Idempotency-Key"]
        assert key["required"]
        assert "security" not in document["paths"]["/healthz"]["get"]


class TestTrouble:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error in /secret/path")

        monkeypatch.setattr(SqliteBooks, "held", fail)

    @pytest.mark.usefixtures("broken")
    async def test_storage_trouble_is_a_503(self, admin: httpx.AsyncClient) -> None:
        """Unknown to the client, who repeats it under the same key; and no word of our insides."""
        body = {"tenant_id": "acme", "amount": 1}
        response = await admin.post("/v1/deductions", json=body, headers={"Idempotency-Key": "k"})
        assert response.status_code == 503
        assert response.json()["type"] == "urn:metered-billing:ledger-unavailable"
        assert response.headers["retry-after"] == "1"
        assert "secret" not in response.text

    @pytest.mark.usefixtures("broken")
    async def test_storage_trouble_in_a_batch_is_every_operations(self, admin: httpx.AsyncClient) -> None:
        """They share a commit: each is unknown, to be repeated singly."""
        operations = [
            {"op": "deduct", "tenant_id": "acme", "amount": 1, "idempotency_key": "k1"},
            {"op": "void", "tenant_id": "acme", "idempotency_key": "k2"},
        ]
        response = await admin.post("/v1/batch", json={"operations": operations})
        assert [result["status"] for result in response.json()["results"]] == [503, 503]

    @pytest.mark.usefixtures("broken")
    async def test_healthz_says_that_the_ledger_is_not_well(self, admin: httpx.AsyncClient) -> None:
        """503: send requests elsewhere."""
        assert (await admin.get("/healthz")).status_code == 503

    async def test_healthz_does_not_wait_for_a_ledger_that_hangs(
        self, admin: httpx.AsyncClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """503 within its time-out."""
        monkeypatch.setattr(health, "TIMEOUT_S", 0.01)
        monkeypatch.setattr(ledger, "check", asyncio.Event().wait)
        assert (await admin.get("/healthz")).status_code == 503

    async def test_healthz_of_many_at_once_asks_the_ledger_once(
        self, admin: httpx.AsyncClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Anybody may ask, so it must cost nothing to be asked; and what is known is soon asked anew."""
        monkeypatch.setattr(health, "GOOD_FOR_S", 0.05)
        asked = 0

        async def fails() -> None:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.01)
            raise LedgerUnavailable("no disk")

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "check", fails)
            impatient = asyncio.ensure_future(admin.get("/healthz"))
            await asyncio.sleep(0)
            impatient.cancel()
            answers = await asyncio.gather(*(admin.get("/healthz") for _ in range(20)))
            assert {answer.status_code for answer in answers} == {503}
            assert (await admin.get("/healthz")).status_code == 503
            assert asked == 1
        await asyncio.sleep(0.06)
        assert (await admin.get("/healthz")).status_code == 200

    async def test_livez_does_not_ask_the_ledger(
        self, admin: httpx.AsyncClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or all would be restarted because their database is."""
        monkeypatch.setattr(ledger, "check", asyncio.Event().wait)
        assert (await admin.get("/livez")).json() == {"status": "ok"}

    async def test_bug_is_a_500_problem(self, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        """Even then."""

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(SqliteBooks, "held", fail)
        response = await admin.get("/v1/balance?tenant_id=acme")
        assert response.status_code == 500
        assert response.json()["type"] == "urn:metered-billing:internal-error"


class TestSpans:
    @pytest.fixture
    def exported(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
        yield exporter
        provider.shutdown()

    async def test_operation_is_a_span_in_the_callers_trace(
        self, admin: httpx.AsyncClient, exported: InMemorySpanExporter
    ) -> None:
        """With what was asked and what came of it."""
        headers = {"Idempotency-Key": "grant-1", "traceparent": TRACEPARENT}
        body = {"tenant_id": "acme", "user_id": "alice", "amount": 5, "reason": "x"}
        transaction = (await admin.post("/v1/grants", json=body, headers=headers)).json()["transaction_id"]
        await admin.post("/v1/grants", json=body, headers=headers)
        first, again = exported.get_finished_spans()
        assert first.name == "metered_billing.ledger.grant"
        assert trace_id(first) == TRACE_ID
        assert dict(first.attributes or {}) == {
            names.OPERATION: "grant",
            names.TENANT_ID: "acme",
            names.USER_ID: "alice",
            names.AMOUNT: 5,
            names.STATUS_CODE: 201,
            names.REPLAYED: False,
            names.TRANSACTION_ID: transaction,
            names.BALANCE: 5,
        }
        assert (again.attributes or {})[names.REPLAYED] is True

    async def test_operation_belongs_to_an_instrumented_servers_span(
        self, admin: httpx.AsyncClient, exported: InMemorySpanExporter
    ) -> None:
        """Where the server has made one, that is in the caller's trace already."""
        void = {"tenant_id": "acme", "idempotency_key": "k"}
        with trace.get_tracer("server").start_as_current_span("POST /v1/voids") as server:
            await admin.post("/v1/voids", json=void, headers={"traceparent": TRACEPARENT})
        span, _ = exported.get_finished_spans()
        assert span.parent == server.get_span_context()

    async def test_batch_has_a_span_for_each_operation(
        self, admin: httpx.AsyncClient, exported: InMemorySpanExporter
    ) -> None:
        """In its own trace, or in the batch's; what is no traceparent is nobody's."""
        account = {"tenant_id": "acme"}
        operations = [
            {"op": "deduct", "idempotency_key": "k1", "amount": 1, "traceparent": OTHER, **account},
            {"op": "void", "idempotency_key": "k2", **account},
            {"op": "void", "idempotency_key": "k3", "traceparent": "nonsense", **account},
            {"op": "dance"},
        ]
        await admin.post("/v1/batch", json={"operations": operations}, headers={"traceparent": TRACEPARENT})
        deduct, void, lost = exported.get_finished_spans()
        assert (trace_id(deduct), trace_id(void)) == (TRACE_ID.replace("4bf9", "5bf9"), TRACE_ID)
        assert trace_id(lost) not in (TRACE_ID, trace_id(deduct))
        assert (deduct.attributes or {})["error.type"] == "insufficient-credits"
        assert deduct.status.is_unset

    async def test_operation_without_an_answer_is_an_error(
        self, admin: httpx.AsyncClient, exported: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The span says so, and ends."""

        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(SqliteBooks, "voided", fail)
        await admin.post("/v1/voids", json={"tenant_id": "acme", "idempotency_key": "k"})
        (span,) = exported.get_finished_spans()
        assert not span.status.is_ok
        assert (span.attributes or {})["error.type"] == "LedgerUnavailable"


def trace_id(span: ReadableSpan) -> str:
    return format(span.context.trace_id, "032x") if span.context else ""
