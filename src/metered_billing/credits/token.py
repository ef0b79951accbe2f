"""A token that may change while it is used: read anew from where it is kept, behind whoever needs it.

Whoever needs it takes what is held, and waits only where that is nothing, or was rejected. Several event loops and
threads may share one: it is read in a thread of its own, once at a time, and who waits and is cancelled cancels
only the wait.
"""

import asyncio
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from pydantic import SecretStr

from metered_billing import names
from metered_billing.bounds import MONTH_S, number
from metered_billing.journal.lock import call_in_forked_child
from metered_billing.runtime import Executor, Runtime
from metered_billing.telemetry import Telemetry

TTL_S = 300.0

STALE_RETRY_S = 30.0
"""How soon it is tried again where it could not be read."""

REJECTED_RETRY_S = 5.0
MAX_REJECTED_RETRY_S = 60.0
"""How soon after a rejection, first and at last, the next one may have it read: all requests may be rejected."""

JITTER = 0.1
"""So that processes that started together do not ask together."""

_VISIBLE = re.compile(r"[\x21-\x7e]+")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def checked_token(token: str | SecretStr | None) -> SecretStr | None:
    """The token, if it can be sent.

    Raises:
        ValueError: It cannot; the text does not show it.
    """
    if token is None:
        return None
    secret = token if isinstance(token, SecretStr) else SecretStr(token)
    if not _VISIBLE.fullmatch(secret.get_secret_value()):
        text = secret.get_secret_value()
        ends = "; it begins or ends with a space or a line break" if text.strip() != text else ""
        raise ValueError(f"the credits token must be visible ASCII without spaces{ends}")
    return secret


def checked_header(name: str, scheme: str) -> tuple[bytes, bytes]:
    """A header's name, and what stands in its value in front of a token.

    Raises:
        ValueError: They cannot be sent.
    """
    if not _HEADER.fullmatch(name) or not (scheme == "" or _VISIBLE.fullmatch(scheme)):
        raise ValueError("a contract's auth_header must be a header's name, and its auth_scheme a word or empty")
    return name.encode("ascii"), (f"{scheme} " if scheme else "").encode("ascii")


class TokenSource(Protocol):
    """Where `HttpCredits` takes its token from, call by call."""

    def held(self) -> SecretStr | None:
        """The token to send. Must not block. None: `another_than(None)` is to be waited for."""
        ...

    async def another_than(self, rejected: SecretStr | None) -> SecretStr | None:
        """Another token than the one that the service has rejected, or None where there is none yet."""
        ...


class TokenUnreadable(Exception):
    """The token cannot be read now. Its text is logged, so it must show no secret."""


class RotatingToken:
    """A token that is read again every five minutes, and once where the service rejects it.

    Args:
        read: Reads it, and may block. It raises where it cannot, `TokenUnreadable` to say why: then what is held stays.
        held: What was read already.
        ttl_s: How long a token is used before it is read again, a tenth more or less.
    """

    def __init__(
        self,
        read: Callable[[], str | SecretStr | None],
        *,
        held: SecretStr | None = None,
        ttl_s: float = TTL_S,
        runtime: Runtime | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._read = read
        self._held = checked_token(held)
        self._ttl_s = number("ttl_s", ttl_s, most=MONTH_S)
        self._runtime = runtime or Runtime()
        self._telemetry = telemetry or Telemetry()
        self.forked()
        self._stale = False
        self._due = -math.inf if held is None else self._in(ttl_s)
        self._rejected_again = -math.inf
        self._patience_s = REJECTED_RETRY_S
        call_in_forked_child(self)

    def forked(self) -> None:
        """This is a child: the thread, and what it was reading, are its parent's."""
        self._lock = threading.Lock()
        self._executor: Executor | None = None  # made when it is needed
        self._reading: Future[None] | None = None

    def held(self) -> SecretStr | None:
        if self._runtime.monotonic() >= self._due:
            self._begin()
        return self._held

    async def another_than(self, rejected: SecretStr | None) -> SecretStr | None:
        # Twice, since what is under way may have begun before the token changed.
        for _ in range(2):
            reading = self._begin_after(rejected)
            if reading is None:
                break
            await asyncio.wrap_future(reading)
        held = self._held
        return None if held == rejected else held

    def _begin_after(self, rejected: SecretStr | None) -> "Future[None] | None":
        """What has to be waited for, or None where another is held already or it is too early to ask."""
        with self._lock:
            if self._held != rejected:
                return None
            if self._reading is not None:
                return self._reading
            if self._runtime.monotonic() < self._rejected_again:
                return None
            self._rejected_again = self._in(self._patience_s)
            self._patience_s = min(2 * self._patience_s, MAX_REJECTED_RETRY_S)
        return self._begin()

    def _begin(self) -> "Future[None]":
        """The reading that is under way, or a new one."""
        with self._lock:
            if self._reading is not None:
                return self._reading
            reading = self._reading = Future()
            reading.set_running_or_notify_cancel()  # so that whoever waits for it cannot cancel it
            self._executor = self._executor or self._runtime.executor()
        try:
            self._executor.submit(self._try_to_read)
        except RuntimeError:  # the process ends
            self._done(None, "there is no thread to read it in")
        return reading

    def _try_to_read(self) -> None:
        try:
            read = self._read()
        except TokenUnreadable as error:
            self._done(None, str(error))
        except BaseException as error:
            self._done(None, type(error).__name__)  # its text may have a secret
        else:
            try:
                self._done(checked_token(read), "there is none")
            except ValueError as error:
                self._done(None, str(error))

    def _done(self, token: SecretStr | None, why_not: str) -> None:
        with self._lock:
            reading, self._reading = self._reading, None
            changed = token is not None and token != self._held
            outage = token is None and not self._stale
            self._stale = token is None
            self._due = self._in(STALE_RETRY_S if token is None else self._ttl_s)
            if changed:
                self._held = token
                self._rejected_again = -math.inf
                self._patience_s = REJECTED_RETRY_S
        if changed:
            self._telemetry.log(names.LOG_ROTATED)
        if outage:
            self._telemetry.log(names.LOG_STALE, reason=why_not)
        if reading is not None:
            reading.set_result(None)

    def _in(self, wait_s: float) -> float:
        """The moment so many seconds from now, on the monotonic clock."""
        return self._runtime.monotonic() + wait_s * self._runtime.random.uniform(1 - JITTER, 1 + JITTER)
