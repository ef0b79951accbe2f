"""One call to a credits service: breaker(token(attempt)), over connections that each event loop has of its own.

What comes back is a value: the answer, or that there was none, and then whether the service may have been asked all
the same. It never says "not sent" of something that may have been. Nothing is retried here, but for a call whose
token was rejected while another came; and nothing is known of credits.
"""

import asyncio
import contextlib
import json
import ssl
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from opentelemetry.trace import Span
from pydantic import SecretStr
from pydantic_core import to_json

from metered_billing import names
from metered_billing.credits.breaker import Breaker, Open
from metered_billing.credits.connections import NEVER_SENT, Connections, CoreWire, LentWire, Outgoing, Wire
from metered_billing.credits.contract import Call, Reply, read_json
from metered_billing.credits.token import TokenSource, checked_token
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry, propagate

CIRCUIT_OPEN = "circuit open"

_UNREADABLE = "the token cannot be read"
_OURS = ("PoolTimeout", _UNREADABLE)
"""Our own trouble, not the service's fault."""

_HEADERS = (
    (b"Accept", b"application/json, application/problem+json"),
    (b"Accept-Encoding", b"identity"),
    (b"User-Agent", b"metered-billing"),
)

_encode_ascii = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Silence:
    """No HTTP answer. `sent` is False only where no connection existed."""

    reason: str
    sent: bool
    retry_after_s: float | None = None


