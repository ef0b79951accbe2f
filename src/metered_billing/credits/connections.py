"""Connections to a service, for one event loop: opened when they are needed, kept, and closed."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

import httpx

MAX_REPLY_BYTES = 4 << 20
"""The longest reply that is read; a longer one is a broken one."""


class Connections:
    """Transports of one connection each, and a line for them.

    One pool for all connections loses some: httpcore forgets one that it hands to a request, or has just opened
    for it, in the very moment when the request is cancelled or gives up. One burst of timeouts with more requests
    than connections used up the whole pool, for the rest of the process's life. Here, what a request leaves other
    than with an answer is closed and thrown away.
    """

    def __init__(self, new: Callable[[], httpx.AsyncBaseTransport], connections: int) -> None:
        self._new = new
        self._free = asyncio.Semaphore(connections)
        self._idle: list[httpx.AsyncBaseTransport] = []
        self.closed = False
        self._closing = self._close_at_last()

    async def open(self) -> None:
        """Belong to this event loop from now on."""
        await anext(self._closing)

    async def aclose(self) -> None:
        """Close what is idle now, and the rest as soon as it has its answer."""
        await self._closing.aclose()

    async def _close_at_last(self) -> AsyncGenerator[None, None]:
        # At its end a loop closes the async generators that were begun on it. So nothing stays open where
        # nobody calls `aclose`, as under a TestClient without `with`.
        try:
            yield
        finally:
            self.closed = True
            while self._idle:
                await self._idle.pop().aclose()

    @contextlib.asynccontextmanager
    async def one(self, timeout_s: float) -> AsyncIterator[httpx.AsyncBaseTransport]:
        """A transport for one request, as soon as there is one to spare; first come, first served."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("all connections are busy") from None
        answered = False
        try:
            transport = self._idle.pop() if self._idle else self._new()
            try:
                yield transport
                answered = True
            finally:
                if answered and not self.closed:
                    self._idle.append(transport)
                else:
                    await transport.aclose()
        finally:
            self._free.release()


class Lent(httpx.AsyncBaseTransport):
    """A transport that is not ours to close."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self.handle_async_request = transport.handle_async_request  # type: ignore[method-assign]


class _TooLong(Exception):
    pass


class _Compressed(Exception):
    pass


async def fetch(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> tuple[int, Mapping[str, str], bytes]:
    """Send a request. Returns status, headers and body.

    Raises:
        Exception: Whatever the transport raises, or that the reply is too long or compressed.
    """
    response = await transport.handle_async_request(request)
    try:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Compressed  # we asked for none that is: a few bytes can unpack to gigabytes
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_REPLY_BYTES:
                raise _TooLong
        return response.status_code, response.headers, bytes(content)
    finally:
        await response.aclose()
