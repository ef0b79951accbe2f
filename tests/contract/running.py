"""A credits service to hold to the contract: in this process, on a real socket, or anybody's.

    CONFORMANCE_URL=https://credits.example CONFORMANCE_TOKEN=… pytest tests/contract

runs the same tests against a service of your own. Its token must be allowed to grant; every test uses a
tenant of its own, and leaves its entries behind.
"""

import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import httpx
import uvicorn

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app

ADMIN = "an-admins-token"
ACME = "acmes-token"

TOKENS = {ADMIN: "admin", ACME: "tenant:acme", "everyones-token": "*"}

EXTERNAL_URL = os.environ.get("CONFORMANCE_URL")


class Client:
    """The contract's calls, in short."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.tenant = f"tenant-{uuid4()}"

    async def grant(self, amount: int = 100, key: str = "grant-1", **body: Any) -> httpx.Response:
        return await self._post("/v1/grants", {"amount": amount, "reason": "test", **body}, key)

    async def deduct(self, amount: int = 10, key: str = "charge-1", **body: Any) -> httpx.Response:
        return await self._post("/v1/deductions", {"amount": amount, **body}, key)

    async def refund(
        self, transaction_id: str, amount: int = 2, key: str = "charge-1:refund", **body: Any
    ) -> httpx.Response:
        body = {"amount": amount, "reason": "failed items", **body}
        path = f"/v1/deductions/{transaction_id}/refunds"
        return await self.http.post(path, json=body, headers={"Idempotency-Key": key})

    async def void(self, key: str = "charge-1", **body: Any) -> httpx.Response:
        return await self._post("/v1/voids", {"idempotency_key": key, **body}, None)

    async def batch(self, *operations: dict[str, Any]) -> list[dict[str, Any]]:
        response = await self.http.post("/v1/batch", json={"operations": operations})
        assert response.status_code == 200, response.text
        results: list[dict[str, Any]] = response.json()["results"]
        return results

    async def balance(self, user_id: str | None = None) -> int:
        params = {"tenant_id": self.tenant} | ({} if user_id is None else {"user_id": user_id})
        response = await self.http.get("/v1/balance", params=params)
        assert response.status_code == 200, response.text
        balance: int = response.json()["balance"]
        return balance

    async def transactions(self, **params: Any) -> dict[str, Any]:
        response = await self.http.get("/v1/transactions", params={"tenant_id": self.tenant, **params})
        assert response.status_code == 200, response.text
        page: dict[str, Any] = response.json()
        return page

    async def _post(self, path: str, body: dict[str, Any], key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.http.post(path, json={"tenant_id": self.tenant, **body}, headers=headers)


@contextlib.asynccontextmanager
async def in_process(place: str) -> AsyncIterator[httpx.AsyncClient]:
    """The reference service, called without a network."""
    ledger = Ledger(place)
    transport = httpx.ASGITransport(create_app(ledger, Tokens(TOKENS)))
    async with httpx.AsyncClient(transport=transport, base_url="http://credits", headers=bearer(ADMIN)) as http:
        yield http
    await ledger.close()


@contextlib.contextmanager
def on_a_socket(place: str) -> Iterator[str]:
    """The reference service under a real uvicorn; its URL."""
    config = uvicorn.Config(create_app(Ledger(place), Tokens(TOKENS)), port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RuntimeError("the service did not start")
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