class Sender:
    """Sends calls to one service.

    Args:
        url: See `HttpCredits`, as for what is not said here.
        auth_header: The name of the header that has the token, and what stands in front of the token in its value.

    Raises:
        ValueError: The URL or the token cannot be right; its text never shows the token.
        ImportError: `lean` without its extra.
        OSError: The certificates that the environment names cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | SecretStr | TokenSource | None,
        auth_header: tuple[bytes, bytes],
        breaker_failures: int,
        breaker_reset_s: float,
        transport: httpx.AsyncBaseTransport | None,
        lean: bool,
        max_connections: int,
        runtime: Runtime,
        telemetry: Telemetry,
    ) -> None:
        self._url = _checked_url(url)
        self._prefix = self._url.raw_path.rstrip(b"/")
        # As telemetry has them; what parses a URL anew for each of its parts is slow.
        self._server = f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"
        self._host = self._url.host
        self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        self._token: SecretStr | None = None
        self._tokens: TokenSource | None = None
        if token is None or isinstance(token, str | SecretStr):
            self._token = checked_token(token)
        else:
            self._tokens = token
        self._auth_header = auth_header
        self._transport = transport
        self._wire: Callable[[httpx.URL, ssl.SSLContext], Wire] = _lean_wire() if lean else CoreWire
        # Made once, for with certificates it takes 40 ms; those of SSL_CERT_FILE or SSL_CERT_DIR, where it is set.
        self._tls = httpx.create_ssl_context(verify=self._url.scheme == "https")
        self._max_connections = max_connections
        self._runtime = runtime
        self._telemetry = telemetry
        self._breaker = Breaker(breaker_failures, breaker_reset_s, runtime.monotonic, telemetry.breaker_changed)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Connections] = weakref.WeakKeyDictionary()

    @property
    def realm(self) -> str:
        """The service's URL, as `Credits.realm` has it."""
        return str(self._url).rstrip("/")

    @property
    def rotates(self) -> bool:
        """Whether there may be another token than one that was rejected."""
        return self._tokens is not None

    def blocked_s(self) -> float:
        """Seconds for which the breaker lets nothing through; 0 unless it is open."""
        return self._breaker.remaining_s()

    def rejected(self, status: int) -> None:
        """Say loudly that the service takes the token for a wrong one."""
        self._telemetry.log(names.LOG_REJECTED, status=status, server=self._host)

    async def open(self) -> None:
        """Belong to this event loop, here and now rather than at the first call. Asks nothing of the service."""
        self._telemetry.breaker_is(self._breaker.state)
        await self._opened()

    async def aclose(self) -> None:
        """Close this event loop's connections; those that are in use as soon as they have their answer."""
        connections = self._loops.pop(asyncio.get_running_loop(), None)
        if connections is not None:
            await connections.aclose()

    async def send(
        self,
        call: Call,
        timeout_s: float,
        operation: str,
        resend: int,
        content: bytes | None = None,
        batched: Sequence[Span] = (),
    ) -> Reply | Silence:
        """Send once, if the breaker lets it through.

        Args:
            timeout_s: For all of it, waiting for a connection and for a token included.
            operation: What it is for, as telemetry calls it.
            resend: How many attempts there were before it.
            content: What to send, where it is made already; else it is the call's body.
            batched: The spans of the operations that go in this call.
        """
        if timeout_s <= 0:  # overslept
            return Silence("out of time", sent=False)
        admitted = self._breaker.admit()
        if isinstance(admitted, Open):
            return Silence(CIRCUIT_OPEN, sent=False, retry_after_s=admitted.retry_after_s)
        failed: bool | None = None
        try:
            outcome = await self._authorized(call, timeout_s, operation, resend, content, batched)
            if isinstance(outcome, Reply):
                # 501 is an answer: a service without voids gives it to every void.
                failed = outcome.status >= 500 and outcome.status != 501
            elif outcome.reason not in _OURS:
                failed = True
            return outcome
        finally:
            self._breaker.report(admitted, failed)

    async def _authorized(
        self, call: Call, timeout_s: float, operation: str, resend: int, content: bytes | None, batched: Sequence[Span]
    ) -> Reply | Silence:
        """Send it with the token, and at once again where that was rejected and there is another by now."""
        ends, token = self._runtime.monotonic() + timeout_s, self._token
        if self._tokens is not None:
            token = self._tokens.held()
            if token is None:
                token = await self._another_token(self._tokens, None, ends)
                timeout_s = ends - self._runtime.monotonic()
            if token is None or timeout_s <= 0:
                return Silence(_UNREADABLE, sent=False)
        outcome = await self._attempt(call, timeout_s, operation, resend, content, batched, token)
        if self._tokens is not None and isinstance(outcome, Reply) and outcome.status == 401:
            token = await self._another_token(self._tokens, token, ends)
            timeout_s = ends - self._runtime.monotonic()
            if token is not None and timeout_s > 0:
                again = await self._attempt(call, timeout_s, operation, resend + 1, content, batched, token)
                outcome = _after_rejection(outcome, again)
        if isinstance(outcome, Reply) and outcome.status in (401, 403):
            self.rejected(outcome.status)
        return outcome

    async def _another_token(self, tokens: TokenSource, rejected: SecretStr | None, ends: float) -> SecretStr | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ends - self._runtime.monotonic()):
                return await tokens.another_than(rejected)
        return None

    async def _attempt(
        self,
        call: Call,
        timeout_s: float,
        operation: str,
        resend: int,
        content: bytes | None,
        batched: Sequence[Span],
        token: SecretStr | None,
    ) -> Reply | Silence:
        target = self._prefix + call.path.encode("ascii")
        url = self._server + target.decode("ascii")
        if call.params:
            target += b"?" + str(httpx.QueryParams(call.params)).encode("ascii")
        if content is None and call.body is not None:
            content = encode(call.body)
        connections = self._open_ones() or await self._opened()
        with self._telemetry.attempt(call.method, url, self._host, self._port, resend, operation, batched) as span:
            try:
                # The engine's own timeouts are for each read and write: a trickling reply outlasts them all.
                async with asyncio.timeout(timeout_s) as whole, connections.one(timeout_s / 2) as wire:
                    left_s = (whole.when() or 0.0) - asyncio.get_running_loop().time()
                    # Connecting gives up before the whole attempt does: only then is it known not to be sent.
                    received = await wire.send(
                        Outgoing(call.method, target, self._headers(call, content, token), content, left_s * 0.9)
                    )
            except NEVER_SENT as error:
                span.failed(type(error).__name__)
                return Silence(type(error).__name__, sent=False)
            except Exception as error:
                # Whatever it is, the request may have gone out: a stale connection and a service that
                # commits and then closes look the same.
                span.failed(type(error).__name__)
                return Silence(type(error).__name__, sent=True)
            span.span.set_attribute(names.HTTP_STATUS_CODE, received.status)
            reply = Reply(received.status, received.headers, read_json(received.content))
            if reply.status >= 400:
                span.failed(str(reply.status))
            return reply

    def _headers(self, call: Call, content: bytes | None, token: SecretStr | None) -> list[tuple[bytes, bytes]]:
        headers = [*_HEADERS]
        if content is not None:
            headers.append((b"Content-Type", b"application/json"))
        if call.key is not None:
            headers.append((b"Idempotency-Key", call.key.encode("ascii")))
        if call.headers:
            headers += [(name.encode("ascii"), value.encode("ascii")) for name, value in call.headers.items()]
        if token is not None:
            # In no variable of its own: tracebacks in logs may show those.
            name, scheme = self._auth_header
            headers.append((name, scheme + token.get_secret_value().encode("ascii")))
        carried: dict[str, str] = {}
        propagate(carried)
        headers += [(name.encode("ascii"), value.encode("ascii")) for name, value in carried.items()]
        return headers

    def _open_ones(self) -> Connections | None:
        """This event loop's connections, unless they are still to be opened."""
        connections = self._loops.get(asyncio.get_running_loop())
        return None if connections is None or connections.closed else connections

    async def _opened(self) -> Connections:
        connections = self._open_ones()
        if connections is None:
            for gone in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(gone, None)  # another thread may have been faster
            connections = Connections(self._new_wire, self._max_connections, self._runtime.now)
            self._loops[asyncio.get_running_loop()] = connections
            await connections.open()
        return connections

    def _new_wire(self) -> Wire:
        if self._transport is not None:
            return LentWire(self._url, self._transport)
        return self._wire(self._url, self._tls)


