"""The middleware: what a response reports is on record before its last byte, and what is due comes back."""

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import structlog
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from metered_billing import (
    BillingError,
    InsufficientCredits,
    MeteredBillingMiddleware,
    SqlCredits,
    current_charge,
    metered,
    settled,
)
from metered_billing.journal import JournalError
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.settings import Settings
from tests.stand import ANN, GRANTED, Connection, Message, Stand, StartupFailed, lifespan, serving


def app_with(bench: Stand, endpoint: Any, *, inner: list[Middleware] | None = None, **options: Any) -> Starlette:
    """An app with one metered route, `POST /work`."""
    return Starlette(
        routes=[Route("/work", endpoint, methods=["POST"])],
        middleware=[Middleware(MeteredBillingMiddleware, **bench.options(**options)), *(inner or [])],
    )


def ten(response: Response | Exception, **terms: Any) -> Any:
    """A metered route of ten credits that answers so, or raises."""

    @metered(**{"cost": 10, **terms})
    async def work(request: Request) -> Response:
        if isinstance(response, Exception):
            raise response
        return response

    return work


def statuses(good: int, bad: int) -> list[dict[str, str]]:
    return [{"status": "ok"}] * good + [{"status": "failed"}] * bad


async def post(app: Any, path: str = "/work", **headers: str) -> httpx.Response:
    async with serving(app) as client:
        return await client.post(path, headers=headers)


# What stays as it was.


async def test_unmetered_route_is_passed_on_message_by_message(bench: Stand) -> None:
    """Free is free: the very same messages go through, and nothing is read, held or added."""

    async def work(request: Request) -> Response:
        return StreamingResponse(iter(["a", "b"]), headers={"x-own": "1"})

    connection = Connection(app_with(bench, work), "/work")
    await connection.run()
    assert [message["type"] for message in connection.sent] == ["http.response.start"] + ["http.response.body"] * 3
    assert connection.headers == {"x-own": "1"}
    assert connection.body == b"ab"


