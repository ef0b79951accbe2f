"""What stands between the HTTP engine and the network."""

import socket
from collections.abc import Iterator
from typing import Any

import httpcore
import pytest

from metered_billing.credits.connections import _Stream


class Network(httpcore.AsyncNetworkStream):
    """Notes what is done; a socket's one end stands for it."""

    def __init__(self, here: socket.socket) -> None:
        self.done: list[object] = []
        self.broken = False
        self.socket = here

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.done.append(buffer)
        if self.broken:
            raise httpcore.WriteError

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self.done.append(max_bytes)
        return b"HTTP/1.1 413 Content Too Large"

    async def aclose(self) -> None:
        self.done.append("closed")

    def get_extra_info(self, info: str) -> Any:
        return self.socket if info == "socket" else f"its {info}"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture
def network(pair: tuple[socket.socket, socket.socket]) -> Network:
    return Network(pair[0])


async def test_request_goes_in_one_piece(network: Network) -> None:
    """Its head and its body are written together, before the answer is waited for, and once."""
    stream = _Stream(network)
    await stream.write(b"head, ")
    await stream.write(b"body")
    assert network.done == []
    for _ in range(2):
        await stream.read(100)
    assert network.done == [b"head, body", 100, 100]


async def test_answer_to_a_request_that_was_not_read(network: Network) -> None:
    """A service that refuses and closes early is heard, though not all could be written."""
    network.broken = True
    stream = _Stream(network)
    await stream.write(b"much")
    assert await stream.read(100) == b"HTTP/1.1 413 Content Too Large"


async def test_closed_before_it_is_written(network: Network) -> None:
    """What nobody waits for any more is not sent."""
    stream = _Stream(network)
    await stream.write(b"head")
    await stream.aclose()
    assert network.done == ["closed"]


async def test_looks_whether_it_was_closed(network: Network, pair: tuple[socket.socket, socket.socket]) -> None:
    """An idle connection that has something to read, be it its end, is found out, and so is one that is closed here."""
    stream = _Stream(network)
    here, there = pair
    assert stream.get_extra_info("ssl_object") == "its ssl_object"
    assert stream.get_extra_info("is_readable") is False
    there.close()
    assert stream.get_extra_info("is_readable") is True
    here.close()
    assert stream.get_extra_info("is_readable") is True
