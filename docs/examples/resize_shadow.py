"""In between: customers are billed by hand as before; the library does the same beside it, in a ledger of its own."""

from fastapi import FastAPI, Request
from resize_by_hand import resize
from resize_work import Pictures, Smalls, account_of

from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered

shadow = SqlCredits("sqlite:///shadow.db")


async def shadow_account_of(request: Request) -> Account:
    """Nobody may be refused for want of shadow credits, so everybody gets a million of them, once."""
    account = account_of(request)
    key = f"shadow:{account.tenant_id}:{account.user_id}"
    await shadow.grant(account.tenant_id, account.user_id, amount=1_000_000, reason="shadow", idempotency_key=key)
    return account


def pictures(body: Pictures) -> int:
    return len(body.pictures)


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits=shadow, account=shadow_account_of, journal="shadow-journal")


@app.post("/resize")
@metered(cost=pictures, outcomes="$.results[*].status")
async def resize_in_the_shadow(body: Pictures, request: Request) -> Smalls:
    return await resize(body, request)