async def test_websocket_is_passed_on(bench: Stand) -> None:
    """Other kinds of scope are none of ours."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    def talk() -> str:
        with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
            return websocket.receive_text()

    assert await asyncio.to_thread(talk) == "hello"


# What comes back.


async def test_response_tells_what_was_charged(bench: Stand) -> None:
    """Deducted, due back, the balance with what is due, and the transaction."""
    response = await post(app_with(bench, ten(JSONResponse({"results": statuses(8, 2)}))))
    [deduction, refund] = await bench.entries()
    assert response.json() == {"results": statuses(8, 2)}
    assert {name: value for name, value in response.headers.items() if name.startswith("credits-")} == {
        "credits-deducted": "10",
        "credits-transaction-id": deduction["transaction_id"],
        "credits-refunded": "2",
        "credits-balance": "92",
    }
    assert refund["balance"] == 92


@pytest.mark.parametrize("status", [400, 404, 409, 422, 500, 503])
async def test_error_status_refunds_all(bench: Stand, status: int) -> None:
    """An answered 500 is no more paid for than a raised one, whatever its body reports."""
    response = await post(app_with(bench, ten(JSONResponse({"results": statuses(10, 0)}, status))))
    assert (response.status_code, response.headers["credits-refunded"]) == (status, "10")
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


@pytest.mark.parametrize("status", [200, 201, 202, 204, 302, 304])
async def test_success_without_a_report_keeps_all(bench: Stand, status: int) -> None:
    """2xx and 3xx count as delivered where nothing is reported."""
    response = await post(app_with(bench, ten(Response(status_code=status))))
    assert (response.status_code, response.headers["credits-refunded"]) == (status, "0")
    assert await bench.moves() == [("deduction", -10)]


@pytest.mark.parametrize("error", [ValueError("x"), HTTPException(503), HTTPException(404)])
async def test_exception_refunds_all(bench: Stand, error: Exception) -> None:
    """A route that raises is not paid for, whoever answers for it."""
    await post(app_with(bench, ten(error)))
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]
    [_, refund] = await bench.entries()
    status = getattr(error, "status_code", None)
    assert refund["reason"] == (f"status {status}" if status else "exception ValueError")


async def test_exception_seen_from_outside_everything_settles_once(bench: Stand) -> None:
    """As the outermost layer one sees the 500 and the exception: one refund."""
    app = Starlette(routes=[Route("/work", ten(ValueError("x")), methods=["POST"])])
    await post(MeteredBillingMiddleware(app, **bench.options()))
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_cancelled_request_refunds_all(bench: Stand) -> None:
    """`CancelledError` is no `Exception`, and still everything comes back."""
    running = asyncio.Event()

    @metered(cost=10)
    async def work(request: Request) -> Response:
        running.set()
        await asyncio.sleep(60)
        return Response()

    async with lifespan(app := app_with(bench, work)):
        task = asyncio.create_task(Connection(app, "/work").run())
        await running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_refund_goes_out_while_background_tasks_run(bench: Stand) -> None:
    """They come after the last byte, change nothing, and are not waited for."""
    go = asyncio.Event()
    response = JSONResponse({"results": statuses(8, 2)}, background=BackgroundTask(go.wait))
    async with lifespan(app := app_with(bench, ten(response))):
        task = asyncio.create_task(Connection(app, "/work").run())
        while len(await bench.moves()) < 2:
            await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        await task
    assert await bench.moves() == [("deduction", -10), ("refund", 2)]


async def test_outcome_is_on_record_before_the_last_byte(bench: Stand) -> None:
    """When the final chunk goes out, the journal knows already what is to be refunded."""
    journal = SqliteJournal(bench.directory / "journal")
    states = []

    async def look(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            states.append(await journal.unsettled(0))

    async with lifespan(app := app_with(bench, ten(JSONResponse({"results": statuses(8, 2)})), journal=journal)):
        await Connection(app, "/work", on_send=look).run()
    [state] = states
    assert list(state) == ["refunding"]


class FailingJournal(SqliteJournal):
    """Fails to write an outcome as long as `failing`; all else is written."""

    failing = True

    def write(self, before: Any, after: Any, *, durable: bool) -> Any:
        if durable and self.failing:

            async def fail() -> bool:
                raise JournalError("disk full")

            return fail()
        return super().write(before, after, durable=durable)


async def test_journal_that_fails_at_the_outcome_never_withholds_the_response(
    bench: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """The response goes out, the error is loud, and once the journal works again everything is refunded."""
    journal = FailingJournal(bench.directory / "journal")
    app = app_with(bench, ten(JSONResponse({"results": statuses(8, 2)})), journal=journal)
    with caplog.at_level(logging.CRITICAL, "metered_billing"):
        response = await post(app)
    assert (response.status_code, response.json()) == (200, {"results": statuses(8, 2)})
    assert "journal.failed" in caplog.text
    assert await bench.moves() == [("deduction", -10)]
    journal.failing = False
    async with lifespan(app):
        while len(await bench.moves()) < 2:
            await asyncio.sleep(0.01)
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_send_that_fails_after_the_outcome_changes_nothing(bench: Stand) -> None:
    """What is on record decides, even if the last byte then found nobody."""

    async def fail(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    async with lifespan(app := app_with(bench, ten(JSONResponse({"results": statuses(8, 2)})))):
        with pytest.raises(OSError, match="gone"):
            await Connection(app, "/work", on_send=fail).run()
    assert await bench.moves() == [("deduction", -10), ("refund", 2)]


# Clients that leave.


@pytest.mark.parametrize(
    ("options", "terms", "moves"),
    [
        ({}, {}, [("deduction", -10), ("refund", 10)]),
        ({"on_disconnect": "keep"}, {}, [("deduction", -10), ("refund", 2)]),
        ({}, {"on_disconnect": "keep"}, [("deduction", -10), ("refund", 2)]),
        ({"on_disconnect": "keep"}, {"on_disconnect": "refund"}, [("deduction", -10), ("refund", 10)]),
    ],
)
async def test_client_that_left_before_the_answer(
    bench: Stand, options: dict[str, Any], terms: dict[str, Any], moves: list[tuple[str, int]]
) -> None:
    """By default it pays for nothing; with "keep", for what was done. The route's word goes before the app's."""
    async with lifespan(app := app_with(bench, ten(JSONResponse({"results": statuses(8, 2)}), **terms), **options)):
        connection = Connection(app, "/work")
        connection.leave()
        await connection.run()
    assert await bench.moves() == moves


async def test_body_that_nobody_read_does_not_look_like_a_client_that_left(bench: Stand) -> None:
    """A route may ignore its request's body; what is left of it is no disconnect."""
    async with lifespan(app := app_with(bench, ten(JSONResponse({"results": statuses(10, 0)})))):
        await Connection(app, "/work", b"unread" * 100).run()
    assert await bench.moves() == [("deduction", -10)]


async def test_receive_that_fails_does_not_look_like_a_client_that_left(bench: Stand) -> None:
    """Nor does a server whose `receive` raises; nor one that goes on about the request's body for ever."""

    class Odd(Connection):
        async def receive(self) -> Message:
            raise RuntimeError("no more")

    class Endless(Connection):
        async def receive(self) -> Message:
            return {"type": "http.request", "body": b"", "more_body": True}

    async with lifespan(app := app_with(bench, ten(Response()))):
        await Odd(app, "/work").run()
        await Endless(app, "/work").run()
    assert await bench.moves() == [("deduction", -10)] * 2


@pytest.mark.parametrize(
    ("on_disconnect", "moves"),
    [("refund", [("deduction", -10), ("refund", 10)]), ("keep", [("deduction", -10)])],
)
async def test_stream_without_a_report_that_is_left(
    bench: Stand, on_disconnect: str, moves: list[tuple[str, int]]
) -> None:
    """Starlette cancels its iterator and returns as if nothing were: only the last chunk is missing."""

    async def forever() -> AsyncIterator[str]:
        while True:
            yield "x"
            await asyncio.sleep(0)

    response = StreamingResponse(forever(), media_type="text/csv")
    app = app_with(bench, ten(response), on_disconnect=on_disconnect)
    async with lifespan(app):
        connection = Connection(app, "/work")
        asyncio.get_running_loop().call_later(0.05, connection.leave)
        await connection.run()
    assert await bench.moves() == moves


# Streams.


def lines(good: int, bad: int = 0, error: Exception | None = None) -> StreamingResponse:
    async def produce() -> AsyncIterator[str]:
        for status in statuses(good, bad):
            yield json.dumps(status) + "\n"
        if error is not None:
            raise error

    return StreamingResponse(produce(), media_type="application/x-ndjson")


