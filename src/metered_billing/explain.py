"""One charge's whole story in plain words, for whoever answers "why was I charged 8?". Pure.

The words of the journal (settled, voided, refunding …) stand beside what they mean for the customer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from metered_billing.charge import Account, Record, State

SHOWN = 20
"""Failed items that are named in a sentence; JSON has them all."""


@dataclass(frozen=True, slots=True)
class Story:
    """What there is to tell of a charge.

    Attributes:
        summary: Who paid how much in the end, in one sentence.
        facts: What was asked for: a word, and a text.
        events: What happened, oldest first: seconds since the epoch, the journal's word, and what it means.
        outcome: What came of it, and what is still to come: a word, and a text.
    """

    summary: str
    facts: tuple[tuple[str, str], ...]
    events: tuple[tuple[float, str, str], ...]
    outcome: tuple[tuple[str, str], ...]


def story_of(record: Record, *, living: bool, now: float) -> Story:
    """The story of a charge as the journal has it.

    Args:
        living: Whether the process that it belongs to still runs.
        now: Seconds since the epoch.
    """
    return Story(
        f"{name_of(record.account)} {_SUMMARIES[record.state](record)}",
        tuple(_facts(record)),
        tuple(_events(record)),
        (("kept", _kept(record)), ("pending", _pending(record, living, now))),
    )


def name_of(account: Account) -> str:
    """An account, for people."""
    return f"{account.tenant_id} / {account.user_id}" if account.user_id else f"{account.tenant_id} (shared pool)"


def in_words(amount: int) -> str:
    """So many credits."""
    return f"{amount:,} credit" if abs(amount) == 1 else f"{amount:,} credits"


def moment(at: float) -> str:
    """A time for people, in UTC."""
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{at}"


def duration(seconds: float) -> str:
    """A duration for people, in its largest unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def trace_id_of(record: Record) -> str | None:
    """The trace that its deduction belongs to; None where nothing was traced."""
    parts = (record.traceparent or "").split("-")
    return parts[1] if len(parts) >= 4 else None


def _paid(record: Record) -> str:
    if record.kept_credits == 0:
        return f"paid nothing: {_all(record)} came back."
    if record.refund_credits == 0:
        return f"paid {in_words(record.kept_credits)}."
    back = in_words(record.refund_credits)
    return f"paid {in_words(record.kept_credits)}: {record.amount_credits:,} were taken, and {back} came back."


def _pays(record: Record) -> str:
    kept = "nothing" if record.kept_credits == 0 else in_words(record.kept_credits)
    back = in_words(record.refund_credits)
    return f"pays {kept}: {record.amount_credits:,} were taken, and {back} are on their way back."


def _disputed(record: Record) -> str:
    if record.transaction_id is None:
        return (
            f"may have paid {in_words(record.amount_credits)}: undoing the deduction was refused. A person has to look."
        )
    return f"paid {in_words(record.kept_credits)}, by this record, which is disputed. A person has to look."


def _all(record: Record) -> str:
    return "the credit" if record.amount_credits == 1 else f"all {in_words(record.amount_credits)}"


_SUMMARIES: Mapping[State, Callable[[Record], str]] = {
    State.OPENED: lambda record: f"is asked for {in_words(record.amount_credits)}: there is no answer on record yet.",
    State.DEDUCTED: lambda record: f"has paid {in_words(record.amount_credits)}: what came of it is not on record yet.",
    State.REFUNDING: _pays,
    State.VOIDING: lambda record: f"pays nothing: the deduction of {in_words(record.amount_credits)} is being undone.",
    State.SETTLED: _paid,
    State.DECLINED: lambda record: f"paid nothing: the account held less than {in_words(record.amount_credits)}.",
    State.ABANDONED: lambda _: "paid nothing: the deduction was never sent.",
    State.VOIDED: lambda record: f"paid nothing: the deduction of {in_words(record.amount_credits)} was undone.",
    State.DISPUTED: _disputed,
}


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    price, rest = divmod(record.amount_credits, record.units) if record.units else (0, 1)
    # A price may differ by item: then only the sum is known.
    how = f"{record.units:,} units" if rest else f"{record.units:,} x {in_words(price)}"
    yield "asked", f"{in_words(record.amount_credits)} ({how})"
    yield from record.metadata.items()
    if record.request_id is not None:
        yield "request", record.request_id
    if record.transaction_id is not None:
        yield "transaction", record.transaction_id
    if (trace_id := trace_id_of(record)) is not None:
        yield "trace", trace_id


def _events(record: Record) -> Iterator[tuple[float, str, str]]:
    yield record.opened_at, "opened", "on record, before anything was sent"
    if not record.history and record.state is not State.OPENED:
        text = "by a release that did not write down what happened in between"
        yield record.closed_at or record.opened_at, str(record.state), text
    explained = [occasion in _WITH_REASON for occasion, _ in record.history]
    for number, (occasion, at) in enumerate(record.history):
        text = _EVENTS[occasion](record) if occasion in _EVENTS else ""
        # The record has one reason: that of the last event that had one.
        if explained[number] and not any(explained[number + 1 :]) and record.reason:
            text += f" ({record.reason})"
        yield at, occasion, text


