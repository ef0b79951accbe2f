"""The network between the apps and the credits service: real requests, simulated wires.

What is sent is a copy: it may never arrive, arrive twice, or hours later, whatever its sender thinks of it by
then. Nothing that arrives is undone by what happens to its reply.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httpx

from metered_billing.ledger import LedgerError
from tests.simulation.processes import Dead, Process

if TYPE_CHECKING:
    from tests.simulation.world import World

HTML = [(b"content-type", b"text/html")]
PROBLEM = [(b"content-type", b"application/problem+json")]

STRAY = (*(402, 404) * 3, 301, 400, 401, 403, 405, 409, 410, 413, 422, 429, 501, 502, 503)
"""What a proxy, a captive portal or a deployment under way answers in the service's place."""


@dataclass(frozen=True)
class Call:
    """A request on its way."""

    operation: str
    charge_id: str
    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    parts: "tuple[Call, ...]" = ()
    refused: frozenset[str] = frozenset()
    """Of a batch: its operations, and the charges of those that the service refuses for good."""


@dataclass
class Reply:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Transport(httpx.AsyncBaseTransport):
    """What an app process sends through."""

    def __init__(self, world: "World", process: Process) -> None:
        self._world = world
        self._process = process

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._process.check()
        call = call_of(request)
        try:
            response = await self._world.network.send(self._process, call, request.extensions["timeout"]["connect"])
        finally:
            self._process.check()
        self._world.heard(call, response.status_code)
        return response