async def test_stream_is_counted_as_it_passes(bench: Stand) -> None:
    """Each line as it goes by; nothing is held back, and what is not mentioned has failed."""
    passed = []
    produced = 0

    async def produce() -> AsyncIterator[str]:
        nonlocal produced
        for status in statuses(6, 1):
            passed.append(produced)
            produced += 1
            yield json.dumps(status) + "\n"

    seen = []

    async def look(message: Message) -> None:
        seen.append(produced)

    response = StreamingResponse(produce(), media_type="application/x-ndjson")
    async with lifespan(app := app_with(bench, ten(response))):
        await Connection(app, "/work", on_send=look).run()
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 7]  # the start goes first, then line by line, then the end
    assert await bench.moves() == [("deduction", -10), ("refund", 4)]


async def test_stream_that_breaks_keeps_what_it_had_reported(bench: Stand) -> None:
    """Three lines went out before it raised: three are paid for."""
    await post(app_with(bench, ten(lines(3, error=ValueError("x")))))
    assert await bench.moves() == [("deduction", -10), ("refund", 7)]


async def test_stream_that_breaks_behind_base_http_middleware_does_not_look_delivered(bench: Stand) -> None:
    """It completes the body first, and raises only then."""

    async def pass_on(request: Request, call_next: Any) -> Response:
        return await call_next(request)  # type: ignore[no-any-return]

    async def produce() -> AsyncIterator[str]:
        yield '{"results": []}'
        raise ValueError("x")

    inner = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
    await post(app_with(bench, ten(StreamingResponse(produce(), media_type="text/csv")), inner=inner))
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_stream_that_is_left_keeps_what_it_had_reported(bench: Stand) -> None:
    """A client that leaves in the middle has got what it has got."""
    app: Any = None

    async def produce() -> AsyncIterator[str]:
        for status in statuses(4, 0):
            yield json.dumps(status) + "\n"
        await asyncio.sleep(60)

    response = StreamingResponse(produce(), media_type="application/x-ndjson")
    async with lifespan(app := app_with(bench, ten(response))):
        connection = Connection(app, "/work")

        async def leave(message: Message) -> None:
            if len(connection.sent) == 4:
                asyncio.get_running_loop().call_later(0.02, connection.leave)

        connection._on_send = leave
        await connection.run()
    assert await bench.moves() == [("deduction", -10), ("refund", 6)]


async def test_stream_that_is_cancelled_keeps_what_it_had_reported(bench: Stand) -> None:
    """Likewise when the server cancels the request."""

    async def produce() -> AsyncIterator[str]:
        yield '{"status": "ok"}\n'
        await asyncio.sleep(60)

    response = StreamingResponse(produce(), media_type="application/x-ndjson")
    async with lifespan(app := app_with(bench, ten(response))):
        connection = Connection(app, "/work")
        task = asyncio.create_task(connection.run())
        while len(connection.sent) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, BaseExceptionGroup)):
            await task
        assert await bench.moves() == [("deduction", -10), ("refund", 9)]


async def test_server_sent_events_are_read(bench: Stand) -> None:
    """`data:` lines are looked at; comments and [DONE] are passed over."""
    events = ": hi\n\n" + 'data: {"item": {"status": "ok"}}\n\n' * 9 + "data: [DONE]\n\n"
    response = StreamingResponse(iter([events]), media_type="text/event-stream")
    await post(app_with(bench, ten(response, outcomes="$.item.status")))
    assert await bench.moves() == [("deduction", -10), ("refund", 1)]


# Bodies.


async def test_json_sent_in_chunks_is_read_as_a_whole(bench: Stand) -> None:
    """However it is cut, and without holding its chunks back."""
    text = json.dumps({"results": statuses(7, 3)})
    response = StreamingResponse(iter([text[:20], text[20:]]), media_type="application/json")
    answered = await post(app_with(bench, ten(response)))
    assert answered.text == text
    assert "credits-refunded" not in answered.headers  # its headers went first
    assert await bench.moves() == [("deduction", -10), ("refund", 3)]


