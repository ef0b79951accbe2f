"""Where the commands find credits: a running service over HTTP, or a ledger that can be opened beside it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import httpx

from metered_billing.cli.failure import Failure
from metered_billing.credits.contract import segment
from metered_billing.credits.token import checked_token
from metered_billing.errors import TYPE_PREFIX
from metered_billing.ledger import Grant, Ledger, LedgerError, LedgerNotOpened

TIMEOUT_S = 10.0
"""How long one call may take in all: httpx's own limit is for each read, and a dripping answer outlasts it."""

NOT_FOUND = f"{TYPE_PREFIX}not-found"

Document = Mapping[str, Any]


class Source(Protocol):
    """Each answers with the JSON of the credits API, or raises `Failure`."""

    async def grant(self, command: Grant) -> Document: ...

    async def balance(self, tenant: str, user: str | None) -> Document: ...

    async def transactions(self, tenant: str, user: str | None, limit: int, cursor: str | None = None) -> Document: ...

    async def transaction(self, transaction_id: str) -> Document | None:
        """None where there is none."""
        ...


@asynccontextmanager
async def open_source(url: str, token: str | None) -> AsyncIterator[Source]:
    """The credits behind a URL.

    Raises:
        Failure: It is no URL of ours, or the ledger cannot be opened.
    """
    if url.startswith(("http://", "https://")):
        async with _client(url, token) as client:
            yield _Service(client)
        return
    try:
        ledger = Ledger(url)
    except ValueError as error:
        raise Failure(f"{error}; or a service: http://127.0.0.1:8080", 2) from None
    except ImportError as error:
        raise Failure(f"{error}.") from None
    try:
        await ledger.start()
        yield _Ledger(ledger)
    except LedgerError as error:
        raise Failure(f"{error}.", in_doubt=not isinstance(error, LedgerNotOpened)) from None
    finally:
        await ledger.close()


class _Service:
    """A running credits service."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def grant(self, command: Grant) -> Document:
        body = {
            "tenant_id": command.tenant_id,
            "user_id": command.user_id,
            "amount": command.amount,
            "reason": command.reason,
        }
        headers = {"Idempotency-Key": command.idempotency_key}
        return await self._call("POST", "/v1/grants", json=body, headers=headers)

    async def balance(self, tenant: str, user: str | None) -> Document:
        return await self._call("GET", "/v1/balance", params=_params(tenant_id=tenant, user_id=user))

    async def transactions(self, tenant: str, user: str | None, limit: int, cursor: str | None = None) -> Document:
        params = _params(tenant_id=tenant, user_id=user, limit=limit, cursor=cursor)
        return await self._call("GET", "/v1/transactions", params=params)

    async def transaction(self, transaction_id: str) -> Document | None:
        document = await self._call("GET", f"/v1/transactions/{segment(transaction_id)}", absent=NOT_FOUND)
        return None if document.get("type") == NOT_FOUND else document

    async def _call(self, method: str, path: str, *, absent: str | None = None, **content: Any) -> Document:
        """The JSON of the answer. `absent`: the type of a problem that is an answer, too."""
        base = self._client.base_url
        where = f"{base.scheme}://{base.netloc.decode()}"  # without a password, if the URL has one
        try:
            async with asyncio.timeout(TIMEOUT_S):
                response = await self._client.request(method, path, **content)
        except TimeoutError:
            raise Failure(f"No answer from {where} within {TIMEOUT_S:.0f} s.", in_doubt=True) from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Failure(f"No answer from {where}: {reason}.", in_doubt=True) from None
        try:
            document = response.json()
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or (
            response.status_code in (404, 405, 501) and not str(document.get("type")).startswith(TYPE_PREFIX)
        ):
            raise Failure(
                f"{where} answers {response.status_code}, and not as a credits service does. It was asked by the "
                "credits API: its URL goes without /v1, and a service behind a mapping is asked by "
                "`explain --contract` alone.",
                in_doubt=True,
            )
        if response.status_code == 401:
            raise Failure(f"{where} does not accept the token: set METERED_BILLING_TOKEN or --token.")
        if absent is not None and document.get("type") == absent:
            return document
        if not response.is_success:
            why = str(document.get("detail") or f"{where} answers {response.status_code}.")
            raise Failure(why, in_doubt=response.is_server_error)
        return document


class _Ledger:
    """A ledger that this process opens for a moment."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def grant(self, command: Grant) -> Document:
        answer = await self._ledger.grant(command)
        if not answer.done:
            raise Failure(str(answer.body["detail"]))
        return answer.body

    async def balance(self, tenant: str, user: str | None) -> Document:
        return {"balance": await self._ledger.balance(tenant, user)}

    async def transactions(self, tenant: str, user: str | None, limit: int, cursor: str | None = None) -> Document:
        page = await self._ledger.transactions(tenant, user, limit=limit, cursor=cursor)
        return {"items": list(page.items), "next_cursor": page.next_cursor}

    async def transaction(self, transaction_id: str) -> Document | None:
        return await self._ledger.transaction(transaction_id)


def _client(url: str, token: str | None) -> httpx.AsyncClient:
    try:
        secret = checked_token(token)
        if not 0 < (httpx.URL(url).port or 80) < 65_536:
            raise ValueError("the URL has a port that there is not")
        headers = {} if secret is None else {"Authorization": f"Bearer {secret.get_secret_value()}"}
        # Credits do not travel through whatever proxy the environment names.
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.InvalidURL, UnicodeEncodeError):
        raise Failure("The URL has characters that cannot be sent.", 2) from None
    except ValueError as error:
        raise Failure(f"{error}.", 2) from None


def _params(**values: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in values.items() if value is not None}
