"""A lean connection, on the parser that uvicorn uses: `HttpCredits(url, lean=True)`, with the extra `lean`.

It speaks HTTP/1.1 and keeps its connection, and it can no more than that. A call costs a third of what it costs on
httpx's engine, which counts where calls carry little. Mocks of httpx do not see it: leave it out in tests.
"""

import asyncio
import re
import ssl
from typing import cast

import httptools
import httpx

from metered_billing.credits.connections import KEEP_IDLE_S, MAX_REPLY_BYTES, Outgoing, Received, check_encoding

_INJECTED = re.compile(rb"[\x00\r\n]")
_TARGET = re.compile(rb"[\x21-\x7e]+")

MAX_HEAD_BYTES = 64 << 10


class LeanWire:
    """A `Wire`. It raises httpx's exceptions, as the others do."""

    def __init__(self, url: httpx.URL, tls: ssl.SSLContext) -> None:
        self._url = url
        self._host = url.raw_host.decode("ascii")  # as it is signed for: Python would encode some names otherwise
        self._tls = tls if url.scheme == "https" else None
        self._port = url.port or (443 if self._tls else 80)
        self._connection: _Connection | None = None

    async def send(self, request: Outgoing) -> Received:
        _check(request)
        connection = self._connection
        if connection is None or not connection.keeps():
            await self.aclose()
            connection = self._connection = await self._connect(request.connect_s)
        # In no variable of its own: the token is in it.
        received = await connection.ask(_message(request, self._url.netloc))
        check_encoding(received.headers)
        return received

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def _connect(self, within_s: float) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(within_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop), self._host, self._port, ssl=self._tls
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection in time") from error
        except OSError as error:  # TLS's errors, too
            raise httpx.ConnectError(str(error)) from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._keeps = True
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Received] | None = None
        self._idle_since = loop.time()
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._content = bytearray()
        self._left = MAX_HEAD_BYTES
        self._status = 0

    def ask(self, message: bytes) -> "asyncio.Future[Received]":
        """Send the bytes of a request; what comes of it."""
        self._answer = self._loop.create_future()
        if self._transport is None:
            self._fail("closed before it was sent")
        else:
            self._transport.write(message)
        return self._answer

    def keeps(self) -> bool:
        """Whether it can be used once more."""
        return self._keeps and self._loop.time() - self._idle_since < KEEP_IDLE_S

    def close(self) -> None:
        self._keeps = False
        if self._transport is not None and not self._loop.is_closed():
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none, by its class

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody has asked
            return
        self._left -= len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
        else:
            if self._left < 0:
                self._fail("the answer is too long")

    def connection_lost(self, error: Exception | None) -> None:
        self._keeps = False
        self._transport = None
        if error is not None:
            self._fail(str(error), httpx.ReadError)
        elif self._status and self._headers.keys().isdisjoint(("content-length", "transfer-encoding")):
            self.on_message_complete()  # where no length is given, the answer ends with the connection
        else:
            self._fail("the connection was closed")

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody has asked for a second answer; some of it may be lost already

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._left = MAX_REPLY_BYTES

    def on_body(self, data: bytes) -> None:
        self._content += data

    def on_message_complete(self) -> None:
        received = Received(self._status, self._headers, bytes(self._content))
        if 100 <= received.status < 200:  # the answer is still to come
            self._headers, self._left, self._status = {}, MAX_HEAD_BYTES, 0
            return
        self._keeps = self._keeps and self._parser.should_keep_alive()
        self._idle_since = self._loop.time()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(received)
        self._begin()

    def _fail(self, why: str, kind: type[httpx.TransportError] = httpx.RemoteProtocolError) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(kind(why))


def _check(request: Outgoing) -> None:
    """
    Raises:
        httpx.LocalProtocolError: It would say something else on the wire.
    """
    if not _TARGET.fullmatch(request.target):
        raise httpx.LocalProtocolError("a path that cannot be sent")
    if any(_INJECTED.search(value) for _, value in request.headers):
        raise httpx.LocalProtocolError("a header with a line break")


def _message(request: Outgoing, host: bytes) -> bytes:
    """The request as it goes over the wire."""
    parts = [request.method.encode("ascii"), b" ", request.target, b" HTTP/1.1\r\nHost: ", host, b"\r\n"]
    for name, value in request.headers:
        parts += (name, b": ", value, b"\r\n")
    if request.content is not None:
        parts.append(b"Content-Length: %d\r\n" % len(request.content))
    return b"".join((*parts, b"\r\n", request.content or b""))
