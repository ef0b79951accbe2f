"""What every client saw against what the ledger says: each request is judged by itself."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PRICE = 10


@dataclass(slots=True)
class Seen:
    """One request, as its client saw it.

    Attributes:
        status: None where no complete answer came.
        good: How many of its ten items the route reports as succeeded.
        excused: The journal's database was down meanwhile, so that a complete answer may be refunded whole.
    """

    request_id: str
    path: str
    good: int
    status: int | None = None
    excused: bool = False


@dataclass(slots=True)
class Moves:
    """What moved for one request."""

    deductions: list[int] = field(default_factory=list)
    returns: list[int] = field(default_factory=list)

    @property
    def net(self) -> int:
        return -sum(self.deductions) - sum(self.returns)


def moves_of(entries: Iterable[Mapping[str, Any]]) -> Mapping[str, Moves]:
    """A tenant's entries by request. Entries in any order."""
    entries = list(entries)
    request_of = {entry["id"]: entry["request_id"] for entry in entries if entry["kind"] == "deduction"}
    found: dict[str, Moves] = defaultdict(Moves)
    for entry in entries:
        if entry["kind"] == "deduction":
            found[entry["request_id"]].deductions.append(entry["amount"])
        elif entry["kind"] in ("refund", "void"):
            found[request_of[entry["transaction_id"]]].returns.append(entry["amount"])
    return found


def fault(seen: Seen, moves: Moves) -> str | None:
    """What is wrong with a request, or None."""
    if len(moves.deductions) > 1:
        return f"deducted {len(moves.deductions)} times"
    if any(amount != -PRICE for amount in moves.deductions):
        return f"deducted {moves.deductions}"
    if len(moves.returns) > 1:
        return f"{len(moves.returns)} refunds: {moves.returns}"
    if not moves.deductions and seen.status == 200:
        return "ran free"
    allowed = _allowed(seen)
    if moves.net not in allowed:
        return f"paid {moves.net}, and may be {sorted(allowed)} after {seen.status or 'no answer'}"
    return None


def _allowed(seen: Seen) -> set[int]:
    """What the request may have cost in the end."""
    if seen.status == 200:
        return {seen.good, 0} if seen.excused else {seen.good}
    if seen.status is not None:
        return {0}
    if seen.path == "/stream":
        return set(range(seen.good + 1))  # what had been reported when it broke off
    # Its outcome may have come on record just before the process died.
    return {0} if seen.path == "/raise" else {0, seen.good}


def judge(requests: Iterable[Seen], moves: Mapping[str, Moves]) -> tuple[Counter[str], list[str]]:
    """How the requests ended, and what is wrong."""
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    known = set()
    for seen in requests:
        ended[str(seen.status or "no answer")] += 1
        known.add(seen.request_id)
        why = fault(seen, moves.get(seen.request_id, Moves()))
        if why is not None:
            wrong.append(f"{seen.request_id} {seen.path} good={seen.good}: {why}")
    wrong += [f"{request_id}: charged, and nobody asked" for request_id in moves if request_id not in known]
    return ended, wrong
