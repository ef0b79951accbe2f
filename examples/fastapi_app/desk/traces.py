"""What a trace shows: a line in the list, and a waterfall. Pure functions of its spans."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .spans import CREDITS, Span

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
STATE, CHARGE_ID, REQUEST_ID = PREFIX + "charge.state", PREFIX + "charge.id", PREFIX + "request.id"
TENANT_ID, USER_ID, TRANSACTION_ID = PREFIX + "tenant.id", PREFIX + "user.id", PREFIX + "transaction.id"
STATUS_CODE, REPLAYED = PREFIX + "status_code", PREFIX + "replayed"
MISMATCH, UNREADABLE = PREFIX + "outcomes_mismatch", PREFIX + "outcomes_unreadable"
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
        here = self.spans[0].trace_id
        later = {span.span_id: span for _, span in linking if span.trace_id != here}
        self.later = sorted(later.values(), key=lambda span: span.start_ns)
        """Refunds, voids and recoveries of this trace's charge that stand in other traces, in order."""
        self.own = next((span.process for span in self.spans if span.service != CREDITS), "The process that served it")
        self.died = self._died(running)

    @property
    def status(self) -> int | None:
        """The status that the client got."""
        status = self.entry.get(STATUS) if self.entry is not None and self.entry.kind == "server" else None
        return status if isinstance(status, int) else None

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def first(self, name: str) -> Span | None:
        return next((span for span in self.spans if span.name == name), None)

    def any_of(self, attribute: str) -> Any:
        """What the spans of the charge say of it, the most telling first."""
        told = (self.charge, self.deduct, *self.refunds, *self.voids, self.recover, *self.later, *self.ledger)
        for span in filter(None, told):
            if span.get(attribute) not in (None, ""):
                return span.get(attribute)
        return None

    def attempts_of(self, operation: Span | None) -> list[Span]:
        """The HTTP attempts below an operation."""
        if operation is None:
            return []
        return [span for span in self.attempts if span.parent_id == operation.span_id]

    def _died(self, running: Collection[int] | None) -> bool:
        """Whether its process died before it ended. Spans of its that had not ended are lost with it."""
        if self.entry is not None or not self.orphans:
            return False
        mine = {span.pid for span in self.orphans if span.service != CREDITS}
        if any(span.name == RECOVER and span.pid not in mine for span in self.later):
            return True  # nobody else takes up the charge of a process that lives
        return running is not None and bool(mine) and None not in mine and mine.isdisjoint(running)


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
        "tenant_id": facts.any_of(TENANT_ID),
        "user_id": facts.any_of(USER_ID),
        "amount": facts.any_of(AMOUNT),
        **_moved(facts),
        "outcome": told.get(OUTCOME) if told is not None else None,
        "attempts": len(facts.attempts),
        "retries": sum(1 for span in facts.attempts if span.get(RESEND)),
        "errors": sum(1 for span in facts.spans if span.status == "error"),
        "services": list(dict.fromkeys(span.service for span in facts.spans)),
        "request_id": facts.any_of(REQUEST_ID),
        "charge_id": facts.any_of(CHARGE_ID),
        "transaction_id": facts.any_of(TRANSACTION_ID),
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
        if facts.charge.get(MISMATCH):
            found.append("outcomes mismatch")
        if facts.charge.get(UNREADABLE):
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


def _moved(facts: Facts) -> dict[str, int | None]:
    """Credits kept, refunded and voided: as the charge says, else whoever drove it to its end, here or later."""
    charge = facts.charge
    done = [span for span in (*facts.refunds, *facts.voids, *facts.later) if span.get(OUTCOME) == "ok"]
    voided = next((span.get(REFUNDED) or 0 for span in done if span.name == VOID), None)
    if charge is not None and charge.get(KEPT) is not None:
        return {"kept": charge.get(KEPT), "refunded": charge.get(REFUNDED), "voided": voided}
    refunded = next((span.get(REFUNDED) for span in done if span.name == REFUND), None)
    amount = facts.any_of(AMOUNT)
    kept = amount - refunded if isinstance(amount, int) and isinstance(refunded, int) else None
    return {"kept": 0 if voided is not None else kept, "refunded": refunded, "voided": voided}


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
