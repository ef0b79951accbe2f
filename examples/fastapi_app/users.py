"""Who is asking: a stand-in for the app's own authentication."""

import secrets
from typing import Annotated

from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel


class User(BaseModel):
    """Somebody who is logged in."""

    tenant_id: str
    user_id: str


USERS = {
    "demo": User(tenant_id="demo", user_id="alice"),
    "tour": User(tenant_id="demo", user_id="tour"),
    "poor": User(tenant_id="demo", user_id="poor"),
}
"""By their bearer token. A real app keeps hashes of tokens, in a database."""

_bearer = HTTPBearer(auto_error=False, description="`demo`, `tour` or `poor`")


def current_user(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> User:
    """The user whose token the request carries.

    Raises:
        HTTPException: 401; there is no token, or nobody has it.
    """
    given = credentials.credentials.encode() if credentials else b""
    found = None
    for token, user in USERS.items():
        # All of them, each in constant time: how long a wrong token takes tells nothing about the right ones.
        if secrets.compare_digest(given, token.encode()):
            found = user
    if found is None:
        raise HTTPException(401, "Send `Authorization: Bearer demo`.", headers={"WWW-Authenticate": "Bearer"})
    return found


CurrentUser = Annotated[User, Depends(current_user)]
