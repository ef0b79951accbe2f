"""Credits over HTTP: what to ask, how often, and what the answers mean.

One call is `sender`'s: breaker, token, connection. What is here is around it: retry(line(call)), where the line is
what operations gather in while a call is in flight.

A deduction is tried a few times under its one key within a deadline, since a request waits for it. A refund
or a void is tried once a call: the biller comes back with it, for ever. First attempts stand in line, and go
out together; whatever is tried again goes by itself, so that nothing is held up by its neighbours twice. Whatever
happens, the answer is a value, and it never says "not sent" of something that may have been.
"""

import asyncio
import math
import weakref
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
import tenacity
from opentelemetry import trace
from opentelemetry.trace import Span
from pydantic import SecretStr

from metered_billing import names
from metered_billing.bounds import DAY_S, HOUR_S, number, whole
from metered_billing.charge import (
    MAX_ID_LENGTH,
    Declined,
    DeductAnswer,
    Deducted,
    FindAnswer,
    Found,
    NoLookup,
    NotFound,
    NotSent,
    NoVoid,
    Record,
    RefundAnswer,
    Unanswered,
    Unknown,
    VoidAnswer,
    after_unknown,
)
from metered_billing.credits.breaker import RetryBudget
from metered_billing.credits.contract import Call, Contract, Reply, retry_after_s
from metered_billing.credits.line import ALONE, Line, Waiting
from metered_billing.credits.sender import CIRCUIT_OPEN, Sender, Silence, encode
from metered_billing.credits.token import TokenSource, checked_header
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry, traceparent_of

T = TypeVar("T")

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0

PAGE = 200
MAX_PAGES = 10_000
"""How far a transaction is looked for: a list without an end must not hold up recovery for ever."""

DEDUCTIONS_AT_ONCE = 2
UNDOING_AT_ONCE = 1
"""Calls in flight together, of first attempts: deductions, and refunds and voids, which neither holds up."""

GROUP = 1000
"""The most operations that one call carries."""

_CROWDED = "too many are waiting for the credits service"
_LATE = "waited too long for the credits service"
_FINAL = (CIRCUIT_OPEN, _CROWDED, _LATE)


@dataclass(frozen=True, slots=True)
class _NoBatch:
    """There are no batches here, or so somebody says; whether it was passed on nevertheless is unknown."""

    reason: str


# Those two are not frozen, which would make them twice as slow to make.


@dataclass(slots=True)
class _Asked:
    """What stands in line.

    Attributes:
        deadline: When it must have its answer, on the runtime's monotonic clock.
        span: Of the operation.
    """

    operation: str
    record: Record
    call: Call
    deadline: float
    span: Span


@dataclass(slots=True)
class _Attempt:
    """One attempt's result, and whether another is worth making."""

    answer: DeductAnswer
    again: bool
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Lines:
    """Who waits on one event loop: neither holds up the other."""

    deductions: Line
    undoing: Line


