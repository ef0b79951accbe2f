"""What one would write otherwise, three times: each posts a deduction before the work and a refund after it.

They are written with care: one client for all requests, an idempotency key that survives retries, a breaker that
knows cancellation from failure. What they lack is what a journal and voids are for.
"""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pybreaker
import tenacity
from opentelemetry import trace
from opentelemetry.propagate import inject

TIMEOUT_S = 5.0

_log = logging.getLogger("app.credits")
_tracer = trace.get_tracer("app.credits")


class Rejected(Exception):
    """The service answered, and not with 200 or 201."""


class Unavailable(Exception):
    """It answered 5xx, or not at all."""


class Credits(ABC):
    """Two calls to the credits service."""

    def __init__(self, url: str, token: str, tenant: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._tenant = tenant

    async def deduct(self, key: str, user: str, amount: int) -> str:
        """The transaction's id."""
        body = {"tenant_id": self._tenant, "user_id": user, "amount": amount}
        answer = await self._post("deduct", "/v1/deductions", key, body)
        return str(answer["transaction_id"])

    async def refund(self, key: str, transaction_id: str, amount: int, items: list[str]) -> None:
        """Give some of it back."""
        body = {"amount": amount, "reason": "failed items", "items": items}
        await self._post("refund", f"/v1/deductions/{transaction_id}/refunds", key, body)

    @abstractmethod
    async def _post(self, name: str, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]: ...


class Plain(Credits):
    """httpx, and nothing else."""

    def __init__(self, url: str, token: str, tenant: str) -> None:
        super().__init__(url, token, tenant)
        self._client = httpx.AsyncClient(base_url=url, headers=self._headers, timeout=TIMEOUT_S)

    async def _post(self, name: str, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._client.post(path, json=body, headers={"Idempotency-Key": key})
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer


class _WithEverything(Credits):
    """Three attempts with exponential waits, a breaker, a span a call, a log line an operation."""

    def __init__(self, url: str, token: str, tenant: str) -> None:
        super().__init__(url, token, tenant)
        self._breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=10, throw_new_error_on_trip=False)
        self._retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(3),
            wait=tenacity.wait_exponential_jitter(0.1, 1),
            retry=tenacity.retry_if_exception_type(Unavailable),
            reraise=True,
        )

    async def _post(self, name: str, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        # A copy: a shared one keeps its state on itself.
        answer: dict[str, Any] = await self._retrying.copy()(
            self._through_breaker, self._attempt, name, path, key, body
        )
        _log.info("%s %s: %s credits of %s", name, key, body["amount"], body.get("user_id"))
        return answer

    async def _through_breaker(
        self, attempt: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any
    ) -> dict[str, Any]:
        # Awaited outside pybreaker, which takes a cancellation for a failure, and told afterwards.
        if self._breaker.current_state == pybreaker.STATE_OPEN:
            self._breaker.call(lambda: None)
        try:
            answer = await attempt(*arguments)
        except Unavailable as error:
            with contextlib.suppress(Unavailable):
                self._breaker.call(_raise, error)
            raise
        self._breaker.call(lambda: None)
        return answer

    async def _attempt(self, name: str, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Idempotency-Key": key}
        attributes = {"http.request.method": "POST", "url.full": self._url + path}
        with _tracer.start_as_current_span(
            f"credits.{name}", kind=trace.SpanKind.CLIENT, attributes=attributes
        ) as span:
            inject(headers)
            status, answer = await self._send(path, headers, body)
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                raise Unavailable(status)
            if status >= 400:
                raise Rejected(status, answer)
            return answer

    @abstractmethod
    async def _send(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, dict[str, Any]]: ...


class OverHttpx(_WithEverything):
    """Over httpx."""

    def __init__(self, url: str, token: str, tenant: str) -> None:
        super().__init__(url, token, tenant)
        self._client = httpx.AsyncClient(base_url=url, headers=self._headers, timeout=TIMEOUT_S)

    async def _send(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            response = await self._client.post(path, json=body, headers=headers)
        except httpx.TransportError as error:
            raise Unavailable(type(error).__name__) from error
        return response.status_code, response.json()


class OverAiohttp(_WithEverything):
    """Over aiohttp."""

    _session: Any = None

    async def _send(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        import aiohttp

        if self._session is None:  # it has to be made on the event loop
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            self._session = aiohttp.ClientSession(self._url, headers=self._headers, timeout=timeout)
        try:
            async with self._session.post(path, json=body, headers=headers) as response:
                return response.status, await response.json(content_type=None)
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise Unavailable(type(error).__name__) from error


def _raise(error: Exception) -> None:
    raise error
