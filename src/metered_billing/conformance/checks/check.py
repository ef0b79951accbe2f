"""What a check is, what they protect, and the list of them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from metered_billing.conformance.bench import Bench

GROUPS = {
    "required": "Once, and nothing lost",
    "voids": "Undoing what went unanswered",
    "declines": "Remembering declines",
    "batch": "Many at once",
    "transactions": "Looking things up",
    "forms": "Saying it as the API does",
}
"""What the checks are about, in order."""

PROMISES = {
    1: "Paid first",
    2: "Paid for what the response reports",
    3: "Once",
    4: "Nothing lost",
    5: "On record before the last byte",
    6: "The work is safe",
    7: "Free is free",
    8: "Nobody else's",
}
"""The promises of the library that the checks protect."""

NEEDED = 100
"""Credits that an account must hold for the checks."""

Run = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of a credits service.

    Attributes:
        promise: Which promise of the library it protects: a number of `PROMISES`; None: none.
        fatal: Where it is broken, credits can be lost, or taken or made twice, and the library cannot help it.
        tried: What is done.
        expected: What a service that keeps the promise does.
        without: What the library does where it is broken, and what that costs.
        needs: The name of the option without which the check is left out; else empty.
    """

    name: str
    group: str
    promise: int | None
    fatal: bool
    tried: str
    expected: str
    without: str
    run: Run
    needs: str = ""


CHECKS: list[Check] = []
"""All of them, in the order in which they are run."""

DO_NOT = "Do not use this service. "


def check(
    name: str,
    group: str,
    promise: int | None,
    *,
    tried: str,
    expected: str,
    without: str,
    fatal: bool = False,
    needs: str = "",
) -> Callable[[Run], Run]:
    """Add a function to the checks."""

    def add(run: Run) -> Run:
        CHECKS.append(Check(name, group, promise, fatal, tried, expected, without, run, needs))
        return run

    return add
