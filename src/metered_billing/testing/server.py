"""The reference credits service on a socket of this machine, with everything that can go wrong before it."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from metered_billing.testing.service import ReferenceService
from metered_billing.testing.wire import Request, Unanswered, Wire

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.server import ServerState
except ImportError as error:
    raise ImportError("the service on a socket needs: pip install 'metered-billing[service]'") from error

Message = MutableMapping[str, Any]


@contextlib.contextmanager
def serve(service: ReferenceService, wire: Wire) -> Iterator["Server"]:
    """It listens meanwhile."""
    server = Server(service, wire)
    try:
        yield server
    finally:
        server.down()


class Server:
    """A service that listens; also a `Switch`.

    A lost reply is a connection that closes, and no answer in time is none: whoever waits gives up by himself.
    While the service is down nobody listens.
    """

    def __init__(self, service: ReferenceService, wire: Wire) -> None:
        self._service = service
        self._wire = wire
        self._config = uvicorn.Config(
            self._app,
            interface="asgi3",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        self._state = ServerState()
        self._listening: asyncio.Server | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._config.load()
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def check(self, fault: str) -> None:
        if fault == "refused":
            raise ValueError("whoever listens refuses nobody: 'refused' is `down()` and `up()` here")

    def down(self) -> None:
        self._service.do(self._hang_up())

    def up(self) -> None:
        self._service.do(self._listen())

    async def _listen(self) -> None:
        if self._listening is None:
            loop = asyncio.get_running_loop()
            self._listening = await loop.create_server(
                lambda: _Connection(self._config, self._state, {}, loop), "127.0.0.1", self.port, reuse_address=True
            )

    async def _hang_up(self) -> None:
        listening, self._listening = self._listening, None
        if listening is None:
            return
        listening.close()
        for connection in list(self._state.connections):
            with contextlib.suppress(AttributeError):
                connection.transport.abort()
        await asyncio.sleep(0)

    async def _app(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        request = await _request(scope, receive)
        if request is None:
            return
        try:
            fate = self._wire.fate(request)
            for operation in fate.declines:
                await self._service.decline_here(operation)
            answered = None if fate.request is None else await self._service.answer_here(fate.request)
            response = fate.answer(answered)
        except Unanswered as silence:
            if silence.how != "timeout":
                scope["extensions"][_TRANSPORT].abort()
            await _until_gone(receive)
            return
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items()]
        headers = [header for header in headers if header[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(response.body)))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})


_TRANSPORT = "metered_billing.test.transport"


class _Connection(H11Protocol):
    """One that its app can break: no answer at all is nothing that ASGI knows."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_transport(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "extensions": {_TRANSPORT: transport}}, receive, send)

        self.app = with_transport


async def _request(scope: Mapping[str, Any], receive: Any) -> Request | None:
    """The whole request; None where its client has left before its end."""
    body = b""
    while True:
        message: Message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    query = scope["query_string"]
    target = scope["raw_path"].decode("ascii") + (f"?{query.decode('ascii')}" if query else "")
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return Request(scope["method"], target, headers, body)


async def _until_gone(receive: Any) -> None:
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
