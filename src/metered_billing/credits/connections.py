"""Connections to a service, for one event loop: opened when they are needed, kept, and closed."""

import asyncio
import contextlib
import math
import select
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpcore
import httpx

MAX_REPLY_BYTES = 4 << 20
"""The longest reply that is read; a longer one is a broken one."""


KEEP_IDLE_S = 5.0
"""How long a connection is kept that nobody uses, as httpx does: many servers close theirs soon after."""

NEVER_SENT = (
    httpcore.ConnectError,
    httpcore.ConnectTimeout,
    httpcore.PoolTimeout,
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
)
"""What is raised where no connection existed. After anything else the request may have gone out."""


# Neither is frozen, which would make it slow to make.


@dataclass(slots=True)
class Outgoing:
    """A request, ready to be sent.

    Attributes:
        target: The path, with its query.
        headers: All of them but `Host` and `Content-Length`.
        connect_s: How long connecting may take.
    """

    method: str
    target: bytes
    # The token is among them: it must not be shown where somebody shows variables.
    headers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    content: bytes | None
    connect_s: float


@dataclass(slots=True)
class Received:
    """An answer: the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Wire(Protocol):
    """One connection, for one request at a time."""

    async def send(self, request: Outgoing) -> Received:
        """Send the request, and read all of its answer.

        Raises:
            Exception: Whatever went wrong (see `NEVER_SENT`), or that the answer is too long or compressed.
        """
        ...

    async def aclose(self) -> None:
        """Close it. It may be used again."""
        ...


class Connections:
    """Wires of one connection each, and a line for them.

    One pool for all connections loses some: httpcore forgets one that it hands to a request, or has just opened
    for it, in the very moment when the request is cancelled or gives up. One burst of timeouts with more requests
    than connections used up the whole pool, for the rest of the process's life. Here, what a request leaves other
    than with an answer is closed and thrown away.

    Args:
        new: Makes a wire.
        connections: How many of them may be in use at the same time.
        clock: The wall clock, which goes on while the process is frozen.
    """

    def __init__(self, new: Callable[[], Wire], connections: int, clock: Callable[[], float] = time.time) -> None:
        self._new = new
        self._clock = clock
        self._used_at = -math.inf
        self._free = asyncio.Semaphore(connections)
        self._idle: list[Wire] = []
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
            await self._close_idle()

    async def _close_idle(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    def one(self, timeout_s: float) -> "_One":
        """A wire for one request, as soon as there is one to spare; first come, first served."""
        return _One(self, timeout_s)

    async def take(self, timeout_s: float) -> Wire:
        """See `one`; whoever takes it gives it back.

        Raises:
            httpx.PoolTimeout: There is none in time.
        """
        if self._free.locked():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._free.acquire()
            except TimeoutError:
                raise httpx.PoolTimeout("all connections are busy") from None
        else:
            await self._free.acquire()
        try:
            # Each wire looks how long it was idle by the loop's clock, which may have stood still with the process.
            if self._idle and abs(self._clock() - self._used_at) > KEEP_IDLE_S:
                await self._close_idle()
            return self._idle.pop() if self._idle else self._new()
        except BaseException:
            self._free.release()
            raise

    async def give_back(self, wire: Wire, answered: bool) -> None:
        """Keep it for the next, if its answer was read; close it otherwise."""
        try:
            if answered and not self.closed:
                self._idle.append(wire)
                self._used_at = self._clock()
            else:
                await wire.aclose()
        finally:
            self._free.release()


class _One:
    """`Connections.one`. A class costs less than `@asynccontextmanager`."""

    __slots__ = ("_connections", "_timeout_s", "_wire")

    def __init__(self, connections: Connections, timeout_s: float) -> None:
        self._connections = connections
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Wire:
        self._wire = await self._connections.take(self._timeout_s)
        return self._wire

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._connections.give_back(self._wire, kind is None)


class CoreWire:
    """A connection of httpx's own engine, without the pool that httpx would put before it.

    The pool's bookkeeping is most of what a call costs, and this needs none: it is one connection. Unlike httpx's
    client, it asks no proxy of the environment: those are set for other purposes.
    """

    def __init__(self, url: httpx.URL, tls: ssl.SSLContext) -> None:
        port = url.port or (443 if url.scheme == "https" else 80)
        self._origin = httpcore.Origin(url.raw_scheme, url.raw_host, port)
        self._tls = tls
        self._host = (b"Host", url.netloc)
        self._connection: httpcore.AsyncHTTPConnection | None = None

    async def send(self, request: Outgoing) -> Received:
        connection = self._connection
        if connection is None or connection.is_closed() or connection.has_expired():
            await self.aclose()
            connection = self._connection = httpcore.AsyncHTTPConnection(
                self._origin,
                ssl_context=self._tls,
                keepalive_expiry=KEEP_IDLE_S,
                network_backend=_Network(),
            )
        origin, content = self._origin, request.content
        length = [] if content is None else [(b"Content-Length", b"%d" % len(content))]
        response = await connection.handle_async_request(
            httpcore.Request(
                request.method,
                httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=request.target),
                headers=[self._host, *request.headers, *length],
                content=content,
                extensions={"timeout": {"connect": request.connect_s}},
            )
        )
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            received = Received(response.status, headers, await _read(headers, response.stream))
        finally:
            await response.aclose()
        if _has_said_more(connection):
            await self.aclose()
        return received

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()


def _has_said_more(connection: httpcore.AsyncHTTPConnection) -> bool:
    """Whether bytes came behind the answer. The engine would take them for the answer to the next request."""
    # What the engine keeps to itself; that it is still there, a test on a socket says.
    state = getattr(getattr(connection, "_connection", None), "_h11_state", None)
    return state is not None and bool(state.trailing_data[0])


class _Network(httpcore.AnyIOBackend):
    """The engine's own, which writes each request in one piece."""

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await super().connect_tcp(*args, **options))


