"""Route by route: one is metered, the other is still billed by hand, and none is both."""

from typing import Any

import resize_by_hand
from fastapi import APIRouter, FastAPI, Request
from resize_metered import pictures
from resize_work import Pictures, Smalls, account_of, resized

from metered_billing import MeteredBillingMiddleware, current_charge, metered

router = APIRouter()


async def deduct(request: Request, amount: int) -> str:
    """The old function, which from now on refuses to charge what is metered already."""
    try:
        charge = current_charge()
    except LookupError:  # no metered request: by hand, as before
        return await resize_by_hand.deduct(request, amount)
    raise RuntimeError(f"charge {charge.id} pays for this request already: take the billing out of its route")


@router.post("/resize")
@metered(cost=pictures, outcomes="$.results[*].status")
async def resize(body: Pictures) -> Smalls:
    return Smalls(results=[await resized(picture) for picture in body.pictures])


@router.post("/thumbnail")
async def thumbnail(request: Request) -> dict[str, Any]:
    transaction_id = await deduct(request, 1)
    return {"transaction": transaction_id}


@router.post("/both")
@metered(cost=1)
async def both(request: Request) -> dict[str, Any]:
    return {"transaction": await deduct(request, 1)}  # a slip: it is answered 500, and nothing is charged


app = FastAPI()
app.include_router(router)
app.add_middleware(MeteredBillingMiddleware, account=account_of)
