"""The decorator: what a request costs, who pays, and what is refused."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.websockets import WebSocket

from metered_billing import Account, MeteredBillingMiddleware, current_charge, metered, settled
from metered_billing.charge import MAX_AMOUNT
from metered_billing.routes import Misregistered, check
from tests import future_app
from tests.stand import ANN, GRANTED, Stand, serving


class Images(BaseModel):
    images: list[str] = []
    n: int = 0


def number(body: Images) -> int:
    return len(body.images)


def mapping(body: Images) -> dict[str, int]:
    return dict.fromkeys(body.images, 1)


def results(body: Images) -> dict[str, Any]:
    """What `/…` answers: an image whose name starts with an x has failed."""
    return {"results": [{"id": i, "status": "failed" if i.startswith("x") else "succeeded"} for i in body.images]}


TEN = {"images": ["a", "b", "c", "x1", "d", "e", "x2", "f", "g", "h"]}


def fastapi_app(bench: Stand, **options: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(MeteredBillingMiddleware, **bench.options(**options))
    return app


def app_with(bench: Stand, endpoint: Callable[..., Any], **options: Any) -> FastAPI:
    app = fastapi_app(bench, **options)
    app.post("/work")(endpoint)
    return app


async def post(app: Any, body: Any = None, path: str = "/work", **headers: str) -> httpx.Response:
    async with serving(app) as client:
        return await client.post(path, json=TEN if body is None else body, headers=headers)


# Every way of registering a route.


def _fastapi_async(bench: Stand) -> tuple[Any, str]:
    @metered(cost=mapping)
    async def work(body: Images) -> dict[str, Any]:
        return results(body)

    return app_with(bench, work), "/work"


def _fastapi_sync(bench: Stand) -> tuple[Any, str]:
    @metered(cost=mapping)
    def work(body: Images) -> dict[str, Any]:
        assert current_charge().amount_credits == 10  # in a thread too
        return results(body)

    return app_with(bench, work), "/work"


def _fastapi_included(bench: Stand) -> tuple[Any, str]:
    inner, outer = APIRouter(prefix="/inner"), APIRouter()

    @inner.post("/work")
    @metered(cost=mapping)
    async def work(body: Images) -> dict[str, Any]:
        return results(body)

    outer.include_router(inner, prefix="/outer")
    app = fastapi_app(bench)
    app.include_router(outer, prefix="/v1")
    return app, "/v1/outer/inner/work"


def _fastapi_mounted(bench: Stand) -> tuple[Any, str]:
    sub = FastAPI()

    @sub.post("/work")
    @metered(cost=mapping)
    async def work(body: Images) -> dict[str, Any]:
        return results(body)

    app = fastapi_app(bench)
    app.mount("/sub", sub)
    return app, "/sub/work"


async def _body(request: Request) -> Images:
    return Images.model_validate(await request.json())


async def _mapping_of(request: Request) -> dict[str, int]:
    return mapping(await _body(request))


def _starlette_function(bench: Stand) -> tuple[Any, str]:
    @metered(cost=_mapping_of)
    async def work(request: Request) -> Response:
        return JSONResponse(results(await _body(request)))

    routes = [Route("/work", work, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(MeteredBillingMiddleware, **bench.options())]), "/work"


def _starlette_unannotated(bench: Stand) -> tuple[Any, str]:
    async def cost(request):  # type: ignore[no-untyped-def]
        return await _mapping_of(request)

    @metered(cost=cost)
    async def work(req):  # type: ignore[no-untyped-def]
        return JSONResponse(results(await _body(req)))

    routes = [Route("/work", work, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(MeteredBillingMiddleware, **bench.options())]), "/work"


def _starlette_class(bench: Stand) -> tuple[Any, str]:
    class Work(HTTPEndpoint):
        @metered(cost=_mapping_of)
        async def post(self, request: Request) -> Response:
            return JSONResponse(results(await _body(request)))

        async def get(self, request: Request) -> Response:
            return Response()

    routes = [Route("/work", Work)]
    return Starlette(routes=routes, middleware=[Middleware(MeteredBillingMiddleware, **bench.options())]), "/work"


def _starlette_mounted(bench: Stand) -> tuple[Any, str]:
    @metered(cost=_mapping_of)
    async def work(request: Request) -> Response:
        return JSONResponse(results(await _body(request)))

    routes = [Mount("/a", routes=[Mount("/b", app=Starlette(routes=[Route("/work", work, methods=["POST"])]))])]
    return Starlette(routes=routes, middleware=[Middleware(MeteredBillingMiddleware, **bench.options())]), "/a/b/work"


def _outermost(bench: Stand) -> tuple[Any, str]:
    app = FastAPI()

    @app.post("/work")
    @metered(cost=mapping)
    async def work(body: Images) -> dict[str, Any]:
        return results(body)

    return MeteredBillingMiddleware(app, **bench.options()), "/work"


def _callable_object(bench: Stand) -> tuple[Any, str]:
    class Work:
        async def __call__(self, body: Images) -> dict[str, Any]:
            return results(body)

    return app_with(bench, metered(cost=mapping)(Work())), "/work"


def _partial(bench: Stand) -> tuple[Any, str]:
    async def work(body: Images, kind: str) -> dict[str, Any]:
        return results(body)

    return app_with(bench, metered(cost=mapping)(functools.partial(work, kind="k"))), "/work"


REGISTERED = [
    _fastapi_async,
    _fastapi_sync,
    _fastapi_included,
    _fastapi_mounted,
    _starlette_function,
    _starlette_unannotated,
    _starlette_class,
    _starlette_mounted,
    _outermost,
    _callable_object,
    _partial,
]


@pytest.mark.parametrize("register", REGISTERED)
async def test_metered_route_however_registered_is_charged(
    bench: Stand, register: Callable[[Stand], tuple[Any, str]]
) -> None:
    """Ten are deducted, the two that failed come back under the same transaction, by name."""
    app, path = register(bench)
    response = await post(app, path=path)
    assert response.status_code == 200, response.text
    deduction, refund = await bench.entries()
    assert (deduction["kind"], deduction["amount"]) == ("deduction", -10)
    assert (refund["kind"], refund["amount"]) == ("refund", 2)
    assert refund["transaction_id"] == deduction["transaction_id"] == response.headers["credits-transaction-id"]
    assert refund["items"] == ["x1", "x2"]
    assert await bench.balance() == 92


async def test_metered_with_future_annotations_and_depends_is_charged(bench: Stand) -> None:
    """String annotations, `Annotated` dependencies and an included router's prefix all work together."""
    app = fastapi_app(bench)
    app.include_router(future_app.router)
    response = await post(app, {"text": "one two three"}, "/v2/x/complete", **{"x-user": "ann"})
    assert response.json() == {"kind": "x", "text": "one two three", "user": "ann"}
    assert await bench.balance() == GRANTED - 3


