"""Whether the client is there: seen where it can be seen, asked for where it cannot."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request
from opentelemetry.sdk.trace import TracerProvider
from uvicorn.protocols.http import h11_impl

from metered_billing.presence import has_left, looked_up

from .stand import Connection, Message


def cycle(**changes: Any) -> Any:
    """What uvicorn has for one request whose body has been read."""
    request: Any = h11_impl.RequestResponseCycle.__new__(h11_impl.RequestResponseCycle)
    request.__dict__.update(disconnected=False, more_body=False, body=bytearray())
    request.__dict__.update(changes)
    return request


def test_uvicorn_has_what_is_looked_up() -> None:
    """Should uvicorn call it something else one day, its `receive` is asked, and this test says why that is slow."""
    names = set(h11_impl.RequestResponseCycle.__init__.__code__.co_names)
    assert names >= {"disconnected", "more_body", "body"}


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({}, False),
        ({"disconnected": True}, True),
        ({"more_body": True}, None),
        ({"body": bytearray(b"unread")}, None),
        ({"disconnected": None}, None),
    ],
)
def test_uvicorn_is_not_asked(changes: dict[str, Any], seen: bool | None) -> None:
    """It knows; but while some of the body is unread it may have stopped reading."""
    assert looked_up(cycle(**changes).receive) is seen


async def test_uvicorn_is_seen_through_fastapis_own_telemetry() -> None:
    """FastAPI puts a function of its own around `receive` where something is traced."""
    seen: list[bool | None] = []
    app = FastAPI(telemetry={"tracer_provider": TracerProvider()})

    @app.post("/work")
    async def work(request: Request) -> None:
        await request.body()
        seen.append(looked_up(around[0]))

    around: list[Any] = []

    class Looking:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            around.append(receive)
            await self.app(scope, receive, send)

    app.add_middleware(Looking)
    connection = Connection(app, "/work")
    server = cycle(receive_one=connection.receive)
    receives = type("Server", (type(server),), {"__module__": type(server).__module__, "receive": _receive})
    server.__class__ = receives
    connection.receive = server.receive  # type: ignore[method-assign]
    await connection.run()
    assert not hasattr(around[0], "__self__")
    assert seen == [False]


async def _receive(self: Any) -> Message:
    message: Message = await self.receive_one()
    return message


async def test_queue_that_is_empty_says_nothing_of_a_client_that_left() -> None:
    """What is in it has to be looked at."""
    queue: asyncio.Queue[Message] = asyncio.Queue()
    assert looked_up(queue.get) is False
    await queue.put({"type": "http.disconnect"})
    assert looked_up(queue.get) is None
    assert await has_left(queue.get, [])


def test_any_other_server_is_asked() -> None:
    """A function, or an object, of whatever module."""

    async def receive() -> Message:
        return {}

    assert looked_up(receive) is None
    assert looked_up(Connection(None, "/").receive) is None  # type: ignore[arg-type]
