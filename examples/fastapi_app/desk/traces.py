"""What a trace shows: a line in the list, and a waterfall. Pure functions of its spans."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .spans import Span

Linking = Sequence[tuple[str, Span]]
"""Spans, of this trace or another, that link to one of this trace, whose id stands first."""

PREFIX = "metered_billing."
CHARGE, DEDUCT = PREFIX + "charge", PREFIX + "deduct"
REFUND, VOID, RECOVER = PREFIX + "refund", PREFIX + "void", PREFIX + "recover"
LEDGER = PREFIX + "ledger."
CUT_OUT = "cut out"

OUTCOME, REASON = PREFIX + "outcome", PREFIX + "reason"
AMOUNT, KEPT, REFUNDED = PREFIX + "amount", PREFIX + "kept", PREFIX + "refunded"
TRIES, ITEMS, BALANCE = PREFIX + "tries", PREFIX + "items", PREFIX + "balance"
STATE = PREFIX + "charge.state"
STATUS, RESEND, ERROR = "http.response.status_code", "http.request.resend_count", "error.type"

NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
"""Errors of an attempt whose connection never existed."""

_NAMES = {RECOVER: "recovery", REFUND: "refund, later", VOID: "void, later", LEDGER + "grant": "grant"}


class Facts:
    """What the spans of one trace say, put together once.

    Args:
        running: The ids of the processes that run now; None where that is not known.
    """

    def __init__(self, spans: Iterable[Span], linking: Linking = (), running: Collection[int] | None = None) -> None:
        self.spans = sorted(spans, key=lambda span: (span.start_ns, span.end_ns, span.span_id))
        by_id = {span.span_id: span for span in self.spans}
        self.roots = [span for span in self.spans if span.parent_id is None or span.parent_id not in by_id]
        self.entry = next((span for span in self.roots if span.entry), None)
        self.orphans = [span for span in self.roots if not span.entry]
        self.charge = self.first(CHARGE)
        self.deduct = self.first(DEDUCT)
        self.recover = self.first(RECOVER)
        self.refunds = self.named(REFUND)
        self.voids = self.named(VOID)
        self.attempts = [span for span in self.spans if span.kind == "client"]
        self.ledger = [span for span in self.spans if span.name.startswith(LEDGER)]
        self.pictures = self.named(CUT_OUT)
        self.linking = linking
        self.started_ns = self.spans[0].start_ns
        self.ended_ns = max(span.end_ns for span in self.spans)
        self.died = bool(self.orphans) and running is not None and not self._lives(running)
        self._parents = by_id

    @property
    def ended(self) -> bool:
        return self.entry is not None

    @property
    def status(self) -> int | None:
        """The status that the client got."""
        status = self.entry.get(STATUS) if self.entry is not None and self.entry.kind == "server" else None
        return status if isinstance(status, int) else None

    @property
    def later(self) -> list[Span]:
        """Refunds, voids and recoveries of this trace's charge that stand in other traces, in order."""
        here = self.spans[0].trace_id
        found = {span.span_id: span for _, span in self.linking if span.trace_id != here}
        return sorted(found.values(), key=lambda span: span.start_ns)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def first(self, name: str) -> Span | None:
        return next((span for span in self.spans if span.name == name), None)

    def any_of(self, attribute: str) -> Any:
        """What the spans of the charge say of it, the most telling first."""
        for span in filter(None, (self.charge, self.deduct, *self.refunds, *self.voids, self.recover, *self.ledger)):
            if span.get(attribute) not in (None, ""):
                return span.get(attribute)
        return None

    def attempts_of(self, operation: Span | None) -> list[Span]:
        """The HTTP attempts below an operation."""
        if operation is None:
            return []
        return [span for span in self.attempts if span.parent_id == operation.span_id]

    def took(self) -> int | None:
        """Credits that the service says were deducted in this trace; None where its spans do not tell."""
        told = [span for span in self.ledger if span.name == LEDGER + "deduct"]
        if any(span.get(PREFIX + "status_code") in (200, 201) for span in told):
            return int(self.any_of(AMOUNT) or 0)
        return 0 if told else None

    def voided(self) -> int | None:
        """Credits that a void in this trace gave back; None where there was none, or the spans do not tell."""
        done = [span for span in self.voids if span.get(OUTCOME) == "ok"]
        if not done:
            return None
        said = next((span.get(PREFIX + "voided") for span in done if span.get(PREFIX + "voided") is not None), None)
        if said is None:
            said = next((span.get(PREFIX + "refunded") for span in self.ledger if span.name == LEDGER + "void"), None)
        return int(said) if said is not None else self.took()

    def _lives(self, running: Collection[int]) -> bool:
        # Those whose parent never came: the parent was of the same process, but for the service's first spans.
        mine = [span for span in self.orphans if span.service != "credits"] or self.orphans
        return any(span.pid is None or span.pid in running for span in mine)


