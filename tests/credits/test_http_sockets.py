"""Credits over HTTP, on real sockets: what timeouts, resets, stale connections and crowds come to."""

import asyncio
import contextlib
import gc
import json
import shutil
import socket
import ssl
import struct
import subprocess
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest

from metered_billing.charge import Account, Deducted, NotSent, Record, State, Unanswered, Unknown
from metered_billing.credits.contract import Call, Contract
from metered_billing.credits.http import HttpCredits
from metered_billing.runtime import Runtime

DEDUCTED = Deducted("tx-1", 90)
ANSWER = json.dumps({"transaction_id": "tx-1", "amount": 10, "balance": 90}).encode()
YES = b"HTTP/1.1 201 Created\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
LAST_YES = b"HTTP/1.1 201 Created\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)


def record(number: int = 1) -> Record:
    """A charge of 10 credits, of which 2 are to go back."""
    return Record(
        id=f"charge-{number}",
        account=Account("acme", "alice"),
        amount_credits=10,
        units=10,
        opened_at=0.0,
        state=State.REFUNDING,
        transaction_id="tx-1",
        refund_credits=2,
    )


class Request:
    """One request as it arrived, and the wire to answer on."""

    def __init__(self, number: int, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.number = number  # on its connection, from 1
        self.target = head.split()[1].decode()
        lines = head.decode().split("\r\n")[1:]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.body = body
        self.writer = writer

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Drop the connection the hard way."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Request], Awaitable[None]]


class Server:
    """Reads requests, and hands each to its script, which may say or do anything."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.most_open = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def keys(self) -> list[str]:
        return [request.key for request in self.requests]

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator["Server"]:
        listening = await asyncio.start_server(self._accepted, "127.0.0.1", port, ssl=tls)
        self.port = listening.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listening.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        number = 0
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                number += 1
                request = Request(number, head, await reader.readexactly(int(length or 0)), writer)
                self.requests.append(request)
                await self.script(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


async def say_yes(request: Request) -> None:
    await request.send(YES)


async def hang(request: Request) -> None:
    await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def connected(script: Script, **options: Any) -> AsyncIterator[tuple[HttpCredits, Server]]:
    """A client, and a server that does as it is told."""
    async with Server(script).running() as server:
        credits_ = client(server.url, **options)
        try:
            yield credits_, server
        finally:
            await credits_.aclose()


def address(server: socket.socket, scheme: str = "http") -> str:
    """The URL of a socket that listens."""
    return f"{scheme}://127.0.0.1:{server.getsockname()[1]}"


LEAN = ContextVar("lean", default=False)


@pytest.fixture(params=[False, True], ids=["default", "lean"], autouse=True)
def wire(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever is true of httpx's engine is true of the lean connection."""
    token = LEAN.set(request.param)
    yield
    LEAN.reset(token)


def client(url: str, **options: Any) -> HttpCredits:
    """A client that does not wait between its attempts."""
    runtime = Runtime(sleep=lambda _: asyncio.sleep(0))
    return HttpCredits(url, **{"runtime": runtime, "lean": LEAN.get(), **options})


class TestTimeouts:
    async def test_trickling_reply(self) -> None:
        """A reply that comes byte by byte is cut off by the attempt's timeout, though no read ever times out."""

        async def trickle(request: Request) -> None:
            for at in range(len(YES)):
                await request.send(YES[at : at + 1])
                await asyncio.sleep(0.2)

        async with connected(trickle, attempts=1, attempt_timeout_s=0.5) as (credits_, _):
            began = time.monotonic()
            assert await credits_.deduct(record()) == Unknown("TimeoutError")
            assert time.monotonic() - began < 5

    @pytest.mark.parametrize("start", [b"", b"HTTP/1.1 201 Cre", YES[:-20]])
    async def test_hang(self, start: bytes) -> None:
        """Before the status line, within it or within the body: it may have been charged."""

        async def begin(request: Request) -> None:
            await request.send(start)
            await hang(request)

        async with connected(begin, attempts=2, attempt_timeout_s=0.1) as (credits_, server):
            assert await credits_.deduct(record()) == Unknown("TimeoutError")
            assert server.keys == ["charge-1", "charge-1"]
            assert isinstance(await credits_.refund(record()), Unanswered)

    async def test_deadline_cuts_the_last_attempt(self) -> None:
        """An attempt gets no more than what is left of the whole."""
        async with connected(hang, timeout_s=0.3, attempt_timeout_s=60) as (credits_, server):
            began = time.monotonic()
            assert await credits_.deduct(record()) == Unknown("TimeoutError")
            assert time.monotonic() - began < 5
            assert len(server.requests) == 1

    async def test_slow_answer_within_the_timeout(self) -> None:
        """Slow is not late."""

        async def slow(request: Request) -> None:
            await asyncio.sleep(0.1)
            await say_yes(request)

        async with connected(slow) as (credits_, _):
            assert await credits_.deduct(record()) == DEDUCTED


class TestConnecting:
    async def test_refused(self) -> None:
        """Nobody listens: nothing was sent."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        credits_ = client(f"http://127.0.0.1:{port}")

        assert await credits_.deduct(record()) == NotSent("ConnectError")
        assert await credits_.void(record()) == Unanswered("ConnectError", sent=False)

    async def test_no_such_host(self) -> None:
        """A name that leads nowhere: nothing was sent."""
        credits_ = client("http://credits.invalid", attempts=1)

        assert await credits_.deduct(record()) == NotSent("ConnectError")

    async def test_backlog_is_full(self) -> None:
        """Where no connection comes about in time nothing was sent, though it took the whole attempt."""
        with socket.socket() as server, contextlib.ExitStack() as crowd:
            server.bind(("127.0.0.1", 0))
            server.listen(0)
            for _ in range(4):
                one = crowd.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(server.getsockname())
            credits_ = client(address(server, "http"), attempts=1, attempt_timeout_s=0.3)

            assert await credits_.deduct(record()) == NotSent("ConnectTimeout")

    async def test_never_accepted(self) -> None:
        """The kernel takes connections, and requests, for a process that hangs: it may yet read them."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            credits_ = client(address(server, "http"), attempts=1, attempt_timeout_s=0.2)

            assert await credits_.deduct(record()) == Unknown("TimeoutError")
            await credits_.aclose()

    async def test_no_tls_there(self) -> None:
        """Before TLS is agreed upon no request goes out: whatever fails there, nothing was sent."""

        async def speak_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            await reader.read()
            writer.close()

        async with await asyncio.start_server(speak_plainly, "127.0.0.1", 0) as server:
            credits_ = client(address(server.sockets[0], "https"), attempts=1)

            assert await credits_.deduct(record()) == NotSent("ConnectError")

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
    def test_certificate_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unknown certificate gets no request; one that SSL_CERT_FILE names does."""
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        make = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=127.0.0.1"
        more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
        subprocess.run([*make.split(), *more], check=True, capture_output=True)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(cert, key)

        async def ask() -> object:
            async with Server(say_yes).running(tls=tls) as server:
                answer = await client(server.url.replace("http", "https"), attempts=1).deduct(record())
                return answer, len(server.requests)

        # A loop of its own, for the server's end of a handshake that fails is an error to the loop.
        assert asyncio.run(ask()) == (NotSent("ConnectError"), 0)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert asyncio.run(ask()) == (DEDUCTED, 1)

    def test_certificate_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Certificates that cannot be read are an error at once, not at the first deduction."""
        monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/cert.pem")

        with pytest.raises(OSError, match="No such file"):
            client("https://127.0.0.1")

    @pytest.mark.slow
    async def test_hang_in_the_tls_handshake(self) -> None:
        """Nor was anything sent to a server that never answers the greeting."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            credits_ = client(address(server, "https"), attempts=1, attempt_timeout_s=4)

            assert await credits_.deduct(record()) == NotSent("ConnectTimeout")

    async def test_proxies_of_the_environment_are_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody's credits go through whatever proxy happens to be set for other purposes."""
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)

        async with connected(say_yes) as (credits_, _):
            assert await credits_.deduct(record()) == DEDUCTED

    async def test_header_that_cannot_be_sent(self) -> None:
        """A contract whose key would be two headers sends neither."""

        class Broken(Contract):
            def deduction(self, record: Record) -> Call:
                return Call("POST", "/v1/deductions", {}, key="a\r\nX-Admin: 1")

        async with connected(say_yes, contract=Broken()) as (credits_, server):
            assert isinstance(await credits_.deduct(record()), Unknown)
            assert server.requests == []