def test_metered_with_an_annotation_that_cannot_be_evaluated_keeps_it() -> None:
    """A name imported under TYPE_CHECKING stays a string instead of failing the decoration."""
    assert future_app.unevaluated.__signature__.parameters["amount"].annotation == "Decimal"  # type: ignore[attr-defined]


async def test_metered_keeps_openapi_of_the_endpoint(bench: Stand) -> None:
    """The parameters, body and response that FastAPI documents are the endpoint's own."""
    app, _ = _fastapi_async(bench)
    operation = app.openapi()["paths"]["/work"]["post"]
    assert "Images" in str(operation["requestBody"])
    assert set(operation["responses"]) == {"200", "422"}  # the rest is added at start-up


# What it costs.


async def test_validation_error_is_never_charged(bench: Stand) -> None:
    """A 422 is the framework's, before billing is reached."""
    app, path = _fastapi_async(bench)
    response = await post(app, {"images": "no list"}, path)
    assert response.status_code == 422
    assert "credits-deducted" not in response.headers
    assert await bench.moves() == []


class Work:
    """An endpoint that counts how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, body: Images) -> dict[str, Any]:
        self.runs += 1
        return {"done": True}


def raising(body: Images) -> int:
    raise KeyError("x")


async def raising_later(body: Images) -> int:
    raise RuntimeError


class RaisingAsItIsRead(dict[str, int]):
    def items(self) -> Any:
        raise KeyError("x")


@pytest.mark.parametrize(
    "cost",
    [
        lambda: True,
        lambda: 1.5,
        lambda: -1,
        lambda: None,
        lambda: "10",
        lambda: [1],
        lambda: {"a": -1},
        lambda: {"a": True},
        lambda: {1: 1, "1": 1},
        lambda: {"": 1},
        raising,
        raising_later,
        lambda: RaisingAsItIsRead(a=1),
    ],
)
async def test_cost_that_is_no_price_is_answered_500_and_charges_nothing(bench: Stand, cost: Any) -> None:
    """A bug in the app's pricing is the app's: 500, the route not run, nothing moved."""
    work = Work()
    response = await post(app_with(bench, metered(cost=cost)(work)))
    assert response.status_code == 500
    assert response.json()["type"] == "urn:metered-billing:billing-misconfigured"
    assert response.headers["content-type"] == "application/problem+json"
    assert "nothing stays charged" in response.json()["detail"]
    assert work.runs == 0
    assert await bench.moves() == []


@pytest.mark.parametrize("price", [lambda: True, lambda: 0.5, lambda: -1, lambda: None, raising])
async def test_price_that_is_no_price_is_answered_500_and_charges_nothing(bench: Stand, price: Any) -> None:
    """Likewise for `price`."""
    work = Work()
    response = await post(app_with(bench, metered(cost=1, price=price)(work)))
    assert (response.status_code, work.runs) == (500, 0)
    assert await bench.moves() == []


async def test_cost_above_max_units_is_answered_413_and_charges_nothing(bench: Stand) -> None:
    """A billion units are refused before anything is multiplied, journalled or sent."""
    work = Work()
    response = await post(app_with(bench, metered(cost=lambda: 10**9)(work)))
    assert response.status_code == 413
    problem = response.json()
    assert problem["type"] == "urn:metered-billing:too-many-units"
    assert (problem["units"], problem["max_units"], work.runs) == (10**9, 100_000, 0)
    assert await bench.moves() == []


async def test_mapping_above_max_units_is_answered_413(bench: Stand) -> None:
    """For a mapping it is the sum that counts."""
    response = await post(app_with(bench, metered(cost=lambda: {"a": 3, "b": 3}, max_units=5)(Work())))
    assert response.status_code == 413


async def test_amount_beyond_what_json_can_carry_is_answered_500(bench: Stand) -> None:
    """Units x price must stay below 2**53."""
    response = await post(app_with(bench, metered(cost=2, price=lambda: MAX_AMOUNT)(Work())))
    assert response.status_code == 500


async def test_http_exception_of_cost_passes_as_it_is(bench: Stand) -> None:
    """An app may refuse a request while pricing it."""

    def cost() -> int:
        raise HTTPException(418, "no")

    response = await post(app_with(bench, metered(cost=cost)(Work())))
    assert (response.status_code, response.json()) == (418, {"detail": "no"})
    assert await bench.moves() == []


async def test_flat_cost_and_price_are_multiplied(bench: Stand) -> None:
    """Units x price is the amount; what fails is refunded at the same price."""

    @metered(cost=number, price=3)
    async def work(body: Images) -> dict[str, Any]:
        return results(body)

    response = await post(app_with(bench, work))
    assert response.headers["credits-deducted"] == "30"
    assert response.headers["credits-refunded"] == "6"
    assert await bench.balance() == GRANTED - 24


async def test_price_function_chooses_its_arguments_too(bench: Stand) -> None:
    """`price` may depend on the request."""

    async def price(body: Images) -> int:
        return body.n

    response = await post(app_with(bench, metered(cost=2, price=price)(Work())), {"n": 7})
    assert response.headers["credits-deducted"] == "14"


async def test_cost_is_given_defaults_that_the_framework_did_not_pass(bench: Stand) -> None:
    """A Starlette endpoint's own default counts as its argument."""

    @metered(cost=lambda n: n)
    async def work(request: Request, n: int = 4) -> Response:
        return Response()

    app = Starlette(
        routes=[Route("/work", work, methods=["POST"])],
        middleware=[Middleware(MeteredBillingMiddleware, **bench.options())],
    )
    assert (await post(app)).headers["credits-deducted"] == "4"