async def test_compressed_body_is_read(bench: Stand) -> None:
    """A GZip middleware inside of ours hides nothing."""
    inner = [Middleware(GZipMiddleware, minimum_size=1)]
    app = app_with(bench, ten(JSONResponse({"results": statuses(7, 3)})), inner=inner)
    response = await post(app, **{"accept-encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"
    assert (response.json(), response.headers["credits-refunded"]) == ({"results": statuses(7, 3)}, "3")


@pytest.mark.parametrize(
    "body",
    [
        b'{"results": ',
        b"[" * 100_000,
        b'{"results": [' + b" " * (1 << 20) + b"]}",
        b"\xff\xfe\xfd",
    ],
)
async def test_body_that_cannot_be_read_counts_by_its_status(
    bench: Stand, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Invalid, too deep, too long, or no text: kept, and reported."""
    app = app_with(bench, ten(Response(body, media_type="application/json"), outcomes="$.results[*]"))
    with caplog.at_level(logging.WARNING, "metered_billing"):
        response = await post(app)
    assert response.content == body
    assert await bench.moves() == [("deduction", -10)]
    assert "charge.outcomes_unreadable" in caplog.text
    [span] = [span for span in bench.spans if span.name == "metered_billing.charge"]
    assert span.attributes is not None
    assert "metered_billing.outcomes_unreadable" in span.attributes


async def test_decompression_bomb_is_not_unpacked(bench: Stand) -> None:
    """A few bytes that unpack to many count by their status."""
    body = gzip.compress(b'{"results": [' + b" " * (64 << 20) + b"]}")
    response = Response(body, media_type="application/json", headers={"content-encoding": "gzip"})
    await post(app_with(bench, ten(response, outcomes="$.results[*]")))
    assert await bench.moves() == [("deduction", -10)]


async def test_mismatch_is_reported(bench: Stand, caplog: pytest.LogCaptureFixture) -> None:
    """What the response does not mention has failed, and that is said: log, metric, span."""
    app = app_with(bench, ten(JSONResponse({"r": statuses(4, 0)}), outcomes="$.r[*].status"))
    with caplog.at_level(logging.WARNING, "metered_billing"):
        await post(app)
    assert await bench.moves() == [("deduction", -10), ("refund", 6)]
    assert "charge.outcomes_mismatch" in caplog.text
    [span] = [span for span in bench.spans if span.name == "metered_billing.charge"]
    assert span.attributes is not None
    assert "metered_billing.outcomes_mismatch" in span.attributes


async def test_file_counts_by_its_status(bench: Stand, tmp_path: Path) -> None:
    """A file's body is not JSON; with or without the server's own way of sending it."""
    path = tmp_path / "file.txt"
    path.write_text("text")
    async with lifespan(app := app_with(bench, ten(FileResponse(path)))):
        connection = Connection(app, "/work")
        connection.scope["extensions"] = {"http.response.pathsend": {}}
        await connection.run()
        assert connection.sent[-1]["type"] == "http.response.pathsend"
        await Connection(app, "/work").run()
    assert await bench.moves() == [("deduction", -10)] * 2


async def test_reader_of_ours_that_raises_keeps_the_charge_for_a_person(
    bench: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in reading never changes a response."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("metered_billing.outcomes.bodies.BodyReader.finish", broken)
    response = await post(app_with(bench, ten(JSONResponse({"results": statuses(8, 2)}))))
    assert (response.status_code, response.headers["credits-refunded"]) == (200, "0")
    assert await bench.moves() == [("deduction", -10)]


async def test_other_messages_are_passed_on(bench: Stand) -> None:
    """Extensions that we do not know go through."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.debug", "info": {}})
        await Response(b"x")(scope, receive, send)

    class Odd(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await asgi(scope, receive, send)

    async with lifespan(app := app_with(bench, ten(Odd()))):
        connection = Connection(app, "/work")
        await connection.run()
    assert [message["type"] for message in connection.sent] == [
        "http.response.debug",
        "http.response.start",
        "http.response.body",
    ]


async def test_transaction_id_that_is_no_header_value_is_left_out(bench: Stand) -> None:
    """A credits service cannot write headers of its own into our responses."""

    class Odd(SqlCredits):
        async def deduct(self, record: Any) -> Any:
            from metered_billing.charge import Deducted

            return Deducted("t\r\nset-cookie: x", 1)

    credits = Odd(bench.directory / "odd.db")  # noqa: A001
    response = await post(app_with(bench, ten(Response()), credits=credits))
    assert response.headers["credits-deducted"] == "10"
    assert "credits-transaction-id" not in response.headers
    await credits.aclose()


# Problems.


async def test_too_few_credits_is_answered_402(bench: Stand) -> None:
    """With what it costs, what there is, and what is missing; the route did not run."""
    ran = []

    @metered(cost=GRANTED + 1)
    async def work(request: Request) -> Response:
        ran.append(1)
        return Response()

    response = await post(app_with(bench, work))
    assert response.status_code == 402
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "type": "urn:metered-billing:insufficient-credits",
        "title": "Too few credits",
        "status": 402,
        "detail": "This request costs 101 credits and the account has 100. Nothing was charged.",
        "required": 101,
        "balance": 100,
        "shortfall": 1,
    }
    assert not ran
    assert await bench.moves() == []


async def test_journal_that_cannot_be_written_is_answered_503(bench: Stand) -> None:
    """If the first record cannot be written, nothing is charged."""

    class Broken(SqliteJournal):
        def open(self, record: Any) -> Any:
            raise JournalError("disk full")

    app = app_with(bench, ten(Response()), journal=Broken(bench.directory / "journal"))
    response = await post(app)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["type"] == "urn:metered-billing:credits-unavailable"
    assert await bench.moves() == []


@pytest.mark.parametrize("kind", [InsufficientCredits, BillingError, 402])
async def test_handler_that_the_app_registered_answers(bench: Stand, kind: Any) -> None:
    """For the error itself, any class above it, or its status code."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())
    app.post("/work")(metered(cost=GRANTED + 1)(_nothing))

    @app.exception_handler(kind)
    async def poor(request: Request, error: InsufficientCredits) -> Response:
        return PlainTextResponse(f"you lack {error.shortfall}", 402)

    response = await post(app)
    assert (response.status_code, response.text) == (402, "you lack 1")


async def _nothing() -> None: ...


async def _free() -> None: ...


async def test_frameworks_own_handlers_do_not_answer(bench: Stand) -> None:
    """They would drop all but the detail; FastAPI registers one by itself."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())
    app.post("/work")(metered(cost=GRANTED + 1)(_nothing))
    assert (await post(app)).json()["shortfall"] == 1


async def test_openapi_tells_of_402_and_503(bench: Stand) -> None:
    """On metered routes alone, included and mounted ones too; what the app declared itself stays."""
    from fastapi import APIRouter

    app, router, sub = FastAPI(), APIRouter(), FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())
    work = metered(cost=1)(_nothing)
    app.post("/direct", responses={402: {"description": "our own words"}})(work)
    app.post("/hidden", include_in_schema=False)(work)
    app.get("/free")(_free)
    router.post("/included/{n}")(work)
    sub.post("/mounted")(work)
    app.include_router(router, prefix="/v1")
    app.mount("/sub", sub)
    async with serving(app) as client:
        schema = (await client.get("/openapi.json")).json()
        mounted = (await client.get("/sub/openapi.json")).json()
        again = (await client.get("/openapi.json")).json()
    paths = schema["paths"]
    assert paths["/direct"]["post"]["responses"]["402"] == {"description": "our own words"}
    for responses in (
        paths["/v1/included/{n}"]["post"]["responses"],
        mounted["paths"]["/mounted"]["post"]["responses"],
    ):
        for status, name in (("402", "insufficient-credits"), ("503", "credits-unavailable")):
            content = responses[status]["content"]["application/problem+json"]
            assert content["example"]["type"] == f"urn:metered-billing:{name}"
        assert "Retry-After" in responses["503"]["headers"]
    assert "503" in paths["/direct"]["post"]["responses"]
    assert "402" not in paths["/free"]["get"]["responses"]
    assert again == schema


