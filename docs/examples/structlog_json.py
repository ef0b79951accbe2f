"""One metered request, logged as JSON by the app's own structlog configuration."""

import asyncio
import logging
from typing import Any

import httpx
import structlog
from fastapi import FastAPI

from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered, settled

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        structlog.processors.JSONRenderer(),  # or structlog.dev.ConsoleRenderer()
    ],
    wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
)

ledger = SqlCredits("credits.db")
app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits=ledger, account=lambda: Account("acme", "ann"))


@app.post("/work")
@metered(cost=lambda: {"img-1": 1, "img-2": 1})
async def work() -> dict[str, Any]:
    return {"results": [{"id": "img-1", "status": "ok"}, {"id": "img-2", "status": "failed"}]}


async def main() -> None:
    await ledger.grant("acme", "ann", amount=10, reason="demo", idempotency_key="demo")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        await client.post("/work", headers={"X-Request-ID": "req-1"})
    await settled()
    await ledger.aclose()


asyncio.run(main())
