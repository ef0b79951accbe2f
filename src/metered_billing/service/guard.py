"""What stands before every route: the token, and the bound on the body. Pure ASGI; reads nothing."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metered_billing.service.problems import Problem, problem_response, unauthorized
from metered_billing.service.tokens import Access, Tokens

MAX_BODY_BYTES = 1 << 20
MAX_BATCH_BYTES = 8 << 20

ACCESS = "metered_billing.access"
"""Where the token's `Access` stands in the ASGI scope."""


class Guard:
    """Lets a request in that has a token (below /v1) and a body within bounds.

    Args:
        max_body_bytes: Of all bodies but a batch's.
        max_batch_bytes: Of a batch's.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        self.app = app
        self._tokens = tokens
        self._max_body_bytes = max_body_bytes
        self._max_batch_bytes = max_batch_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        bound = self._max_batch_bytes if path == "/v1/batch" else self._max_body_bytes
        access = self._access(headers)
        if access is None and path.startswith("/v1"):
            await problem_response(unauthorized())(scope, receive, send)
        elif _announced(headers) > bound:
            await problem_response(_too_large(bound))(scope, receive, send)
        else:
            scope[ACCESS] = access
            await self.app(scope, _bounded(receive, bound), send)

    def _access(self, headers: Headers) -> Access | None:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        return self._tokens.access(secret.strip()) if scheme.lower() == "bearer" else None


def _announced(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length[:20]) if length.isascii() and length.isdigit() else 0


def _bounded(receive: Receive, bound: int) -> Receive:
    """Count what arrives: a streamed body announces no length, and an announced one may be a lie."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > bound:
            raise _too_large(bound)
        return message

    return bounded


def _too_large(bound: int) -> Problem:
    return Problem("body-too-large", f"The body may have at most {bound} bytes.")