class Network:
    """All wires of a world."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.partitioned_until = 0.0
        self.under_way = 0
        self.last_arrival = 0.0

    async def send(self, process: Process, call: Call, connect_s: float) -> httpx.Response:
        """One call of an app's, and what comes of it."""
        world, random = self._world, self._world.random
        if "deduct" in (call.operation, *(part.operation for part in call.parts)):
            world.deduction_goes_out(process)
        call = world.refuse_parts(process, call)
        if call.parts:
            world.coverage["batch", str(len(call.parts))] += 1
        world.call_goes_out(process)
        fault = world.fault_of_call(process, call)
        world.note(process.name, call.operation, call.charge_id, fault or "")
        if fault == "no connection in time":
            await asyncio.sleep(connect_s)
            raise httpx.ConnectTimeout(fault)
        await asyncio.sleep(random.choice((0.0, 0.001, 0.05)))
        if fault == "refused" or world.service is None or not world.service.ready:
            raise httpx.ConnectError("nobody listens")
        if fault == "request lost":
            raise await self._silence()
        if fault == "5xx before":
            return _response(Reply(random.choice((500, 502, 503, 504)), HTML, b"<h1>sorry</h1>"))
        if fault == "stray proxy before":
            return _response(Reply(random.choice(world.stray), HTML, b"<h1>hello</h1>"))
        if fault == "wrong Retry-After":
            return _response(_impatient(world))
        if fault == "token rejected":
            body = b'{"type":"urn:metered-billing:unauthorized","title":"?","status":401}'
            return _response(Reply(random.choice((401, 403)), PROBLEM, body))
        if fault == "refused for good":
            body = b'{"type":"urn:metered-billing:forbidden-by-hand","title":"?","status":422}'
            return _response(Reply(422, PROBLEM, body))
        if fault == "request late":
            self._copy(call, world.late_s())
            raise await self._silence()
        reply: asyncio.Future[Reply] = world.loop.create_future()
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._copy(call, random.choice((0.0, 0.001, 0.02)), reply)
        if fault == "duplicate":
            self._copy(call, random.choice((0.0, 0.001, world.late_s())))
        if fault == "reset after the request":
            await asyncio.sleep(random.choice((0.0, 0.01, 0.1)))
            raise random.choice((httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError))(fault)
        try:
            answer = await reply
        except ConnectionResetError:
            raise random.choice((httpx.ReadError, httpx.RemoteProtocolError))("the service died") from None
        await asyncio.sleep(random.choice((0.0, 0.001, 0.02)))
        if fault == "reply lost":
            raise await self._silence()
        if fault == "slow":
            await asyncio.sleep(random.uniform(0.1, random.choice((1.9, 8.0))))
        if fault == "5xx after":
            return _response(Reply(random.choice((500, 502, 503, 504)), HTML, b""))
        if fault == "stray proxy after":
            stray = (404, 405, 501) if call.parts else world.stray  # as if there were no batches
            return _response(Reply(random.choice(stray), HTML, b"<h1>hello</h1>"))
        if fault == "broken reply":
            return _response(_broken(world, answer))
        if fault == "compressed reply":
            return _response(Reply(answer.status, [*answer.headers, (b"content-encoding", b"gzip")], answer.body))
        if fault == "trickling reply":
            return _response(answer, _Trickle(answer.body, random.uniform(0.01, 0.5)))
        if fault == "reply cut short":
            return _response(answer, _Cut(answer.body[: random.randrange(len(answer.body) or 1)]))
        return _response(answer)

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None, key: str = "") -> Reply:
        """A call of the world's own, over a wire that does not fail; the service must be up."""
        headers = [(b"authorization", b"Bearer admin"), (b"content-type", b"application/json")]
        if key:
            headers.append((b"idempotency-key", key.encode()))
        path, _, query = path.partition("?")
        content = b"" if body is None else json.dumps(body).encode()
        headers.append((b"content-length", str(len(content)).encode()))
        reply: asyncio.Future[Reply] = self._world.loop.create_future()
        self._copy(Call("", "", method, path, query.encode(), tuple(headers), content), 0.001, reply)
        return await reply

    async def _silence(self) -> Exception:
        """Nothing comes, until whoever waits gives up, or the connection does."""
        await asyncio.sleep(self._world.random.choice((0.01, 1.0, 600.0)))
        return self._world.random.choice((httpx.ReadError, httpx.ReadTimeout))("silence")

    def _copy(self, call: Call, after_s: float, reply: "asyncio.Future[Reply] | None" = None) -> None:
        """Let a copy arrive, whatever becomes of its sender."""
        world = self._world
        self.under_way += 1
        self.last_arrival = max(self.last_arrival, world.loop.time() + after_s)
        world.outside(world.loop.call_later, after_s, self._arrive, call, reply)

    def _arrive(self, call: Call, reply: "asyncio.Future[Reply] | None") -> None:
        self.under_way -= 1
        world = self._world
        service = world.service
        if service is None or not service.ready:
            if reply is None:
                world.note("network", "drops", call.operation, call.charge_id)
            elif not reply.done():
                reply.set_exception(ConnectionResetError("service"))
            return
        if reply is not None:
            service.expected[reply] = None
        service.spawn(self._serve(service, call, reply), f"{call.operation} {call.charge_id}")

    async def _serve(self, service: Process, call: Call, reply: "asyncio.Future[Reply] | None") -> None:
        """The service's end."""
        world = self._world
        try:
            answer = self._missing(call) or await self._asked(service, call)
        except Dead:
            raise
        except Exception as error:
            world.problem(f"the service raised {error!r}")
            answer = Reply(500, HTML, b"")
        service.check()
        if call.parts and answer.status == 200:
            for part, result in zip(call.parts, json.loads(answer.body)["results"], strict=True):
                world.answered(part, Reply(result["status"], [], b""))
        else:
            world.answered(call, answer)
        if reply is not None:
            service.expected.pop(reply, None)
            if not reply.done():
                reply.set_result(answer)

    async def _asked(self, service: Process, call: Call) -> Reply:
        """The service's own answer; one that looks at the balance before the key declines what it has taken."""
        if call.parts:
            return await self._asked_for_many(service, call)
        answer = await _served(service.app, call)
        if call.operation == "deduct" and answer.status == 200:
            said = await self._too_little(service, json.loads(call.body))
            if said is not None:
                return Reply(402, PROBLEM, json.dumps(said).encode())
        return answer

    async def _asked_for_many(self, service: Process, call: Call) -> Reply:
        """As alone, so in a batch; what the service has not, or refuses for good, it is not asked for."""
        operations = json.loads(call.body)["operations"]
        results: list[dict[str, Any] | None] = []
        for part in call.parts:
            missing = self._missing(part)
            if missing is not None:
                results.append({"status": missing.status, "body": {}})
            elif part.charge_id in call.refused:
                results.append({"status": 422, "body": {"type": "urn:metered-billing:forbidden-by-hand"}})
            else:
                results.append(None)
        asked = [operation for operation, result in zip(operations, results, strict=True) if result is None]
        body = json.dumps({"operations": asked}).encode()
        headers = (*(each for each in call.headers if each[0] != b"content-length"),)
        headers += ((b"content-length", str(len(body)).encode()),)
        answer = await _served(service.app, replace(call, body=body, headers=headers))
        if answer.status != 200:
            return answer
        rest = iter(json.loads(answer.body)["results"])
        results = [result or next(rest) for result in results]
        for number, (operation, result) in enumerate(zip(operations, results, strict=True)):
            if operation["op"] == "deduct" and result is not None and result["status"] == 200:
                said = await self._too_little(service, operation)
                if said is not None:
                    results[number] = {"status": 402, "body": said}
        return Reply(200, answer.headers, json.dumps({"results": results}).encode())

    async def _too_little(self, service: Process, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What a service that looks at the balance first says of a deduction that it has done already."""
        if not self._world.service_kind.balance_first:
            return None
        try:
            held = await service.journal.balance(asked["tenant_id"], asked.get("user_id"))
        except LedgerError:
            return None
        if held >= asked["amount"]:
            return None
        return {"type": "urn:metered-billing:insufficient-credits", "balance": held, "required": asked["amount"]}

    def _missing(self, call: Call) -> Reply | None:
        """What a service without voids, or without batches, says of them."""
        kind = self._world.service_kind
        if (call.operation != "void" or kind.has_voids) and (call.operation != "batch" or kind.has_batches):
            return None
        return Reply(self._world.random.choice((404, 405, 501)), HTML, b"no such thing")


class _Trickle(httpx.AsyncByteStream):
    def __init__(self, body: bytes, every_s: float) -> None:
        self._body, self._every_s = body, every_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self._body), 16):
            await asyncio.sleep(self._every_s)
            yield self._body[at : at + 16]


class _Cut(httpx.AsyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body
        raise httpx.RemoteProtocolError("cut short")


def call_of(request: httpx.Request) -> Call:
    """Which call it is, and about which charge."""
    path, _, query = request.url.raw_path.partition(b"?")
    headers = tuple((name.lower(), value) for name, value in request.headers.raw)
    body = request.content
    key = request.headers.get("idempotency-key", "")
    if path.endswith(b"/refunds"):
        operation, charge_id = "refund", key.removesuffix(":refund")
    elif path.endswith(b"/voids"):
        operation, charge_id = "void", json.loads(body)["idempotency_key"]
    elif path.endswith(b"/deductions"):
        operation, charge_id = "deduct", key
    elif path.endswith(b"/batch"):
        parts = tuple(_part(operation, headers) for operation in json.loads(body)["operations"])
        return Call("batch", "", request.method, path.decode(), query, headers, body, parts)
    else:
        operation, charge_id = "find", ""
    return Call(operation, charge_id, request.method, path.decode(), query, headers, body)


def _part(operation: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...]) -> Call:
    charge_id = operation["idempotency_key"].removesuffix(":refund")
    return Call(operation["op"], charge_id, "POST", "", b"", headers, json.dumps(operation).encode())


async def _served(app: Any, call: Call) -> Reply:
    """Run the ASGI app for one request."""
    unread = [{"type": "http.request", "body": call.body, "more_body": False}]
    reply = Reply(0, [], b"")

    async def receive() -> Any:
        if not unread:
            await asyncio.Event().wait()
        return unread.pop()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status, reply.headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            reply.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": unquote(call.path),
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": ("10.0.0.1", 1),
        "server": ("credits", 80),
        "state": {},
    }
    await app(scope, receive, send)
    return reply


def _response(reply: Reply, stream: httpx.AsyncByteStream | None = None) -> httpx.Response:
    if stream is None:
        return httpx.Response(reply.status, headers=reply.headers, stream=httpx.ByteStream(reply.body))
    return httpx.Response(reply.status, headers=reply.headers, stream=stream)


def _impatient(world: "World") -> Reply:
    wait = world.random.choice(
        (b"-1", b"0", b"3", b"120", b"99999999999", b"soon", b"Wed, 21 Oct 2065 07:28:00 GMT", b"1e9", b"")
    )
    return Reply(world.random.choice((408, 425, 429, 503)), [*HTML, (b"retry-after", wait)], b"later")


def _broken(world: "World", answer: Reply) -> Reply:
    """The right status, and a body that is not what was agreed."""
    json_type = [(b"content-type", b"application/json")]
    how = world.random.randrange(5)
    if how == 0:
        return Reply(answer.status, json_type, answer.body[: len(answer.body) // 2])
    if how == 1:
        return Reply(answer.status, json_type, b"[]")
    if how == 2:
        return Reply(200, HTML, b"<h1>Please log in</h1>")
    if how == 3:
        return Reply(answer.status, json_type, b"")
    body = json.loads(answer.body)
    if isinstance(body, dict) and "amount" in body:
        body["amount"] += 1
    return Reply(answer.status, json_type, json.dumps(body).encode() if "amount" in body else b"null")
