"""What a user may see of their own credits: asked of the credits service, never kept here."""

from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import HTTPException
from pydantic import BaseModel, SecretStr

from metered_billing import Settings

from .desk.untraced import untraced
from .users import User


class Statement(BaseModel):
    """An account's balance, in credits, and its latest transactions, the newest first."""

    account: User
    balance: int
    transactions: list[dict[str, Any]]


class _Bearer(httpx.Auth):
    """The token that the app is billed with, as it is now: where it is in SSM, it may be rotated."""

    def __init__(self, settings: Settings) -> None:
        self._source = settings.token_source()

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        source = self._source
        token = source if source is None or isinstance(source, SecretStr) else source.held()
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        yield request


class Wallet:
    """Reads accounts at the credits service.

    Args:
        client: Knows the service's address and token.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator["Wallet"]:
        """A wallet at the service that the app is billed at; closed at the end of the block."""
        settings = Settings()
        async with httpx.AsyncClient(
            base_url=settings.credits or "http://127.0.0.1:8080",
            auth=_Bearer(settings),
            timeout=2,
            trust_env=False,
        ) as client:
            yield cls(client)

    async def statement(self, user: User) -> Statement:
        """What `user` has, and what became of it lately.

        Raises:
            HTTPException: 503; the credits service gives no answer.
        """
        account = {"tenant_id": user.tenant_id, "user_id": user.user_id}
        # In this order: a refund that arrives in between is missing from the list for a moment, never listed
        # and missing from the balance.
        transactions = await self._get("/v1/transactions", account | {"limit": "10"})
        balance = await self._get("/v1/balance", account)
        return Statement(account=user, balance=balance["balance"], transactions=transactions["items"])

    async def _get(self, path: str, params: dict[str, str]) -> dict[str, Any]:
        try:
            # Asked every second by every page: spans of it would hide those of the work.
            answer = await self._client.get(path, params=params, headers=untraced())
            answer.raise_for_status()
            body: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise HTTPException(503, "The credits service gives no answer.", headers={"Retry-After": "5"}) from error
        return body
