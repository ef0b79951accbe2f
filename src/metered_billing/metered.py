"""The decorator: price the request, have it deducted, then run the route."""

import functools
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, ParamSpec, Protocol, TypeGuard, TypeVar, overload

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.websockets import WebSocket

from metered_billing import names
from metered_billing.biller import Charge
from metered_billing.bounds import whole
from metered_billing.charge import MAX_AMOUNT, Account
from metered_billing.choosing import Bound, Chooser, Offer, is_kind, name_of
from metered_billing.errors import (
    AccountRequired,
    BillingError,
    BillingMisconfigured,
    CreditsUnavailable,
    InvalidCost,
    TooManyUnits,
)
from metered_billing.middleware import (
    EXCHANGE,
    Exchange,
    MeteredBillingMiddleware,
    OnDisconnect,
    OnUnavailable,
    checked_choice,
)
from metered_billing.outcomes import Paid, Path, compile_path, cost_of, from_returned
from metered_billing.outcomes.paid import described
from metered_billing.problems import answer
from metered_billing.routes import METERED, METERED_BY
from metered_billing.telemetry import Telemetry

Units = int | Mapping[str, int] | Mapping[int, int]
Cost = int | Callable[..., Units | Awaitable[Units]]
Price = int | Callable[..., int | Awaitable[int]]
Payer = Callable[..., Account | Awaitable[Account | None] | None]

P = ParamSpec("P")
R = TypeVar("R")


