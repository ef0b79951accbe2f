"""Who pays comes from the app's own authentication, by way of a dependency."""

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, metered


class User(BaseModel):
    company: str
    name: str


USERS = {"Bearer ann": User(company="acme", name="ann"), "Bearer bob": User(company="acme", name="bob")}


def current_user(request: Request) -> User:
    user = USERS.get(request.headers.get("authorization", ""))
    if user is None:
        raise HTTPException(401, "Who are you?")
    return user


CurrentUser = Annotated[User, Depends(current_user)]


def account_of(user: User) -> Account:
    """`user` is the route's own argument of that name."""
    return Account(user.company, user.name)


def shared_pool_of(user: User) -> Account:
    return Account(user.company)


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=account_of)


@app.post("/own")
@metered(cost=1)
async def own(user: CurrentUser) -> str:
    return f"{user.name} paid"


@app.post("/shared")
@metered(cost=1, account=shared_pool_of)
async def shared(user: CurrentUser) -> str:
    return f"{user.company} paid"
