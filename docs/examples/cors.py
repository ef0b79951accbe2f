"""An app whose billing headers can be read by scripts of another origin."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from metered_billing import Account, MeteredBillingMiddleware, metered

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))
app.add_middleware(  # added last, so it stands outermost: its headers are on our 402 and 503 too
    CORSMiddleware,
    allow_origins=["https://shop.example"],
    expose_headers=["Credits-Deducted", "Credits-Transaction-Id", "Credits-Refunded", "Credits-Balance", "Retry-After"],
)


@app.get("/work")
@metered(cost=1)
async def work() -> str:
    return "done"
