"""A database's password is in no answer, log, error or span, whatever the database says."""

import logging
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from metered_billing import Account, MeteredBillingMiddleware, metered
from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from tests.stand import lifespan

SECRET = "hunter2"

Spoil = Callable[[str], str]


def with_password(url: str) -> str:
    """The same place, with a password that the server does not ask for."""
    return re.sub(r"//([^:@/]+)(:[^@/]*)?@", rf"//\1:{SECRET}@", url)


TROUBLES: dict[str, Spoil] = {
    "no such role": lambda url: re.sub(r"//[^:@/]+:", "//ghost:", url),
    "no such database": lambda url: re.sub(r"/[^/]+$", "/nowhere", url),
    "no TLS there": lambda url: f"{url}?sslmode=require",
    "no server there": lambda url: re.sub(r"@[^/]+/", "@127.0.0.1:1/", url),
    "no such host": lambda url: re.sub(r"@[^/]+/", "@nowhere.invalid/", url),
}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_password_is_nowhere_when_the_database_refuses(
    pg_clean: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Of the service's ledger, of an app's ledger, and of its journal."""
    url = TROUBLES[trouble](with_password(pg_clean))
    assert SECRET in url
    exporter = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name, **_: tracers.get_tracer(name))
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    service = create_app(Ledger(url), Tokens({"t": "admin"}))
    transport = httpx.ASGITransport(service, raise_app_exceptions=False)
    headers = {"Authorization": "Bearer t", "Idempotency-Key": "k"}
    async with httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers) as client:
        answer = await client.post("/v1/grants", json={"tenant_id": "acme", "amount": 1, "reason": "x"})
    assert answer.status_code == 503
    seen.append(answer.text)

    @metered(cost=1)
    async def work(request: Request) -> JSONResponse:
        return JSONResponse({})

    for credits_, journal in ((url, str(tmp_path / "journal")), ("sqlite:///" + str(tmp_path / "credits.db"), url)):
        app = Starlette(routes=[Route("/work", work, methods=["POST"])])
        app.add_middleware(
            MeteredBillingMiddleware, credits=credits_, journal=journal, account=lambda request: Account("acme")
        )
        with pytest.raises(Exception) as raised:  # whatever it is
            async with lifespan(app):
                pass
        seen += traceback.format_exception(raised.value)

    logged = [record.getMessage() + "".join(_traceback(record)) for record in caplog.records]
    assert logged
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    assert spans
    assert SECRET not in "".join(seen + logged + spans)


def _traceback(record: logging.LogRecord) -> list[str]:
    return traceback.format_exception(*record.exc_info) if record.exc_info else []


async def test_password_is_nowhere_when_the_connection_is_cut(pg_clean: str, caplog: pytest.LogCaptureFixture) -> None:
    """By the server, under way."""
    ledger = Ledger(with_password(pg_clean))
    caplog.set_level(logging.DEBUG)
    service = create_app(ledger, Tokens({"t": "admin"}))
    transport = httpx.ASGITransport(service, raise_app_exceptions=False)
    headers = {"Authorization": "Bearer t"}
    seen = []
    async with httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers) as client:
        assert (await client.get("/v1/balance?tenant_id=acme")).status_code == 200
        with psycopg.connect(pg_clean, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        for number in range(3):
            answer = await client.post(
                "/v1/grants",
                json={"tenant_id": "acme", "amount": 1, "reason": "x"},
                headers={"Idempotency-Key": f"k{number}"},
            )
            seen.append(f"{answer.status_code} {answer.text}")
    await ledger.close()
    seen += [record.getMessage() + "".join(_traceback(record)) for record in caplog.records]
    assert SECRET not in "".join(seen)
