"""A metered app as users write one: at module level, its middleware configured by the environment."""

from typing import Any

from fastapi import FastAPI, Header
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, metered


class Work(BaseModel):
    images: list[str]


def one_credit_an_image(body: Work) -> dict[str, int]:
    return dict.fromkeys(body.images, 1)


def account_of(x_user: str | None = None) -> Account:
    return Account("acme", x_user)


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware)


@app.post("/work")
@metered(cost=one_credit_an_image, account=account_of)
async def work(body: Work, x_user: str | None = Header(None)) -> dict[str, Any]:
    """What begins with `bad` fails."""
    return {
        "results": [
            {"id": image, "status": "failed" if image.startswith("bad") else "succeeded"} for image in body.images
        ]
    }


TEN = {"images": ["bad-1", "bad-2", *(f"img-{number}" for number in range(8))]}
"""Two of ten fail."""