def summary(facts: Facts) -> dict[str, Any]:
    """A trace in a line, as `GET /desk/traces` lists it."""
    charge, entry = facts.charge, facts.entry
    told = charge or facts.deduct or facts.recover or next(iter((*facts.refunds, *facts.voids)), None)
    here = facts.spans[0].trace_id
    linked = dict.fromkeys(
        [trace_id for span in facts.spans for trace_id, _ in span.links] + [span.trace_id for span in facts.later]
    )
    return {
        "trace_id": here,
        "started_at": moment(facts.started_ns),
        "duration_ms": ms(facts.ended_ns - facts.started_ns),
        "name": name_of(facts),
        "status": facts.status,
        "ended": entry is not None,
        "tenant_id": facts.any_of(PREFIX + "tenant.id"),
        "user_id": facts.any_of(PREFIX + "user.id"),
        "amount": facts.any_of(AMOUNT),
        "kept": charge.get(KEPT) if charge is not None else None,
        "refunded": _refunded(facts),
        "voided": facts.voided(),
        "outcome": told.get(OUTCOME) if told is not None else None,
        "attempts": len(facts.attempts),
        "retries": sum(1 for span in facts.attempts if span.get(RESEND)),
        "errors": sum(1 for span in facts.spans if span.status == "error"),
        "services": list(dict.fromkeys(span.service for span in facts.spans)),
        "request_id": facts.any_of(PREFIX + "request.id"),
        "charge_id": facts.any_of(PREFIX + "charge.id"),
        "transaction_id": facts.any_of(PREFIX + "transaction.id"),
        "trouble": trouble(facts),
        "spans": len(facts.spans),
        "linked": [trace_id for trace_id in linked if trace_id != here],
    }


def trouble(facts: Facts) -> list[str]:
    """Why somebody might look at it, in short words; nothing where all is as it should be."""
    found: list[str] = []
    if facts.died:
        found.append("process died")
    status = facts.status
    if status is not None and status >= 500:
        found.append(str(status))
    unanswered = {_what_went_wrong(span) for span in facts.attempts} - {None}
    found += sorted(word for word in unanswered if word)
    if facts.deduct is not None and facts.deduct.get(OUTCOME) not in (None, "ok", "declined") and not unanswered:
        found.append(str(facts.deduct.get(REASON) or facts.deduct.message or facts.deduct.get(OUTCOME)))
    if any(span.get(RESEND) for span in facts.attempts):
        found.append("retried")
    for span in (*facts.refunds, *facts.voids):
        if span.get(OUTCOME) not in (None, "ok"):
            found.append(f"{span.name.removeprefix(PREFIX)} {_words(str(span.get(OUTCOME)))}")
    if facts.charge is not None:
        if facts.charge.get(OUTCOME) in ("disputed", "journal", "ownership_lost"):
            found.append(_words(str(facts.charge.get(OUTCOME))))
        if facts.charge.get(PREFIX + "outcomes_mismatch"):
            found.append("outcomes mismatch")
        if facts.charge.get(PREFIX + "outcomes_unreadable"):
            found.append("outcomes unreadable")
    if facts.recover is not None:
        found.append("recovered")
    return list(dict.fromkeys(found))


