"""How much the service takes on: calls in a second, calls at a time, and bytes that it holds for them."""

from collections.abc import Callable

from metered_billing.bounds import MOST, number, whole

MAX_CALLS = 1000
"""Calls under way at the same time. The library makes three at a time, whatever its app's load."""

MAX_HELD_BYTES = 64 << 20
"""Bytes of all bodies that are being read or worked on at the same time."""

_MAX_KEYS = 10_000


class Rate:
    """So many calls a second for each key, and as many at once after a pause.

    A token bucket, kept as the one moment at which it will be full again.

    Args:
        per_s: Calls a second.
        monotonic: The clock, in seconds.
    """

    def __init__(self, per_s: float, monotonic: Callable[[], float]) -> None:
        number("the rate", per_s, most=MOST)
        self._interval_s = 1 / per_s
        self._slack_s = max(per_s, 1.0) / per_s - self._interval_s
        self._monotonic = monotonic
        self._full_at: dict[str, float] = {}

    def take(self, key: str) -> float:
        """0 if one more may come now; else nothing is taken, and this is how long to wait, in seconds."""
        now = self._monotonic()
        full_at = max(self._full_at.get(key, now), now)
        wait_s = full_at - self._slack_s - now
        if wait_s > 1e-9:
            return wait_s
        if len(self._full_at) >= _MAX_KEYS and key not in self._full_at:
            self._forget(now)
        self._full_at[key] = full_at + self._interval_s
        return 0.0

    def _forget(self, now: float) -> None:
        """Make room: those that are full again are as good as new, and those that are nearly so come next."""
        spent = sorted((full_at, key) for key, full_at in self._full_at.items() if full_at > now)
        self._full_at = {key: full_at for full_at, key in spent[-_MAX_KEYS // 2 :]}


class Load:
    """What is under way.

    Args:
        max_calls: At the same time.
        max_bytes: Of their bodies, together.
    """

    def __init__(self, max_calls: int = MAX_CALLS, max_bytes: int = MAX_HELD_BYTES) -> None:
        self.max_calls = whole("max_calls", max_calls)
        self.max_bytes = whole("max_bytes", max_bytes, most=1 << 40)
        self.calls = 0
        self.held_bytes = 0
