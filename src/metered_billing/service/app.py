"""The credits service as an ASGI app."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from metered_billing.bounds import whole
from metered_billing.ledger import Ledger
from metered_billing.runtime import Runtime
from metered_billing.service.guard import MAX_BATCH_BYTES, MAX_BODY_BYTES, Guard, Known
from metered_billing.service.health import Health
from metered_billing.service.limits import Load, Rate
from metered_billing.service.problems import handle_problems
from metered_billing.service.routes import router
from metered_billing.service.short import ShortWay
from metered_billing.service.tokens import HINT, InvalidTokens

VERSION = "1.0.0"
"""Of the contract, not of the package."""


def create_app(
    ledger: Ledger,
    tokens: Known,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    max_calls_per_s: float | None = None,
    load: Load | None = None,
    runtime: Runtime | None = None,
) -> FastAPI:
    """The reference credits service over a ledger.

    The ledger is opened at start-up and closed at shutdown; without a lifespan, at the first request.

    Args:
        max_body_bytes: The largest body, a batch's apart.
        max_batch_bytes: The largest body of a batch.
        max_calls_per_s: What one token may make of calls, a batch being one; None: as many as it likes.
        load: What may be under way at the same time, of all tokens' calls together.
        runtime: The clock that tokens expire by, and that calls are counted by.

    Raises:
        InvalidTokens: There is no token, so nobody could call it.
        ValueError: A number cannot be right.
    """
    runtime = runtime or Runtime()
    rate = None if max_calls_per_s is None else Rate(max_calls_per_s, runtime.monotonic)
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
    app.state.health = Health(ledger)
    handle_problems(app)
    app.add_middleware(ShortWay, ledger=ledger)
    app.add_middleware(
        Guard,
        tokens=tokens,
        max_body_bytes=whole("max_body_bytes", max_body_bytes),
        max_batch_bytes=whole("max_batch_bytes", max_batch_bytes),
        rate=rate,
        load=load,
        runtime=runtime,
    )
    app.include_router(router)
    return app
