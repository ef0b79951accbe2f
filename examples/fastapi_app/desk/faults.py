"""A proxy between the app and the credits service that breaks calls as it is told, on real sockets.

While the fault is "down", or the service is, nobody listens on its port, so that the kernel refuses
connections just as it does for a process that is not there.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import h11

from .sockets import bound

Kind = Literal["none", "down", "slow", "lost reply", "500 after commit", "twice"]
Calls = Literal["next", "every"]
KINDS: Sequence[Kind] = get_args(Kind)

ANSWERED_WITHIN_S = 30.0
"""A call that the service has not answered by then is cut."""

SLOW_S = 3.0
"""Longer than the app waits for one attempt, which is 2 s; it is passed on although nobody waits any more."""

MAX_BODY_BYTES = 16 << 20
MAX_CONNECTIONS = 512

_READ = 1 << 16


@dataclass(slots=True)
class Fault:
    """What is broken, and how often that has struck since it was chosen."""

    kind: Kind = "none"
    calls: Calls = "every"
    struck: int = 0
    chosen_ns: int = field(default_factory=time.time_ns)


class FaultyProxy:
    """Passes HTTP calls on to `port`.

    Args:
        port: The credits service's, on 127.0.0.1.
        holder: Bound to the proxy's own port, and never listening: the port stays ours while it refuses connections.
        changed: Called when the fault has changed by itself.
    """

    def __init__(self, port: int, holder: socket.socket, changed: Callable[[], None] = lambda: None) -> None:
        self.fault = Fault()
        self.port: int = holder.getsockname()[1]
        self._holder = holder
        self._upstream = port
        self._changed = changed
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._service_up = False
        self._turn = asyncio.Lock()

    async def stop(self) -> None:
        """Refuse from now on, and cut what is under way."""
        async with self._turn:
            await self._shut()
        self._holder.close()

    async def choose(self, kind: Kind, calls: Calls) -> None:
        """Break calls in this way from now on; those under way are not touched, but for "down"."""
        self.fault = Fault(kind, calls)
        await self._see_to_it()

    async def service_is(self, up: bool) -> None:
        """Say whether the service answers, which it does not at first; while it does not, connections are refused."""
        if up != self._service_up:
            self._service_up = up
            await self._see_to_it()

    async def refused(self, attempts: int) -> None:
        """Say that the app was refused, in so many attempts, for one operation: only the app can know."""
        if self.fault.kind == "down" and attempts:
            self.fault.struck += attempts
            if self.fault.calls == "next":
                self.fault.kind = "none"
                await self._see_to_it()
            self._changed()

    async def _see_to_it(self) -> None:
        async with self._turn:
            if self.fault.kind == "down" or not self._service_up:
                await self._shut()
            else:
                await self._open()

    async def _open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=bound(self.port), backlog=256)

    async def _shut(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for task in list(self._calls):
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)
        await asyncio.sleep(0)  # what was cut is closed in the loop's next turn

    # One connection of the app's.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._calls) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._calls.add(task)
        try:
            await _Connection(self, reader, writer).run()
        except (OSError, TimeoutError, h11.ProtocolError, _Cut, asyncio.CancelledError):
            pass  # cut: whoever called sees a connection that ends without an answer
        finally:
            self._calls.discard(task)
            writer.transport.abort()

    def strike(self, method: bytes) -> Kind:
        """How this call is to be broken. A fault of one call is used up by it."""
        fault = self.fault
        if method != b"POST" or fault.kind in ("none", "down"):
            return "none"
        kind: Kind = fault.kind
        fault.struck += 1
        if fault.calls == "next":
            fault.kind = "none"
        self._changed()
        return kind

    async def ask(self, call: "_Call") -> "_Answer":
        """What the service answers to a call, on a connection of its own.

        Raises:
            OSError, _Cut: Nothing.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            async with asyncio.timeout(ANSWERED_WITHIN_S):
                return await self._exchange(call, reader, writer)
        finally:
            writer.transport.abort()

    async def _exchange(self, call: "_Call", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> "_Answer":
        connection = h11.Connection(h11.CLIENT)
        headers = [(name, value) for name, value in call.headers if name not in _HOP]
        headers += [(b"content-length", str(len(call.body)).encode()), (b"connection", b"close")]
        request = h11.Request(method=call.method, target=call.target, headers=headers)
        writer.write((connection.send(request) or b"") + call.body)
        connection.send(h11.Data(data=call.body))
        connection.send(h11.EndOfMessage())
        await writer.drain()
        return await _answer(connection, reader)


_HOP = frozenset({b"connection", b"keep-alive", b"content-length", b"transfer-encoding", b"te", b"upgrade", b"expect"})


@dataclass(slots=True)
class _Call:
    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(slots=True)
class _Answer:
    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


_BROKEN = _Answer(500, b"Internal Server Error", [(b"content-type", b"text/plain")], b"Internal Server Error\n")


class _Cut(Exception):
    """The connection is to end here, without an answer."""


class _Connection:
    def __init__(self, proxy: FaultyProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        while (call := await self._next_call()) is not None:
            answer = await self._deliver(call, self._proxy.strike(call.method))
            await self._reply(answer)
            if self._http.our_state is h11.MUST_CLOSE:
                return
            self._http.start_next_cycle()

    async def _next_call(self) -> _Call | None:
        """The next call on it; None when there is none."""
        request: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_READ))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_BODY_BYTES:
                    raise _Cut
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                return _Call(request.method, request.target, list(request.headers), bytes(body))
            else:
                return None

    async def _deliver(self, call: _Call, kind: Kind) -> _Answer:
        if kind == "slow":
            # Whether the caller still waits or not: it may have gone out, and arrives late.
            await asyncio.sleep(SLOW_S)
        if kind == "twice":
            await self._proxy.ask(call)
        answer = await self._proxy.ask(call)
        if kind == "lost reply":
            raise _Cut
        return _BROKEN if kind == "500 after commit" else answer

    async def _reply(self, answer: _Answer) -> None:
        headers = [(name, value) for name, value in answer.headers if name not in _HOP]
        headers.append((b"content-length", str(len(answer.body)).encode()))
        response = h11.Response(status_code=answer.status, reason=answer.reason, headers=headers)
        data = (self._http.send(response) or b"") + (self._http.send(h11.Data(data=answer.body)) or b"")
        self._writer.write(data + (self._http.send(h11.EndOfMessage()) or b""))
        await self._writer.drain()


async def _answer(connection: h11.Connection, reader: asyncio.StreamReader) -> _Answer:
    answer: _Answer | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ))
        elif isinstance(event, h11.Response):
            answer = _Answer(event.status_code, event.reason, list(event.headers), b"")
        elif isinstance(event, h11.Data) and answer is not None:
            answer.body += event.data
            if len(answer.body) > MAX_BODY_BYTES:
                raise _Cut
        elif isinstance(event, h11.EndOfMessage) and answer is not None:
            return answer
        elif not isinstance(event, h11.InformationalResponse):
            raise _Cut
