"""pybreaker under asyncio, used the way that holds: admit by state, await outside, report afterwards.

pybreaker's own wrappers do not: `@breaker` on a coroutine function never sees a failure, `calling()` turns
a cancellation into a `CircuitBreakerError`, and half-open lets everybody in. Nor does its clock, which is
`datetime.now` and cannot be simulated: when the open time is over, we say so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pybreaker


@dataclass(frozen=True, slots=True)
class Admitted:
    """Leave to make one call. Its result counts only while `state` is still the breaker's."""

    state: Any
    probe: bool


@dataclass(frozen=True, slots=True)
class Open:
    """No call may be made; the next probe is due after `retry_after_s` seconds."""

    retry_after_s: float


class _Failed(Exception):
    pass


class Breaker:
    """Opens after so many failed calls in a row; after a while lets one probe through.

    Args:
        failures: Consecutive failures that open it.
        reset_s: Seconds it stays open.
        monotonic: The clock, in seconds.
        changed: Told of the new state's name at each change.
    """

    def __init__(
        self,
        failures: int,
        reset_s: float,
        monotonic: Callable[[], float],
        changed: Callable[[str], None] = lambda state: None,
    ) -> None:
        self._reset_s = reset_s
        self._monotonic = monotonic
        self._opened_at = 0.0
        self._probing = False
        # The call that trips it must keep its own error: a read timeout is unknown, not "never sent".
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=failures, listeners=[_Listener(changed)], throw_new_error_on_trip=False
        )

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        return str(self._breaker.current_state)

    def remaining_s(self) -> float:
        """Seconds until a probe may be made; 0 unless it is open."""
        if self.state != pybreaker.STATE_OPEN:
            return 0.0
        return max(self._opened_at + self._reset_s - self._monotonic(), 0.0)

    def admit(self) -> Admitted | Open:
        """Ask for leave to make one call; whoever gets it must `report`."""
        if self.state == pybreaker.STATE_OPEN:
            remaining_s = self.remaining_s()
            if remaining_s > 0:
                return Open(remaining_s)
            self._breaker.half_open()
        if self.state == pybreaker.STATE_HALF_OPEN:
            if self._probing:
                return Open(1.0)
            self._probing = True
            return Admitted(self._breaker.state, probe=True)
        return Admitted(self._breaker.state, probe=False)

    def report(self, admitted: Admitted, failed: bool | None) -> None:
        """Say how the call went; None (cancelled, never tried) counts neither way."""
        if admitted.probe:
            self._probing = False
        if failed is None or self._breaker.state is not admitted.state:
            # A call begun before the last change says nothing about the service now.
            return
        if not failed:
            if admitted.probe or self._breaker.fail_counter:  # else there is nothing to forgive
                self._breaker.call(lambda: None)
            return
        try:
            self._breaker.call(_fail)
        except _Failed:
            if self.state == pybreaker.STATE_OPEN:
                self._opened_at = self._monotonic()


class RetryBudget:
    """Retries that a burst of failures may add: a tenth of the calls, and a few to begin with.

    Without it every client triples its calls just when the service can bear them least.
    """

    def __init__(self, share: float = 0.1, reserve: float = 20.0) -> None:
        self._share = share
        self._reserve = reserve
        self._left = reserve

    def called(self) -> None:
        self._left = min(self._left + self._share, self._reserve)

    def take(self) -> bool:
        """One retry, if there is one left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _fail() -> None:
    raise _Failed


class _Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self._changed(new_state.name)
