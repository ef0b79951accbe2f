"""An app that sells translations, one credit a word. Words that it does not know cost nothing."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, metered

FRENCH = {"cat": "chat", "dog": "chien", "house": "maison", "milk": "lait"}
CUSTOMERS = {"Bearer ann": Account("acme", "ann"), "Bearer bob": Account("acme", "bob")}


class Words(BaseModel):
    words: list[str]


def account_of(request: Request) -> Account | None:
    """Who pays. Your own authentication goes here; None is answered 401."""
    return CUSTOMERS.get(request.headers.get("authorization", ""))


def one_credit_a_word(body: Words) -> dict[str, int]:
    """What each word costs, by the word."""
    return dict.fromkeys(body.words, 1)


router = APIRouter()


@router.post("/translate")
@metered(cost=one_credit_a_word)
async def translate(body: Words) -> dict[str, Any]:
    return {"results": [translated(word) for word in body.words]}


def translated(word: str) -> dict[str, str]:
    if word in FRENCH:
        return {"id": word, "status": "succeeded", "text": FRENCH[word]}
    return {"id": word, "status": "failed"}


def create_app() -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    app.add_middleware(MeteredBillingMiddleware, account=account_of)
    return app
