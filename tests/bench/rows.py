"""What a part of the bench measures: rows, some of which are held against a goal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Args:
        what: What was measured, as a line of a table.
        value: In `unit`; for a goal it is the ratio that the goal names, and `unit` is "x".
        baseline: What it stands against, in words: "one commit each", "pgbench".
        goal: The key of a goal in `GOALS`, or "" for a figure that is only shown.
    """

    what: str
    value: float
    unit: str
    baseline: str = ""
    goal: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a ratio is to be: at least (or, where less is better, at most)."""

    key: str
    what: str
    least: float
    aim: float
    less_is_better: bool = False

    def reached(self, value: float) -> str:
        """ "aim", "least" or "missed"."""
        for word, bound in (("aim", self.aim), ("least", self.least)):
            if value <= bound if self.less_is_better else value >= bound:
                return word
        return "missed"


GOALS = (
    Goal("1", "64 concurrent, tracing off: throughput against hand-written plain", 7, 12),
    Goal("2 httpx", "64 concurrent, spans at 100 %: throughput against hand-written with everything on httpx", 5, 10),
    Goal("2 aiohttp", "64 concurrent, spans at 100 %: throughput against the same on aiohttp", 1.5, 2.5),
    Goal("3 off", "64 concurrent, tracing off in both: share of the bare route", 0.60, 0.78),
    Goal("3 on", "64 concurrent, tracing on in both: share of the bare route", 0.65, 0.85),
    Goal("4", "256 concurrent, tracing off: throughput against hand-written plain", 20, 50),
    Goal("5", "1 at a time, spans on: p50 against hand-written with everything", 1.0, 0.5, True),
    Goal("6", "metering's CPU a request at 64 (ours minus bare) against hand-written plain's", 1 / 15, 1 / 40, True),
    Goal("7", "an unmetered route behind the middleware: CPU against bare", 1.03, 1.01, True),
    Goal("8", "journal, 64 concurrent, FULL: against one commit each", 25, 40),
    Goal("9 SQLite", "ledger, 64 concurrent, one hot account, SQLite: against one transaction each", 15, 29),
    Goal("9 PostgreSQL", "ledger, 64 concurrent, one hot account, PostgreSQL: against one transaction each", 20, 34),
    Goal("9 pgbench", "ledger, 64 concurrent, one hot account, PostgreSQL: against pgbench", 10, 40),
    Goal("10", "ledger's throughput at 1,000,000 entries against the start", 0.9, 1.0),
    Goal("11", "handler of 20 ms, 64 concurrent, tracing off: share of the bare route", 0.75, 0.9),
)
"""What we hold ourselves to."""


def goal_lines(rows: Iterable[Row], goals: Sequence[Goal] = GOALS) -> list[list[str]]:
    """A line for each goal: key, what, at least, aim, measured, verdict. The worst of several rows counts."""
    measured: dict[str, list[float]] = {}
    for row in rows:
        if row.goal:
            measured.setdefault(row.goal, []).append(row.value)
    unknown = measured.keys() - {goal.key for goal in goals}
    if unknown:
        raise ValueError(f"there is no goal {', '.join(sorted(unknown))}")
    lines = []
    for goal in goals:
        values = measured.get(goal.key)
        bounds = [ratio(goal.least), ratio(goal.aim)]
        if values is None:
            lines.append([goal.key, goal.what, *bounds, "", "not measured"])
            continue
        worst = max(values) if goal.less_is_better else min(values)
        lines.append([goal.key, goal.what, *bounds, ratio(worst), goal.reached(worst)])
    return lines


def ratio(value: float) -> str:
    """Short: small fractions of one as 1/N."""
    if 0 < value < 0.2:
        return f"1/{1 / value:.1f}".removesuffix(".0")
    return f"{value:.2f}".rstrip("0").rstrip(".") if value < 10 else f"{value:.1f}".removesuffix(".0")


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], align: str = "") -> str:
    """A table. `align` has an "l" or "r" for each column; by default the first stands left, the others right."""
    rule = ["---" if side == "l" else "---:" for side in align or "l" + "r" * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines)) + "\n"