def _lean_wire() -> Callable[[httpx.URL, ssl.SSLContext], Wire]:
    try:
        from metered_billing.credits.lean import LeanWire
    except ImportError as error:
        raise ImportError("lean=True needs httptools: pip install 'metered-billing[lean]'") from error
    return LeanWire


def _after_rejection(rejected: Reply, outcome: Reply | Silence) -> Reply | Silence:
    """What came of a call whose first copy was answered 401, which is no proof that nothing came of that one."""
    if rejected.problem is not None:
        return outcome  # the service itself said so: it did nothing
    if isinstance(outcome, Reply):
        outcome.doubt = str(rejected)
        return outcome
    return Silence(f"{rejected}; then {outcome.reason}", sent=True, retry_after_s=outcome.retry_after_s)


def encode(value: Mapping[str, Any]) -> bytes:
    """As JSON."""
    try:
        return to_json(value)
    except ValueError:
        # In ASCII, what is no Unicode (a lone surrogate in an exception's text, say) can be sent all the same.
        return _encode_ascii(value).encode()


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        # Not in httpx's own words: they show the part that is wrong, which may be of a password.
        raise ValueError("the credits URL is not a URL: its host or its port cannot be read") from None
    if "%20" in parsed.host:
        raise ValueError("the credits URL must have no spaces in its host")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("the credits URL must start with http:// or https:// and name a host")
    if parsed.port is not None and not 0 < parsed.port < 65_536:
        raise ValueError("the credits URL has a port that there is not")
    if parsed.userinfo or parsed.fragment or b"?" in parsed.raw_path:
        raise ValueError("the credits URL must have no user, no query and no fragment: the token goes into `token`")
    return parsed