class _Stream(httpcore.AsyncNetworkStream):
    """Holds what it is to write until somebody waits for the answer.

    The engine writes a request's head and its body one after the other, each at the price of a system call.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._socket = stream.get_extra_info("socket")
        self._unwritten = b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unwritten += buffer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unwritten:
            buffer, self._unwritten = self._unwritten, b""
            # A service may answer and close before it has read all: as the engine does, look whether it has.
            with contextlib.suppress(httpcore.WriteError):
                await self._stream.write(buffer, timeout)
        return await self._stream.read(max_bytes, timeout)

    async def start_tls(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(*args, **options))

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable" and hasattr(select, "poll"):
            return self._is_readable()
        return self._stream.get_extra_info(info)

    def _is_readable(self) -> bool:
        """Whether something has come that nobody has asked for, such as the end. The engine's way, but quicker."""
        number = self._socket.fileno()
        if number < 0:  # closed
            return True
        poll = select.poll()
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))


class LentWire:
    """A transport of the user's own, which is not ours to close."""

    def __init__(self, url: httpx.URL, transport: httpx.AsyncBaseTransport) -> None:
        self._url = url
        self._transport = transport

    async def send(self, request: Outgoing) -> Received:
        response = await self._transport.handle_async_request(
            httpx.Request(
                request.method,
                self._url.copy_with(raw_path=request.target),
                content=request.content,
                headers=list(request.headers),
                extensions={"timeout": httpx.Timeout(None, connect=request.connect_s).as_dict()},
            )
        )
        try:
            return Received(response.status_code, response.headers, await _read(response.headers, response.stream))
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        pass


class _TooLong(Exception):
    pass


class _Compressed(Exception):
    pass


def check_encoding(headers: Mapping[str, str]) -> None:
    """Refuse a compressed answer: we asked for none, and a few bytes can unpack to gigabytes."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _Compressed


async def _read(headers: Mapping[str, str], stream: object) -> bytes:
    check_encoding(headers)
    if not isinstance(stream, AsyncIterable):
        raise TypeError("the transport is not asynchronous")
    content = bytearray()
    async for chunk in stream:
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise _TooLong
    return bytes(content)