class HttpCredits:
    """A credits service that speaks the credits API.

    Args:
        url: `http://` or `https://`, with an optional path in front of `/v1/…`.
        token: Sent as a bearer token; never logged. One that may change meanwhile: a `RotatingToken`, or whatever else
            is a `TokenSource`.
        timeout_s: What a request waits for its deduction in all, retries included.
        attempt_timeout_s: What one attempt may take in all (httpx has no such limit of its own).
        attempts: How often a deduction is tried, always under its one key.
        breaker_failures: Failed HTTP calls in a row that open the circuit.
        breaker_reset_s: How long it stays open before one probe is let through.
        contract: What to ask and how to read the answers, for services of another shape.
        transport: What is sent through instead of the network, on every event loop; it stays yours to close.
        lean: Send over a connection that can less and costs less (extra `lean`); mocks of httpx do not see it.
        max_connections: Open at the same time, per event loop.
        batching: Whether what is asked for while a call is in flight goes out in one call, where the contract has
            batches.
        max_waiting: Operations that may stand in line, per event loop. Beyond it: 503.

    Raises:
        ValueError: The URL, the token or a number cannot be right; its text never shows the token.
        ImportError: `lean` without its extra.
        OSError: The certificates that the environment names cannot be read.
        TypeError: The contract is none.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | SecretStr | TokenSource | None = None,
        timeout_s: float = 5.0,
        attempt_timeout_s: float = 2.0,
        attempts: int = 3,
        breaker_failures: int = 5,
        breaker_reset_s: float = 10.0,
        contract: Contract | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        lean: bool = False,
        max_connections: int = 100,
        batching: bool = True,
        max_waiting: int = 5000,
        runtime: Runtime | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._timeout_s = number("timeout_s", timeout_s, most=HOUR_S)
        self._attempt_timeout_s = number("attempt_timeout_s", attempt_timeout_s, most=HOUR_S)
        self._attempts = whole("attempts", attempts)
        self._max_waiting = whole("max_waiting", max_waiting)
        # In line: enough must be left for a call of its own.
        self._patience_s = timeout_s - min(attempt_timeout_s, timeout_s) / 2
        self._contract = Contract() if contract is None else _contract(contract)
        self._runtime = runtime or Runtime()
        self._telemetry = telemetry or Telemetry()
        self._sender = Sender(
            url,
            token=token,
            auth_header=checked_header(self._contract.auth_header, self._contract.auth_scheme),
            breaker_failures=whole("breaker_failures", breaker_failures),
            breaker_reset_s=number("breaker_reset_s", breaker_reset_s, most=DAY_S),
            transport=transport,
            lean=lean,
            max_connections=whole("max_connections", max_connections),
            runtime=self._runtime,
            telemetry=self._telemetry,
        )
        self._deductions_at_once = DEDUCTIONS_AT_ONCE
        self._batches = batching and self._contract.batches
        self._batch_was_answered = False
        self._budget = RetryBudget()
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Lines] = weakref.WeakKeyDictionary()
        # Copied for every call: a shared one keeps its state on itself, and concurrent users of it
        # run successful calls twice.
        self._retrying = tenacity.AsyncRetrying(
            sleep=self._runtime.sleep,
            retry=tenacity.retry_if_result(lambda attempt: attempt.again),
            wait=self._wait_s,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )

    @property
    def realm(self) -> str:
        return self._sender.realm

    @property
    def remembers_declines(self) -> bool:
        return self._contract.remembers_declines

    async def start(self) -> None:
        """Asks nothing of the service: one that is down must not keep the app from starting."""
        await self._sender.open()
        self._lines()  # here and now, so that what goes in groups is in no request's context

    async def deduct(self, record: Record) -> DeductAnswer:
        """Take the credits, in up to `attempts` attempts within `timeout_s`."""
        try:
            call = self._contract.deduction(record)
            deadline = self._runtime.monotonic() + self._timeout_s
            self._budget.called()
            outcome = await self._first(_Asked("deduct", record, call, deadline, trace.get_current_span()))
            doubt: str | None = None
            if isinstance(outcome, _NoBatch):
                doubt = outcome.reason
                outcome = await self._sender.send(call, self._left_s(deadline), "deduct", 0)
            result = self._read(record, outcome)
            if isinstance(result.answer, Unknown):
                doubt = doubt or result.answer.reason
            if result.again:
                result, doubt = await self._again(record, call, deadline, result, doubt)
        except Exception as error:
            return Unknown(self._bug(record, error), misconfigured=True)
        return result.answer if doubt is None else after_unknown(result.answer, doubt)

    async def refund(self, record: Record) -> RefundAnswer:
        """Give credits back, in one attempt."""
        return await self._answered(record, self._refund(record))

    async def void(self, record: Record) -> VoidAnswer:
        """Undo the deduction, in one attempt."""
        return await self._answered(record, self._void(record))

    async def find(self, record: Record) -> FindAnswer:
        """Look through the account's transactions, page by page."""
        return await self._answered(record, self._find(record))

    async def aclose(self) -> None:
        """Close this event loop's connections; those that are in use as soon as they have their answer."""
        lines = self._loops.pop(asyncio.get_running_loop(), None)
        if lines is not None:
            await lines.deductions.aclose()
            await lines.undoing.aclose()
        await self._sender.aclose()

    async def _answered(self, record: Record, work: Coroutine[Any, Any, T]) -> T | Unanswered:
        """What `work` answers."""
        try:
            return await work
        except Exception as error:
            return Unanswered(self._bug(record, error))

    def _bug(self, record: Record, error: Exception) -> str:
        """Why there is no answer: a bug, which is to say in a contract of the user's own. It is loud."""
        self._telemetry.log(names.LOG_MISCONFIGURED, record, exc_info=error)
        return f"{type(error).__name__} in the credits client"

    # The calls.

    async def _again(
        self, record: Record, call: Call, deadline: float, first: _Attempt, doubt: str | None
    ) -> tuple[_Attempt, str | None]:
        """What came of further attempts, and the first reason for doubt there was."""
        number = 0

        async def attempt() -> _Attempt:
            nonlocal doubt, number
            number += 1
            if number == 1:
                return first
            result = self._read(record, await self._sender.send(call, self._left_s(deadline), "deduct", number - 1))
            if isinstance(result.answer, Unknown) and doubt is None:
                doubt = result.answer.reason
            return result

        def stop(state: tenacity.RetryCallState) -> bool:
            return (
                state.attempt_number >= self._attempts
                or self._runtime.monotonic() + state.upcoming_sleep >= deadline
                or self._sender.blocked_s() > state.upcoming_sleep
                or not self._budget.take()
            )

        last: _Attempt = await self._retrying.copy(stop=stop)(attempt)
        return last, doubt

    async def _refund(self, record: Record) -> RefundAnswer:
        outcome = await self._undo("refund", record, self._contract.refund(record))
        if isinstance(outcome, Silence):
            return _unanswered(outcome)
        answer = self._contract.read_refund(record, outcome)
        if not isinstance(answer, RefundAnswer):
            raise _no_answer("read_refund", answer)
        return self._with_patience(outcome, answer)

    async def _void(self, record: Record) -> VoidAnswer:
        call = self._contract.void(record)
        if call is None:
            return NoVoid()
        outcome = await self._undo("void", record, call)
        if isinstance(outcome, Silence):
            return _unanswered(outcome)
        answer = self._contract.read_void(record, outcome)
        if not isinstance(answer, VoidAnswer):
            raise _no_answer("read_void", answer)
        return self._with_patience(outcome, answer)

    async def _undo(self, operation: str, record: Record, call: Call) -> Reply | Silence:
        if record.tries == 0:
            outcome = await self._first(_Asked(operation, record, call, math.inf, trace.get_current_span()))
            if not isinstance(outcome, _NoBatch):
                return outcome
        return await self._sender.send(call, self._attempt_timeout_s, operation, record.tries)

    async def _find(self, record: Record) -> FindAnswer:
        account, cursor = record.account, None
        seen: set[str] = set()
        while len(seen) < MAX_PAGES:
            call = self._contract.transactions(account.tenant_id, account.user_id, cursor, PAGE)
            if call is None:
                return NoLookup()
            outcome = await self._sender.send(call, self._attempt_timeout_s, "find", 0)
            if isinstance(outcome, Silence):
                return _unanswered(outcome)
            page = self._contract.read_transactions(outcome)
            if page is None:
                return self._with_patience(outcome, Unanswered(f"no transactions ({outcome})"))
            answer = self._contract.find(record, page)
            if not isinstance(answer, FindAnswer):
                raise _no_answer("find", answer)
            if isinstance(answer, Found) and not _is_id(answer.transaction_id):
                raise _no_id("find")
            cursor = page.next_cursor
            if not isinstance(answer, NotFound) or cursor is None:
                return answer
            if cursor in seen:
                break
            seen.add(cursor)
        return Unanswered("the list of transactions has no end")

    # In line, for the first attempt.

    async def _first(self, asked: _Asked) -> Reply | Silence | _NoBatch:
        """Make the call when it is its turn, or hear what came of the call that it was part of."""
        if not self._batches:
            return await self._sender.send(asked.call, self._left_s(asked.deadline), asked.operation, 0)
        blocked_s = self._sender.blocked_s()
        if blocked_s > 0:
            return Silence(CIRCUIT_OPEN, sent=False, retry_after_s=blocked_s)
        lines, account = self._lines(), asked.record.account
        line = lines.deductions if asked.operation == "deduct" else lines.undoing
        if not line.has_room(account):
            self._telemetry.crowded_out()
            return Silence(_CROWDED, sent=False, retry_after_s=1.0)
        waiting = line.join(asked, account, _weight(asked), self._patience_s)
        try:
            outcome = await waiting.told
        except BaseException as error:
            if waiting.alone:  # it is cancelled before it has heard of it
                line.leave()
            elif isinstance(error, asyncio.CancelledError):
                await line.forsake(waiting)
            raise
        if outcome is not ALONE:
            return outcome  # type: ignore[no-any-return]
        try:
            return await self._sender.send(asked.call, self._left_s(asked.deadline), asked.operation, 0)
        finally:
            line.leave()

    def _left_s(self, deadline: float) -> float:
        """What one attempt may take."""
        return min(self._attempt_timeout_s, deadline - self._runtime.monotonic())

    async def _send_group(self, group: Sequence[Waiting]) -> None:
        """Make one call for many, and tell each what came of it."""
        sent: list[Waiting] = []
        operations: list[bytes] = []
        for waiting in group:
            asked: _Asked = waiting.asked
            try:
                operation = dict(self._contract.batched(asked.operation, asked.record, asked.call))
                traceparent = traceparent_of(asked.span)
                if traceparent is not None:
                    operation["traceparent"] = traceparent
                operations.append(encode(operation))
            except Exception as error:
                waiting.fail(error)
            else:
                sent.append(waiting)
        if not sent:
            return
        path, content = self._contract.batch(operations)
        now = self._runtime.monotonic()
        timeout_s = min(self._attempt_timeout_s, max(waiting.asked.deadline for waiting in sent) - now)
        late = Silence("TimeoutError", sent=True)
        hurried = [
            asyncio.get_running_loop().call_later(waiting.asked.deadline - now, waiting.tell, late)
            for waiting in sent
            if waiting.asked.deadline - now < timeout_s
        ]
        try:
            spans = [waiting.asked.span for waiting in sent]
            outcome = await self._sender.send(Call("POST", path), timeout_s, "batch", 0, content, spans)
        finally:
            for timer in hurried:
                timer.cancel()
        for waiting, each in zip(sent, self._shares(outcome, len(sent)), strict=True):
            waiting.tell(each)

    def _shares(self, outcome: Reply | Silence, size: int) -> Sequence[Reply | Silence | _NoBatch]:
        """What came of each of a group, given what came of its call."""
        if isinstance(outcome, Silence):
            return [outcome] * size
        replies = self._contract.read_batch(outcome, size)
        if replies is not None:
            self._batch_was_answered = True
            shares = [self._share(outcome, reply) for reply in replies]
            rejected = next(
                (each.status for each in shares if isinstance(each, Reply) and each.status in (401, 403)), 0
            )
            if rejected:
                self._sender.rejected(rejected)
            return shares
        if outcome.status in (404, 405, 501):
            # One that had batches a moment ago still has: then it is a deployment, or a proxy.
            self._batches = self._batch_was_answered
            return [_NoBatch(f"a batch was answered {outcome}")] * size
        if outcome.status >= 500 or outcome.status in (401, 403, 408, 425, 429):
            return [outcome] * size
        return [Silence(f"a batch was answered {outcome}", sent=True)] * size

    def _share(self, outcome: Reply, reply: Reply | None) -> Reply | Silence | _NoBatch:
        if reply is None:
            return Silence("broken result in a batch", sent=True)
        if reply.status == 401 and self._sender.rotates:
            return _NoBatch(str(reply))  # by itself it gets the other token, where there is one
        reply.doubt = outcome.doubt
        return reply

    def _lines(self) -> _Lines:
        """Who stands in line on this event loop."""
        loop = asyncio.get_running_loop()
        lines = self._loops.get(loop)
        if lines is None:
            for gone in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(gone, None)  # another thread may have been faster
            lines = _Lines(self._line(self._deductions_at_once), self._line(UNDOING_AT_ONCE))
            self._loops[loop] = lines
        return lines

    def _line(self, at_once: int) -> Line:
        return Line(
            self._send_group,
            late=Silence(_LATE, sent=False),
            lost=Silence("the call was broken off", sent=True),
            at_once=at_once,
            group=GROUP,
            waiting=self._max_waiting,
        )

    # What it means, and whether to try again.

    def _read(self, record: Record, outcome: Reply | Silence) -> _Attempt:
        if isinstance(outcome, Silence):
            wait_s = outcome.retry_after_s or self._sender.blocked_s() or None
            if not outcome.sent:
                # The circuit does not close within a request: an open one is not tried again. Nor is more asked
                # of a service that does not keep up.
                return _Attempt(NotSent(outcome.reason, wait_s), again=outcome.reason not in _FINAL)
            return _Attempt(Unknown(outcome.reason, wait_s), again=True)
        answer = _checked(self._contract.read_deduction(record, outcome))
        if isinstance(answer, Declined) and not self._contract.remembers_declines:
            answer = replace(answer, forgotten=True)
        if not isinstance(answer, Unknown):
            return _Attempt(after_unknown(answer, outcome.doubt) if outcome.doubt else answer, again=False)
        wait_s = retry_after_s(outcome.headers, self._runtime.now())
        answer = Unknown(answer.reason, wait_s or self._sender.blocked_s() or None, answer.misconfigured)
        voided = outcome.status == 409 and outcome.problem is not None
        again = not answer.misconfigured and outcome.status not in (401, 403) and not voided
        return _Attempt(answer, again, wait_s)

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """The longer of what the service asked for and a full jitter."""
        highest_s = min(FIRST_BACKOFF_S * 2 ** (state.attempt_number - 1), MAX_BACKOFF_S)
        jitter_s = self._runtime.random.uniform(0, highest_s)
        attempt: _Attempt | None = state.outcome.result() if state.outcome else None
        return max((attempt.retry_after_s if attempt else None) or 0.0, jitter_s)

    def _with_patience(self, reply: Reply, answer: T) -> T | Unanswered:
        """Hand the service's Retry-After to whoever schedules the next attempt."""
        if isinstance(answer, Unanswered):
            return Unanswered(answer.reason, retry_after_s(reply.headers, self._runtime.now()))
        return answer


