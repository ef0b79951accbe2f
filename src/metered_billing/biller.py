"""The conductor: deducts before the route runs, puts its outcome on record, hands the rest to the settler.

What a charge does next is for `charge.step` to say; here is when. The rule for every `await`: what follows
from dying there is found in the journal by the next `recover`, and what follows from being cancelled there
is handed to a task of the settler's, which the request's cancellation does not reach.
"""

import asyncio
import contextlib
import functools
import math
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from opentelemetry.trace import Span

from metered_billing import names
from metered_billing.charge import (
    Account,
    Declined,
    Deducted,
    Event,
    Lost,
    NotSent,
    Record,
    Unknown,
    opened,
    step,
)
from metered_billing.credits import Credits
from metered_billing.errors import BillingError, BillingMisconfigured, CreditsUnavailable, InsufficientCredits
from metered_billing.journal import Journal, JournalError, PlaceLost
from metered_billing.loops import Deadlines
from metered_billing.outcomes import Paid, Said
from metered_billing.runtime import Runtime
from metered_billing.settler import FIRST_BACKOFF_S, MAX_RETRY_AFTER_S, RECOVER_EVERY_S, Settler
from metered_billing.telemetry import Operation, Telemetry, shown_items, traceparent_of

T = TypeVar("T")

JOURNAL_WITHIN_S = 5.0
"""What a request waits for its journal at a time: as long as for its credits."""


class Charge:
    """The charge of the request that is running: what `current_charge()` returns.

    Attributes:
        id: UUIDv7, the idempotency key of its deduction.
        amount_credits: What was deducted, in whole credits; 0 where the request is free.
    """

    __slots__ = ("_account", "_closed", "_outcome", "_record", "_said", "_span", "_written", "amount_credits",
                 "balance", "id", "paid")  # fmt: skip

    def __init__(
        self,
        record: Record | None,
        paid: Paid,
        *,
        charge_id: str,
        account: Account | None,
        balance: int | None = None,
        span: Span | None = None,
    ) -> None:
        self.id: str = charge_id
        self.paid: Paid = paid
        self.balance: int | None = balance
        self.amount_credits: int = 0 if record is None else record.amount_credits
        self._account = account
        self._record = record
        self._said = Said(paid)
        self._span = span
        # The one write of its outcome, once it is under way, and the record as it is after it.
        self._written: asyncio.Future[bool] | None = None
        self._outcome: Record | None = None
        self._closed = False

    @property
    def account(self) -> Account:
        """Who pays.

        Raises:
            LookupError: Nobody: the request is free, and names no account.
        """
        if self._account is None:
            raise LookupError("this request is free and names no account")
        return self._account

    @property
    def transaction_id(self) -> str | None:
        """The credits service's name for the deduction; None where the request is free."""
        return None if self._record is None else self._record.transaction_id

    def fail(self, item: str | None = None, *, units: int | None = None) -> None:
        """Say that an item (of a mapping cost) or so many units (of a number) failed, and are to be refunded.

        It adds to what the response reports.

        Raises:
            ValueError: No such item, or more units than were paid for.
            TypeError: The other kind of cost.
            RuntimeError: The response is complete: its outcome is on record.
        """
        if self._closed or self._written is not None:
            raise RuntimeError("the response is complete: what failed can no longer be said")
        self._said.fail(item, units=units)

    # For the middleware.

    @property
    def said(self) -> Said:
        """What the route has said so far."""
        return self._said

    @property
    def record(self) -> Record | None:
        """The charge as it was when the route began; None where the request is free."""
        return self._record

    def note(self, attribute: str, text: str) -> None:
        """Something for whoever reads the charge's span."""
        if self._span is not None:
            self._span.set_attribute(attribute, text)


