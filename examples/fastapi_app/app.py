"""An app that sells cut-out pictures, one credit each, and never keeps a credit for one that failed.

`make demo` runs it beside a credits service. Everything about money is in the lines marked "billing".
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse

from metered_billing import Account, MeteredBillingMiddleware, metered

from . import tracing
from .models import Batch, BatchDone, CreateProducts, Product, ProductsCreated
from .pages import add_pages, door_to_the_desk
from .samples import sample_request
from .studio import Studio
from .users import CurrentUser, User
from .wallet import Statement, Wallet

logging.basicConfig(level=logging.INFO)
logging.getLogger("httpx").setLevel(logging.WARNING)

studio = Studio.from_environment()
tracer_provider = tracing.set_up()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep a connection pool to the credits service for `GET /me`, and one to the desk."""
    async with Wallet.open() as wallet, door_to_the_desk() as desk:
        app.state.wallet, app.state.desk = wallet, desk
        yield
    if tracer_provider is not None:
        await asyncio.to_thread(tracer_provider.shutdown)


def account_of(user: User) -> Account:
    """Billing: who pays is who is logged in. `user` is the endpoint's own argument of that name."""
    return Account(user.tenant_id, user.user_id)


def one_credit_an_image(body: CreateProducts | Batch) -> dict[str, int]:
    """Billing: what each item costs, by its id, so that a refund can say which ones failed."""
    return {image.id: 1 for image in body.images}


app = FastAPI(
    title="Cut-outs",
    description="Backgrounds removed, one credit an image.",
    lifespan=lifespan,
    telemetry={"exclude": tracing.is_quiet},
)
# Billing: the rest is from the environment: METERED_BILLING_CREDITS, METERED_BILLING_TOKEN, …_JOURNAL.
app.add_middleware(MeteredBillingMiddleware, account=account_of)
app.add_middleware(tracing.TellTraceId)
add_pages(app)


@app.post("/create-products", response_model_exclude_none=True)
@metered(cost=one_credit_an_image, outcomes="$.products[*].images[*]")
async def create_products(body: CreateProducts, user: CurrentUser) -> ProductsCreated:
    """Cut out the pictures of products. Costs a credit an image; images that fail are refunded."""
    done = iter(await studio.cut_all(body.images))
    return ProductsCreated(
        products=[Product(name=group.name, images=[next(done) for _ in group.images]) for group in body.product_groups]
    )


@app.post("/batch", response_model_exclude_none=True)
@metered(cost=one_credit_an_image)  # what failed is read from `results`, where it is looked for by itself
async def batch(body: Batch, user: CurrentUser) -> BatchDone:
    """Cut out pictures. Costs a credit an image; images that fail are refunded."""
    return BatchDone(results=await studio.cut_all(body.images))


@app.get("/images/{name}")
async def image(name: str) -> FileResponse:
    """A picture that was cut out."""
    path = studio.path(name)
    if path is None:
        raise HTTPException(404, "There is no such image.")
    return FileResponse(path, media_type="image/png")


def wallet_of(request: Request) -> Wallet:
    """The app's wallet."""
    wallet: Wallet = request.app.state.wallet
    return wallet


@app.get("/me")
async def me(user: CurrentUser, wallet: Annotated[Wallet, Depends(wallet_of)]) -> Statement:
    """The user's balance and latest transactions. Free."""
    return await wallet.statement(user)


@app.get("/samples")
async def samples() -> dict[str, Any]:
    """A body for `POST /create-products`: ten pictures, of which two are broken."""
    return sample_request()


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """422, as FastAPI has it, but without repeating megabytes of pictures."""
    details = [{key: fault[key] for key in ("type", "loc", "msg")} for fault in error.errors()]
    return JSONResponse({"detail": details}, status_code=422)
