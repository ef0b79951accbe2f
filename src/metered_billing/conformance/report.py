"""What came of the checks, and the verdict over all of them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from metered_billing.conformance.bench import Exchange
from metered_billing.conformance.checks import PROMISES, Check


class Outcome(StrEnum):
    """What came of one check."""

    HELD = "held"
    BROKEN = "broken"
    NOT_TRIED = "not tried"


class Verdict(StrEnum):
    """What the library can do with the service."""

    CONFORMANT = "conformant"
    LIMITED = "usable with limits"
    UNKNOWN = "not known"
    UNUSABLE = "not usable"


EXIT_CODES: Mapping[Verdict, int] = {
    Verdict.CONFORMANT: 0,
    Verdict.LIMITED: 3,
    Verdict.UNKNOWN: 1,
    Verdict.UNUSABLE: 1,
}


@dataclass(frozen=True, slots=True)
class Result:
    """One check's.

    Attributes:
        came: What came instead, or why it was not tried; empty where the promise held.
        exchanges: The calls that were made, without tokens.
        prevented: It was not tried, and should have been.
        kept: Credits that it took and that could not be given back; below zero: that there are more now.
    """

    check: Check
    outcome: Outcome
    came: str = ""
    exchanges: tuple[Exchange, ...] = ()
    prevented: bool = False
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of the service.

    Attributes:
        account: Whose credits were used, in words.
        kept: Credits that the account lacks now and held before; below zero: that it has more.
            None: its balance could not be read any more.
        mapped: Whether it was asked through a `Contract` of a user's own.
    """

    url: str
    account: str
    results: Sequence[Result]
    kept: int | None = 0
    mapped: bool = False

    @property
    def broken(self) -> list[Result]:
        return [result for result in self.results if result.outcome is Outcome.BROKEN]

    @property
    def not_tried(self) -> list[Result]:
        return [result for result in self.results if result.outcome is Outcome.NOT_TRIED]

    @property
    def prevented(self) -> list[Result]:
        return [result for result in self.results if result.prevented]

    @property
    def verdict(self) -> Verdict:
        """Not usable where one promise is broken that the library cannot do without; else not all may be known."""
        if any(result.check.fatal for result in self.broken):
            return Verdict.UNUSABLE
        if self.prevented:
            return Verdict.UNKNOWN
        return Verdict.LIMITED if self.broken else Verdict.CONFORMANT

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """For machines. The calls stand with what is broken."""
        return {
            "url": self.url,
            "account": self.account,
            "verdict": str(self.verdict),
            "credits_kept": self.kept,
            "checks": [_to_json(result) for result in self.results],
        }


def _to_json(result: Result) -> dict[str, Any]:
    check = result.check
    document: dict[str, Any] = {
        "name": check.name,
        "group": check.group,
        "promise": None if check.promise is None else f"{check.promise}. {PROMISES[check.promise]}",
        "fatal": check.fatal,
        "outcome": str(result.outcome),
        "tried": check.tried,
        "expected": check.expected,
        "came": result.came or None,
        "without": check.without,
    }
    if result.outcome is Outcome.BROKEN:
        document["exchanges"] = [asdict(exchange) for exchange in result.exchanges]
    return document
