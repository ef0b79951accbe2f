"""An app whose credits are in a service of our own."""

import os

from fastapi import FastAPI, Request
from house_credits import HouseCredits
from pydantic import BaseModel

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered


class Texts(BaseModel):
    texts: list[str]


class Result(BaseModel):
    text: str | None
    status: str


class Translated(BaseModel):
    results: list[Result]


def account_of(request: Request) -> Account:
    return Account("acme", request.headers.get("x-user"))  # in earnest: the user who is authenticated


app = FastAPI()
app.add_middleware(
    MeteredBillingMiddleware,
    credits=HttpCredits(
        os.environ["HOUSE_CREDITS_URL"], token=os.environ["HOUSE_CREDITS_KEY"], contract=HouseCredits()
    ),
    account=account_of,
)


@app.post("/translate")
@metered(cost=lambda body: len(body.texts), price=2, outcomes="$.results[*].status")
async def translate(body: Texts) -> Translated:
    return Translated(
        results=[
            Result(text=text.upper(), status="succeeded") if text else Result(text=None, status="failed")
            for text in body.texts
        ]
    )