async def test_cost_takes_its_parameters_in_any_way_they_are_declared(bench: Stand) -> None:
    """Positional-only, keyword-only, defaults of its own, *args and **kwargs."""

    def cost(n: int, /, body: Images, *args: Any, kind: str, other: int = 5, **kwargs: Any) -> int:
        assert (args, kwargs) == ((), {})
        return n + body.n + other + len(kind)

    @metered(cost=cost)
    async def work(n: int, kind: str, body: Images) -> None: ...

    response = await post(app_with(bench, work), {"n": 1}, "/work?n=2&kind=abc")
    assert response.headers["credits-deducted"] == "11"


async def test_free_request_runs_uncharged(bench: Stand) -> None:
    """A cost of 0 is no charge: the header says so, and neither journal nor credits are touched."""

    @metered(cost=number)
    async def work(body: Images) -> dict[str, Any]:
        charge = current_charge()
        charge.fail(units=0)
        assert (charge.amount_credits, charge.transaction_id, charge.account) == (0, None, ANN)
        return {"results": []}

    response = await post(app_with(bench, work), {"images": []})
    assert response.headers["credits-deducted"] == "0"
    assert "credits-transaction-id" not in response.headers
    assert await bench.moves() == []


async def test_free_request_needs_no_account(bench: Stand) -> None:
    """Where nothing is to be paid, nobody has to be there to pay it."""

    @metered(cost=0)
    async def work() -> None:
        with pytest.raises(LookupError):
            _ = current_charge().account

    app = app_with(bench, work, account=lambda: None)
    assert (await post(app)).status_code == 200


