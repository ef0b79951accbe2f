"""The app under chaos: routes of each kind, whose answers say what is to be paid."""

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, Settings, metered

Results = dict[str, list[dict[str, str]]]


def account_of(request: Request) -> Account:
    """Whoever asks is believed: this app has no customers but the storm."""
    return Account(request.headers["x-tenant"])


_settings = Settings()
# A circuit that closes again soon: while it is open nothing can go wrong.
_credits = HttpCredits(_settings.credits or "", token=_settings.token, breaker_reset_s=1)

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits=_credits, account=account_of)


@app.get("/up")
async def up() -> dict[str, bool]:
    """Free: for whoever waits until the app is up."""
    return {"up": True}


def _results(good: int) -> Results:
    return {"results": [{"id": f"i{n}", "status": "ok" if n < good else "failed"} for n in range(10)]}


@app.post("/work")
@metered(cost=lambda: {f"i{n}": 1 for n in range(10)})
async def work(good: int, seconds: float) -> Results:
    """Ten items, of which so many succeed, after so many seconds."""
    await asyncio.sleep(seconds)
    return _results(good)


@app.post("/sync")
@metered(cost=10)
def sync(good: int, seconds: float) -> Results:
    """The same in a thread."""
    return _results(good)


@app.post("/stream")
@metered(cost=10)
async def stream(good: int, seconds: float) -> StreamingResponse:
    """The same line by line."""

    async def lines() -> AsyncIterator[str]:
        for result in _results(good)["results"]:
            yield json.dumps(result) + "\n"
            await asyncio.sleep(seconds / 10)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@app.post("/raise")
@metered(cost=10)
async def broken(good: int, seconds: float) -> Results:
    """Does the work, and then raises."""
    await asyncio.sleep(seconds)
    raise RuntimeError("a bug of the app's")
