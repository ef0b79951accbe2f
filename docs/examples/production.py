"""An app as it runs in production: a credits service, probes, patience in figures."""

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from probes import probes

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered

CREDITS_URL = os.environ["METERED_BILLING_CREDITS"]
CREDITS_TOKEN = os.environ["METERED_BILLING_TOKEN"]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    gc.collect()
    gc.freeze()  # spares the garbage collector what was loaded once and stays
    yield


app = FastAPI(lifespan=lifespan)
app.include_router(probes(CREDITS_URL, CREDITS_TOKEN))
app.add_middleware(
    MeteredBillingMiddleware,  # where its journal is, METERED_BILLING_JOURNAL says
    credits=HttpCredits(
        CREDITS_URL,
        token=CREDITS_TOKEN,
        timeout_s=3,  # what a customer waits for a deduction at the most
        attempt_timeout_s=1,
    ),
    drain_timeout_s=10,  # what a shutdown waits for refunds that are under way
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