# Who pays.


async def test_account_none_is_answered_401(bench: Stand) -> None:
    """Nobody to charge: 401, and the route does not run."""
    work = Work()
    response = await post(app_with(bench, metered(cost=1)(work), account=lambda: None))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert (response.json()["type"], work.runs) == ("urn:metered-billing:account-required", 0)


async def test_http_exception_of_account_passes(bench: Stand) -> None:
    """An app may refuse whom it does not know."""

    def account() -> Account:
        raise HTTPException(403, "not you")

    response = await post(app_with(bench, metered(cost=1)(Work()), account=account))
    assert (response.status_code, response.json()) == (403, {"detail": "not you"})


@pytest.mark.parametrize("account", [lambda: "acme", lambda: ("acme", "ann"), raising])
async def test_account_that_is_none_is_answered_500(bench: Stand, account: Any) -> None:
    """Whatever is not an Account is a bug of the app's."""
    work = Work()
    response = await post(app_with(bench, metered(cost=1)(work), account=account))
    assert (response.status_code, work.runs) == (500, 0)
    assert await bench.moves() == []


async def test_account_of_a_dependency_is_chosen_by_name(bench: Stand) -> None:
    """What a dependency returned is an argument like any other, for the middleware's function too."""

    async def user(request: Request) -> str:
        request.state.tenant = "acme"
        return request.headers["x-user"]

    async def account(user: str, request: Request) -> Account:
        return Account(request.state.tenant, user)

    @metered(cost=1)
    async def work(body: Images, user: Annotated[str, Depends(user)]) -> None: ...

    response = await post(app_with(bench, work, account=account), **{"x-user": "ann"})
    assert response.status_code == 200
    assert await bench.balance() == GRANTED - 1


async def test_account_of_the_route_overrides_the_middlewares(bench: Stand) -> None:
    """`@metered(account=…)` wins, and an account without credits is answered 402."""
    work = metered(cost=1, account=lambda: Account("poor"))(Work())
    response = await post(app_with(bench, work))
    assert response.status_code == 402
    assert (response.json()["required"], response.json()["balance"], response.json()["shortfall"]) == (1, 0, 1)
    assert await bench.moves() == []


