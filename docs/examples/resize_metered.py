"""After: the route says what it costs, and what failed is read from its response."""

from fastapi import FastAPI
from resize_work import Pictures, Smalls, account_of, resized

from metered_billing import MeteredBillingMiddleware, metered

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, account=account_of)


def pictures(body: Pictures) -> int:
    return len(body.pictures)


@app.post("/resize")
@metered(cost=pictures, outcomes="$.results[*].status")
async def resize(body: Pictures) -> Smalls:
    return Smalls(results=[await resized(picture) for picture in body.pictures])
