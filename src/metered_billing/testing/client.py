"""A client of an app under test: between its start-up and its shutdown, and settled after each answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

App = Callable[..., Awaitable[None]]


@asynccontextmanager
async def client_of(
    app: App,
    settled: Callable[[], Awaitable[None]],
    *,
    base_url: str,
    headers: Mapping[str, str] | None,
    raise_app_exceptions: bool,
) -> AsyncIterator[httpx.AsyncClient]:
    needs_asyncio()

    async def after(_: httpx.Response) -> None:
        await settled()

    async with (
        _lifespan(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions),
            base_url=base_url,
            headers=headers,
            event_hooks={"response": [after]},
        ) as client,
    ):
        yield client


def needs_asyncio() -> None:
    """
    Raises:
        RuntimeError: This is another event loop, trio's say, where asyncio's own error would tell nobody why.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            'billing needs asyncio\'s event loop: under anyio, add a fixture `anyio_backend` that returns "asyncio"'
        ) from None


@asynccontextmanager
async def _lifespan(app: App) -> AsyncIterator[None]:
    """Start the app and shut it down, as a server does; an app that knows nothing of that is just called."""
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}

    async def run() -> None:
        try:
            await app(scope, to_app.get, from_app.put)
        finally:
            await from_app.put({"type": "ended"})

    running = asyncio.create_task(run())
    await to_app.put({"type": "lifespan.startup"})
    answer = await from_app.get()
    if answer["type"] == "lifespan.startup.failed":
        await asyncio.wait([running])
        raise running.exception() or RuntimeError(f"the app did not start: {answer.get('message', '')}")
    ended = answer["type"] == "ended"
    if ended:
        await asyncio.wait([running])
        running.exception()  # that it has no lifespan: nobody need hear of it
    try:
        yield
    finally:
        if not ended:
            await to_app.put({"type": "lifespan.shutdown"})
            await running
