"""What the app sells: pictures made small."""

from fastapi import Request
from pydantic import BaseModel

from metered_billing import Account


class Pictures(BaseModel):
    pictures: list[str]


class Small(BaseModel):
    picture: str
    status: str


class Smalls(BaseModel):
    results: list[Small]


async def resized(picture: str) -> Small:
    if picture == "bomb":
        raise RuntimeError("the worker died")
    return Small(picture=picture, status="failed" if picture == "broken" else "succeeded")


def account_of(request: Request) -> Account:
    return Account("acme", request.headers.get("x-user", "ann"))  # in earnest: the user who is authenticated