async def test_user_does_not_fall_back_to_the_tenants_pool(bench: Stand) -> None:
    """The pool is an account of its own."""
    await bench.credits.grant("acme", None, amount=50, reason="pool", idempotency_key="pool")
    app = app_with(bench, metered(cost=1)(Work()), account=lambda: Account("acme", "bob"))
    assert (await post(app)).status_code == 402
    app = app_with(bench, metered(cost=1)(Work()), account=lambda: Account("acme"))
    assert (await post(app)).status_code == 200


async def test_request_for_an_endpoint_without_one_has_headers_path_and_state(bench: Stand) -> None:
    """It is there for `cost` and `account`; its body is gone, and says so."""
    seen: dict[str, str] = {}

    async def cost(request: Request, r: Request) -> int:
        seen.update(path=request.url.path, user=request.headers["x-user"], kind=request.path_params["kind"])
        assert r is request
        with pytest.raises(RuntimeError, match="read this request's body already"):
            await request.body()
        return 1

    @metered(cost=cost)
    async def work(kind: str, body: Images) -> None: ...

    app = fastapi_app(bench)
    app.post("/jobs/{kind}")(work)
    assert (await post(app, path="/jobs/k", **{"x-user": "ann"})).status_code == 200
    assert seen == {"path": "/jobs/k", "user": "ann", "kind": "k"}


async def test_argument_called_request_is_the_endpoints_own(bench: Stand) -> None:
    """Chosen by name: a body that is called `request` is what `request` means."""

    @metered(cost=lambda request: len(request.images))
    async def work(request: Images) -> None: ...

    assert (await post(app_with(bench, work))).headers["credits-deducted"] == "10"


async def test_app_without_any_account_function_does_not_start(bench: Stand) -> None:
    """A route that nobody could be charged for is refused at start-up."""
    with pytest.raises(Exception, match="nobody says who pays"):
        await post(app_with(bench, metered(cost=1)(Work()), account=None))


async def test_account_function_that_does_not_fit_a_route_keeps_the_app_from_starting(bench: Stand) -> None:
    """The middleware's `account` must be callable for every metered route."""

    def account(user: str) -> Account:
        return Account(user)

    with pytest.raises(Exception, match="account asks for 'user', which Work has not"):
        await post(app_with(bench, metered(cost=1)(Work()), account=account))


# What the route itself says.


async def test_what_the_route_says_has_failed_adds_to_what_it_reports(bench: Stand) -> None:
    """For a mapping: the union of failures."""

    @metered(cost=mapping)
    async def work(body: Images) -> dict[str, Any]:
        current_charge().fail("a")
        current_charge().fail("x1")
        return results(body)

    await post(app_with(bench, work))
    refund = (await bench.entries())[1]
    assert (refund["amount"], refund["items"]) == (3, ["a", "x1", "x2"])


async def test_units_said_to_have_failed_are_refunded(bench: Stand) -> None:
    """For a number: so many units less."""

    @metered(cost=10)
    def work() -> None:
        current_charge().fail(units=4)

    assert (await post(app_with(bench, work))).headers["credits-refunded"] == "4"
    assert await bench.moves() == [("deduction", -10), ("refund", 4)]


async def test_current_charge_tells_what_was_deducted(bench: Stand) -> None:
    """Its id, account, amount and transaction; after the response nothing more can be said."""
    charges = []

    @metered(cost=2)
    async def work() -> None:
        charges.append(current_charge())

    response = await post(app_with(bench, work))
    [charge] = charges
    assert charge.account == ANN
    assert charge.amount_credits == 2
    assert charge.transaction_id == response.headers["credits-transaction-id"]
    deduction = (await bench.entries())[0]
    assert deduction["idempotency_key"] == charge.id
    with pytest.raises(RuntimeError, match="the response is complete"):
        charge.fail(units=1)


def test_current_charge_outside_a_request_is_a_lookup_error() -> None:
    """There is none."""
    with pytest.raises(LookupError):
        current_charge()


