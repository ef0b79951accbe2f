"""ASGI in, ASGI out: what a metered request's response reports is on record before its last byte goes out.

The middleware holds configuration only; each request gets an `Exchange` of its own, found by the decorator
through a context variable. Until the decorator has put a charge into it, it passes everything on. Routes
are not resolved here and request bodies are not read: the framework has done both by then.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metered_billing import names
from metered_billing.biller import Biller, Charge
from metered_billing.bounds import DAY_S, number, whole
from metered_billing.charge import Event, Reported, Unread
from metered_billing.credits import Credits
from metered_billing.journal import Journal
from metered_billing.outcomes import (
    LineReader,
    Outcome,
    Reader,
    Report,
    StatusReader,
    count,
    none_kept,
    reader_for,
)
from metered_billing.outcomes import Path as JsonPath
from metered_billing.presence import has_left
from metered_billing.problems import document
from metered_billing.routes import check, unwrapped
from metered_billing.runtime import Runtime
from metered_billing.settings import Settings
from metered_billing.telemetry import Telemetry

T = TypeVar("T")
OnDisconnect = Literal["refund", "keep"]
OnUnavailable = Literal["reject"]
Settle = Literal["background", "inline"]

_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

EXCHANGE: ContextVar["Exchange | None"] = ContextVar("metered_billing_exchange", default=None)


class MeteredBillingMiddleware:
    """Charges for the routes that are decorated with `@metered`.

    Args:
        app: The app inside.
        credits: A URL (`http(s)://…`, `sqlite:///credits.db`) or a client such as `HttpCredits(…)`; by default
            what `Settings` finds.
        account: Says who pays: its parameters are chosen by name, `request` or an argument of the route, and it
            returns an `Account` or None (401). Without it every route needs its own.
        journal: The directory of the journal, or `postgresql://…`; by default what `Settings` finds, which is
            `metered-billing-journal` in the end.
        on_disconnect: What happens to the charge when the client has left before the answer.
        on_unavailable: What happens to requests while credits cannot be deducted; only "reject" (503) so far.
        max_body_bytes: The longest response body that outcomes are read from.
        drain_timeout_s: How long a shutdown waits for requests and refunds under way.
        settle: When refunds and voids go out: in the "background", or "inline", before the app is done with the
            request, where nothing may be under way between requests (AWS Lambda); by default
            `METERED_BILLING_SETTLE`, then "background".
        settle_timeout_s: How long a request is held up by that at the most; what is not done then is done later.
        settings: Instead of those that are looked for.

    Raises:
        ValueError, TypeError: A setting cannot be right. Where a server runs already, start-up fails instead.
    """

    account: Callable[..., Any] | None
    on_disconnect: OnDisconnect
    on_unavailable: OnUnavailable
    max_body_bytes: int
    drain_timeout_s: float
    settle: Settle
    settle_timeout_s: float
    telemetry: Telemetry
    biller: Biller
    _inline: bool

    def __init__(
        self,
        app: ASGIApp,
        *,
        credits: str | Credits | None = None,  # noqa: A002 - the field's word
        account: Callable[..., Any] | None = None,
        journal: str | Path | Journal | None = None,
        on_disconnect: OnDisconnect = "refund",
        on_unavailable: OnUnavailable = "reject",
        max_body_bytes: int = 1 << 20,
        drain_timeout_s: float = 5.0,
        settle: Settle | None = None,
        settle_timeout_s: float = 3.0,
        settings: Settings | None = None,
        runtime: Runtime | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.app = app
        self._refused: Exception | None = None
        self._checked = False

        def configure() -> None:
            found = settings or Settings()
            self.account = account
            self.on_disconnect = checked_choice("on_disconnect", on_disconnect, OnDisconnect)
            self.on_unavailable = checked_choice("on_unavailable", on_unavailable, OnUnavailable)
            if account is not None and not callable(account):
                raise TypeError(f"account must be a function that returns an Account; this is {account!r}")
            self.max_body_bytes = whole("max_body_bytes", max_body_bytes, least=0)
            self.drain_timeout_s = number("drain_timeout_s", drain_timeout_s, most=DAY_S, zero=True)
            self.settle = checked_choice("settle", found.settle if settle is None else settle, Settle)
            self.settle_timeout_s = number("settle_timeout_s", settle_timeout_s, most=DAY_S, zero=True)
            self.telemetry = telemetry or Telemetry()
            self._inline = self.settle == "inline"
            clocks = runtime or Runtime()
            self.biller = Biller(
                found.open_credits(credits, clocks, self.telemetry, asked_by="MeteredBillingMiddleware"),
                found.open_journal(journal, clocks, self.telemetry),
                runtime=clocks,
                telemetry=self.telemetry,
                inline=self._inline,
            )

        self._configure = configure
        try:
            configure()
        except Exception as error:
            if not _is_served():
                raise
            # Starlette makes it for the server's first message, which is about the lifespan. Servers take what is
            # raised then for an app that has none: they go on, and each request is a 500. So `__call__` tells them.
            self._refused = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                if self._refused is not None:
                    await send({"type": "lifespan.startup.failed", "message": str(self._refused)})
                    raise self._refused
                send = self._watching(scope, send)
            await self.app(scope, receive, send)
            return
        if not self._checked:  # no lifespan has done it
            self._check(scope)
        # It refers to the scope, and nothing in the scope to it: what is a cycle waits for the garbage collector.
        exchange = Exchange(self, scope, receive, send)
        # A dependency may put things on `request.state` of a copy of this scope, made further inside.
        scope.setdefault("state", {})
        token = EXCHANGE.set(exchange)
        try:
            await self.app(scope, receive, exchange.send)
        except BaseException as error:
            exchange.close(error)
            # Who is told to go at once, its loop closed perhaps, can wait for nothing.
            if self._inline and exchange.claimed and not isinstance(error, GeneratorExit):
                await self._quiesce()
            raise
        else:
            exchange.close(None)
            if self._inline and exchange.claimed:
                await self._quiesce()
        finally:
            EXCHANGE.reset(token)

    async def _quiesce(self) -> None:
        """Leave nothing under way: when the request is over, the process may be frozen."""
        try:
            await self.biller.quiesce(self.settle_timeout_s)
        except Exception as error:
            # A bug, of ours or a backend's: whatever it is, it is not the response's trouble.
            self.telemetry.log(names.LOG_BUG, exc_info=error)

    def _watching(self, scope: Scope, send: Send) -> Send:
        async def watch(message: Message) -> None:
            # An error here goes into the app's own lifespan, which ends it and reports that it has failed.
            if message["type"] == "lifespan.startup.complete":
                self._check(scope)
                await self.biller.start()
                if self._inline:
                    await self._quiesce()
            elif message["type"].startswith("lifespan.shutdown."):
                await self.biller.drain(self.drain_timeout_s)
            await send(message)

        return watch

    def _check(self, scope: Scope) -> None:
        if self._refused is not None:
            self._configure()  # where no lifespan has told: it may have been AWS that could not be asked just then
            self._refused = None
        app = scope.get("app") or unwrapped(self.app)
        if app is not None:
            check(app, self.account)
            document(app)
        self._checked = True


def _is_served() -> bool:
    """Whether an event loop runs here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Exchange:
    """One request and its response.

    `send` is what the app sends through. It holds back the start of a response whose length is known, until
    the outcome is: so that the headers can tell. It never holds back what is streamed.
    """

    __slots__ = (
        "_billing",
        "_broken",
        "_claimed",
        "_ended",
        "_held",
        "_left",
        "_on_disconnect",
        "_over",
        "_path",
        "_reader",
        "_receive",
        "_send",
        "_started",
        "_status",
        "charge",
        "failed",
        "raised",
        "report",
        "scope",
        "streams",
    )

    def __init__(self, billing: MeteredBillingMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self._billing = billing
        self._receive = receive
        self._send = send
        self.scope = scope
        self.charge: Charge | None = None
        self._claimed = False
        self._ended = False

    # For the decorator.

    @property
    def billing(self) -> MeteredBillingMiddleware:
        return self._billing

    @property
    def request_id(self) -> str | None:
        """The caller's `X-Request-ID`, where it is short and harmless enough to stand in a log.

        Without one, on AWS Lambda, the invocation's: Lambda's own lines in the log have it.
        """
        for name, value in self.scope["headers"]:
            if name == b"x-request-id":
                return value.decode("ascii") if _REQUEST_ID.fullmatch(value) else None
        invocation = getattr(self.scope.get("aws.context"), "aws_request_id", None)
        return invocation if isinstance(invocation, str) else None

    @property
    def claimed(self) -> bool:
        """Whether it is charged for, or would have been."""
        return self._claimed

    def claim(self) -> bool:
        """Whether this request may be charged: once, and while it lasts."""
        if self._claimed or self._ended:
            return False
        self._claimed = True
        return True

    def begin(self, charge: Charge, path: JsonPath | None, on_disconnect: OnDisconnect | None) -> bool:
        """From here on the response is watched.

        Args:
            path: What to read off its body, if not the default.

        Returns:
            False where the request has ended meanwhile: then all of the charge goes back.
        """
        if self._ended:
            self._billing.biller.release(charge, Reported(0, tuple(charge.paid.by_item or ()), "the request had ended"))
            return False
        self._path = path
        self._on_disconnect = on_disconnect or self._billing.on_disconnect
        self._status = 0
        self._reader: Reader | None = None
        self._held: Message | None = None
        self._started = False
        self._over = False
        self._broken = False
        self._left = False
        self.streams = False
        self.failed: str | None = None
        self.report: Report | None = None
        self.raised: str | None = None
        self.charge = charge
        return True

    def broke(self) -> None:
        """The response's own iterator raised: even if the response is completed, it is not whole."""
        self._broken = True

    # For the app.

    def send(self, message: Message) -> Awaitable[None]:
        # Not a coroutine itself: free is free, and what is charged for has one of its own.
        charge = self.charge
        if charge is None:
            return self._send(message)
        kind = message["type"]
        if kind == "http.response.start":
            return self._start(message, charge)
        if kind == "http.response.body":
            return self._more(message, charge) if message.get("more_body", False) else self._last(message, charge)
        return self._last(message, charge) if kind == "http.response.pathsend" else self._out(message)

    async def _out(self, *messages: Message) -> None:
        try:
            for message in messages:
                await self._send(message)
        except OSError:  # how a server says, since ASGI 2.4, that nobody is there
            self._left = True
            raise

    async def _start(self, message: Message, charge: Charge) -> None:
        self._status = message["status"]
        headers = dict(message.get("headers", ()))
        if self.report is None and self.raised is None and charge.amount_credits > 0:
            self._reader = reader_for(
                self._status,
                _text(headers.get(b"content-type")),
                _text(headers.get(b"content-encoding")),
                self._path,
                charge.paid,
                self._billing.max_body_bytes,
            )
        self._held = message
        if self.streams or (b"content-length" not in headers and self._status not in (204, 205, 304)):
            await self._out(*self._opening(charge, None))

    async def _more(self, message: Message, charge: Charge) -> None:
        self._feed(message, charge)
        await self._out(*self._opening(charge, None), message)

    def _feed(self, message: Message, charge: Charge) -> None:
        if self._reader is None:
            return
        try:
            self._reader.feed(message.get("body", b""))
        except Exception as error:
            self._reader_raised(charge, error)

    def _reader_raised(self, charge: Charge, error: Exception) -> None:
        # A bug in a reader of ours: as if the app's own had raised. The response is not to suffer.
        self._reader = None
        self.raised = f"reading the outcome raised {type(error).__name__}"
        self._billing.telemetry.log(names.LOG_READER_RAISED, charge.record, exc_info=error)

    async def _last(self, message: Message, charge: Charge) -> None:
        self._feed(message, charge)
        # A stream that was left keeps what it has reported; any other answer was for nothing.
        left = (
            self._on_disconnect == "refund"
            and not isinstance(self._reader, LineReader)
            and charge.amount_credits > 0
            and await has_left(self._receive, self.scope["headers"])
        )
        event = self._refund_all("the client left before the answer") if left else self._outcome(charge)
        await self._billing.biller.conclude(charge, event)
        await self._out(*self._opening(charge, event), message)
        self._over = True
        self._billing.biller.release(charge, event)

    def _opening(self, charge: Charge, event: Event | None) -> tuple[Message, ...]:
        """The start, if it is held still, with the headers that can be known by now: to be sent at once."""
        if self._held is None:
            return ()
        start, self._held = self._held, None
        if event is None and not 200 <= self._status < 400:
            event = self._refund_all("")
        self._started = True
        return ({**start, "headers": [*start.get("headers", ()), *_headers(charge, event)]},)

    # What came of it.

    def _outcome(self, charge: Charge, *, complete: bool = True) -> Event:
        """The response's outcome, as an event for its charge."""
        complete = complete and not self._broken
        if charge.amount_credits == 0:
            return Reported(0)
        if self.failed is not None:
            return self._refund_all(self.failed)
        if not 200 <= self._status < 400:
            return self._refund_all(f"status {self._status}")
        try:
            outcome = self._read(charge, complete)
        except Exception as error:
            self._reader_raised(charge, error)
        if self.raised is not None:
            return Unread(self.raised)
        self._tell(charge, outcome)
        reason = "failed items" if complete else "the stream broke off"
        return Reported(outcome.kept_units * charge.paid.price, outcome.failed_items, reason)

    def _read(self, charge: Charge, complete: bool) -> Outcome:
        if self.report is not None and complete:
            return count(charge.paid, self.report, charge.said)
        if self._reader is not None:
            return self._reader.finish(charge.said, complete=complete)
        return none_kept(charge.paid)

    def _refund_all(self, reason: str) -> Reported:
        charge = self.charge
        return Reported(0, () if charge is None else tuple(charge.paid.by_item or ()), reason)

    def _tell(self, charge: Charge, outcome: Outcome) -> None:
        for attribute, event, text in (
            (names.MISMATCH, names.LOG_MISMATCH, outcome.mismatch),
            (names.UNREADABLE, names.LOG_UNREADABLE, outcome.unreadable),
        ):
            if text is not None:
                charge.note(attribute, text)
                self._billing.telemetry.log(event, charge.record, reason=text, charge_id=charge.id)

    def close(self, error: BaseException | None) -> None:
        """The app is done with this request, one way or the other: settle what `_last` did not."""
        self._ended = True
        charge = self.charge
        if charge is None or self._over:
            return
        self._over = True
        self._billing.biller.release(charge, self._unfinished(charge, error))

    def _unfinished(self, charge: Charge, error: BaseException | None) -> Event:
        """The outcome of a response whose last byte was not sent."""
        if self.failed is not None:
            return self._refund_all(self.failed)
        if isinstance(self._reader, LineReader) and self._started:
            return self._outcome(charge, complete=False)
        if isinstance(error, asyncio.CancelledError):
            return self._refund_all("cancelled")
        if error is not None and not self._left:
            return self._refund_all(f"exception {type(error).__name__}")
        # Starlette cancels the iterator of a client that has left, and returns; or `send` raised.
        if self._on_disconnect == "keep" and 200 <= self._status < 400 and not self._broken:
            if self.report is None and self.raised is None:
                # What its body would have reported was never sent: its status has to do.
                self._reader = StatusReader(self._status, charge.paid)
            return self._outcome(charge)
        return self._refund_all("the client left before the answer")


def _headers(charge: Charge, event: Event | None) -> list[tuple[bytes, bytes]]:
    headers = [(b"credits-deducted", b"%d" % charge.amount_credits)]
    transaction_id = charge.transaction_id
    if transaction_id is not None and _VISIBLE.fullmatch(transaction_id):
        headers.append((b"credits-transaction-id", transaction_id.encode()))
    if event is not None and charge.amount_credits > 0:
        kept = event.kept_credits if isinstance(event, Reported) else charge.amount_credits
        refunded = charge.amount_credits - kept
        headers.append((b"credits-refunded", b"%d" % refunded))
        if charge.balance is not None:
            headers.append((b"credits-balance", b"%d" % (charge.balance + refunded)))
    return headers


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")


def checked_choice(name: str, value: T, choices: Any) -> T:
    """`value`, if it is one of a `Literal`'s."""
    if value not in choices.__args__:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices.__args__))}; this is {value!r}")
    return value
