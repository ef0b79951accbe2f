"""What stands before every route: the token, and bounds on bodies, rate and load. Pure ASGI; reads nothing."""

import logging
import math
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metered_billing.runtime import Runtime
from metered_billing.service.limits import Load, Rate
from metered_billing.service.problems import Problem, problem_response, unauthorized
from metered_billing.service.tokens import Token, has_expired, moment

MAX_BODY_BYTES = 1 << 20
MAX_BATCH_BYTES = 8 << 20

ACCESS = "metered_billing.access"
"""Where the token's `Access` stands in the ASGI scope."""

_log = logging.getLogger("metered_billing.service")


class Known(Protocol):
    """The tokens, as they are now."""

    def __len__(self) -> int: ...

    def find(self, secret: str) -> Token | None: ...


class Guard:
    """Lets a request in that has a token (below /v1), while it is not one too many, and a body within bounds.

    What it turns away has had no effect.

    Args:
        max_body_bytes: Of all bodies but a batch's.
        max_batch_bytes: Of a batch's.
        rate: Of each token's calls, and of the refusals of each address's; None: unbounded.
        load: Of all calls.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Known,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        rate: Rate | None = None,
        load: Load | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.app = app
        self._tokens = tokens
        self._max_body_bytes = max_body_bytes
        self._max_batch_bytes = max_batch_bytes
        self._rate = rate
        self._load = load or Load()
        self._runtime = runtime or Runtime()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        bound = self._max_batch_bytes if path == "/v1/batch" else self._max_body_bytes
        refusal = None
        if path.startswith("/v1"):
            token = self._token(headers)
            refusal = self._refusal(token, scope)
            scope[ACCESS] = None if token is None else token.access
        if refusal is None and _announced(headers) > bound:
            refusal = _too_large(bound)
        if refusal is not None:
            await problem_response(refusal)(scope, receive, send)
            return
        body = _Body(receive, bound, self._load)
        self._load.calls += 1
        try:
            await self.app(scope, body.receive, send)
        finally:
            self._load.calls -= 1
            self._load.held_bytes -= body.held_bytes

    def _token(self, headers: Headers) -> Token | None:
        sent = headers.getlist("authorization")
        if len(sent) != 1:  # of two, a proxy may have looked at the other
            return None
        scheme, _, secret = sent[0].partition(" ")
        return self._tokens.find(secret.strip()) if scheme.lower() == "bearer" else None

    def _refusal(self, token: Token | None, scope: Scope) -> Problem | None:
        """Why this call may not come in, or not now."""
        if token is None or has_expired(token, self._runtime.now()):
            wait_s = 0.0 if self._rate is None else self._rate.take(f"address {(scope.get('client') or ('',))[0]}")
            if wait_s:
                return _too_often(wait_s)
            if token is None or token.expires_at is None:
                return unauthorized()
            _log.warning("token %s is still in use, and has expired", token.id)
            return unauthorized(f"This token expired at {moment(token.expires_at)}. Use a newer one.", "invalid_token")
        wait_s = 0.0 if self._rate is None else self._rate.take(token.id)
        if wait_s:
            return _too_often(wait_s)
        return _overloaded() if self._load.calls >= self._load.max_calls else None


class _Body:
    """Counts what arrives: a streamed body announces no length, and an announced one may be a lie."""

    __slots__ = ("_bound", "_load", "_receive", "held_bytes")

    def __init__(self, receive: Receive, bound: int, load: Load) -> None:
        self._receive = receive
        self._bound = bound
        self._load = load
        self.held_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.held_bytes += size
        self._load.held_bytes += size
        if self.held_bytes > self._bound:
            raise _too_large(self._bound)
        if self._load.held_bytes > self._load.max_bytes:
            raise _overloaded()
        return message


def _announced(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length[:20]) if length.isascii() and length.isdigit() else 0


def _too_large(bound: int) -> Problem:
    return Problem("body-too-large", f"The body may have at most {bound} bytes.")


def _too_often(wait_s: float) -> Problem:
    return Problem(
        "rate-limited",
        "Too many calls with this token, or from this address without one. Nothing was done; repeat it later.",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )


def _overloaded() -> Problem:
    return Problem(
        "overloaded",
        "Too many calls are under way. Nothing was done; repeat it later.",
        headers={"Retry-After": "1"},
    )