# Starting and stopping.


async def test_metered_above_the_route_decorator_keeps_the_app_from_starting(bench: Stand) -> None:
    """It would run free: FastAPI knows only the plain function."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())

    @metered(cost=1)
    @app.post("/work")
    async def work() -> None: ...

    with pytest.raises(StartupFailed, match=r"/work would run free: @metered stands above"):
        await post(app)


async def test_metered_above_the_route_decorator_is_refused_without_a_lifespan(bench: Stand) -> None:
    """At the first request, then, and at every one after it."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())

    @metered(cost=1)
    @app.post("/work")
    async def work() -> None: ...

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        assert [(await client.post("/work")).status_code for _ in range(2)] == [500, 500]


async def test_plain_function_may_be_served_beside_the_metered_one(bench: Stand) -> None:
    """Who registers both means it."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())

    async def work() -> None: ...

    app.post("/work")(metered(cost=1)(work))
    app.post("/free")(work)
    await post(app, "/free")
    assert await bench.moves() == []


async def test_metered_websocket_keeps_the_app_from_starting(bench: Stand) -> None:
    """Where nothing was annotated, decoration could not tell."""
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options())

    @app.websocket("/ws")
    @metered(cost=1)
    async def ws(websocket) -> None:  # type: ignore[no-untyped-def]
        ...

    with pytest.raises(StartupFailed, match="a WebSocket cannot be metered"):
        await post(app)


async def test_unwritable_journal_keeps_the_app_from_starting(bench: Stand) -> None:
    """At start-up, clearly, instead of at the first customer."""
    (bench.directory / "file").write_text("")
    app = app_with(bench, ten(Response()), journal=bench.directory / "file" / "journal")
    with pytest.raises(StartupFailed, match="no journal can be kept"):
        await post(app)


async def test_unwritable_journal_without_a_lifespan_is_answered_503(bench: Stand) -> None:
    """Nothing is charged where nothing can be put on record."""
    (bench.directory / "file").write_text("")
    app = app_with(bench, ten(Response()), journal=bench.directory / "file" / "journal")
    connection = Connection(app, "/work")
    await connection.run()
    assert connection.status == 503
    assert await bench.moves() == []


async def test_trace_says_why_nothing_could_be_opened(bench: Stand, caplog: pytest.LogCaptureFixture) -> None:
    """Whose request it was, what it would have cost, and why it was 503; the log line has the span's id."""
    (bench.directory / "file").write_text("")
    await Connection(app_with(bench, ten(Response()), journal=bench.directory / "file" / "journal"), "/work").run()
    charge, span = bench.spans
    assert (charge.name, span.name) == ("metered_billing.charge", "metered_billing.deduct")
    assert dict(charge.attributes or {})["metered_billing.outcome"] == "not run"
    assert span.parent == charge.context
    attributes = dict(span.attributes or {})
    assert "no journal can be kept" in str(attributes.pop("metered_billing.reason"))
    assert attributes == {
        "metered_billing.tenant.id": "acme",
        "metered_billing.user.id": "ann",
        "metered_billing.amount": 10,
        "metered_billing.units": 10,
        "metered_billing.outcome": "notsent",
        "error.type": "notsent",
    }
    assert span.context is not None
    assert f"{span.context.span_id:016x}" in caplog.text


