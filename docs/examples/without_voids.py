"""A credits service that lacks two things: it has no voids, and it forgets what it declined."""

from typing import Any

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app

reference = create_app(Ledger("sqlite:///credits.db"), Tokens({"app-secret": "*", "admin-secret": "admin"}))
declined: dict[bytes, int] = {}


async def app(scope: Any, receive: Any, send: Any) -> None:
    path, headers = scope.get("path"), dict(scope.get("headers", []))
    if path == "/v1/voids":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"Not Found"})
        return
    key = headers.get(b"idempotency-key", b"")
    if path == "/v1/deductions" and key in declined:  # a new try under an old key
        headers[b"idempotency-key"] = b"%s-try-%d" % (key, declined[key])
        scope = {**scope, "headers": list(headers.items())}

    async def send_on(message: Any) -> None:
        if path == "/v1/deductions" and message.get("status") == 402:
            declined[key] = declined.get(key, 1) + 1
        await send(message)

    await reference(scope, receive, send_on)