class Biller:
    """Deducts, settles and recovers, for one middleware.

    Args:
        credits: Who moves the credits.
        journal: Where unsettled charges are on record.
        recover_every_s: How often the journal is looked through.
        inline: Whether there may be nothing under way between requests; see `Settler`.
    """

    def __init__(
        self,
        credits: Credits,  # noqa: A002 - the field's word
        journal: Journal,
        *,
        runtime: Runtime | None = None,
        telemetry: Telemetry | None = None,
        recover_every_s: float = RECOVER_EVERY_S,
        inline: bool = False,
    ) -> None:
        self._credits = credits
        self._journal = journal
        self._runtime = runtime or Runtime()
        self._telemetry = telemetry or Telemetry()
        self._settler = Settler(credits, journal, self._runtime, self._telemetry, recover_every_s, inline=inline)
        self._deadlines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Deadlines] = weakref.WeakKeyDictionary()

    async def start(self) -> None:
        """Open the journal, and recover from now on, on this event loop. May be called again.

        Raises:
            JournalError: The journal cannot be had.
        """
        await self._settler.start()

    @property
    def started(self) -> bool:
        """Whether it is, on this event loop."""
        return self._settler.started

    async def quiesce(self, within_s: float) -> None:
        """Let refunds and voids under way come to their end, then do nothing before the next request or `start`."""
        try:
            await self._settler.quiesce(within_s)
        finally:
            deadlines = self._deadlines.get(asyncio.get_running_loop())
            if deadlines is not None:
                deadlines.let_go()

    async def drain(self, timeout_s: float) -> None:
        """Let requests and refunds under way come to their end, then stop, and close everything."""
        await self._settler.drain(timeout_s)

    async def recover(self) -> int:
        """Look through the journal now, as recovery does by itself. Returns how many charges were tried."""
        return await self._settler.recover()

    # Serving a request.

    async def deduct(
        self,
        account: Account,
        paid: Paid,
        *,
        request_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Charge:
        """Take the price of `paid` from the account, before the route runs.

        Returns:
            The charge, deducted and on record. Whoever gets it calls `conclude` before the last byte, then `release`.

        Raises:
            InsufficientCredits: The account holds too little; nothing moved.
            CreditsUnavailable: No answer, or no journal: nothing moved, or it is being undone.
            BillingMisconfigured: The service refused to understand; it is being undone.
        """
        record = opened(
            self._runtime.new_id(),
            account,
            amount_credits=paid.amount_credits,
            units=paid.units,
            now=self._runtime.now(),
            owner=self._journal.owner,
            request_id=request_id,
            metadata=metadata,
        )
        span = self._telemetry.charge_span(record)
        self._telemetry.log(names.LOG_COST_COMPUTED, record, span=span, units=paid.units)
        self._settler.attend(record)
        try:
            return await self._deduct(record, paid, span)
        except BaseException as error:
            if not isinstance(error, BillingError | asyncio.CancelledError):
                self._settler.leave(record)  # a bug of ours: what is on record is recovered
            span.set_attribute(names.OUTCOME, "not run")
            cancelled = isinstance(error, asyncio.CancelledError)
            span.set_attribute(names.ERROR_TYPE, "cancelled" if cancelled else type(error).__qualname__)
            span.end()
            raise

    async def _deduct(self, record: Record, paid: Paid, span: Span) -> Charge:
        with self._telemetry.operation(names.SPAN_DEDUCT, record, parent=span) as operation:
            traceparent = traceparent_of(operation.span)
            if traceparent is not None:
                record = record.but(traceparent=traceparent)
            try:
                try:
                    await self._soon(self._journal.open(record))
                except PlaceLost:
                    # We were stopped, and taken for dead. It is not on record, and is ours to put there.
                    record = record.but(owner=self._journal.owner)
                    await self._soon(self._journal.open(record))
            except asyncio.CancelledError:
                # The write may still land, or fail; nothing was sent, and nothing will be.
                unsent = NotSent("cancelled before it was sent")
                self._settler.spawn(record, self._settler.follow(record, unsent, opened=False))
                raise
            except JournalError as error:
                # It may be on record all the same: then recovery finds and voids it, which moves nothing.
                raise self._not_on_record(record, operation, error) from error
            try:
                answer = await self._credits.deduct(record)
            except BaseException as error:
                # Cancelled, or a bug in a backend: the request may be out already.
                unknown = Unknown(f"{type(error).__name__} while it was under way")
                self._settler.spawn(record, self._settler.follow(record, unknown))
                if isinstance(error, Exception):
                    _say_why(operation, "unknown", unknown.reason)
                    self._telemetry.log(names.LOG_UNAVAILABLE, record, exc_info=error)
                    raise CreditsUnavailable(1) from error
                raise
            after = step(record, answer, now=self._runtime.now())
            if isinstance(answer, Deducted | Declined) and answer.balance is not None:
                operation.note(names.BALANCE, answer.balance)
            if not isinstance(answer, Deducted):
                _say_why(operation, type(answer).__name__.lower(), after.reason or "")
                self._settler.spawn(record, self._settler.follow(record, answer))
                raise self._refusal(after, answer)
            operation.note(names.TRANSACTION_ID, answer.transaction_id)
            # Whatever becomes of it now, the credits have moved.
            self._telemetry.moved("deducted", after.amount_credits)
            self._telemetry.log(
                names.LOG_DEDUCTED, after, span=operation.span, units=paid.units, balance=answer.balance
            )
            ours = self._journal.holds(record)
            if not ours:
                await self._confirm(record, after, operation)
        charge = Charge(after, paid, charge_id=after.id, account=after.account, balance=answer.balance, span=span)
        if ours:
            asyncio.get_running_loop().call_soon(self._catch_up, charge, record, after)
        return charge

    async def _confirm(self, record: Record, after: Record, operation: Operation) -> None:
        """Put the deduction on record as confirmed, and see that nobody else has moved the charge meanwhile.

        Raises:
            CreditsUnavailable: Somebody has, or it cannot be known: the charge is undone, and the route must not run.
        """
        try:
            won = await self._soon(self._journal.write(record, after, durable=False))
        except asyncio.CancelledError:
            # The write is in the queue already, so this one comes behind it.
            self._settler.spawn(record, self._settler.follow(after, Lost("cancelled before the route ran")))
            raise
        except JournalError as error:
            # On record it is still opened, so recovery voids it.
            raise self._not_on_record(after, operation, error) from error
        if not won:
            self._settler.leave(record)
            _say_why(operation, "ownership_lost", "another process has moved the charge")
            self._telemetry.log(names.LOG_OWNERSHIP_LOST, after)
            raise CreditsUnavailable(1)

    def _not_on_record(self, record: Record, operation: Operation, error: JournalError) -> CreditsUnavailable:
        """Leave the charge to recovery, and say why the route does not run."""
        _say_why(operation, "journal", f"journal: {error}")
        self._settler.complain(record, error)
        self._settler.leave(record)
        return CreditsUnavailable(1)

    def _catch_up(self, charge: Charge, record: Record, after: Record) -> None:
        """Put a confirmed deduction on record, should its request still be running in the next turn of the loop.

        Nobody has to wait for it: nobody else can move the charge, and what dies before finds it opened, and voids it.
        If the outcome is there already, it goes on record instead; if this fails, it still can.
        """
        if charge._written is not None or charge._closed:
            return
        try:
            written = asyncio.ensure_future(self._journal.write(record, after, durable=False))
        except Exception as error:
            self._settler.complain(after, error)
        else:
            written.add_done_callback(functools.partial(self._caught_up, after))

    def _caught_up(self, after: Record, written: "asyncio.Future[bool]") -> None:
        if not written.cancelled() and (error := written.exception()) is not None:
            self._settler.complain(after, error)

    def _soon(self, write: Awaitable[T]) -> Awaitable[T]:
        """How a write to the journal went, unless that takes too long: a disk that hangs must not hang requests.

        Raises:
            JournalError: Too long, or failed. It may be written all the same. (When it is awaited.)
        """
        if type(write) is not asyncio.Future:
            return self._timed(write)
        self._watch(write, _too_late)
        return write

    async def _timed(self, write: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(JOURNAL_WITHIN_S):
                return await write
        except TimeoutError as error:
            raise _not_written() from error

    def _watch(self, future: "asyncio.Future[Any]", late: "Callable[[asyncio.Future[Any]], None]") -> None:
        loop = asyncio.get_running_loop()
        deadlines = self._deadlines.get(loop)
        if deadlines is None:
            for gone in [other for other in list(self._deadlines) if other.is_closed()]:
                self._deadlines.pop(gone, None)  # what is in it holds on to its loop
            deadlines = self._deadlines[loop] = Deadlines(loop)
        deadlines.watch(future, JOURNAL_WITHIN_S, late)

    def _refusal(self, record: Record, answer: Declined | NotSent | Unknown) -> BillingError:
        """What the client is told of an answer that is not yes."""
        if isinstance(answer, Declined) and not answer.after_unknown:
            self._telemetry.log(names.LOG_DECLINED, record, balance=answer.balance)
            return InsufficientCredits(record.amount_credits, answer.balance)
        self._telemetry.log(names.LOG_UNAVAILABLE, record, reason=record.reason)
        if isinstance(answer, Unknown) and answer.misconfigured:
            return BillingMisconfigured(f"the credits service refused the deduction: {answer.reason}")
        wait_s = (None if isinstance(answer, Declined) else answer.retry_after_s) or FIRST_BACKOFF_S
        return CreditsUnavailable(math.ceil(min(max(wait_s, 1), MAX_RETRY_AFTER_S)))

    def free(self, paid: Paid, account: Account | None) -> Charge:
        """The charge of a request that costs nothing: nothing is journalled, sent or settled."""
        return Charge(None, paid, charge_id=self._runtime.new_id(), account=account)

    # Its outcome.

    async def conclude(self, charge: Charge, event: Event) -> None:
        """Put the charge's outcome on record, synced to disk; to be awaited before the last byte goes out.

        Never raises but for a cancellation: trouble with the journal is loud, and not the client's. The
        first outcome counts; further ones are ignored.
        """
        self._begin_outcome(charge, event)
        record, written = charge._record, charge._written
        if record is None or written is None or written.done():
            return
        # Not the write itself, which a cancellation of the request would take along. How it went is for `release`
        # to look at; here it only has to be over.
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        written.add_done_callback(lambda _: _give_up(over))
        self._watch(over, _give_up)
        await over
        if not written.done():
            self._settler.complain(record, reason=f"no outcome in {JOURNAL_WITHIN_S} s")

    def release(self, charge: Charge, event: Event) -> None:
        """The response is over, one way or the other: settle in the background.

        Args:
            event: The outcome, in case that none was concluded.
        """
        if charge._closed:
            return
        self._begin_outcome(charge, event)
        charge._closed = True
        record, written = charge._record, charge._written
        if record is None:
            return
        if written is not None and not written.done():
            written.add_done_callback(_seen)
            self._settler.spawn(record, self._settle(charge, record, written))
            return
        # As nearly always: `conclude` has waited for it. What is over needs no task.
        due = self._told(charge, record)
        if due is None:
            self._settler.leave(record)
        else:
            self._settler.spawn(record, self._settler.drive(due, charge._span))

    def _begin_outcome(self, charge: Charge, event: Event) -> None:
        """Queue the one write of the outcome. From here on a cancellation cannot change it."""
        record = charge._record
        if record is None or charge._closed or charge._written is not None:
            return
        try:
            after = step(record, event, now=self._runtime.now())
            charge._written = asyncio.ensure_future(self._journal.write(record, after, durable=True))
            charge._outcome = after
        except Exception as error:
            # A full queue, a closed journal, or a bug: the response goes out, and recovery refunds all.
            self._settler.complain(record, error)

    async def _settle(self, charge: Charge, record: Record, written: "asyncio.Future[bool]") -> None:
        with contextlib.suppress(Exception):
            await asyncio.shield(written)
        due = self._told(charge, record)
        if due is not None:
            await self._settler.drive(due, charge._span)

    def _told(self, charge: Charge, record: Record) -> Record | None:
        """Say how the write of the outcome went, now that it is over. Returns the record where a refund is due."""
        try:
            return self._tell(charge, record)
        except Exception as error:
            # A bug of ours, or of a span processor's: recovery goes by what is on record.
            self._telemetry.log(names.LOG_BUG, record, exc_info=error)
            return None

    def _tell(self, charge: Charge, record: Record) -> Record | None:
        after, written, span = charge._outcome, charge._written, charge._span
        if after is None or written is None:
            self._end(span, record, "journal")
            return None
        try:
            won = written.result()
        except (Exception, asyncio.CancelledError) as error:  # cancelled with its loop, where the journal has tasks
            # On record it is still deducted: recovery refunds all, once the journal works again.
            self._settler.complain(record, error, span=span)
            self._end(span, record, "journal")
            return None
        if not won:
            self._telemetry.log(names.LOG_OWNERSHIP_LOST, record, span=span)
            self._end(span, record, "ownership_lost")
            return None
        self._end(span, after, str(after.state))
        self._telemetry.moved("kept", after.kept_credits)
        if not after.final:
            return after
        self._settler.say_final(after, span)
        return None

    def _end(self, span: Span | None, record: Record, outcome: str) -> None:
        if span is None:
            return
        if span.is_recording():
            attributes: dict[str, Any] = {
                names.OUTCOME: outcome,
                names.KEPT: record.kept_credits,
                names.REFUNDED: record.refund_credits,
                names.TRANSACTION_ID: record.transaction_id,
            }
            if record.reason is not None:
                attributes[names.REASON] = record.reason
            if record.refund_items:
                attributes[names.ITEMS] = shown_items(record)
            span.set_attributes(attributes)
        span.end()


def _say_why(operation: Operation, error_type: str, reason: str) -> None:
    """On the deduction's span: why the route does not run."""
    operation.failed(error_type, reason)
    operation.note(names.REASON, reason)


def _not_written() -> JournalError:
    return JournalError(f"not written within {JOURNAL_WITHIN_S} s")


def _too_late(write: "asyncio.Future[Any]") -> None:
    write.set_exception(_not_written())


def _give_up(over: "asyncio.Future[None]") -> None:
    if not over.done():
        over.set_result(None)


def _seen(written: "asyncio.Future[bool]") -> None:
    """Whoever waited for it may be gone by now."""
    if not written.cancelled():
        written.exception()
