"""An app for real processes: routes that take their time, on the ledger in process or a real service."""

import asyncio
import json
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.responses import StreamingResponse

from metered_billing import Account, MeteredBillingMiddleware, metered

app = FastAPI()
app.add_middleware(
    MeteredBillingMiddleware,
    account=lambda: Account("acme"),
    drain_timeout_s=float(os.environ.get("DRAIN_TIMEOUT_S", "5")),
)


@app.get("/up")
async def up() -> dict[str, bool]:
    """Free: for whoever waits until the app is up."""
    return {"up": True}


@app.post("/work")
@metered(cost=10)
async def work(good: int = 10, seconds: float = 0) -> dict[str, list[dict[str, str]]]:
    """Ten items, of which so many succeed, after so many seconds."""
    await asyncio.sleep(seconds)
    return {"results": [{"status": "ok" if number < good else "failed"} for number in range(10)]}


@app.post("/sync")
@metered(cost=10)
def sync(good: int = 10) -> dict[str, list[dict[str, str]]]:
    """The same in a thread."""
    return {"results": [{"status": "ok" if number < good else "failed"} for number in range(10)]}


@app.post("/stream")
@metered(cost=10)
async def stream(good: int = 10, seconds: float = 0) -> StreamingResponse:
    """The same line by line, so many seconds apart."""

    async def lines() -> AsyncIterator[str]:
        for number in range(10):
            yield json.dumps({"status": "ok" if number < good else "failed"}) + "\n"
            await asyncio.sleep(seconds)

    return StreamingResponse(lines(), media_type="application/x-ndjson")
