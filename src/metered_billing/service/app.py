"""The credits service as an ASGI app."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from metered_billing.ledger import Ledger
from metered_billing.service.guard import MAX_BATCH_BYTES, MAX_BODY_BYTES, Guard
from metered_billing.service.problems import handle_problems
from metered_billing.service.routes import router
from metered_billing.service.short import ShortWay
from metered_billing.service.tokens import HINT, InvalidTokens, Tokens

VERSION = "1.0.0"
"""Of the contract, not of the package."""


def create_app(
    ledger: Ledger,
    tokens: Tokens,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> FastAPI:
    """The reference credits service over a ledger.

    The ledger is opened at start-up and closed at shutdown; without a lifespan, at the first request.

    Args:
        max_body_bytes: The largest body, a batch's apart.
        max_batch_bytes: The largest body of a batch.

    Raises:
        InvalidTokens: There is no token, so nobody could call it.
    """
    if not tokens:
        raise InvalidTokens(HINT)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await ledger.start()
        try:
            yield
        finally:
            await ledger.close()

    app = FastAPI(
        title="Credits",
        version=VERSION,
        summary="Prepaid credits: deduct, refund, void, grant.",
        description="Errors are RFC 9457 problems, whose `type` is `urn:metered-billing:NAME`.",
        lifespan=lifespan,
        # The pages would fetch their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.ledger = ledger
    handle_problems(app)
    app.add_middleware(ShortWay, ledger=ledger)
    app.add_middleware(Guard, tokens=tokens, max_body_bytes=max_body_bytes, max_batch_bytes=max_batch_bytes)
    app.include_router(router)
    return app
