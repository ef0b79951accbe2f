"""The route that is measured, and each way to bill for it."""

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, metered
from tests.bench import by_hand
from tests.bench.variants import PEERS, Variant

SLOW_S = 0.02


class Item(BaseModel):
    """Something to work on."""

    id: str
    data: str


class Batch(BaseModel):
    """What a client asks for."""

    items: list[Item]


class Result(BaseModel):
    """What became of an item."""

    id: str
    status: str


class Results(BaseModel):
    """What a client gets."""

    results: list[Result]


Work = Callable[[Batch], Awaitable[Results]]


def _results(body: Batch) -> Results:
    return Results(
        results=[Result(id=item.id, status="failed" if item.data == "broken" else "ok") for item in body.items]
    )


async def create(body: Batch) -> Results:
    """Ten items; those that are broken fail."""
    return _results(body)


async def slow(body: Batch) -> Results:
    """The same, after a while."""
    await asyncio.sleep(SLOW_S)
    return _results(body)


def user_of(request: Request) -> str:
    """Who pays."""
    return request.headers["x-user"]


def items_of(body: Batch) -> dict[str, int]:
    """A unit for each item."""
    return {item.id: 1 for item in body.items}


def bare(app: FastAPI, variant: Variant) -> None:
    """Nothing is billed."""
    app.post("/create")(create)
    app.post("/slow")(slow)


def base(app: FastAPI, variant: Variant) -> None:
    """What many write a middleware with."""

    async def nothing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=nothing)
    bare(app, variant)


def unmetered(app: FastAPI, variant: Variant) -> None:
    """Behind our middleware, and free."""
    _add_ours(app, variant)
    bare(app, variant)


def ours(app: FastAPI, variant: Variant) -> None:
    """As the README shows it."""
    _add_ours(app, variant)
    app.post("/create")(metered(cost=items_of, outcomes="$.results[*]")(create))
    app.post("/slow")(metered(cost=items_of, outcomes="$.results[*]")(slow))


def _add_ours(app: FastAPI, variant: Variant) -> None:
    options: dict[str, Any] = {}
    if variant.lean:
        options["lean"] = True
    credits = HttpCredits(os.environ["BENCH_CREDITS"], token=os.environ["BENCH_TOKEN"], **options)  # noqa: A001
    tenant = os.environ["BENCH_TENANT"]

    def account_of(request: Request) -> Account:
        return Account(tenant, user_of(request))

    app.add_middleware(
        MeteredBillingMiddleware, credits=credits, account=account_of, journal=os.environ["BENCH_JOURNAL"]
    )


def by_hand_plain(app: FastAPI, variant: Variant) -> None:
    """A shared `httpx.AsyncClient`, a POST before and a POST after."""
    _add_by_hand(app, by_hand.Plain)


def by_hand_httpx(app: FastAPI, variant: Variant) -> None:
    """And tenacity, pybreaker, spans and log lines."""
    _add_by_hand(app, by_hand.OverHttpx)


def by_hand_aiohttp(app: FastAPI, variant: Variant) -> None:
    """The same over aiohttp."""
    _add_by_hand(app, by_hand.OverAiohttp)


def _add_by_hand(app: FastAPI, kind: Callable[[str, str, str], by_hand.Credits]) -> None:
    credits = kind(os.environ["BENCH_CREDITS"], os.environ["BENCH_TOKEN"], os.environ["BENCH_TENANT"])  # noqa: A001

    async def billed(request: Request, body: Batch, work: Work) -> Results:
        key = str(uuid.uuid4())
        transaction = await credits.deduct(key, user_of(request), len(body.items))
        try:
            results = await work(body)
        except Exception:
            await credits.refund(f"{key}:refund", transaction, len(body.items), [item.id for item in body.items])
            raise
        failed = [result.id for result in results.results if result.status != "ok"]
        if failed:
            await credits.refund(f"{key}:refund", transaction, len(failed), failed)
        return results

    @app.post("/create")
    async def billed_create(request: Request, body: Batch) -> Results:
        return await billed(request, body, create)

    @app.post("/slow")
    async def billed_slow(request: Request, body: Batch) -> Results:
        return await billed(request, body, slow)


def create_app(variant: Variant, stats: Callable[[], dict[str, Any]]) -> FastAPI:
    """The app of a variant. At `/stats` it tells those, at `/headers` what its requests have to carry."""
    app = FastAPI()
    if variant in PEERS:
        from tests.bench import peers

        headers = getattr(peers, variant.build)(app, variant)
    else:
        headers = globals()[variant.build](app, variant) or []

    @app.get("/stats")
    async def told() -> JSONResponse:
        return JSONResponse(stats())

    @app.get("/headers")
    async def to_carry() -> JSONResponse:
        return JSONResponse(headers)

    return app
