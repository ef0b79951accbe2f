"""The desk over HTTP: spans in, and everything else as JSON under `/desk`. Errors are problems (RFC 9457)."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .books import Unreadable
from .faults import KINDS
from .guard import problem, refusal
from .otlp import MAX_BODY_BYTES, BadBody

if TYPE_CHECKING:
    from .desk import Desk

WAIT_S = 10.0
"""How long `?since=` waits for news."""

MAX_JSON_BYTES = 4_096
MAX_LISTED = 1_000


def create_app(desk: "Desk") -> ASGIApp:
    """The routes, for one desk."""
    app = Starlette(
        routes=[
            Route("/v1/traces", _ingest, methods=["POST"]),
            Route("/desk/state", _state),
            Route("/desk/statement", _statement),
            Route("/desk/fault", _fault, methods=["POST"]),
            Route("/desk/kill", _kill, methods=["POST"]),
            Route("/desk/traces", _traces),
            Route("/desk/traces/{trace_id}", _trace),
        ],
        exception_handlers={HTTPException: _as_problem, ClientDisconnect: _nobody_there},
    )
    app.state.desk = desk
    return _Guarded(app)


class _Guarded:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An exporter sends no header of ours; what it sends, no web page can without asking first either.
        if scope["type"] == "http":
            reading = "GET" if scope["path"] == "/v1/traces" else scope["method"]
            if (refused := refusal(reading, scope["headers"])) is not None:
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _desk(request: Request) -> "Desk":
    desk: Desk = request.app.state.desk
    return desk


async def _ingest(request: Request) -> Response:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-protobuf":
        raise HTTPException(415, "Send OTLP as application/x-protobuf.")
    body = await _body(request, MAX_BODY_BYTES)
    try:
        await _desk(request).ingest(body, request.headers.get("content-encoding", "").strip())
    except BadBody as error:
        raise HTTPException(400, f"{error}.") from error
    return Response(b"", media_type="application/x-protobuf")


async def _state(request: Request) -> Response:
    return JSONResponse(await _desk(request).state())


async def _statement(request: Request) -> Response:
    try:
        return JSONResponse(await _desk(request).books.statement(request.query_params.get("user_id", "")))
    except Unreadable as error:
        raise HTTPException(503, f"The statement cannot be read: {error}.", {"Retry-After": "2"}) from error


async def _fault(request: Request) -> Response:
    given = await _json(request)
    kind, calls = given.get("kind"), given.get("calls", "every")
    if kind is None or kind not in KINDS or calls not in ("next", "every"):
        raise HTTPException(422, f"`kind` is one of: {', '.join(KINDS)}; `calls` is next or every.")
    await _desk(request).choose_fault(kind, calls)
    return JSONResponse(await _desk(request).state())


async def _kill(request: Request) -> Response:
    from .desk import TooMany

    given = await _json(request)
    process, after_ms = given.get("process"), given.get("after_ms", 0)
    if process not in ("app", "credits") or type(after_ms) is not int or not 0 <= after_ms <= 60_000:
        raise HTTPException(422, "`process` is app or credits; `after_ms` is from 0 to 60000.")
    try:
        _desk(request).kill(process, after_ms)
    except TooMany as error:
        raise HTTPException(429, str(error)) from error
    return JSONResponse({"process": process, "after_ms": after_ms}, 202)


async def _traces(request: Request) -> Response:
    desk, given = _desk(request), request.query_params
    limit = _number(given, "limit", 100, most=MAX_LISTED)
    slow_ms = _number(given, "slow_ms", 0)
    if "since" in given:
        await desk.collector.newer(_number(given, "since", 0), WAIT_S)
    # The version first: what arrives while this is put together is news.
    version = desk.collector.version
    found = [one for one in desk.reading.summaries() if _wanted(one, given, slow_ms)]
    return JSONResponse(
        {
            "traces": found[:limit],
            "version": version,
            "kept": len(desk.collector),
            "dropped": desk.collector.dropped,
        }
    )


async def _trace(request: Request) -> Response:
    found = _desk(request).reading.trace(request.path_params["trace_id"].lower())
    if found is None:
        raise HTTPException(404, "There is no such trace here, or not any more.")
    return JSONResponse(found)


def _wanted(one: Mapping[str, Any], given: Mapping[str, str], slow_ms: float) -> bool:
    for parameter, member in (("tenant", "tenant_id"), ("user", "user_id"), ("outcome", "outcome")):
        if given.get(parameter) and given[parameter] != one[member]:
            return False
    if not _answered(one["status"], given.get("status", "")):
        return False
    if one["duration_ms"] < slow_ms or (given.get("trouble") == "1" and not one["trouble"]):
        return False
    sought = given.get("q", "").strip().lower()
    return not sought or any(sought in str(value).lower() for value in one.values() if value is not None)


def _answered(status: int | None, wanted: str) -> bool:
    """Whether a status is the one wanted: `402`, `4xx`, or `none` where there is no answer."""
    if wanted in ("", "none"):
        return not wanted or status is None
    return str(status) == wanted or (wanted.endswith("xx") and str(status)[:1] == wanted[:1])


def _number(given: Mapping[str, str], name: str, default: int, *, most: int = 2**53) -> int:
    text = given.get(name) or str(default)
    if not text.isdecimal() or len(text) > 16:
        raise HTTPException(422, f"`{name}` is a whole number from 0.")
    return min(int(text), most)


async def _json(request: Request) -> Mapping[str, Any]:
    body = await _body(request, MAX_JSON_BYTES)
    given = None
    with suppress(ValueError, RecursionError):
        given = json.loads(body)
    if not isinstance(given, dict):
        raise HTTPException(400, "Send a JSON object.")
    return given


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"{most} bytes is the most.")
    return bytes(body)


async def _as_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    title = {404: "Not found", 422: "Not understood"}.get(error.status_code, "Refused")
    answer = problem(error.status_code, title, error.detail)
    answer.headers.update(error.headers or {})
    return answer


async def _nobody_there(request: Request, error: Exception) -> Response:
    return Response(status_code=400)
