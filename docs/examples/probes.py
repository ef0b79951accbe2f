"""Two probes for an orchestrator: does this process live, and may it be sent requests?"""

import httpx
from fastapi import APIRouter, Response


def probes(credits_url: str, token: str, *, tenant_id: str = "readiness-probe") -> APIRouter:
    """Routes that are free, to be included in the app.

    Args:
        tenant_id: Whose balance is asked for, where the token is for one tenant only.
    """
    router = APIRouter(include_in_schema=False)
    seen: list[str] = []  # that this process can charge

    @router.get("/livez")
    async def livez() -> str:
        """200 as long as the event loop turns."""
        return "lives"

    @router.get("/readyz")
    async def readyz(response: Response) -> str:
        """200 from the moment on that the credits service has told it a balance, which moves nothing.

        A wrong address or token thus never gets into the rotation. Afterwards it is not asked again: an outage that
        all instances see alike would take all of them out, and with them the routes that are free.
        """
        if not seen:
            why = await _asked(credits_url, token, tenant_id)
            if why is not None:
                response.status_code = 503
                return f"cannot charge: {why}"
            seen.append("once")
        return "ready"

    return router


async def _asked(credits_url: str, token: str, tenant_id: str) -> str | None:
    """Why the credits service does not tell a balance; None if it does."""
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with httpx.AsyncClient(timeout=2, trust_env=False, headers=headers) as client:
            answer = await client.get(f"{credits_url.rstrip('/')}/v1/balance", params={"tenant_id": tenant_id})
    except (httpx.TransportError, httpx.InvalidURL) as error:
        return type(error).__name__
    return None if answer.status_code == 200 else f"HTTP {answer.status_code}"
