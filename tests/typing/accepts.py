"""Documented uses, as a type checker sees them. Checked by `mypy --strict`, never run."""

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, assert_type

from fastapi import FastAPI
from pydantic import BaseModel, SecretStr
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from metered_billing import (
    Account,
    BillingError,
    Charge,
    CreditsUnavailable,
    HttpCredits,
    InsufficientCredits,
    InvalidCost,
    MeteredBillingMiddleware,
    Settings,
    SqlCredits,
    current_charge,
    metered,
    settled,
)
from metered_billing.credits.token import RotatingToken
from metered_billing.testing import FAULTS, Billing, Call, Entry, in_memory, in_process, on_a_socket


class Images(BaseModel):
    images: list[str]


class Done(BaseModel):
    results: list[bool]


# Endpoints keep their parameters and their result.


@metered(cost=1)
async def asynchronous(body: Images, n: int = 1) -> Done:
    return Done(results=[])


@metered(cost=1)
def synchronous(body: Images) -> Done:
    return Done(results=[])


async def awaited() -> None:
    coroutine = asynchronous(Images(images=[]), n=2)
    coroutine = assert_type(coroutine, Coroutine[Any, Any, Done])
    assert_type(await coroutine, Done)
    assert_type(await synchronous(Images(images=[])), Done)
    assert_type(await settled(), None)


class Work(HTTPEndpoint):
    @metered(cost=1)
    async def post(self, request: Request) -> Response:
        return JSONResponse({})


async def method(work: Work, request: Request) -> None:
    assert_type(await work.post(request), Response)


# Prices.


def mapping(body: Images) -> dict[str, int]:
    return dict.fromkeys(body.images, 1)


def read_only(body: Images) -> Mapping[str, int]:
    return dict.fromkeys(body.images, 1)


def number(body: Images) -> int:
    return len(body.images)


async def later(request: Request) -> int:
    return len(await request.body())


metered(mapping)
metered(cost=read_only)
metered(cost=number, price=2)
metered(cost=later, price=number)
metered(cost=lambda: 1, max_units=10)


# Outcomes, accounts, words.


def flags(returned: Done) -> list[bool]:
    return returned.results


def delivered(returned: Done) -> int:
    return sum(returned.results)


def by_item(returned: Done, body: Images) -> dict[str, bool]:
    return dict(zip(body.images, returned.results, strict=True))


metered(cost=1, outcomes="$.results[*].status")
metered(cost=1, outcomes=flags)
metered(cost=1, outcomes=delivered)
metered(cost=1, outcomes=by_item)


def payer(request: Request) -> Account | None:
    return Account("acme", request.headers.get("x-user"))


async def payer_later(request: Request) -> Account:
    return Account("acme")


metered(cost=1, account=payer, on_disconnect="keep", on_unavailable="reject")
metered(cost=1, account=payer_later, on_disconnect="refund")


# The charge.


def inside() -> None:
    charge = current_charge()
    assert_type(charge, Charge)
    assert_type(charge.id, str)
    assert_type(charge.account, Account)
    assert_type(charge.account.tenant_id, str)
    assert_type(charge.account.user_id, str | None)
    assert_type(charge.amount_credits, int)
    assert_type(charge.transaction_id, str | None)
    charge.fail("img-3")
    charge.fail(units=2)


# The middleware.

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware)
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=payer)
app.add_middleware(MeteredBillingMiddleware, credits=SqlCredits(Path("credits.db")), journal=Path("journal"))
app.add_middleware(
    MeteredBillingMiddleware,
    credits=HttpCredits("https://credits.internal", token=SecretStr("secret"), timeout_s=3, attempts=2),
    journal="journal",
    on_disconnect="keep",
    max_body_bytes=1 << 16,
    drain_timeout_s=1,
)
Starlette(middleware=[Middleware(MeteredBillingMiddleware, account=payer)])
MeteredBillingMiddleware(app, settings=Settings(credits="sqlite:///credits.db"))
Settings(credits=None, token=SecretStr("t"), journal="j", ssm_prefix="/prod", _env_file=None)
HttpCredits("http://credits", token=Settings().token_source())
HttpCredits("http://credits", token=RotatingToken(lambda: "t"))

route: Callable[..., Any] = app.post("/work")(asynchronous)


# Errors.


def handled(request: Request, error: InsufficientCredits) -> Response:
    assert_type(error.required, int)
    assert_type(error.balance, int | None)
    assert_type(error.shortfall, int | None)
    assert_type(error.status_code, int)
    return JSONResponse(error.problem(), error.status_code)


def unavailable(error: CreditsUnavailable) -> int:
    return error.retry_after_s


def kinds() -> list[type[BillingError]]:
    return [InsufficientCredits, CreditsUnavailable, InvalidCost]


# Credits in process.


async def ledger() -> None:
    books = SqlCredits("sqlite:///credits.db")
    await books.grant("acme", "ann", amount=5, reason="test", idempotency_key="grant-1")
    assert_type(await books.balance("acme", "ann"), int)
    page = await books.transactions("acme", limit=10)
    assert_type(page.next_cursor, str | None)
    await books.aclose()


# The test kit.


def test_route(billing: Billing) -> None:
    billing.grant("acme", 100)
    billing.grant("acme", 100, user_id="ann")
    billing.fail_next("deduct", "lost reply")
    billing.fail_next("refund", "500 after commit", 3, optional=True)
    billing.fail_always("void", "timeout")
    billing.down()
    billing.up()
    for fault, kind in FAULTS.items():
        for operation in kind.only:
            billing.fail_next(operation, fault)
    billing.assert_charged("acme", "ann", kept=8, refunded=2)
    billing.assert_not_charged("acme")
    billing.assert_balanced()
    assert_type(billing.balance("acme"), int)
    assert_type(billing.entries("acme"), list[Entry])
    for call in billing.calls:
        assert_type(call, Call)
        assert_type(call.status, int | None)


async def test_asynchronously(billing: Billing) -> None:
    async with billing.client(app, headers={"X-User": "ann"}) as client:
        assert_type((await client.post("/work")).status_code, int)
    async with billing.client(Starlette()):
        await billing.settled()
    async with in_memory() as fresh:
        assert_type(fresh, Billing)


def test_without_fixtures() -> None:
    with in_memory() as billing, in_process(Path("files")) as real, on_a_socket() as served:
        assert_type((billing, real, served), tuple[Billing, Billing, Billing])
