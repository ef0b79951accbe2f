"""What others have published for apps like this one, each as its own pages show it: `make bench-peers`.

None of them does the same as we do, so each says what it does not: they are measured for what a request then costs.
"""

import asyncio
import base64
import json
import os
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.bench.app import SLOW_S, Batch, Results, _results
from tests.bench.load import USERS
from tests.bench.variants import Variant

Headers = list[dict[str, str]]
"""What each user's requests carry."""

NETWORK = "eip155:84532"


def slowapi(app: FastAPI, variant: Variant) -> Headers:
    """A rate limiter that counts in memory: ten for each request. Nothing is on record, nothing comes back."""
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded

    limiter = Limiter(key_func=lambda request: request.headers["x-user"])
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)

    @app.post("/create")
    @limiter.limit("1000000000/day", cost=10)
    async def create(request: Request, body: Batch) -> Results:
        return _results(body)

    @app.post("/slow")
    @limiter.limit("1000000000/day", cost=10)
    async def slow(request: Request, body: Batch) -> Results:
        await asyncio.sleep(SLOW_S)
        return _results(body)

    return [{}] * USERS


def gringotts(app: FastAPI, variant: Variant) -> Headers:
    """Prepaid credits in the app's own SQLite file. Ten a request; what fails of them does not come back."""
    # Read when it is imported.
    os.environ["DATABASE_URL"] = f"sqlite:///{os.environ['BENCH_JOURNAL']}-gringotts.db"
    import gringotts as package
    from gringotts import auth, db

    db.Base.metadata.create_all(db.engine)
    package.init_app(app, package.GringottsConfig())
    charge = package.charge(10)

    @app.post("/create")
    async def create(body: Batch, user: Any = Depends(charge)) -> Results:  # noqa: B008 - as its pages show it
        return _results(body)

    @app.post("/slow")
    async def slow(body: Batch, user: Any = Depends(charge)) -> Results:  # noqa: B008
        await asyncio.sleep(SLOW_S)
        return _results(body)

    with db.SessionLocal() as session:
        keys = [auth.create_user_with_key(session, f"user-{user}", 10**9)[1] for user in range(USERS)]
    return [{"X-API-Key": key} for key in keys]


def x402(app: FastAPI, variant: Variant) -> Headers:
    """A payment a request: verified by a facilitator before the route and settled after it, over HTTP.

    The facilitator is a stub that says yes at once: no signature is checked, no chain is asked, nothing is on record.
    """
    from x402 import x402ResourceServer
    from x402.http import FacilitatorConfig, HTTPFacilitatorClient
    from x402.http.middleware.fastapi import payment_middleware
    from x402.http.types import PaymentOption, RouteConfig
    from x402.schemas import AssetAmount, ResourceConfig

    class Exact:
        """What its scheme for Ethereum does with prices, without its libraries."""

        scheme = "exact"
        default_asset_transfer_method = "eip3009"
        payment_flows = {"eip3009": {"supported": ("authorization",), "default": "authorization"}}  # noqa: RUF012

        def parse_price(self, price: Any, network: str) -> Any:
            return AssetAmount(amount="10", asset="0x" + "1" * 40)

        def enhance_payment_requirements(self, requirements: Any, kind: Any, extensions: list[str]) -> Any:
            return requirements

    server = x402ResourceServer(HTTPFacilitatorClient(FacilitatorConfig(url=os.environ["BENCH_FACILITATOR"])))
    server.register(NETWORK, Exact())
    terms = {"scheme": "exact", "network": NETWORK, "price": "$0.01", "pay_to": "0x" + "2" * 40}
    routes = {f"POST /{path}": RouteConfig(accepts=PaymentOption(**terms)) for path in ("create", "slow")}
    app.middleware("http")(payment_middleware(routes, server))

    @app.post("/create")
    async def create(body: Batch) -> Results:
        return _results(body)

    @app.post("/slow")
    async def slow(body: Batch) -> Results:
        await asyncio.sleep(SLOW_S)
        return _results(body)

    accepted = server.build_payment_requirements(ResourceConfig(**terms))[0].model_dump(by_alias=True)
    payments = [
        {"x402Version": 2, "payload": {"signature": "0x" + f"{number:0130x}"}, "accepted": accepted}
        for number in range(USERS)
    ]
    return [{"Payment-Signature": base64.b64encode(json.dumps(payment).encode()).decode()} for payment in payments]


def facilitator() -> Starlette:
    """The stub."""

    async def supported(request: Request) -> JSONResponse:
        return JSONResponse({"kinds": [{"x402Version": 2, "scheme": "exact", "network": NETWORK}]})

    async def verify(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"isValid": True, "payer": "0x" + "3" * 40})

    async def settle(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"success": True, "transaction": "0x" + "4" * 64, "network": NETWORK})

    return Starlette(
        routes=[
            Route("/supported", supported),
            Route("/verify", verify, methods=["POST"]),
            Route("/settle", settle, methods=["POST"]),
        ]
    )