async def test_current_charge_in_an_unmetered_route_is_a_lookup_error(bench: Stand) -> None:
    """There is none there either."""

    async def work() -> None:
        with pytest.raises(LookupError):
            current_charge()

    assert (await post(app_with(bench, work))).status_code == 200


async def test_request_is_charged_once_even_if_metered_endpoints_call_each_other(
    bench: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """The inner one refuses, the outer one fails, and everything goes back; the log says why."""

    @metered(cost=1)
    async def inner() -> None: ...

    @metered(cost=1)
    async def outer() -> None:
        await inner()

    assert (await post(app_with(bench, outer))).status_code == 500
    assert await bench.moves() == [("deduction", -1), ("refund", 1)]
    assert "charged for already" in caplog.text


async def test_metered_endpoint_without_the_middleware_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    """It must not run free by mistake; the client is not told why, so the log is."""
    work = Work()
    app = FastAPI()
    app.post("/work")(metered(cost=1)(work))
    assert ((await post(app)).status_code, work.runs) == (500, 0)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "metered_billing"]
    assert told.startswith("billing.misconfigured")
    assert "no MeteredBillingMiddleware" in told


async def test_metered_endpoint_outside_any_request_raises() -> None:
    """The plain function is its `__wrapped__`."""

    @metered(cost=1)
    async def work() -> str:
        return "done"

    with pytest.raises(Exception, match="no MeteredBillingMiddleware"):
        await work()
    assert await work.__wrapped__() == "done"  # type: ignore[attr-defined]


# What the app's own reader says.


@pytest.mark.parametrize(
    ("cost", "value", "refunded"),
    [
        (number, [True] * 8 + [False] * 2, 2),
        (mapping, {"a": True, "b": False}, 9),
        (number, 7, 3),
        (mapping, [True] * 10, 0),
    ],
)
async def test_outcomes_function_of_what_the_route_returned(bench: Stand, cost: Any, value: Any, refunded: int) -> None:
    """Booleans in order, a mapping of id to boolean, or units delivered."""

    async def read(returned: Any, body: Images) -> Any:
        assert returned == {"value": 1}
        assert len(body.images) == 10
        return value

    @metered(cost=cost, outcomes=read)
    async def work(body: Images) -> dict[str, int]:
        return {"value": 1}

    response = await post(app_with(bench, work))
    assert response.headers["credits-refunded"] == str(refunded)
    assert await bench.balance() == GRANTED - 10 + refunded


@pytest.mark.parametrize("read", [lambda returned: 1 / 0, lambda returned: "8", lambda returned: [1]])
async def test_outcomes_function_that_raises_keeps_the_charge_for_a_person(bench: Stand, read: Any) -> None:
    """The response goes out untouched, all is kept, and the charge is disputed."""
    app = app_with(bench, metered(cost=10, outcomes=read)(Work()))
    response = await post(app)
    assert (response.status_code, response.json()) == (200, {"done": True})
    assert response.headers["credits-refunded"] == "0"
    assert await bench.moves() == [("deduction", -10)]
    [span] = [span for span in bench.spans if span.name == "metered_billing.charge"]
    assert span.attributes is not None
    assert span.attributes["metered_billing.outcome"] == "disputed"


async def test_outcomes_function_is_overruled_by_an_error_status(bench: Stand) -> None:
    """What was never delivered is not kept, whatever the reader says."""

    @metered(cost=10, outcomes=lambda returned: 10)
    async def work() -> Response:
        return Response(status_code=500)

    await post(app_with(bench, work))
    assert await bench.balance() == GRANTED


# What is refused at decoration.


async def generator(body: Images) -> AsyncIterator[int]:
    yield 1


def sync_generator() -> Iterator[int]:
    yield 1


class Endpoint(HTTPEndpoint):
    pass


async def socket(websocket: WebSocket) -> None: ...


@metered(cost=1)
async def already() -> None: ...


