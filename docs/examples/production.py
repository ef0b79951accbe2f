"""An app as it runs in production: a credits service, a journal on a disk that stays, patience in figures."""

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    gc.collect()
    gc.freeze()  # spares the garbage collector what was loaded once and stays
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    MeteredBillingMiddleware,
    credits=HttpCredits(
        os.environ["CREDITS_URL"],
        token=os.environ["CREDITS_TOKEN"],
        timeout_s=3,  # what a customer waits for a deduction at the most
        attempt_timeout_s=1,
    ),
    journal=Path(os.environ["BILLING_JOURNAL"]),
    drain_timeout_s=10,  # less than what the server is given to stop
    account=lambda request: Account(request.state.tenant_id),
)


@app.middleware("http")
async def authenticate(request: Request, call_next):  # type: ignore[no-untyped-def]
    request.state.tenant_id = "acme"  # your own
    return await call_next(request)


@app.post("/work")
@metered(cost=1)
async def work() -> str:
    return "done"
