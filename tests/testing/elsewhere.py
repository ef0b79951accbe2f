"""An app in a process of its own: it serves one request, and runs until nobody writes to it any more."""

import asyncio
import sys

import httpx

from tests.stand import lifespan

from .shop import TEN, app


async def serve() -> None:
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        print((await client.post("/work", json=TEN)).status_code, flush=True)  # noqa: T201
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    asyncio.run(serve())
