"""The checks: each promise of the credits API, how it is looked at, and what the library does without it.

A check is given a bench and raises `Broken` with what came instead. It measures by the balance, never by
what an answer says was moved; it counts from what the account holds when it begins; and it leaves behind
whatever it took, for the bench gives all of it back.
"""

from metered_billing.conformance.checks import batches, forms, lookups, required, voids
from metered_billing.conformance.checks.check import CHECKS, DO_NOT, GROUPS, NEEDED, PROMISES, Check

# In the order in which they are told, whichever module was read first.
CHECKS.sort(key=lambda check: list(GROUPS).index(check.group))

__all__ = [
    "CHECKS",
    "DO_NOT",
    "GROUPS",
    "NEEDED",
    "PROMISES",
    "Check",
    "batches",
    "forms",
    "lookups",
    "required",
    "voids",
]
