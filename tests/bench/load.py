"""The load: so many connections, each with one request in flight, as cheaply as Python can.

It shares a core with the credits service, so it must stay out of the way: requests are bytes made beforehand,
responses are looked at no closer than to see that they are whole and say 200.
"""

import asyncio
import functools
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

ITEMS = 10
USERS = 16
BROKEN_EVERY = 10
"""One request in so many has an item that fails, and so a refund."""


def request_bytes(path: str, user: int, broken: bool, headers: Mapping[str, str] | None = None) -> bytes:
    """A request of ten items, of which none or one fails."""
    items = [{"id": f"image-{n}", "data": "broken" if broken and n == 3 else "fine"} for n in range(ITEMS)]
    body = json.dumps({"items": items}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User: user-{user}\r\nContent-Type: application/json\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        + f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Load:
    """A closed loop of clients at one address."""

    def __init__(
        self, port: int, path: str, concurrency: int, seed: int, headers: Sequence[Mapping[str, str]] = ()
    ) -> None:
        self._port = port
        self._concurrency = concurrency
        self._random = random.Random(seed)
        self._requests = [
            [request_bytes(path, user, broken, headers[user] if headers else None) for broken in (False, True)]
            for user in range(USERS)
        ]
        self._clients: list[_Client] = []
        self.sent: Counter[bool] = Counter()
        """How many have been answered, by whether an item failed."""
        self.latencies_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self.going = False

    async def start(self) -> None:
        """Connect, and begin."""
        loop = asyncio.get_running_loop()
        self.going = True
        for number in range(self._concurrency):
            order = [n % BROKEN_EVERY == 0 for n in range(BROKEN_EVERY)]
            self._random.shuffle(order)
            client = _Client(self, self._requests[number % USERS], order)
            await loop.create_connection(functools.partial(_itself, client), "127.0.0.1", self._port)
            self._clients.append(client)

    def answered(self) -> int:
        """How many so far."""
        return self.sent[False] + self.sent[True]

    async def stop(self) -> None:
        """Let what is in flight come to its end."""
        self.going = False
        await asyncio.wait_for(asyncio.gather(*(client.over for client in self._clients)), 30)


def _itself(client: "_Client") -> "_Client":
    return client


class _Client(asyncio.Protocol):
    def __init__(self, load: Load, requests: Sequence[bytes], order: Sequence[bool]) -> None:
        self._load = load
        self._requests = requests
        self._order = order
        self._number = 0
        self._buffer = b""
        self._broken = False
        self._sent_at = 0.0
        self._transport: Any = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._broken = self._order[self._number % len(self._order)]
        self._number += 1
        self._sent_at = time.perf_counter()
        self._transport.write(self._requests[self._broken])

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        head = data.find(b"\r\n\r\n")
        at = data.find(b"content-length: ")
        if head < 0 or at < 0 or len(data) < head + 4 + int(data[at + 16 : data.find(b"\r", at)]):
            self._buffer = data
            return
        self._buffer = b""
        load = self._load
        if data.startswith(b"HTTP/1.1 200"):
            load.sent[self._broken] += 1
            load.latencies_s.append(time.perf_counter() - self._sent_at)
        else:
            load.errors[data[:80].split(b"\r")[0].decode("latin-1")] += 1
        if load.going:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._load.going:
            self._load.errors["connection lost"] += 1
        if not self.over.done():
            self.over.set_result(None)
