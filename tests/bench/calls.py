"""What a call to the credits service costs the app's processor, and what a request that waits for one keeps alive.

    python -m tests.bench --only calls

The service is a process of its own that answers at once, so that nothing but the client is measured: httpx's, shared
and with its pool, and ours. Each way is tried in turns, by time of the processor; the tables show the median.
"""

import asyncio
import gc
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import httpx
import uvloop
from fastapi import FastAPI
from pydantic import BaseModel

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered
from metered_billing.charge import Deducted, Record
from tests.bench.rows import Row

TOGETHER = 16
"""Operations in a call: about what 64 requests at once come to in the bench's app."""

ACCOUNT = Account("acme")
DEDUCTION = {"transaction_id": "01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10", "tenant_id": "acme", "amount": 10, "balance": 90}


class Service(asyncio.Protocol):
    """Says yes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._read = b""

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, end, rest = self._read.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) if end else 0
        if not end or len(rest) < length:
            return
        body, self._read = json.loads(rest[:length]), rest[length:]
        results = [{"status": 201, "body": DEDUCTION}] * len(body.get("operations", ()))
        answer = json.dumps({"results": results} if results else DEDUCTION).encode()
        status = b"200 OK" if results else b"201 Created"
        self._transport.write(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(answer))
            + answer
        )


def serve(listening: socket.socket) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Service, sock=listening)
        await server.serve_forever()

    asyncio.run(main())


def measure(quick: bool = False) -> list[Row]:
    """The rows of the report."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listening,), daemon=True)
        process.start()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return [*runner.run(calls(url, 1 if quick else 7, 200 if quick else 1_000)), *runner.run(alive())]
        finally:
            process.kill()
            process.join()


async def calls(url: str, rounds: int, number: int) -> list[Row]:
    """Each way, in turns."""
    token = "a-token-of-thirty-two-characters"
    headers = {"Authorization": f"Bearer {token}"}
    default, lean = HttpCredits(url, token=token), HttpCredits(url, token=token, lean=True)
    async with httpx.AsyncClient(base_url=url, headers=headers, verify=False) as client:

        async def by_hand() -> None:
            body = {"tenant_id": "acme", "amount": 10}
            (await client.post("/v1/deductions", json=body, headers={"Idempotency-Key": "key"})).json()

        def ours(credits_: HttpCredits, together: int = 1) -> Callable[[], Awaitable[None]]:
            records = [charge(number) for number in range(together)]

            async def deduct() -> None:
                answers = await asyncio.gather(*map(credits_.deduct, records))
                if not all(isinstance(answer, Deducted) for answer in answers):
                    raise RuntimeError(f"the credits service answers {answers[0]}")

            return deduct

        ways: list[tuple[str, Callable[[], Awaitable[None]], int]] = [
            ("a call by httpx's client", by_hand, 1),
            ("a call of ours", ours(default), 1),
            ("a call of ours, lean", ours(lean), 1),
            (f"an operation of ours, {TOGETHER} in a call", ours(default, TOGETHER), TOGETHER),
            (f"an operation of ours, {TOGETHER} in a call, lean", ours(lean, TOGETHER), TOGETHER),
        ]
        taken: dict[str, list[float]] = {what: [] for what, _, _ in ways}
        for round_ in range(rounds + 1):  # the first only warms up
            for what, way, operations in ways:
                began = time.process_time()
                for _ in range(number // operations):
                    await way()
                if round_:
                    taken[what].append((time.process_time() - began) / (number // operations) / operations * 1e6)
            print(f"· calls: round {round_} of {rounds}", flush=True)  # noqa: T201
    await default.aclose()
    await lean.aclose()
    return [Row(what, median(each), "µs", "of the app's processor") for what, each in taken.items()]


def charge(number: int) -> Record:
    return Record(id=f"charge-{number}", account=ACCOUNT, amount_credits=10, units=10, opened_at=0.0)


class Item(BaseModel):
    id: str


class Items(BaseModel):
    items: list[Item]


BODY = json.dumps({"items": [{"id": f"img-{number}"} for number in range(10)]}).encode()
WAITING = 64


class Patient(HttpCredits):
    """Never answers."""

    async def deduct(self, record: Record) -> Any:
        await asyncio.Event().wait()


async def alive() -> list[Row]:
    """The objects, looked at by the garbage collector, that one of many waiting requests keeps alive."""

    async def work(body: Items) -> dict[str, Any]:
        return {}

    async def wait(body: Items) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    bare, ours = FastAPI(), FastAPI()
    bare.post("/")(wait)
    ours.post("/")(metered(cost=10)(work))
    with tempfile.TemporaryDirectory() as journal:
        ours.add_middleware(
            MeteredBillingMiddleware, credits=Patient("http://credits"), journal=journal, account=lambda: ACCOUNT
        )
        return [
            Row("objects that a waiting request keeps alive, bare", await waiting(bare), ""),
            Row("objects that a waiting request keeps alive, metered", await waiting(ours), ""),
        ]


async def waiting(app: FastAPI) -> float:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
    }
    scope |= {"path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "server": ("app", 80)}
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]

    async def request() -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        queue.put_nowait({"type": "http.request", "body": BODY, "more_body": False})

        async def send(message: Any) -> None:
            raise RuntimeError(f"it did not wait: {message}")

        await app(scope | {"headers": headers, "state": {}}, queue.get, send)

    async def begin(number: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(request()) for _ in range(number)]
        for _ in range(20):
            await asyncio.sleep(0.01)
        return tasks

    tasks = await begin(4)  # what is made once is made now
    gc.collect()
    before = len(gc.get_objects())
    tasks += await begin(WAITING)
    kept = (len(gc.get_objects()) - before) / WAITING
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return kept
