"""Whether the client is still there: asked just before the last byte, without waiting for an answer.

ASGI has one way to tell, `receive`, and that one waits. Giving it a few turns of the event loop is right with
every server, and costs more than all else that we do in them. So where the server is one whose own answer can be
looked up, it is looked up: uvicorn has it on the object whose `receive` we were given, and a queue (hypercorn's,
daphne's) is empty while nobody has left.
"""

import asyncio
import inspect
from typing import Any

from starlette.types import Message, Receive

TURNS = 8
"""Turns of the event loop that a `receive` is given to answer: each middleware around it takes a few."""

_MESSAGES = 100
"""How much of the request's body may be left in front of the answer."""


async def has_left(receive: Receive, scope_headers: Any) -> bool:
    """Whether the client has left, without waiting for it to."""
    left = looked_up(receive)
    if left is not None:
        return left
    if any(name == b"expect" for name, _ in scope_headers):
        return False  # asking would make the server ask for the body that nobody wanted
    for _ in range(_MESSAGES):  # what is left of the request's body comes first
        message: asyncio.Future[Message] = asyncio.ensure_future(receive())
        try:
            for _ in range(TURNS):
                if message.done():
                    break
                await asyncio.sleep(0)
        finally:
            if not message.done():
                message.cancel()
        if not message.done() or message.cancelled() or message.exception() is not None:
            return False
        if message.result()["type"] == "http.disconnect":
            return True
    return False


def looked_up(receive: Any) -> bool | None:
    """Whether the client has left, where the server's own answer can be seen; None where it has to be asked."""
    for _ in range(3):  # FastAPI's own telemetry puts a function around it that only looks on
        server = getattr(receive, "__self__", None)
        if server is not None:
            break
        receive = _inside(receive)
    if isinstance(server, asyncio.Queue):
        return False if server.empty() else None
    if not type(server).__module__.startswith("uvicorn.protocols.http."):
        return None
    left, more = getattr(server, "disconnected", None), getattr(server, "more_body", None)
    # While some of the body is unread, uvicorn may have stopped reading, and would not know.
    if more is not False or getattr(server, "body", None) != b"" or not isinstance(left, bool):
        return None
    return left


def _inside(receive: Any) -> Any:
    """The `receive` that this function of FastAPI's passes on; None for any other."""
    if not inspect.isfunction(receive) or receive.__module__ != "fastapi.telemetry._asgi":
        return None
    cells = dict(zip(receive.__code__.co_freevars, receive.__closure__ or (), strict=True))
    return cells["receive"].cell_contents if "receive" in cells else None