def _contract(given: object) -> Contract:
    if isinstance(given, Contract):
        return given
    what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
    raise TypeError(f"contract must be an object of a subclass of Contract, as in contract=Own(); this is {what}")


def _weight(asked: _Asked) -> int:
    """Bytes of its JSON, roughly, and rather more: a character may take twelve."""
    record, account, items = asked.record, asked.record.account, asked.record.refund_items
    letters = len(account.tenant_id) + len(account.user_id or "") + len(record.reason or "") + sum(map(len, items))
    return 4096 + 12 * letters + 3 * len(items)


def _checked(answer: DeductAnswer) -> DeductAnswer:
    """What a contract has read, if it can be believed; a balance that is none is left out.

    Raises:
        TypeError: It is no answer.
    """
    if not isinstance(answer, DeductAnswer):
        raise _no_answer("read_deduction", answer)
    if isinstance(answer, Deducted) and not _is_id(answer.transaction_id):
        raise _no_id("read_deduction")
    if isinstance(answer, Deducted | Declined) and type(answer.balance) is not int and answer.balance is not None:
        return replace(answer, balance=None)
    return answer


def _no_answer(reader: str, answer: object) -> TypeError:
    return TypeError(f"{reader} returned {type(answer).__name__}, which is no answer")


def _no_id(reader: str) -> TypeError:
    return TypeError(f"{reader} returned a transaction whose id is no text of 1 to 255 characters")


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH


def _unanswered(silence: Silence) -> Unanswered:
    return Unanswered(silence.reason, silence.retry_after_s, sent=silence.sent)
