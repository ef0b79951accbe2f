"""Whether a service keeps the promises of the credits API, and what the library does without those it breaks.

Over HTTP alone, against any service. See docs/how-to/check-your-credits-service.md.
"""

from metered_billing.conformance.bench import Bench, Broken, Exchange, NotTried
from metered_billing.conformance.checks import CHECKS, GROUPS, PROMISES, Check
from metered_billing.conformance.consequences import promises, what_happens
from metered_billing.conformance.mapped_checks import checks_of
from metered_billing.conformance.report import Outcome, Report, Result, Verdict
from metered_billing.conformance.run import CannotCheck, check_service, run_check

__all__ = [
    "CHECKS",
    "GROUPS",
    "PROMISES",
    "Bench",
    "Broken",
    "CannotCheck",
    "Check",
    "Exchange",
    "NotTried",
    "Outcome",
    "Report",
    "Result",
    "Verdict",
    "check_service",
    "checks_of",
    "promises",
    "run_check",
    "what_happens",
]
