"""The service in this process, and clients with each kind of token."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app

TOKENS = {
    "admin-token": "admin",
    "all-token": "*",
    "acme-token": "tenant:acme",
    "read-token": "read",
    "acme-read-token": "read:tenant:acme",
}

Connect = Callable[[str | None], httpx.AsyncClient]


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    ledger = Ledger(tmp_path / "credits.db")
    yield ledger
    await ledger.close()


@pytest.fixture
def app(ledger: Ledger) -> FastAPI:
    return create_app(ledger, Tokens(TOKENS))


@pytest.fixture
async def connect(app: FastAPI) -> AsyncIterator[Connect]:
    """Make a client that holds a token."""
    async with AsyncExitStack() as stack:

        def connect(token: str | None) -> httpx.AsyncClient:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://credits", headers=headers)
            stack.push_async_callback(client.aclose)
            return client

        yield connect


@pytest.fixture
def admin(connect: Connect) -> httpx.AsyncClient:
    return connect("admin-token")