class TestBreakingOff:
    async def test_reset_after_the_request_was_read(self) -> None:
        """A connection that is reset may have delivered the request."""

        async def reset(request: Request) -> None:
            request.reset()

        async with connected(reset, attempts=1) as (credits_, server):
            assert await credits_.deduct(record()) == Unknown("ReadError")
            assert server.keys == ["charge-1"]
            assert await credits_.refund(record()) == Unanswered("ReadError")

    async def test_commit_then_close(self) -> None:
        """A service that charges and dies before it answers has charged once: the retry is a replay."""
        charged: set[str] = set()

        async def charge(request: Request) -> None:
            if request.key in charged:
                await request.send(YES.replace(b"201 Created", b"200 OK"))
            else:
                charged.add(request.key)
                request.writer.close()

        async with connected(charge) as (credits_, server):
            assert await credits_.deduct(record()) == DEDUCTED
            assert server.keys == ["charge-1", "charge-1"]
            assert charged == {"charge-1"}
            assert len({request.body for request in server.requests}) == 1

    async def test_stale_connection(self) -> None:
        """A connection kept open that closes on the next request looks just the same: unknown, the same key again."""

        async def close_on_second(request: Request) -> None:
            if request.number == 1:
                await say_yes(request)
            else:
                request.writer.close()

        async with connected(close_on_second) as (credits_, server):
            assert await credits_.deduct(record(1)) == DEDUCTED
            assert await credits_.deduct(record(2)) == DEDUCTED
            assert server.keys == ["charge-1", "charge-2", "charge-2"]

            # `void` has the second connection, which closes: one attempt, and unanswered.
            assert await credits_.void(record(2)) == Unanswered("RemoteProtocolError")

    async def test_connection_closed_in_between(self) -> None:
        """One that was closed while nobody used it is noticed, and not used."""

        async def close_after(request: Request) -> None:
            await say_yes(request)
            request.writer.close()

        async with connected(close_after, attempts=1) as (credits_, server):
            for number in range(3):
                assert await credits_.deduct(record(number)) == DEDUCTED
                await asyncio.sleep(0.02)
            assert server.connections == 3

    @pytest.mark.parametrize("more", [YES, YES[:-5], b"HTTP/1.1 500 No\r\nx-", b"?"])
    async def test_connection_that_says_more_than_was_asked(self, more: bytes) -> None:
        """What follows an answer is no part of the next one's: the connection is not used again."""

        async def say_more(request: Request) -> None:
            await request.send(YES + more)

        async with connected(say_more, attempts=1) as (credits_, server):
            for number in range(3):
                assert await credits_.deduct(record(number)) == DEDUCTED
            assert server.connections == 3

    async def test_lean_connects_to_the_name_that_it_asks_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python's own encoding makes another domain of some names: the token would go there."""
        connected_to: list[str] = []

        async def create_connection(protocol: object, host: str, port: int, **options: object) -> None:
            connected_to.append(host)
            raise OSError

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
        credits_ = HttpCredits("http://stra\u00dfe.example", attempts=1, lean=True)
        assert isinstance(await credits_.deduct(record()), NotSent)
        assert connected_to == ["xn--strae-oqa.example"]

    async def test_connections_are_kept(self) -> None:
        """One after the other, all go over one connection."""
        async with connected(say_yes) as (credits_, server):
            for number in range(10):
                assert await credits_.deduct(record(number)) == DEDUCTED
            assert server.connections == 1

    @pytest.mark.parametrize(
        "reply",
        [
            b"",
            b"\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"HTTP/1.1 201 Created\r\ncontent-length: 1000\r\n\r\n" + ANSWER,
            b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\nff\r\n" + ANSWER,
            b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" + ANSWER,
            b"HTTP/1.1 201 Created\r\ncontent-length: ten\r\n\r\n" + ANSWER,
            b"HTTP/1.1 201 Created\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
            b"HTTP/1.1 201 Created\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
            b"HTTP/1.1 201 Created\r\n\r\n" + ANSWER[:-5],
        ],
    )
    async def test_broken_reply(self, reply: bytes) -> None:
        """Half a reply, or none that is HTTP, is no answer."""

        async def break_off(request: Request) -> None:
            if len(server.requests) % 2:
                await request.send(reply)
                request.writer.close()
            else:
                await say_yes(request)

        async with connected(break_off, attempts=2) as (credits_, server):
            assert await credits_.deduct(record(1)) == DEDUCTED
            assert server.keys == ["charge-1", "charge-1"]

    async def test_reply_that_ends_with_its_connection(self) -> None:
        """Without a length, what came is whole when the connection ends and the JSON with it."""

        async def answer(request: Request) -> None:
            await request.send(b"HTTP/1.0 200 OK\r\n\r\n" + ANSWER)
            request.writer.close()

        async with connected(answer) as (credits_, _):
            assert await credits_.deduct(record()) == DEDUCTED