def name_of(facts: Facts) -> str:
    """What people call it."""
    first = facts.entry or facts.spans[0]
    if facts.entry is not None:
        return _NAMES.get(first.name, first.name)
    # Below a request that has not ended, or never will, its name is handed on.
    asked = next((span.get("demo.request") for span in facts.spans if span.get("demo.request")), None)
    return str(asked or _NAMES.get(first.name, "unfinished request"))


def waterfall(facts: Facts, known: Mapping[tuple[str, str], Span]) -> list[dict[str, Any]]:
    """The spans, depth first and by their start.

    Args:
        known: Spans of other traces that are linked to, by trace and span id.
    """
    children: defaultdict[str, list[Span]] = defaultdict(list)
    top = {span.span_id for span in facts.roots}
    for span in facts.spans:
        if span.span_id not in top and span.parent_id is not None:
            children[span.parent_id].append(span)
    lost = {span.span_id for span in facts.orphans}
    linking: defaultdict[str, list[Span]] = defaultdict(list)
    for target, span in facts.linking:
        linking[target].append(span)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    stack = [(span, 0) for span in reversed(facts.roots)]
    while stack:
        span, depth = stack.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        rows.append(_row(span, depth, span.span_id in lost, facts.started_ns, known, linking[span.span_id]))
        stack += [(child, depth + 1) for child in reversed(children[span.span_id])]
    # Parents that name each other in a ring have no root; a bug of the sender's, but to be seen.
    rows += [
        _row(span, 0, True, facts.started_ns, known, linking[span.span_id])
        for span in facts.spans
        if span.span_id not in seen
    ]
    return rows


def _row(
    span: Span,
    depth: int,
    orphan: bool,
    zero_ns: int,
    known: Mapping[tuple[str, str], Span],
    linked_from: Iterable[Span],
) -> dict[str, Any]:
    return {
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "depth": depth,
        "orphan": orphan,
        "name": span.name,
        "kind": span.kind,
        "service": span.service,
        "process": span.process,
        "start_ms": ms(span.start_ns - zero_ns),
        "duration_ms": ms(span.end_ns - span.start_ns),
        "status": span.status,
        "message": span.message,
        "attributes": dict(span.attributes),
        "events": [
            {"name": event.name, "at_ms": ms(event.at_ns - zero_ns), "attributes": dict(event.attributes)}
            for event in span.events
        ],
        "links_to": [
            {
                "trace_id": trace_id,
                "span_id": span_id,
                "name": known[trace_id, span_id].name if (trace_id, span_id) in known else None,
            }
            for trace_id, span_id in span.links
        ],
        "linked_from": [
            {"trace_id": other.trace_id, "span_id": other.span_id, "name": other.name} for other in linked_from
        ],
    }


def ms(duration_ns: int) -> float:
    """Milliseconds, exact to the microsecond."""
    return round(duration_ns / 1e6, 3)


def moment(at_ns: int) -> str:
    """RFC 3339, in UTC."""
    seconds, rest_ns = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest_ns // 1000:06d}Z"


def _refunded(facts: Facts) -> int | None:
    """Credits that go back: as the charge says, or whoever drives it to its end."""
    if facts.charge is not None:
        refunded = facts.charge.get(REFUNDED)
        return refunded if isinstance(refunded, int) else None
    return next((span.get(REFUNDED) for span in facts.refunds if span.get(REFUNDED) is not None), None)


def _what_went_wrong(attempt: Span) -> str | None:
    """Of an HTTP attempt, in short."""
    error, status = attempt.get(ERROR), attempt.get(STATUS)
    if isinstance(status, int):
        return f"credits answered {status}" if status >= 500 or status in (401, 403, 408, 429) else None
    if error is None:
        return None
    if error in NOT_SENT:
        return "not sent"
    return "timed out" if "Timeout" in str(error) else "no answer"


def _words(outcome: str) -> str:
    return {"ownership_lost": "ownership lost", "journal": "journal failed"}.get(outcome, outcome)
