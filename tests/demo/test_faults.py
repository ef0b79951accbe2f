"""The faulty proxy breaks calls on real sockets exactly as it is told, and no others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from examples.fastapi_app.desk import faults
from examples.fastapi_app.desk.faults import FaultyProxy
from examples.fastapi_app.desk.sockets import bound

pytestmark = pytest.mark.anyio


class Service:
    """Answers each call with how many it has had, and keeps what it was sent."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        self.calls.append(head + await reader.readexactly(int(length.partition(b":")[2])))
        body = str(len(self.calls)).encode()
        writer.write(b"HTTP/1.1 201 Created\r\nX-Kept: yes\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        await writer.drain()
        writer.close()


@pytest.fixture
async def service() -> Service:
    return Service()


@asynccontextmanager
async def proxy_before(service: Service) -> AsyncIterator[tuple[FaultyProxy, httpx.AsyncClient]]:
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    proxy = FaultyProxy(server.sockets[0].getsockname()[1], bound())
    await proxy.service_is(up=True)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}", trust_env=False, verify=False) as http:
            yield proxy, http
    finally:
        await proxy.stop()
        server.close()


async def test_no_fault_passes_everything_on(service: Service) -> None:
    """Method, path, query, headers and body arrive; status, headers and body come back; connections are kept."""
    async with proxy_before(service) as (proxy, http):
        answer = await http.post("/v1/deductions?x=1", content=b"body", headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.text, answer.headers["x-kept"]) == (201, "1", "yes")
        assert (await http.get("/v1/balance")).text == "2"
        first, second = service.calls
        assert first.startswith(b"POST /v1/deductions?x=1 HTTP/1.1\r\n")
        assert b"idempotency-key: k\r\n" in first.lower()
        assert first.endswith(b"\r\n\r\nbody")
        assert second.startswith(b"GET /v1/balance HTTP/1.1\r\n")
        assert proxy.fault.struck == 0


async def test_lost_reply_is_carried_out_and_not_answered(service: Service) -> None:
    """The service did it, and the caller cannot know; once, then all is well again."""
    async with proxy_before(service) as (proxy, http):
        await proxy.choose("lost reply", "next")
        assert (await http.get("/v1/balance")).status_code == 201  # only what moves credits is struck
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await http.post("/v1/deductions")
        assert len(service.calls) == 2
        assert (proxy.fault.kind, proxy.fault.struck) == ("none", 1)
        assert (await http.post("/v1/deductions")).text == "3"


async def test_500_after_commit_every_call(service: Service) -> None:
    """Carried out, and answered 500, until another fault is chosen."""
    async with proxy_before(service) as (proxy, http):
        await proxy.choose("500 after commit", "every")
        for number in (1, 2):
            assert (await http.post("/v1/voids")).status_code == 500
            assert (len(service.calls), proxy.fault.struck) == (number, number)
        await proxy.choose("none", "every")
        assert (await http.post("/v1/voids")).status_code == 201
        assert proxy.fault.struck == 0


async def test_twice_delivers_the_same_call_twice(service: Service) -> None:
    """The second answer goes back."""
    async with proxy_before(service) as (proxy, http):
        await proxy.choose("twice", "next")
        assert (await http.post("/v1/deductions", content=b"body")).text == "2"
        first, second = service.calls
        assert first == second


async def test_slow_call_arrives_although_its_caller_has_left(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was given up may still arrive: that is what makes a timeout a doubt."""
    monkeypatch.setattr(faults, "SLOW_S", 0.2)
    async with proxy_before(service) as (proxy, http):
        await proxy.choose("slow", "next")
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/deductions", timeout=httpx.Timeout(5, read=0.02))
        async with asyncio.timeout(5):
            while not service.calls:
                await asyncio.sleep(0.01)


async def test_down_is_refused_by_the_kernel_and_ends_on_word(service: Service) -> None:
    """No connection comes into being, kept ones are cut, and the port stays the same one."""
    async with proxy_before(service) as (proxy, http):
        port = proxy.port
        assert (await http.get("/v1/balance")).status_code == 201
        await proxy.choose("down", "next")
        for _ in range(2):
            with pytest.raises(httpx.ConnectError):
                await http.get("/v1/balance")
        await proxy.refused(0)  # an operation that was not refused is no end of it
        assert proxy.fault.kind == "down"
        await proxy.refused(3)
        assert (proxy.fault.kind, proxy.fault.struck, proxy.port) == ("none", 3, port)
        assert (await http.get("/v1/balance")).status_code == 201


async def test_service_that_is_gone_is_refused_too(service: Service) -> None:
    """As without a proxy: whoever calls knows that nothing was sent."""
    async with proxy_before(service) as (proxy, http):
        await proxy.service_is(up=False)
        with pytest.raises(httpx.ConnectError):
            await http.post("/v1/deductions")
        await proxy.choose("none", "every")
        with pytest.raises(httpx.ConnectError):
            await http.post("/v1/deductions")
        await proxy.service_is(up=True)
        assert (await http.post("/v1/deductions")).status_code == 201


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01 rubbish\r\n\r\n", b"", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"]
)
async def test_rubbish_is_cut_and_harms_nobody(service: Service, sent: bytes) -> None:
    """A caller that speaks something else, or leaves, is not answered, and nothing of it is passed on."""
    async with proxy_before(service) as (proxy, http):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(sent)
        writer.write_eof()
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert (await http.post("/v1/deductions")).text == "1"
