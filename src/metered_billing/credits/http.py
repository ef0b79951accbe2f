"""Credits over HTTP: retry(breaker(attempt)) around one shared client per event loop.

A deduction is tried a few times under its one key within a deadline, since a request waits for it. A refund
or a void is tried once a call: the biller comes back with it, for ever. Whatever happens, the answer is a
value, and it never says "not sent" of something that may have been.
"""

import asyncio
import json
import math
import re
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tenacity
from pydantic import SecretStr

from metered_billing import names
from metered_billing.charge import (
    DeductAnswer,
    FindAnswer,
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
from metered_billing.credits.breaker import Breaker, Open, RetryBudget
from metered_billing.credits.connections import Connections, Lent, fetch
from metered_billing.credits.contract import Call, Contract, Reply, read_json, retry_after_s
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry, propagate

T = TypeVar("T")
U = TypeVar("U")

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0

PAGE = 200
MAX_PAGES = 10_000
"""How far a transaction is looked for: a list without an end must not hold up recovery for ever."""

_CIRCUIT_OPEN = "circuit open"

_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class _Silence:
    """No HTTP answer. `sent` is False only where no connection existed."""

    reason: str
    sent: bool
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt's result, and whether another is worth making."""

    answer: DeductAnswer
    again: bool
    retry_after_s: float | None = None


class HttpCredits:
    """A credits service that speaks the credits API.

    Args:
        url: `http://` or `https://`, with an optional path in front of `/v1/…`.
        token: Sent as a bearer token; never logged.
        timeout_s: What a request waits for its deduction in all, retries included.
        attempt_timeout_s: What one attempt may take in all (httpx has no such limit of its own).
        attempts: How often a deduction is tried, always under its one key.
        breaker_failures: Failed HTTP calls in a row that open the circuit.
        breaker_reset_s: How long it stays open before one probe is let through.
        contract: What to ask and how to read the answers, for services of another shape.
        transport: What is sent through instead of the network, on every event loop; it stays yours to close.
        max_connections: Open at the same time, per event loop.

    Raises:
        ValueError: The URL, the token or a number cannot be right; its text never shows the token.
        OSError: The certificates that the environment names cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | SecretStr | None = None,
        timeout_s: float = 5.0,
        attempt_timeout_s: float = 2.0,
        attempts: int = 3,
        breaker_failures: int = 5,
        breaker_reset_s: float = 10.0,
        contract: Contract | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        max_connections: int = 100,
        runtime: Runtime | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._url = _checked_url(url)
        self._token = checked_token(token)
        numbers = (timeout_s, attempt_timeout_s, attempts, breaker_failures, breaker_reset_s, max_connections)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError("timeouts, attempts, connections and the breaker's numbers must be above 0, and finite")
        self._timeout_s = timeout_s
        self._attempt_timeout_s = attempt_timeout_s
        self._contract = contract or Contract()
        self._transport = transport
        # Made once, for with certificates it takes 40 ms; those of SSL_CERT_FILE or SSL_CERT_DIR, where it is set.
        self._tls = httpx.create_ssl_context(verify=self._url.scheme == "https")
        self._max_connections = max_connections
        self._runtime = runtime or Runtime()
        self._telemetry = telemetry or Telemetry()
        self._breaker = Breaker(
            breaker_failures, breaker_reset_s, self._runtime.monotonic, self._telemetry.breaker_changed
        )
        self._budget = RetryBudget()
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Connections] = weakref.WeakKeyDictionary()
        # Copied for every call: a shared one keeps its state on itself, and concurrent users of it
        # run successful calls twice.
        self._retrying = tenacity.AsyncRetrying(
            sleep=self._runtime.sleep,
            retry=tenacity.retry_if_result(lambda attempt: attempt.again),
            wait=self._wait_s,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        self._attempts = attempts

    @property
    def realm(self) -> str:
        return str(self._url).rstrip("/")

    @property
    def remembers_declines(self) -> bool:
        return self._contract.remembers_declines

    async def start(self) -> None:
        """Asks nothing of the service: one that is down must not keep the app from starting."""
        self._telemetry.breaker_is(self._breaker.state)

    async def deduct(self, record: Record) -> DeductAnswer:
        """Take the credits, in up to `attempts` attempts within `timeout_s`."""
        return await self._answered(record, self._deduct(record), lambda why: Unknown(why, misconfigured=True))

    async def refund(self, record: Record) -> RefundAnswer:
        """Give credits back, in one attempt."""
        return await self._answered(record, self._refund(record), Unanswered)

    async def void(self, record: Record) -> VoidAnswer:
        """Undo the deduction, in one attempt."""
        return await self._answered(record, self._void(record), Unanswered)

    async def find(self, record: Record) -> FindAnswer:
        """Look through the account's transactions, page by page."""
        return await self._answered(record, self._find(record), Unanswered)

    async def aclose(self) -> None:
        """Close this event loop's connections; those that are in use as soon as they have their answer."""
        connections = self._loops.pop(asyncio.get_running_loop(), None)
        if connections is not None:
            await connections.aclose()

    async def _answered(self, record: Record, work: Coroutine[Any, Any, T], otherwise: Callable[[str], U]) -> T | U:
        """What `work` answers. A bug in it, which is to say in a contract of the user's own, is loud, and no answer."""
        try:
            return await work
        except Exception as error:
            self._telemetry.log(names.LOG_MISCONFIGURED, record, exc_info=error)
            return otherwise(f"{type(error).__name__} in the credits client")

    # The calls.

    async def _deduct(self, record: Record) -> DeductAnswer:
        call = self._contract.deduction(record)
        deadline = self._runtime.monotonic() + self._timeout_s
        doubt: str | None = None
        number = 0

        async def attempt() -> _Attempt:
            nonlocal doubt, number
            left_s = deadline - self._runtime.monotonic()
            if left_s > 0:
                outcome = await self._send(call, min(self._attempt_timeout_s, left_s), "deduct", number)
            else:  # overslept
                outcome = _Silence("out of time", sent=False)
            number += 1
            result = self._read(record, outcome)
            if isinstance(result.answer, Unknown) and doubt is None:
                doubt = result.answer.reason
            return result

        def stop(state: tenacity.RetryCallState) -> bool:
            return (
                state.attempt_number >= self._attempts
                or self._runtime.monotonic() + state.upcoming_sleep >= deadline
                or self._breaker.remaining_s() > state.upcoming_sleep
                or not self._budget.take()
            )

        self._budget.called()
        last: _Attempt = await self._retrying.copy(stop=stop)(attempt)
        if doubt is not None:
            return after_unknown(last.answer, doubt)
        return last.answer

    async def _refund(self, record: Record) -> RefundAnswer:
        outcome = await self._send(self._contract.refund(record), self._attempt_timeout_s, "refund", record.tries)
        if isinstance(outcome, _Silence):
            return _unanswered(outcome)
        return self._with_patience(outcome, self._contract.read_refund(record, outcome))

    async def _void(self, record: Record) -> VoidAnswer:
        call = self._contract.void(record)
        if call is None:
            return NoVoid()
        outcome = await self._send(call, self._attempt_timeout_s, "void", record.tries)
        if isinstance(outcome, _Silence):
            return _unanswered(outcome)
        return self._with_patience(outcome, self._contract.read_void(record, outcome))

    async def _find(self, record: Record) -> FindAnswer:
        account, cursor = record.account, None
        seen: set[str] = set()
        while len(seen) < MAX_PAGES:
            call = self._contract.transactions(account.tenant_id, account.user_id, cursor, PAGE)
            outcome = await self._send(call, self._attempt_timeout_s, "find", 0)
            if isinstance(outcome, _Silence):
                return _unanswered(outcome)
            page = self._contract.read_transactions(outcome)
            if page is None:
                return self._with_patience(outcome, Unanswered(f"no transactions ({outcome})"))
            answer = self._contract.find(record, page)
            cursor = page.next_cursor
            if not isinstance(answer, NotFound) or cursor is None:
                return answer
            if cursor in seen:
                break
            seen.add(cursor)
        return Unanswered("the list of transactions has no end")

    # One attempt.

    async def _send(self, call: Call, timeout_s: float, operation: str, resend: int) -> Reply | _Silence:
        """Send once, if the breaker lets it through."""
        admitted = self._breaker.admit()
        if isinstance(admitted, Open):
            return _Silence(_CIRCUIT_OPEN, sent=False, retry_after_s=admitted.retry_after_s)
        failed: bool | None = None
        try:
            outcome = await self._attempt(call, timeout_s, operation, resend)
            if isinstance(outcome, Reply):
                # 501 is an answer: a service without voids gives it to every void.
                failed = outcome.status >= 500 and outcome.status != 501
            elif outcome.reason != "PoolTimeout":  # our own crowd, not the service's fault
                failed = True
            return outcome
        finally:
            self._breaker.report(admitted, failed)

    async def _attempt(self, call: Call, timeout_s: float, operation: str, resend: int) -> Reply | _Silence:
        url = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + call.path.encode("ascii"))
        # In ASCII: what is no Unicode (a lone surrogate in an exception's text, say) can be sent all the same.
        content = None if call.body is None else json.dumps(call.body, separators=(",", ":")).encode()
        headers = {"Accept": "application/json, application/problem+json", "User-Agent": "metered-billing"}
        headers["Accept-Encoding"] = "identity"
        if content is not None:
            headers["Content-Type"] = "application/json"
        if call.key is not None:
            headers["Idempotency-Key"] = call.key
        port = url.port or (443 if url.scheme == "https" else 80)
        connections = await self._connections()
        with self._telemetry.attempt(call.method, str(url), url.host, port, resend, operation) as span:
            propagate(headers)
            try:
                # httpx's own timeouts are for each read and write: a trickling reply outlasts them all.
                async with asyncio.timeout(timeout_s) as whole, connections.one(timeout_s / 2) as transport:
                    left_s = (whole.when() or 0.0) - asyncio.get_running_loop().time()
                    # Connecting gives up before the whole attempt does: only then is it known not to be sent.
                    timeout = httpx.Timeout(None, connect=left_s * 0.9)
                    request = httpx.Request(
                        call.method,
                        url,
                        content=content,
                        params=call.params,
                        headers={**headers, **self._authorization()},
                        extensions={"timeout": timeout.as_dict()},
                    )
                    status, reply_headers, received = await fetch(transport, request)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                span.failed(type(error).__name__)
                return _Silence(type(error).__name__, sent=False)
            except Exception as error:
                # Whatever it is, the request may have gone out: a stale connection and a service that
                # commits and then closes look the same.
                span.failed(type(error).__name__)
                return _Silence(type(error).__name__, sent=True)
            span.span.set_attribute(names.HTTP_STATUS_CODE, status)
            reply = Reply(status, reply_headers, read_json(received))
            if status >= 400:
                span.failed(str(status))
            if status in (401, 403):
                self._telemetry.log(names.LOG_REJECTED, status=status, server=url.host)
            return reply

    def _authorization(self) -> dict[str, str]:
        """In no variable of whoever calls it: tracebacks in logs may show those."""
        return {} if self._token is None else {"Authorization": f"Bearer {self._token.get_secret_value()}"}

    async def _connections(self) -> Connections:
        loop = asyncio.get_running_loop()
        connections = self._loops.get(loop)
        if connections is None or connections.closed:
            for gone in [other for other in self._loops if other.is_closed()]:
                del self._loops[gone]
            connections = self._loops[loop] = Connections(self._new_transport, self._max_connections)
            await connections.open()
        return connections

    def _new_transport(self) -> httpx.AsyncBaseTransport:
        if self._transport is not None:
            return Lent(self._transport)
        # Unlike httpx's client, its transport asks no proxy of the environment: those are set for other purposes.
        return httpx.AsyncHTTPTransport(verify=self._tls, limits=httpx.Limits(max_connections=1))

    # What it means, and whether to try again.

    def _read(self, record: Record, outcome: Reply | _Silence) -> _Attempt:
        if isinstance(outcome, _Silence):
            wait_s = outcome.retry_after_s or self._breaker.remaining_s() or None
            if not outcome.sent:
                # The circuit does not close within a request: an open one is not tried again.
                return _Attempt(NotSent(outcome.reason, wait_s), again=outcome.reason != _CIRCUIT_OPEN)
            return _Attempt(Unknown(outcome.reason, wait_s), again=True)
        answer = self._contract.read_deduction(record, outcome)
        wait_s = retry_after_s(outcome.headers, self._runtime.now())
        if not isinstance(answer, Unknown):
            return _Attempt(answer, again=False)
        answer = Unknown(answer.reason, wait_s or self._breaker.remaining_s() or None, answer.misconfigured)
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


def _unanswered(silence: _Silence) -> Unanswered:
    return Unanswered(silence.reason, silence.retry_after_s, sent=silence.sent)


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"the credits URL is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("the credits URL must start with http:// or https:// and name a host")
    if parsed.port is not None and not 0 < parsed.port < 65_536:
        raise ValueError("the credits URL has a port that there is not")
    if parsed.userinfo or parsed.fragment or b"?" in parsed.raw_path:
        raise ValueError("the credits URL must have no user, no query and no fragment: the token goes into `token`")
    return parsed


def checked_token(token: str | SecretStr | None) -> SecretStr | None:
    """The token, if it can be sent.

    Raises:
        ValueError: It cannot; the text does not show it.
    """
    if token is None:
        return None
    secret = token if isinstance(token, SecretStr) else SecretStr(token)
    if not _TOKEN.fullmatch(secret.get_secret_value()):
        raise ValueError("the credits token must be visible ASCII without spaces")
    return secret
