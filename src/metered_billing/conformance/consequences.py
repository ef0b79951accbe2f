"""What a service's limits come to, all together: what happens to a charge, and which promises hold. Pure."""

from collections.abc import Iterator

from metered_billing.conformance.checks import PROMISES
from metered_billing.conformance.report import Outcome, Report

OURS = {5, 6, 7}
"""Promises that the library keeps by itself, whatever the service does."""

_PAIR = "A customer may see a deduction and its refund, moments apart, where nothing had been taken."
_TOO_LATE = "A copy that arrives still later takes its credits, and nobody here will know."


def what_happens(report: Report) -> Iterator[tuple[str, str]]:
    """What happens to charges with this service, by occasion, where it is not as with the credits API.

    Nothing where not all that it depends on was tried.
    """
    if report.prevented:
        return
    broken = {result.check.name for result in report.broken}
    voids, remembers = "void-undoes" not in broken, "declines-remembered" not in broken
    has_list = broken.isdisjoint({"find-by-key", "pages"})
    if not voids:
        yield "no answer to a deduction", _resent(remembers=remembers, has_list=has_list)
    if not remembers:
        yield "too few credits", _declined(voids=voids)
    if "refund-replay" in broken:
        yield (
            "no answer to a refund",
            "It is sent again, but what is done is not known to be done: the charge is asked for without end, or "
            "ends as disputed. Its credits are back.",
        )
    if "batch" in broken:
        yield "many at once", "Each operation is a call of its own: nothing is lost but speed."
    if report.mapped:
        yield (
            "comparing the books",
            "`metered-billing reconcile` speaks the credits API itself. With a mapping, compare your service's records "
            "with `metered-billing charges list --json`, by transaction id; `metered-billing explain --contract` looks "
            "for a charge's deduction, where the mapping has a list.",
        )


def _resent(*, remembers: bool, has_list: bool) -> str:
    again = "It is sent again under its key until there is an answer. Taken: it is refunded. Declined: "
    if remembers:
        return f"{again}it is over, for the key stays declined. {_PAIR} Nothing is lost."
    if has_list:
        later = "5 minutes later it is looked for in the list. Found: it is refunded. Not found: it is over."
    else:
        later = "it is sent once more after 5 minutes. Taken: it is refunded. Declined again: it is over."
    return f"{again}{later} {_PAIR} {_TOO_LATE}"


def _declined(*, voids: bool) -> str:
    if voids:
        return "The client hears 402. The deduction is voided, lest a copy is paid later: one call more."
    return (
        "The client hears 402. A copy may yet be paid, so the charge goes the same way, as if there had been no "
        "answer; it is `voiding` for those 5 minutes."
    )


def promises(report: Report) -> Iterator[tuple[int, str, str]]:
    """Each promise of the library, its words, and whether it holds with this service."""
    for number, words in PROMISES.items():
        about = [result for result in report.results if result.check.promise == number]
        broken = [result for result in about if result.outcome is Outcome.BROKEN]
        fatal = [result.check.name for result in broken if result.check.fatal]
        prevented = sum(result.prevented for result in about)
        if number in OURS:
            yield number, words, "yes, whatever the service does"
        elif fatal:
            yield number, words, f"no: {', '.join(fatal)}"
        elif prevented:
            yield number, words, f"not known: {prevented} of {len(about)} not tried"
        elif broken:
            yield number, words, f"with limits: {', '.join(result.check.name for result in broken)}"
        elif any(result.outcome is Outcome.HELD for result in about):
            yield number, words, "yes"
        else:
            yield number, words, "not tried"
