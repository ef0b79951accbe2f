"""Three ways to say what failed: a path, a function, and from inside the route."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, current_charge, metered


class Images(BaseModel):
    images: list[str]


def one_each(body: Images) -> dict[str, int]:
    return dict.fromkeys(body.images, 1)


def which_are_there(returned: dict[str, Any], body: Images) -> dict[str, bool]:
    return {image: image in returned["urls"] for image in body.images}


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))


@app.post("/by-path")
@metered(cost=one_each, outcomes="$.report.images[*]")
async def by_path(body: Images) -> dict[str, Any]:
    return {"report": {"images": [{"id": image, "status": 200 if works(image) else 500} for image in body.images]}}


@app.post("/by-function")
@metered(cost=one_each, outcomes=which_are_there)
async def by_function(body: Images) -> dict[str, Any]:
    return {"urls": {image: f"/{image}.png" for image in body.images if works(image)}}


@app.post("/by-hand")
@metered(cost=one_each)
async def by_hand(body: Images) -> dict[str, Any]:
    charge = current_charge()
    for image in body.images:
        if not works(image):
            charge.fail(image)
    return {"charge": "done"}


def works(image: str) -> bool:
    return not image.startswith("x")
