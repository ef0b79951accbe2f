"""Time as the rules have it, or so many times faster, for tests that must see an alert fire within seconds."""

import re

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Pace:
    """Turns times into PromQL.

    Args:
        hurry: What to divide them by.
    """

    def __init__(self, hurry: int = 1) -> None:
        self._hurry = hurry

    def __call__(self, span: str) -> str:
        """A duration: `5m`, or what is left of it."""
        if self._hurry == 1:
            return span
        # Prometheus takes no fractions.
        return f"{self._ms(span)}ms"

    def seconds(self, span: str) -> str:
        """A number of seconds, to compare with."""
        return f"{self._ms(span) / 1_000:g}"

    def _ms(self, span: str) -> int:
        number, unit = re.fullmatch(r"(\d+)([smhd])", span).groups()  # type: ignore[union-attr]
        return max(int(number) * _SECONDS[unit] * 1_000 // self._hurry, 1)
