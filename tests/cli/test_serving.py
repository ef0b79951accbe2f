"""`metered-billing serve` against clients that send too much, or too slowly: on both of uvicorn's engines."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from metered_billing.cli import serving
from metered_billing.cli.serving import PatientServer, bounded_http

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"

Connect = Callable[[], socket.socket]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    if scope["path"] != "/refused":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(params=["httptools", "h11"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """A real server, whose seconds are tenths."""
    monkeypatch.setattr(serving, "HEAD_WITHIN_S", 3)
    monkeypatch.setattr(serving, "BODY_WITHIN_S", 6)
    monkeypatch.setattr(serving, "_LOOK_EACH_TICKS", 1)
    http = bounded_http() if request.param == "httptools" else "h11"
    config = uvicorn.Config(app, port=0, http=http, ws="none", lifespan="off", log_config=None)
    server = PatientServer(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join, 10)
        stack.callback(setattr, server, "should_exit", True)
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (listening,) = server.servers[0].sockets

        def connect() -> socket.socket:
            connection = stack.enter_context(socket.create_connection(listening.getsockname()))
            connection.settimeout(10)
            return connection

        yield connect


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side closes; empty if it is reset."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(65_536):
            got += more
    return got


@pytest.mark.parametrize(
    "said", [b"", b"POST /", HEAD, HEAD + b"X: y"], ids=["nothing", "a word", "half a head", "half a line"]
)
def test_head_that_never_ends_is_closed(connect: Connect, said: bytes) -> None:
    """Also one that goes on a little at a time; a request in between is answered."""
    connection, other = connect(), connect()
    began = time.monotonic()
    connection.sendall(said)
    with contextlib.suppress(ConnectionError):
        for _ in range(3):
            time.sleep(0.05)
            connection.sendall(b"a" if said else b"")
    other.sendall(HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
    assert answer(other).endswith(b"ok")
    assert answer(connection) == b""
    assert 0.2 < time.monotonic() - began < 5


def test_body_that_never_ends_is_closed(connect: Connect) -> None:
    """Later than a head that does not: and the app hears of a client that has left."""
    connection = connect()
    began = time.monotonic()
    connection.sendall(HEAD + b"Content-Length: 100\r\n\r\nhalf")
    assert answer(connection) == b""
    assert 0.5 < time.monotonic() - began < 5


def test_rest_of_a_refused_body_is_not_waited_for(connect: Connect) -> None:
    """It was answered; what drips on is closed."""
    connection = connect()
    connection.sendall(HEAD.replace(b"/ ", b"/refused ", 1) + b"Content-Length: 100\r\n\r\nhalf")
    assert answer(connection).endswith(b"ok")


def test_request_that_is_whole_is_not_hurried(connect: Connect) -> None:
    """One after the other on one connection, for longer than any of them may take."""
    connection = connect()
    for _ in range(8):
        connection.sendall(HEAD + b"Content-Length: 1\r\n\r\nx")
        got = b""
        while not got.endswith(b"ok"):
            got += connection.recv(65_536)
            assert got
        time.sleep(0.1)


def flood(connection: socket.socket, start: bytes, more: bytes) -> int:
    """Send the start, then more and more; how much had gone when it was cut off."""
    sent = 0
    try:
        connection.sendall(start)
        while sent < 32 << 20:
            sent += connection.send(more)
    except ConnectionError:
        return sent
    raise AssertionError("it was never cut off")


@pytest.mark.parametrize("more", [b"X: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["headers", "one header"])
def test_head_without_a_bound_is_cut_off(connect: Connect, more: bytes) -> None:
    """Long before it fills the memory."""
    assert flood(connect(), HEAD + b"X: ", more) < 16 << 20


def test_trailers_without_a_bound_are_cut_off(connect: Connect) -> None:
    """They are headers, too."""
    start = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    assert flood(connect(), start, b"X: " + b"y" * 1000 + b"\r\n") < 16 << 20


def test_large_body_is_read(connect: Connect) -> None:
    """The bound is on what stands around it."""
    connection = connect()
    size = 4 << 20
    connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
    assert answer(connection).endswith(b"ok")


def test_without_httptools_h11_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which bounds heads itself."""
    monkeypatch.setitem(__import__("sys").modules, "uvicorn.protocols.http.httptools_impl", None)
    assert bounded_http() == "h11"