async def test_shutdown_waits_for_refunds(bench: Stand) -> None:
    """`lifespan.shutdown.complete` goes on only when what was under way is settled."""

    class Slow(SqlCredits):
        async def refund(self, record: Any) -> Any:
            await asyncio.sleep(0.2)
            return await super().refund(record)

    await bench.credits.aclose()
    slow = Slow(bench.directory / "credits.db")
    await post(app_with(bench, ten(ValueError("x")), credits=slow))
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_app_may_be_started_again(bench: Stand) -> None:
    """A second lifespan of the same app charges as the first did."""
    app = app_with(bench, ten(Response()))
    for _ in range(2):
        assert (await post(app)).status_code == 200
    assert await bench.moves() == [("deduction", -10)] * 2


async def test_mounted_app_with_a_middleware_of_its_own_is_charged_by_it(bench: Stand) -> None:
    """The innermost one counts, once."""
    inner = app_with(bench, ten(Response()))
    app = Starlette(
        routes=[Mount("/sub", app=inner)],
        middleware=[Middleware(MeteredBillingMiddleware, **bench.options(journal=bench.directory / "outer"))],
    )
    assert (await post(app, "/sub/work")).headers["credits-deducted"] == "10"
    assert await bench.moves() == [("deduction", -10)]


def test_client_without_a_lifespan_has_a_loop_for_each_request(tmp_path: Path) -> None:
    """What is bound to a loop is kept per loop; a refund that ends with its loop is resumed by the next."""
    credits = SqlCredits(tmp_path / "credits.db")  # noqa: A001
    asyncio.run(credits.grant("acme", "ann", amount=GRANTED, reason="test", idempotency_key="grant"))

    refunds = []

    class Stuck(SqlCredits):
        async def refund(self, record: Any) -> Any:
            refunds.append(record)
            if len(refunds) == 1:
                await asyncio.sleep(60)
            return await super().refund(record)

    asyncio.run(credits.aclose())
    stuck = Stuck(tmp_path / "credits.db")
    app = Starlette(
        routes=[Route("/work", ten(JSONResponse({"results": statuses(8, 2)})), methods=["POST"])],
        middleware=[
            Middleware(MeteredBillingMiddleware, credits=stuck, journal=tmp_path / "journal", account=lambda: ANN)
        ],
    )
    client = TestClient(app)
    assert [client.post("/work").status_code for _ in range(3)] == [200, 200, 200]
    with client:  # and now one loop for all

        async def balance() -> int:
            while (held := await stuck.balance("acme", "ann")) != GRANTED - 3 * 8:
                await settled()
                await asyncio.sleep(0.01)
            return held

        assert client.portal is not None
        assert client.portal.call(balance) == GRANTED - 24


# Settings.


def test_middleware_without_credits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no default place for other people's money."""
    monkeypatch.delenv("METERED_BILLING_CREDITS", raising=False)
    with pytest.raises(ValueError, match="set METERED_BILLING_CREDITS"):
        MeteredBillingMiddleware(Starlette())


@pytest.mark.parametrize(
    "options",
    [
        {"on_disconnect": "x"},
        {"on_unavailable": "x"},
        {"max_body_bytes": -1},
        {"drain_timeout_s": -1},
        {"credits": "ftp://x"},
        {"credits": "credits.db"},
        {"journal": "redis://x"},
        {"journal": ""},
    ],
)
def test_middleware_refuses_what_cannot_be_right(tmp_path: Path, options: dict[str, Any]) -> None:
    """At construction."""
    given: dict[str, Any] = {"credits": "sqlite:///credits.db", "journal": tmp_path, **options}
    with pytest.raises(ValueError):
        MeteredBillingMiddleware(Starlette(), **given)


def test_middleware_refuses_an_account_that_is_no_function(tmp_path: Path) -> None:
    """An Account says who pays always: that is what `lambda: …` is for."""
    with pytest.raises(TypeError, match="account must be a function"):
        MeteredBillingMiddleware(Starlette(), credits="sqlite:///credits.db", account=cast(Any, ANN))


async def test_start_up_fails_where_the_middleware_is_made_by_a_server_and_cannot_be_right(bench: Stand) -> None:
    """A server takes an error for an app that has no lifespan, and serves; what it is told ends it."""
    app = Starlette(middleware=[Middleware(MeteredBillingMiddleware, **bench.options(journal="redis://x"))])
    with pytest.raises(StartupFailed, match="journal must be a directory"):
        async with lifespan(app):
            pass