def _some_failed(record: Record) -> str:
    delivered = record.amount_credits - record.refund_credits
    items = f", for {_items(record)}" if record.refund_items else ""
    good = "nothing was delivered" if delivered == 0 else f"delivered for {in_words(delivered)}"
    return f"{good}; {in_words(record.refund_credits)} to go back{items}"


def _items(record: Record) -> str:
    items = record.refund_items
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _refunded(record: Record) -> str:
    return f"{in_words(record.refund_credits)} back with {name_of(record.account)}, by the refund {record.refund_key}"


_EVENTS: Mapping[str, Callable[[Record], str]] = {
    "deducted": lambda record: f"{in_words(record.amount_credits)} taken from {name_of(record.account)}",
    "declined": lambda _: "the account held too little; nothing was taken, and the client was told so",
    "declined, in doubt": lambda _: "declined, but a copy may have arrived before: undone to be sure",
    "not sent": lambda _: "no attempt reached the credits service: nothing was taken",
    "unknown": lambda _: "no answer to rely on: the credits may have been taken, so it is undone",
    "all succeeded": lambda record: f"all was delivered: {in_words(record.amount_credits)} kept",
    "some failed": _some_failed,
    "lost": lambda record: f"no outcome was ever on record: {_all(record)} to go back",
    "unread": lambda record: f"the app could not tell what was delivered: {_all(record)} kept, for a person to decide",
    "refunded": _refunded,
    "all of it already voided": lambda record: f"{_all(record)} had come back before, by a void",
    "already voided": lambda _: "the refund was refused: the whole deduction had been voided before",
    "refused": lambda _: "the credits service refused for good, so a person has to decide",
    "voided": lambda _: "undone: what was taken is back, and should the deduction arrive late, it is refused",
    "found": lambda record: f"the deduction turned out to have happened: {_all(record)} to go back",
    "not found": lambda _: "the deduction turned out not to have happened",
}

_WITH_REASON = frozenset(
    ("declined, in doubt", "not sent", "unknown", "some failed", "lost", "unread", "already voided", "refused")
)


def _kept(record: Record) -> str:
    if record.state is State.OPENED:
        return "not known yet"
    if record.state is State.DEDUCTED:
        return f"not known yet; {in_words(record.amount_credits)} are taken"
    if record.state is State.DISPUTED and record.transaction_id is None:
        return "not known: compare with the credits service (--credits)"
    return in_words(record.kept_credits)


def _pending(record: Record, living: bool, now: float) -> str:
    if record.state is State.DISPUTED:
        return "a person's decision"
    if record.final:
        return "nothing"
    age = duration(now - record.opened_at)
    if not living:
        return f"{_DUE[record.state](record)}; its process died, so the app has to start, or `metered-billing recover`"
    if record.state in (State.OPENED, State.DEDUCTED):
        return f"the request is being served, for {age}"
    tries = "no attempt yet" if record.tries == 0 else f"{record.tries:,} without an answer"
    when = f"next at {moment(record.due_at)}" if record.due_at > now else "due now"
    return f"{_DUE[record.state](record)}, for {age} now: {tries}, {when}"


_DUE: Mapping[State, Callable[[Record], str]] = {
    State.OPENED: lambda _: "undoing the deduction, whether it happened or not",
    State.DEDUCTED: lambda record: f"a refund of {in_words(record.amount_credits)}",
    State.REFUNDING: lambda record: f"a refund of {in_words(record.refund_credits)}",
    State.VOIDING: lambda _: "undoing the deduction",
}


def as_document(record: Record, *, living: bool) -> dict[str, Any]:
    """A charge as JSON: whole, with times as in the credits API."""
    return {
        "id": record.id,
        "state": str(record.state),
        "tenant_id": record.account.tenant_id,
        "user_id": record.account.user_id,
        "amount": record.amount_credits,
        "units": record.units,
        "kept": record.kept_credits,
        "refund": record.refund_credits,
        "refund_items": list(record.refund_items),
        "reason": record.reason,
        "request_id": record.request_id,
        "metadata": dict(record.metadata),
        "transaction_id": record.transaction_id,
        "trace_id": trace_id_of(record),
        "opened_at": timestamp(record.opened_at),
        "closed_at": None if record.closed_at is None else timestamp(record.closed_at),
        "tries": record.tries,
        "due_at": None if record.final else timestamp(record.due_at),
        "owner": record.owner,
        "owner_lives": living,
        "history": [{"what": occasion, "at": timestamp(at)} for occasion, at in record.history],
    }


def timestamp(at: float) -> str:
    """RFC 3339 in UTC."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{at}"
