"""The demo's pages and what they ask for: files of ours, and the desk behind `/desk`. All under a strict policy."""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .desk.guard import problem, refusal
from .tracing import DESK

FOLDER = Path(__file__).parent / "pages"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline, and in nobody's frame."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The files are ours to change while somebody looks at them.
    "Cache-Control": "no-cache",
}

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

MAX_BODY_BYTES = 64 << 10
DESK_TIMEOUT_S = 20.0
"""Longer than the desk lets anybody wait for news."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,80}")
_DESK_PATH = re.compile(r"[a-z]{1,20}(/[0-9A-Za-z]{1,64})?")
_PASSED_ON = ("content-type", "x-demo")
_PASSED_BACK = ("content-type", "retry-after")


@asynccontextmanager
async def door_to_the_desk() -> AsyncIterator[httpx.AsyncClient | None]:
    """Connections to the desk; None where there is none."""
    if not (url := os.environ.get(DESK)):
        yield None
        return
    limits = httpx.Limits(max_connections=128, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=url, timeout=DESK_TIMEOUT_S, limits=limits, trust_env=False) as client:
        yield client


def add_pages(app: FastAPI) -> None:
    """Add the pages' routes to the app; `app.state.desk` is the door."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        """The page that sells cut-outs."""
        return page("index.html")

    @app.get("/traces", include_in_schema=False)
    async def traces() -> Response:
        """The page of traces."""
        return page("traces.html")

    @app.get("/pages/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        """A script or a style sheet."""
        return page(name)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """What Prometheus scrapes."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/desk/{path:path}", methods=["GET", "POST"], include_in_schema=False)
    async def desk(path: str, request: Request) -> Response:
        """The desk, which is a process of its own: it lives on when this one is killed."""
        return await ask_the_desk(request, path)


def page(name: str) -> Response:
    """A file of the pages'.

    Raises:
        HTTPException: 404; there is none of this name.
    """
    path = FOLDER / name
    if not _NAME.fullmatch(name) or path.suffix not in TYPES or not path.is_file():
        raise HTTPException(404, "There is no such page.")
    return Response(path.read_bytes(), media_type=f"{TYPES[path.suffix]}; charset=utf-8", headers=HEADERS)


async def ask_the_desk(request: Request, path: str) -> Response:
    """Pass a request on to the desk, and its answer back."""
    client: httpx.AsyncClient | None = request.app.state.desk
    if client is None:
        return problem(404, "Not found", "The app runs without a desk: `make demo` brings one.")
    if (refused := refusal(request.method, request.scope["headers"])) is not None:
        return refused
    if not _DESK_PATH.fullmatch(path):  # dots would lead out of it
        return problem(404, "Not found", "The desk has no such place.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return problem(413, "Refused", f"{MAX_BODY_BYTES} bytes is the most.")
    headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    url = httpx.URL(path=f"/desk/{path}", query=request.scope["query_string"])
    try:
        answer = await client.request(request.method, url, content=bytes(body), headers=headers)
    except httpx.HTTPError as error:
        return problem(502, "Bad gateway", f"The desk gives no answer ({type(error).__name__}).")
    back = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
    return Response(answer.content, answer.status_code, {**back, "Cache-Control": "no-store"})
