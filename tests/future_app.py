"""An app whose module has string annotations, some of which cannot be evaluated at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.requests import Request

from metered_billing import Account, metered

if TYPE_CHECKING:
    from decimal import Decimal

router = APIRouter(prefix="/v2")


class Prompt(BaseModel):
    text: str


def user(request: Request) -> str:
    return request.headers["x-user"]


User = Annotated[str, Depends(user)]


def words(prompt: Prompt) -> int:
    return len(prompt.text.split())


def payer(user: str) -> Account:
    return Account("acme", user)


@router.post("/{kind}/complete")
@metered(cost=words, account=payer)
async def complete(kind: str, prompt: Prompt, user: User) -> dict[str, str]:
    return {"kind": kind, "text": prompt.text, "user": user}


def money() -> Decimal | None:
    return None


@metered(cost=1)
async def unevaluated(amount: Decimal) -> None:
    """Its annotation stands under TYPE_CHECKING."""