class TestCrowds:
    async def test_hundred_at_once(self) -> None:
        """A hundred deductions share ten connections, and every one has its own answer."""

        async def answer(request: Request) -> None:
            await asyncio.sleep(0.005)
            body = json.dumps({"transaction_id": f"tx-{request.key}", "amount": 10}).encode()
            await request.send(b"HTTP/1.1 201 Created\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

        async with connected(answer, batching=False, max_connections=10, attempt_timeout_s=30, timeout_s=30) as (
            credits_,
            server,
        ):
            got = await asyncio.gather(*(credits_.deduct(record(number)) for number in range(100)))

            assert got == [Deducted(f"tx-charge-{number}") for number in range(100)]
            assert sorted(server.keys) == sorted(f"charge-{number}" for number in range(100))
            assert server.most_open <= 10

    async def test_no_connection_free(self) -> None:
        """Who waits in line in vain has sent nothing."""
        async with connected(hang, batching=False, max_connections=2, attempt_timeout_s=0.3, attempts=1) as (
            credits_,
            server,
        ):
            got = await asyncio.gather(*(credits_.deduct(record(number)) for number in range(6)))

            assert got == [Unknown("TimeoutError")] * 2 + [NotSent("PoolTimeout")] * 4
            assert sorted(server.keys) == ["charge-0", "charge-1"]

    @pytest.mark.parametrize("leave", ["timeout", "cancel"])
    async def test_crowd_leaves_no_connection_behind(self, leave: str) -> None:
        """However many give up at the same moment, all connections are to be had again afterwards."""
        hanging = True

        async def script(request: Request) -> None:
            await (hang if hanging else say_yes)(request)

        options = {"max_connections": 5, "attempts": 1, "breaker_failures": 1000}
        async with connected(script, batching=False, attempt_timeout_s=0.5, **options) as (credits_, _):
            for _ in range(2):
                hanging = True
                tasks = [asyncio.create_task(credits_.deduct(record(number))) for number in range(50)]
                if leave == "cancel":
                    await asyncio.sleep(0.05)
                    for task in tasks:
                        task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                hanging = False
                got = await asyncio.gather(*(credits_.deduct(record(number)) for number in range(5)))
                assert got == [DEDUCTED] * 5

    async def test_cancelled_at_every_step(self) -> None:
        """At whichever await a call is cancelled, it raises or has its answer; the one connection is free again."""

        async def script(request: Request) -> None:
            await request.send(YES if request.number % 3 else LAST_YES)
            if request.number % 3 == 0:
                request.writer.close()

        async with connected(script, max_connections=1, breaker_failures=1) as (credits_, server):
            ended: set[object] = set()
            for steps in range(80):
                task = asyncio.create_task(credits_.deduct(record()))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    ended.add(await task)
                except asyncio.CancelledError:
                    ended.add("cancelled")
                assert await credits_.deduct(record()) == DEDUCTED
            assert ended == {DEDUCTED, "cancelled"}
            await asyncio.sleep(0.1)
            assert server.open <= 1


class TestLoops:
    """A client outlives event loops; connections do not."""

    @pytest.fixture
    def port(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])

    def test_one_loop_after_the_other(self, port: int) -> None:
        """It works on every new loop, and leaves nothing open on the old, though nobody closes it."""

        def use() -> None:
            credits_ = client(f"http://127.0.0.1:{port}")

            async def once() -> object:
                async with Server(say_yes).running(port):
                    return [await credits_.deduct(record()) for _ in range(2)]

            for _ in range(3):
                assert asyncio.run(once()) == [DEDUCTED] * 2

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            use()
            gc.collect()
        assert [str(each.message) for each in warned] == []

    def test_loop_that_was_not_wound_up(self, port: int) -> None:
        """A loop that is closed in passing is let go of at the next call on another."""
        credits_ = client(f"http://127.0.0.1:{port}")

        async def once() -> object:
            async with Server(say_yes).running(port):
                return await credits_.deduct(record())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it was not closed by us, nor can it be any more
            loop = asyncio.new_event_loop()
            assert loop.run_until_complete(once()) == DEDUCTED
            loop.close()
            gone = weakref.ref(loop)
            del loop
            assert asyncio.run(once()) == DEDUCTED
            gc.collect()
            assert gone() is None

    async def test_closed_and_used_again(self) -> None:
        """Closing is not the end of it: the next call opens what it needs."""
        async with connected(say_yes) as (credits_, server):
            await credits_.aclose()
            assert await credits_.deduct(record()) == DEDUCTED
            await credits_.aclose()
            await credits_.aclose()
            assert await credits_.deduct(record()) == DEDUCTED
            assert server.connections == 2

    async def test_closed_under_way(self) -> None:
        """Whoever is in flight when it is closed still gets an answer; the connection is closed after it."""
        closed = asyncio.Event()

        async def answer(request: Request) -> None:
            await closed.wait()
            await say_yes(request)

        async with connected(answer) as (credits_, server):
            task = asyncio.create_task(credits_.deduct(record()))
            while not server.requests:
                await asyncio.sleep(0.01)
            await credits_.aclose()
            closed.set()

            assert await task == DEDUCTED
            while server.open:
                await asyncio.sleep(0.01)

    async def test_generators_of_the_loop_are_closed(self) -> None:
        """After `shutdown_asyncgens`, on a loop that goes on, it begins anew."""
        async with connected(say_yes) as (credits_, server):
            assert await credits_.deduct(record()) == DEDUCTED
            await credits_._sender._loops[asyncio.get_running_loop()].aclose()

            assert await credits_.deduct(record()) == DEDUCTED
            assert await credits_.deduct(record()) == DEDUCTED
            assert server.connections == 2

    async def test_transport_of_the_users_own(self) -> None:
        """A transport that was handed in is used, and stays open, whatever happens on it."""

        class Transport(httpx.AsyncBaseTransport):
            closed = False

            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                if self.closed:
                    raise AssertionError
                return httpx.Response(201, content=ANSWER) if request.url.path == "/v1/deductions" else 1 / 0  # type: ignore[return-value]

            async def aclose(self) -> None:
                self.closed = True

        transport = Transport()
        credits_ = client("http://credits.test", transport=transport)

        assert await credits_.void(record()) == Unanswered("ZeroDivisionError")
        assert await credits_.deduct(record()) == DEDUCTED
        await credits_.aclose()
        assert await credits_.deduct(record()) == DEDUCTED
        assert not transport.closed


async def test_connection_of_a_process_that_was_frozen_is_not_used_again() -> None:
    """The loop's clock may have stood still with it: the wall clock tells, whichever way it jumped."""

    async def yes(request: Request) -> None:
        await request.send(YES)

    now = 1e9
    async with Server(yes).running() as server:
        credits = HttpCredits(server.url, runtime=Runtime(now=lambda: now))  # noqa: A001
        connections = []
        for skipped_s in (0.0, 4.9, 60.0, -60.0):
            now += skipped_s
            assert await credits.deduct(record()) == DEDUCTED
            connections.append(server.connections)
        await credits.aclose()
    assert connections == [1, 1, 2, 3]