async def test_refused_at_the_first_request_is_looked_at_anew_at_the_next(
    bench: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a lifespan nobody starts the process again, and what could not be read may be there by now."""
    monkeypatch.delenv("METERED_BILLING_CREDITS", raising=False)
    app = Starlette(
        routes=[Route("/work", ten(Response()), methods=["POST"])],
        middleware=[Middleware(MeteredBillingMiddleware, **bench.options(credits=None))],
    )
    with pytest.raises(ValueError, match="set METERED_BILLING_CREDITS"):
        await Connection(app, "/work").run()
    monkeypatch.setenv("METERED_BILLING_CREDITS", f"sqlite:///{bench.directory}/other.db")
    again = Connection(app, "/work")
    await again.run()
    assert again.status == 402
    async with lifespan(app):
        pass


async def test_what_is_not_given_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credits, token and journal."""
    monkeypatch.setenv("METERED_BILLING_CREDITS", f"sqlite:///{tmp_path}/credits.db")
    monkeypatch.setenv("METERED_BILLING_JOURNAL", f"sqlite:///{tmp_path}/journal")
    monkeypatch.setenv("METERED_BILLING_TOKEN", "secret")
    settings = Settings()
    assert "secret" not in repr(settings)
    app = Starlette(
        routes=[Route("/work", ten(Response()), methods=["POST"])],
        middleware=[Middleware(MeteredBillingMiddleware, account=lambda: ANN)],
    )
    assert (await post(app)).status_code == 402
    assert (tmp_path / "journal" / "charges-0.db").exists()


async def test_caller_s_request_id_is_kept_if_it_is_harmless(bench: Stand) -> None:
    """It stands in logs and in the ledger, so it is short and has no odd characters."""
    app = app_with(bench, ten(Response()))
    await post(app, **{"x-request-id": "req-1"})
    await post(app, **{"x-request-id": "req 2"})
    await post(app)
    charges = [span for span in bench.spans if span.name == "metered_billing.charge"]
    assert [dict(span.attributes or {}).get("metered_billing.request.id") for span in charges] == ["req-1", None, None]


def test_charge_is_public() -> None:
    """What `current_charge` returns can be named in annotations."""
    with pytest.raises(LookupError):
        current_charge()


async def test_outermost_without_routes_to_see_is_no_trouble(bench: Stand) -> None:
    """An ASGI app of which nothing is known is served as it is."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await Response("hello")(scope, receive, send)

    connection = Connection(MeteredBillingMiddleware(asgi, **bench.options()), "/work")
    await connection.run()
    assert connection.body == b"hello"


async def test_reader_of_ours_that_raises_while_it_is_fed_keeps_the_charge_for_a_person(
    bench: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a bug in the middle of a stream."""

    def broken(*args: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("metered_billing.outcomes.streams.LineReader.feed", broken)
    response = await post(app_with(bench, ten(lines(8, 2))))
    assert len(response.text.splitlines()) == 10
    assert await bench.moves() == [("deduction", -10)]


async def test_balance_that_the_service_does_not_tell_is_left_out(bench: Stand) -> None:
    """A service of another shape may have none to tell."""

    class Silent(SqlCredits):
        async def deduct(self, record: Any) -> Any:
            from metered_billing.charge import Deducted

            return Deducted("t-1", None)

    credits = Silent(bench.directory / "silent.db")  # noqa: A001
    response = await post(app_with(bench, ten(Response()), credits=credits))
    assert response.headers["credits-transaction-id"] == "t-1"
    assert "credits-balance" not in response.headers
    await credits.aclose()


async def test_error_that_is_streamed_tells_its_refund_at_once(bench: Stand) -> None:
    """What an error refunds is known by its status, before its body is."""
    response = await post(app_with(bench, ten(StreamingResponse(iter(["no"]), 500))))
    assert (response.status_code, response.headers["credits-refunded"]) == (500, "10")
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_stream_that_is_left_under_keep_counts_what_the_apps_own_reader_said(bench: Stand) -> None:
    """What was done is paid for, and what the reader says was done."""

    async def forever() -> AsyncIterator[str]:
        while True:
            yield "x"
            await asyncio.sleep(0)

    response = StreamingResponse(forever(), media_type="text/csv")
    app = app_with(bench, ten(response, on_disconnect="keep", outcomes=lambda returned: 7))
    async with lifespan(app):
        connection = Connection(app, "/work")
        asyncio.get_running_loop().call_later(0.05, connection.leave)
        await connection.run()
    assert await bench.moves() == [("deduction", -10), ("refund", 3)]


async def test_units_that_the_route_said_have_failed_are_no_mismatch(
    bench: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream of fewer tokens than were paid for is none, where the route said how many fewer."""

    async def tokens() -> AsyncIterator[str]:
        for _ in range(3):
            yield 'data: {"status": "ok"}\n\n'
        current_charge().fail(units=7)

    response = StreamingResponse(tokens(), media_type="text/event-stream")
    with caplog.at_level(logging.WARNING, "metered_billing"):
        await post(app_with(bench, ten(response)))
    assert await bench.moves() == [("deduction", -10), ("refund", 7)]
    assert "mismatch" not in caplog.text


@pytest.mark.parametrize("kind", [ValueError, HTTPException])
async def test_exception_that_the_app_answers_with_200_refunds_all(bench: Stand, kind: type[Exception]) -> None:
    """A route that raised is not paid for, whatever a handler of the app's makes of it."""

    async def handler(request: Request, error: Exception) -> Response:
        return JSONResponse({"results": statuses(10, 0)})

    app = app_with(bench, ten(HTTPException(404) if kind is HTTPException else kind("x")))
    app.add_exception_handler(kind, handler)
    response = await post(app)
    assert (response.status_code, response.headers["credits-refunded"]) == (200, "10")
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_redirect_that_is_raised_is_an_answer(bench: Stand) -> None:
    """Some apps raise what others return."""
    response = await post(app_with(bench, ten(HTTPException(303, headers={"location": "/"}))))
    assert (response.status_code, response.headers["credits-refunded"]) == (303, "0")
    assert await bench.moves() == [("deduction", -10)]


@pytest.mark.parametrize(
    ("on_disconnect", "moves"),
    [("refund", [("deduction", -10), ("refund", 10)]), ("keep", [("deduction", -10)])],
)
async def test_client_that_left_by_the_servers_error(
    bench: Stand, on_disconnect: str, moves: list[tuple[str, int]]
) -> None:
    """Since ASGI 2.4 `send` raises where nobody is there: that is a client that left, not a route that raised."""

    async def produce() -> AsyncIterator[str]:
        for _ in range(3):
            yield "x"

    async def fail(message: Message) -> None:
        if message.get("body"):
            raise OSError("gone")

    response = StreamingResponse(produce(), media_type="text/csv")
    async with lifespan(app := app_with(bench, ten(response), on_disconnect=on_disconnect)):
        connection = Connection(app, "/work", on_send=fail)
        connection.scope["asgi"] = {"version": "3.0", "spec_version": "2.4"}
        with pytest.raises((OSError, ClientDisconnect)):
            await connection.run()
    assert await bench.moves() == moves


async def test_iterable_that_is_no_iterator_is_streamed(bench: Stand) -> None:
    """Whatever `async for` takes."""

    class Chunks:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"a"
            yield b"b"

    response = await post(app_with(bench, ten(StreamingResponse(Chunks()))))
    assert response.content == b"ab"
    assert await bench.moves() == [("deduction", -10)]


async def test_request_is_charged_once_even_if_metered_endpoints_run_at_once(bench: Stand) -> None:
    """One of two is refused; the request fails, and the other's credits come back."""

    @metered(cost=10)
    async def one(request: Request) -> int:
        await asyncio.sleep(0.01)
        return 1

    async def work(request: Request) -> Response:
        await asyncio.gather(one(request), one(request))
        return Response()

    assert (await post(app_with(bench, work))).status_code == 500
    assert await bench.moves() in ([], [("deduction", -10), ("refund", 10)])


async def test_metered_endpoint_called_by_a_task_left_behind_is_refused(bench: Stand) -> None:
    """After the request there is no response that could report; nor may one outlast it."""
    tasks = []

    @metered(cost=10)
    async def one(request: Request) -> int:
        return 1

    async def later(request: Request) -> int:
        await asyncio.sleep(0.05)
        return await one(request)

    async def work(request: Request) -> Response:
        tasks.append(asyncio.create_task(later(request)))
        tasks.append(asyncio.create_task(one(request)))
        await asyncio.sleep(0)  # it is being paid for when its request ends
        return Response()

    async with lifespan(app := app_with(bench, work)):
        await Connection(app, "/work").run()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result).__name__ for result in results] == ["BillingMisconfigured"] * 2
        assert await bench.moves() in ([], [("deduction", -10), ("refund", 10)])


async def test_logging_that_raises_changes_neither_response_nor_money(bench: Stand) -> None:
    """A processor of the app's own cannot bear our events: everything goes on."""

    def processor(*args: Any) -> Any:
        raise KeyError("request")

    structlog.configure(processors=[processor])
    try:
        response = await post(app_with(bench, ten(JSONResponse({"results": statuses(8, 2)}))))
    finally:
        structlog.reset_defaults()
    assert (response.status_code, response.headers["credits-refunded"]) == (200, "2")
    assert await bench.moves() == [("deduction", -10), ("refund", 2)]


async def test_response_that_raises_while_it_is_sent_refunds_all(bench: Stand) -> None:
    """The route returned, but what it returned did not arrive."""

    async def produce() -> AsyncIterator[str]:
        yield "a,b"
        raise ValueError("x")

    await post(app_with(bench, ten(StreamingResponse(produce(), media_type="text/csv"), on_disconnect="keep")))
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_client_that_left_is_noticed_through_middleware_around_ours(bench: Stand) -> None:
    """Each takes a few turns of the event loop to pass on that nobody is there."""

    async def pass_on(request: Request, call_next: Any) -> Response:
        return await call_next(request)  # type: ignore[no-any-return]

    work = ten(JSONResponse({"results": statuses(10, 0)}))
    app = Starlette(
        routes=[Route("/work", work, methods=["POST"])],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=pass_on),
            Middleware(MeteredBillingMiddleware, **bench.options()),
        ],
    )
    async with lifespan(app):
        connection = Connection(app, "/work")
        connection.leave()
        await connection.run()
    assert await bench.moves() == [("deduction", -10), ("refund", 10)]


async def test_client_that_expects_100_continue_is_not_made_to_send(bench: Stand) -> None:
    """Asking whether it is there would make the server ask for a body that nobody wants."""
    async with lifespan(app := app_with(bench, ten(JSONResponse({"results": statuses(10, 0)})))):
        connection = Connection(app, "/work", b"unread")
        connection.scope["headers"].append((b"expect", b"100-continue"))
        await connection.run()
        assert connection._unread
    assert await bench.moves() == [("deduction", -10)]


async def test_stream_of_known_length_is_not_held_back(bench: Stand) -> None:
    """Its headers go out at once, whenever its first chunk comes."""
    go = asyncio.Event()

    async def produce() -> AsyncIterator[bytes]:
        await go.wait()
        yield b"ab"

    response = StreamingResponse(produce(), headers={"content-length": "2"})
    async with lifespan(app := app_with(bench, ten(response))):
        connection = Connection(app, "/work")
        task = asyncio.create_task(connection.run())
        while not connection.sent:
            await asyncio.sleep(0.01)
        assert [message["type"] for message in connection.sent] == ["http.response.start"]
        go.set()
        await task
    assert await bench.moves() == [("deduction", -10)]
