"""A 402 in the app's own words."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from metered_billing import Account, InsufficientCredits, MeteredBillingMiddleware, metered

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))


@app.exception_handler(InsufficientCredits)
async def too_few(request: Request, error: InsufficientCredits) -> JSONResponse:
    return JSONResponse({"error": f"You need {error.shortfall} more credits.", "buy": "/shop"}, status_code=402)


@app.post("/work")
@metered(cost=10)
async def work() -> str:
    return "done"