CLASS_METHOD: Any = classmethod(already)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        (generator, "StreamingResponse"),
        (sync_generator, "StreamingResponse"),
        (Endpoint, "put @metered on its methods"),
        (socket, "WebSocket, which cannot be metered"),
        (already, "metered already"),
        (staticmethod(already), "below @staticmethod"),
        (CLASS_METHOD, "below @classmethod"),
        (3, "goes on an endpoint function"),
        (len, "not a plain function"),
    ],
)
def test_decoration_of_what_cannot_be_metered_is_refused(endpoint: Any, says: str) -> None:
    """A TypeError that says what to do instead."""
    with pytest.raises(TypeError, match=says):
        metered(cost=1)(endpoint)


async def plain(body: Images, n: int) -> None: ...


OFFERS = "Its parameters are chosen by name; this route offers: body, n, request"
FIRST = "must take what the route returned as its first parameter. Further ones are chosen by name; this route offers:"
COST = "cost must be a whole number of units, or a function that returns one or a mapping of item id to units; this is"
READS = 'outcomes must be a JSONPath ("$.results[*]") or a function of what the route returned; this is'


def units(users: str) -> int:
    return 1


def no_parameter() -> int:
    return 1


def only_by_name(*, returned: object) -> int:
    return 1


class Uncallable:
    __call__ = 5


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Names that the route has not: which argument, and what there is.
    ({"cost": units}, TypeError, f"cost asks for 'users', which plain has not. {OFFERS}"),
    ({"cost": lambda bdy: 1}, TypeError, f"cost asks for 'bdy', which plain has not: 'body'? {OFFERS}"),
    ({"cost": lambda reqest: 1}, TypeError, f"cost asks for 'reqest', which plain has not: 'request'? {OFFERS}"),
    ({"cost": 1, "price": units}, TypeError, f"price asks for 'users', which plain has not. {OFFERS}"),
    ({"cost": 1, "account": units}, TypeError, f"account asks for 'users', which plain has not. {OFFERS}"),
    (
        {"cost": 1, "outcomes": lambda returned, users: 1},
        TypeError,
        f"outcomes asks for 'users', which plain has not. {OFFERS}",
    ),
    ({"cost": len}, TypeError, f"cost asks for 'obj', which plain has not. {OFFERS}"),
    ({"cost": dict.get}, TypeError, f"cost asks for 'self', which plain has not. {OFFERS}"),
    ({"cost": 1, "outcomes": no_parameter}, TypeError, f"outcomes=no_parameter {FIRST} body, n, request"),
    ({"cost": 1, "outcomes": only_by_name}, TypeError, f"outcomes=only_by_name {FIRST} body, n, request"),
    # What is no function of ours.
    ({"cost": dict}, TypeError, "cost=dict: its parameters cannot be read; wrap it in a function"),
    ({"cost": Uncallable()}, TypeError, "cost=Uncallable: its parameters cannot be read; wrap it in a function"),
    ({"cost": 1, "account": "acme"}, TypeError, "account must be a function; this is str 'acme'"),
    ({"cost": 1, "outcomes": 5}, TypeError, f"{READS} int 5"),
    # What is no price.
    ({"cost": True}, TypeError, "cost must be a whole number; this is bool True"),
    ({"cost": 1.5}, TypeError, f"{COST} float 1.5"),
    ({"cost": "1"}, TypeError, f"{COST} str '1'"),
    ({"cost": None}, TypeError, f"{COST} NoneType None"),
    ({"cost": {"a": 1}}, TypeError, f"{COST} dict {{'a': 1}}"),
    ({"cost": 1, "price": "1"}, TypeError, "price must be a whole number; this is str '1'"),
    ({"cost": 1, "price": 0.5}, TypeError, "price must be a whole number; this is float 0.5"),
    # Values out of range.
    ({"cost": -1}, ValueError, "cost must be from 0 to 9007199254740991; this is int -1"),
    ({"cost": 1, "price": -1}, ValueError, "price must be from 0 to 9007199254740991; this is int -1"),
    (
        {"cost": 1, "max_units": 0},
        ValueError,
        "max_units must be a whole number from 1 to 9,007,199,254,740,991; this is 0",
    ),
    (
        {"cost": 1, "max_units": True},
        ValueError,
        "max_units must be a whole number from 1 to 9,007,199,254,740,991; this is True",
    ),
    (
        {"cost": 1, "on_disconnect": "forget"},
        ValueError,
        "on_disconnect must be one of 'refund', 'keep'; this is 'forget'",
    ),
    ({"cost": 1, "on_unavailable": "allow"}, ValueError, "on_unavailable must be one of 'reject'; this is 'allow'"),
    (
        {"cost": 1, "outcomes": "results[*]"},
        ValueError,
        "outcomes: not a JSONPath (RFC 9535): 'results[*]': expected '$', found 'r', line 1, column 0",
    ),
]