class Decorator(Protocol):
    """What `metered(…)` returns: it turns an endpoint, sync or async, into an async one that is charged for."""

    @overload
    def __call__(self, endpoint: Callable[P, Awaitable[R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(self, endpoint: Callable[P, R], /) -> Callable[P, Coroutine[Any, Any, R]]: ...


def metered(
    cost: Cost,
    *,
    price: Price = 1,
    outcomes: str | Callable[..., Any] | None = None,
    account: Payer | None = None,
    max_units: int = 100_000,
    on_disconnect: OnDisconnect | None = None,
    on_unavailable: OnUnavailable | None = None,
) -> Decorator:
    """Charge for a route. It stands below the route's decorator, next to the function.

        @app.post("/create-products")
        @metered(cost=count_images, outcomes="$.products[*].images[*]")
        async def create_products(body: CreateProducts) -> ProductsCreated: ...

    The parameters of every function given here are chosen by name from the endpoint's own; `request` is always
    there. Each may be sync or async.

    Args:
        cost: Units, a whole number from 0: the same for all requests, or a function that returns it, or a
            function that returns a mapping of item id to units.
        price: Credits a unit, a whole number, or a function that returns it.
        outcomes: What succeeded: a JSONPath (RFC 9535) over the response's JSON, or a function of what the route
            returned. By default `results` or `items`, where they fit; else the status code.
        account: Says who pays, instead of the middleware's.
        max_units: The most units that one request may ask for; above it 413.
        on_disconnect: "refund" or "keep", instead of the middleware's.
        on_unavailable: Likewise; only "reject" so far.

    Raises:
        TypeError, ValueError: At decoration: what cannot be metered, or a function that asks for what the
            endpoint has not.
    """
    if not callable(cost):
        if not isinstance(cost, int):
            raise TypeError(
                "cost must be a whole number of units, or a function that returns one or a mapping of item id to"
                f" units; this is {described(cost)}"
            )
        cost_of(cost)
    if not callable(price):
        cost_of(0, price=price)
    whole("max_units", max_units, most=MAX_AMOUNT)
    if on_disconnect is not None:
        checked_choice("on_disconnect", on_disconnect, OnDisconnect)
    if on_unavailable is not None:
        checked_choice("on_unavailable", on_unavailable, OnUnavailable)

    def decorate(endpoint: Callable[..., Any], /) -> Callable[..., Coroutine[Any, Any, Any]]:
        _refuse(endpoint)
        terms = Terms(endpoint, cost, price, outcomes, account, max_units, on_disconnect)
        charged = terms.charged()
        # FastAPI reads its parameters from here; `wraps` alone would leave it unevaluated annotations.
        charged.__signature__ = terms.offer.signature  # type: ignore[attr-defined]
        setattr(charged, METERED, terms)
        for plain in _wrapped(endpoint):
            plain.__dict__[METERED_BY] = charged
        return charged

    return decorate


def current_charge() -> Charge:
    """The charge of the request that is running.

    Raises:
        LookupError: Outside a metered request.
    """
    exchange = EXCHANGE.get()
    if exchange is None or exchange.charge is None:
        raise LookupError("no metered request is running here")
    return exchange.charge


class Terms:
    """What `@metered` was told, checked against its endpoint."""

    def __init__(
        self,
        endpoint: Callable[..., Any],
        cost: int | Callable[..., Any],
        price: int | Callable[..., Any],
        outcomes: str | Callable[..., Any] | None,
        account: Callable[..., Any] | None,
        max_units: int,
        on_disconnect: OnDisconnect | None,
    ) -> None:
        self.offer = Offer(endpoint)
        self._endpoint = endpoint
        self._is_async = _is_async(endpoint)
        self._name = name_of(endpoint)
        self._cost = Chooser("cost", cost, self.offer) if callable(cost) else cost
        self._price = Chooser("price", price, self.offer) if callable(price) else price
        self._account = None if account is None else Chooser("account", account, self.offer)
        self._path = _compiled(outcomes) if isinstance(outcomes, str) else None
        self._reader = Chooser("outcomes", outcomes, self.offer, returned=True) if callable(outcomes) else None
        if outcomes is not None and self._path is None and self._reader is None:
            raise TypeError(
                'outcomes must be a JSONPath ("$.results[*]") or a function of what the route returned; this is'
                f" {described(outcomes)}"
            )
        self._max_units = max_units
        self._on_disconnect = on_disconnect
        self._metadata = {"endpoint": self._name[:255]}
        # A middleware's account function, with its arguments chosen for this endpoint.
        self._accounts: dict[int, tuple[Callable[..., Any], Chooser]] = {}

    def check(self, account: Callable[..., Any] | None) -> None:
        """For start-up: whether there is an account function that can be called here."""
        self._account_chooser(account)

    def charged(self) -> Callable[..., Coroutine[Any, Any, Any]]:
        """The endpoint as the framework calls it: charge, run it, and hand on what it returned.

        All in one coroutine, for whatever the request waits for is heard by each that waits for it.
        """

        @functools.wraps(self._endpoint)
        async def charged(*args: Any, **kwargs: Any) -> Any:
            exchange = self._claimed()
            billing = exchange.billing
            try:
                paid, account = await self._priced(self.offer.bind(args, kwargs, exchange.scope), billing.account)
                if paid.amount_credits == 0:
                    charge = billing.biller.free(paid, account)
                elif account is None:
                    raise AccountRequired
                else:
                    if not billing.biller.started:  # without a lifespan, nobody has started it
                        await self._start(billing, account, paid)
                    charge = await billing.biller.deduct(
                        account, paid, request_id=exchange.request_id, metadata=self._metadata
                    )
            except BillingError as error:
                if isinstance(error, BillingMisconfigured):
                    why = error.why
                    billing.telemetry.log(names.LOG_MISCONFIGURED, exc_info=error, endpoint=self._name, reason=why)
                return answer(error, self.offer.bind(args, kwargs, exchange.scope).request.scope)
            if not exchange.begin(charge, self._path, self._on_disconnect):
                raise self._misused(billing.telemetry, "was called from a task whose request had ended")
            try:
                if self._is_async:
                    returned = await self._endpoint(*args, **kwargs)
                else:
                    returned = await run_in_threadpool(self._endpoint, *args, **kwargs)
            except Exception as error:
                # Also where a handler of the app's then answers 200.
                exchange.failed = _failure(error)
                raise
            if self._reader is not None and charge.amount_credits > 0:
                call = self.offer.bind(args, kwargs, exchange.scope)
                await self._report(exchange, charge, self._reader, call, returned)
            if callable(returned):  # a response, not something that the framework makes one of
                streamed = hasattr(returned, "body_iterator")
                if streamed:
                    returned.body_iterator = _Watched(returned.body_iterator, exchange)
                exchange.streams = streamed or isinstance(returned, FileResponse)
            return returned

        return charged

    def _claimed(self) -> Exchange:
        """The request that is running, which is charged for from here on.

        Raises:
            BillingMisconfigured: There is none, or it is charged for already.
        """
        exchange = EXCHANGE.get()
        if exchange is None:
            raise self._misused(
                Telemetry(),
                "is metered, but this app has no MeteredBillingMiddleware, or this is no request;"
                " the plain function is its __wrapped__",
            )
        if not exchange.claim():
            raise self._misused(
                exchange.billing.telemetry,
                "was called within a request that is charged for already, or from a task that it"
                " left behind; a request is charged once: call the plain function, its __wrapped__",
            )
        return exchange

    def _misused(self, telemetry: Telemetry, why: str) -> BillingMisconfigured:
        # The framework answers it, by a 500 that tells nobody why: so the log has to.
        error = BillingMisconfigured(f"{self._name} {why}")
        telemetry.log(names.LOG_MISCONFIGURED, endpoint=self._name, reason=error.why)
        return error

    async def _priced(self, call: Bound, default: Callable[..., Any] | None) -> tuple[Paid, Account | None]:
        """What the request costs, and who pays.

        Raises:
            BillingError: What the app's own functions said is no price, or no account.
            HTTPException: What they raised.
        """
        asked = "cost"
        try:
            cost = self._cost(call) if isinstance(self._cost, Chooser) else self._cost
            if _is_awaitable(cost):
                cost = await cost
            asked = "price"
            price = self._price(call) if isinstance(self._price, Chooser) else self._price
            if _is_awaitable(price):
                price = await price
            asked = "cost"  # a mapping of the app's own may work out what is in it as it is read
            paid = self._paid(cost, price)
            chooser = self._payer(default)
            asked = "account"
            account = chooser(call)
            if _is_awaitable(account):
                account = await account
        except HTTPException:
            raise
        except Exception as error:
            raise InvalidCost(f"{self._name}: {asked} raised {type(error).__name__}") from error
        if account is not None and not isinstance(account, Account):
            raise InvalidCost(f"{self._name}: account returned a {type(account).__name__}, not an Account or None")
        return paid, account

    def _paid(self, cost: object, price: object) -> Paid:
        try:
            paid = cost_of(cost, price=price)
        except (TypeError, ValueError) as error:
            raise InvalidCost(f"{self._name}: {error}") from error
        if paid.units > self._max_units:
            raise TooManyUnits(paid.units, self._max_units)
        if paid.amount_credits > MAX_AMOUNT:
            raise InvalidCost(f"{self._name}: {paid.amount_credits} credits are more than {MAX_AMOUNT}")
        return paid

    def _payer(self, default: Callable[..., Any] | None) -> Chooser:
        try:
            return self._account_chooser(default)
        except TypeError as error:
            raise BillingMisconfigured(f"{self._name}: {error}") from error

    async def _start(self, billing: MeteredBillingMiddleware, account: Account, paid: Paid) -> None:
        try:
            await billing.biller.start()
        except Exception as error:
            with billing.telemetry.not_begun(account, paid.amount_credits, paid.units, str(error)):
                billing.telemetry.log(names.LOG_UNAVAILABLE, exc_info=error, endpoint=self._name)
            raise CreditsUnavailable(1) from error

    async def _report(self, exchange: Exchange, charge: Charge, reader: Chooser, call: Bound, returned: Any) -> None:
        """What succeeded, as the app's own function says."""
        try:
            reported = reader(call, returned)
            exchange.report = from_returned(await reported if inspect.isawaitable(reported) else reported)
        except Exception as error:
            # Not the client's trouble: its work is done. A person looks at the charge.
            exchange.raised = f"the outcomes function raised {type(error).__name__}"
            exchange.billing.telemetry.log(names.LOG_READER_RAISED, charge.record, exc_info=error)

    def _account_chooser(self, default: Callable[..., Any] | None) -> Chooser:
        if self._account is not None:
            return self._account
        if default is None:
            raise TypeError(
                f"nobody says who pays for {self._name}: give account=… to MeteredBillingMiddleware or to @metered"
            )
        known = self._accounts.get(id(default))
        if known is None:
            known = self._accounts[id(default)] = (default, Chooser("account", default, self.offer))
        return known[1]


class _Watched:
    """A response's body iterator that tells when it raises.

    An inner `BaseHTTPMiddleware` completes the body of a stream that raised, so that it looks delivered.
    """

    def __init__(self, iterable: AsyncIterable[Any], exchange: Exchange) -> None:
        self._iterable = iterable
        self._iterator: AsyncIterator[Any] | None = None
        self._exchange = exchange

    def __aiter__(self) -> "_Watched":
        return self

    async def __anext__(self) -> Any:
        try:
            if self._iterator is None:
                self._iterator = aiter(self._iterable)
            return await anext(self._iterator)
        except StopAsyncIteration:
            raise
        except Exception:  # a cancellation is a client that left, which shows in other ways
            self._exchange.broke()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterable, name)


def _wrapped(endpoint: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The endpoint, and what it wraps: any of them may be what is registered by mistake."""
    while True:
        yield endpoint
        if not hasattr(endpoint, "__wrapped__"):
            return
        endpoint = endpoint.__wrapped__


def _is_awaitable(value: object) -> TypeGuard[Awaitable[Any]]:
    # What such a function nearly always returns is known, and seen sooner than all the ways to be awaitable.
    return type(value) not in _VALUES and inspect.isawaitable(value)


_VALUES = frozenset({int, dict, Account, type(None)})


def _failure(error: Exception) -> str | None:
    """Why nothing is kept, where a route raised this. A redirect is an answer like any other."""
    if not isinstance(error, HTTPException):
        return f"exception {type(error).__name__}"
    return f"status {error.status_code}" if error.status_code >= 400 else None


def _is_async(endpoint: Callable[..., Any]) -> bool:
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    return inspect.iscoroutinefunction(endpoint) or inspect.iscoroutinefunction(
        getattr(endpoint, "__call__", None)  # noqa: B004 - not whether, but how, it is called
    )


def _compiled(path: str) -> Path:
    try:
        return compile_path(path)
    except ValueError as error:
        raise ValueError(f"outcomes: {error}") from error


def _refuse(endpoint: Any) -> None:
    """Refuse what cannot be metered, and say what to do instead.

    Raises:
        TypeError: It cannot.
    """
    name = getattr(endpoint, "__qualname__", repr(endpoint))
    if isinstance(endpoint, staticmethod | classmethod):
        raise TypeError(f"@metered goes below @{type(endpoint).__name__}, next to the function")
    if inspect.isclass(endpoint):
        raise TypeError(f"{name} is a class: put @metered on its methods (get, post, …) instead")
    if not callable(endpoint):
        raise TypeError(f"@metered goes on an endpoint function; this is {name}")
    plain = inspect.unwrap(endpoint)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(
            f"{name} is a generator: its headers would go out before it runs, and before it is paid for."
            " Return a stream instead:\n\n"
            f"    @metered(…)\n    async def {getattr(endpoint, '__name__', 'endpoint')}(…):\n"
            "        async def lines(): yield …\n"
            '        return StreamingResponse(lines(), media_type="application/x-ndjson")'
        )
    if METERED in getattr(endpoint, "__dict__", {}):
        raise TypeError(f"{name} is metered already")
    if not hasattr(endpoint, "__dict__"):
        raise TypeError(f"{name} is not a plain function: wrap it in one")
    for parameter in Offer(endpoint).signature.parameters.values():
        if is_kind(parameter.annotation, WebSocket):
            raise TypeError(f"{name} serves a WebSocket, which cannot be metered: only a request can")