@pytest.mark.parametrize(("terms", "kind", "says"), REFUSED, ids=[says[:40] for _, _, says in REFUSED])
def test_decoration_with_what_does_not_fit_is_refused(terms: dict[str, Any], kind: type[Exception], says: str) -> None:
    """At once, naming the argument, what is wrong with it, and what the route offers."""
    with pytest.raises(kind) as refused:
        metered(**terms)(plain)
    assert str(refused.value) == says


def test_decoration_with_names_that_fit_is_not_refused() -> None:
    """`request` is always there, and what has a default need not be."""
    metered(cost=lambda n, request, extra=1: 1, on_disconnect="keep", on_unavailable="reject")(plain)
    assert settled is not None


async def test_account_function_that_does_not_fit_is_answered_500_without_a_lifespan(bench: Stand) -> None:
    """Where the app came after the check, the request finds out; nothing moves."""

    def account(user: str) -> Account:
        return Account(user)

    app = fastapi_app(bench, account=account)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        await client.get("/nothing")
        app.post("/work")(metered(cost=1)(Work()))
        response = await client.post("/work", json=TEN)
    assert (response.status_code, response.json()["type"]) == (500, "urn:metered-billing:billing-misconfigured")
    assert await bench.moves() == []


async def test_stream_of_an_endpoint_keeps_its_iterators_own_ways(bench: Stand) -> None:
    """Whoever closes the stream by hand still can."""
    closed = []

    async def lines() -> AsyncIterator[str]:
        try:
            yield '{"status": "ok"}\n'
            yield '{"status": "ok"}\n'
        finally:
            closed.append(True)

    class Closing(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)
            await self.body_iterator.aclose()  # type: ignore[attr-defined]

    @metered(cost=2)
    async def work() -> Response:
        return Closing(lines(), media_type="application/x-ndjson")

    assert (await post(app_with(bench, work))).status_code == 200
    assert closed == [True]
    assert await bench.moves() == [("deduction", -2)]


async def test_metered_function_as_a_dependency_raises_instead_of_returning_an_answer(bench: Stand) -> None:
    """A 402 as its return value would let the route run free."""
    ran: list[None] = []
    pay = metered(cost=GRANTED)(_paid)

    async def work(paid: Annotated[None, Depends(pay)]) -> None:
        ran.append(paid)

    app = app_with(bench, work)
    assert [(await post(app)).status_code for _ in range(2)] == [200, 402]
    assert ran == [None]


async def _paid() -> None: ...


async def test_problem_is_answered_where_no_handlers_are_to_be_seen(bench: Stand) -> None:
    """Under a router that is no app: as a response, by ourselves."""
    from starlette.routing import Router

    async def work(request: Request) -> Response:
        raise AssertionError

    router = Router(routes=[Route("/work", metered(cost=GRANTED + 1)(work), methods=["POST"])])
    response = await post(MeteredBillingMiddleware(router, **bench.options()))
    assert (response.status_code, response.json()["shortfall"]) == (402, 1)


def test_decoration_of_a_decorated_function_marks_what_it_wraps(bench_app: FastAPI) -> None:
    """Whichever of them stands at a route by mistake would run free, and is found."""

    def other(fn: Any) -> Any:
        @functools.wraps(fn)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await fn(*args, **kwargs)

        return wrapper

    @metered(cost=1)
    @other
    @bench_app.post("/work")
    async def work() -> None: ...

    with pytest.raises(Misregistered, match="/work would run free"):
        check(bench_app, lambda: ANN)


@pytest.fixture
def bench_app() -> FastAPI:
    return FastAPI()
