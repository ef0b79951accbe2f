"""One charge and its fate: a pure state machine. No I/O here, and no rule about states anywhere else.

    opened ──deducted──▶ deducted ──all succeeded──▶ settled
       │                    └──some failed──▶ refunding ──refunded──▶ settled
       └──unknown──▶ voiding ──voided──▶ voided

`TRANSITIONS` below is the whole truth (the picture in the docs is drawn from it). Serving a request
and recovering after a crash both go through `step`. See docs/reference/charge.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Final

MAX_AMOUNT = 2**53 - 1
"""The largest amount, in credits: the largest integer that every JSON reader gets right."""

MAX_ID_LENGTH = 255
"""The longest id of a tenant, user, transaction or item, and the longest idempotency key."""

MAX_ITEMS = 1_000
MAX_ITEMS_BYTES = 64 << 10
"""How many failed items a refund names, and how long all their ids are; what goes back is the amount of all."""

# Lone surrogates, which JSON can smuggle in as "\ud800", cannot be written to any database.
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


def _is_printable(value: object) -> bool:
    return isinstance(value, str) and _PRINTABLE.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays.

    Without a user it is the tenant's shared pool. A user with too few credits does not fall back to the pool.

    Args:
        tenant_id: 1 to 255 characters, no control characters.
        user_id: Likewise, or None.

    Raises:
        ValueError: An id is empty, too long, not a string, or has control characters.
    """

    tenant_id: str
    user_id: str | None = None

    def __post_init__(self) -> None:
        if not _is_printable(self.tenant_id):
            raise ValueError("tenant_id must be 1 to 255 characters without control characters")
        if self.user_id is not None and not _is_printable(self.user_id):
            raise ValueError("user_id must be 1 to 255 characters without control characters")


class State(StrEnum):
    """Where a charge stands. The last five are final."""

    OPENED = "opened"
    DEDUCTED = "deducted"
    REFUNDING = "refunding"
    VOIDING = "voiding"
    SETTLED = "settled"
    DECLINED = "declined"
    ABANDONED = "abandoned"
    VOIDED = "voided"
    DISPUTED = "disputed"


FINAL = frozenset({State.SETTLED, State.DECLINED, State.ABANDONED, State.VOIDED, State.DISPUTED})

TRANSITIONS: Mapping[State, Mapping[str, State]] = {
    State.OPENED: {
        "deducted": State.DEDUCTED,
        "declined": State.DECLINED,
        # A service that forgets declines, or an earlier attempt that may still arrive: undo it.
        "declined, in doubt": State.VOIDING,
        "not sent": State.ABANDONED,
        "unknown": State.VOIDING,
    },
    State.DEDUCTED: {
        "all succeeded": State.SETTLED,
        "some failed": State.REFUNDING,
        "lost": State.REFUNDING,
        "unread": State.DISPUTED,
    },
    State.REFUNDING: {
        "refunded": State.SETTLED,
        "all of it already voided": State.VOIDED,
        "already voided": State.DISPUTED,
        "refused": State.DISPUTED,
    },
    State.VOIDING: {
        "voided": State.VOIDED,
        "refused": State.DISPUTED,
        # Where the service has no voids: see `Undoing._without_void`.
        "found": State.REFUNDING,
        "not found": State.VOIDED,
    },
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A charge as the journal keeps it. Immutable: `step` makes the next one.

    Attributes:
        id: UUIDv7; the idempotency key of its deduction.
        amount_credits: What was asked for, in whole credits.
        units: What was priced: amount_credits = units x price.
        opened_at: Seconds since the epoch.
        request_id: What the caller's request is called in the logs.
        metadata: Sent along with the deduction, for people to read.
        transaction_id: The service's name for the deduction, once it is known.
        refund_credits: What is to go back, or went back. Never more than the amount.
        refund_items: The ids of the failed items, as far as they fit.
        reason: Why it is refunded, voided or disputed, in words.
        traceparent: The deduction's span (W3C), for the link from a later refund.
        owner: Which process's journal file holds it.
        tries: Attempts made at the refund or void that is due.
        due_at: When the next attempt is due, seconds since the epoch.
        declined_at: When a resent deduction was declined by a service that has no voids and forgets
            declines; see `Undoing._without_void`.
        closed_at: When it became final.
        history: What has happened to it, oldest first: the row of `TRANSITIONS`, and when (seconds since
            the epoch). For people to read; nothing is decided by it.
    """

    id: str
    account: Account
    amount_credits: int
    units: int
    state: State = State.OPENED
    opened_at: float
    request_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    transaction_id: str | None = None
    refund_credits: int = 0
    refund_items: tuple[str, ...] = ()
    reason: str | None = None
    traceparent: str | None = None
    owner: str = ""
    tries: int = 0
    due_at: float = 0.0
    declined_at: float | None = None
    closed_at: float | None = None
    history: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        # `type` and not `isinstance`: True is an int, and no amount.
        if type(self.amount_credits) is not int or not 0 < self.amount_credits <= MAX_AMOUNT:
            raise ValueError(f"charge {self.id}: an amount of {self.amount_credits} credits")
        if type(self.refund_credits) is not int or not 0 <= self.refund_credits <= self.amount_credits:
            raise ValueError(f"charge {self.id}: {self.refund_credits} of {self.amount_credits} refunded")

    def but(self, **changes: Any) -> "Record":
        """The record with these changes: `dataclasses.replace`, faster.

        Raises:
            TypeError: There is no such field.
        """
        after = object.__new__(Record)
        values = after.__dict__
        values.update(self.__dict__)
        values.update(changes)
        if len(values) != len(self.__dict__):
            raise TypeError(f"a record has no {', '.join(changes.keys() - self.__dict__.keys())}")
        after.__post_init__()
        return after

    @property
    def refund_key(self) -> str:
        """The idempotency key of its one refund."""
        return f"{self.id}:refund"

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def kept_credits(self) -> int:
        """What the customer has paid for good; not what is refunded, pending, or disputed."""
        if self.state in (State.SETTLED, State.REFUNDING):
            return self.amount_credits - self.refund_credits
        if self.state is State.DISPUTED and self.transaction_id is not None:
            return self.amount_credits - self.refund_credits
        return 0


_ANY: Final = Record(id="", account=Account("-"), amount_credits=1, units=1, opened_at=0.0)


def opened(
    charge_id: str,
    account: Account,
    *,
    amount_credits: int,
    units: int,
    now: float,
    owner: str,
    request_id: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Record:
    """A charge at its beginning: nothing has been sent.

    Args:
        now: Seconds since the epoch.

    Raises:
        ValueError: The amount is no amount.
    """
    # To make one of nineteen fields from another takes half as long as from nothing.
    return _ANY.but(
        id=charge_id,
        account=account,
        amount_credits=amount_credits,
        units=units,
        opened_at=now,
        request_id=request_id,
        metadata=metadata or {},
        owner=owner,
        due_at=now,
    )


class ImpossibleEvent(RuntimeError):
    """An event that cannot happen in the record's state: a bug of ours. No credits moved by it."""


class Event:
    """Something that happened to a charge; `step` says what follows."""

    __slots__ = ()
    occasion: ClassVar[str] = ""

    def occasion_for(self, record: Record) -> str:
        """The row of `TRANSITIONS` that applies."""
        return self.occasion

    def changes(self, record: Record) -> dict[str, Any]:
        """What else changes in the record."""
        return {}


# What came of a deduction.


@dataclass(frozen=True, slots=True)
class Deducted(Event):
    """Confirmed: the credits are taken. `balance` is what is left, in credits."""

    occasion = "deducted"
    transaction_id: str
    balance: int | None = None

    def changes(self, record: Record) -> dict[str, Any]:
        return {"transaction_id": self.transaction_id}


@dataclass(frozen=True, slots=True)
class Declined(Event):
    """Too few credits; nothing moved.

    That is the end of it, but for three reasons to undo the deduction all the same, each of which stands alone:

    Attributes:
        balance: What the account holds, in credits, where the service tells it.
        certain: False: it may not have been the service that spoke.
        after_unknown: An earlier attempt went unanswered, and may yet arrive and be paid. Then not even the client
            can be told that it was declined.
        forgotten: The service does not keep declines: a copy may yet arrive and be paid.
    """

    balance: int | None = None
    certain: bool = True
    after_unknown: bool = False
    forgotten: bool = False

    def occasion_for(self, record: Record) -> str:
        last_word = self.certain and not self.after_unknown and not self.forgotten
        return "declined" if last_word else "declined, in doubt"

    def changes(self, record: Record) -> dict[str, Any]:
        return {"reason": "insufficient credits"}


@dataclass(frozen=True, slots=True)
class NotSent(Event):
    """Every attempt failed before its connection existed, or none was made: nothing can have moved."""

    occasion = "not sent"
    reason: str
    retry_after_s: float | None = None

    def changes(self, record: Record) -> dict[str, Any]:
        return {"reason": self.reason}


@dataclass(frozen=True, slots=True)
class Unknown(Event):
    """No answer that can be believed: the credits may be taken, or be taken later."""

    occasion = "unknown"
    reason: str
    retry_after_s: float | None = None
    misconfigured: bool = False

    def changes(self, record: Record) -> dict[str, Any]:
        return {"reason": self.reason}


DeductAnswer = Deducted | Declined | NotSent | Unknown


def after_unknown(answer: DeductAnswer, reason: str) -> DeductAnswer:
    """`answer` as it stands when an earlier attempt, under the same key, went unanswered.

    That first copy may yet arrive. So "declined" and "not sent" are not the last word; "deducted" is, for
    the key makes both copies one.
    """
    if isinstance(answer, Declined):
        return replace(answer, after_unknown=True)
    if isinstance(answer, NotSent):
        return Unknown(f"{reason}; then {answer.reason}", retry_after_s=answer.retry_after_s)
    return answer


# What came of the request.


@dataclass(frozen=True, slots=True)
class Reported(Event):
    """The response's outcome: `kept_credits` of the amount stay paid, the rest goes back."""

    kept_credits: int
    failed_items: tuple[str, ...] = ()
    reason: str = "failed items"

    def occasion_for(self, record: Record) -> str:
        return "all succeeded" if self.kept_credits == record.amount_credits else "some failed"

    def changes(self, record: Record) -> dict[str, Any]:
        if self.kept_credits == record.amount_credits:
            return {}
        return {
            "refund_credits": record.amount_credits - self.kept_credits,
            "refund_items": _some(self.failed_items),
            "reason": self.reason,
        }


def _some(items: tuple[str, ...]) -> tuple[str, ...]:
    """As many of the items as a refund names."""
    left = MAX_ITEMS_BYTES
    for number, item in enumerate(items[:MAX_ITEMS]):
        left -= len(item.encode(errors="replace"))
        if left < 0:
            return items[:number]
    return items[:MAX_ITEMS]


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """The process died, or the request ended, before an outcome was on record: everything goes back."""

    occasion = "lost"
    reason: str

    def changes(self, record: Record) -> dict[str, Any]:
        return {"refund_credits": record.amount_credits, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Unread(Event):
    """The app's own reader of outcomes raised: all is kept, and a person has to look."""

    occasion = "unread"
    reason: str

    def changes(self, record: Record) -> dict[str, Any]:
        return {"reason": self.reason}


# What came of a refund or a void.


@dataclass(frozen=True, slots=True)
class Refunded(Event):
    """Confirmed: the refund is in the ledger."""

    occasion = "refunded"
    refund_id: str | None = None
    balance: int | None = None


@dataclass(frozen=True, slots=True)
class AlreadyVoided(Event):
    """The service says that the deduction was voided before: for a full refund that is the same thing."""

    def occasion_for(self, record: Record) -> str:
        whole = record.refund_credits == record.amount_credits
        return "all of it already voided" if whole else "already voided"

    def changes(self, record: Record) -> dict[str, Any]:
        if record.refund_credits == record.amount_credits:
            return {}
        return {"reason": f"{record.refund_credits} credits were to be refunded, but all had been voided already"}


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """The service understood, and said no for good: a person has to look."""

    occasion = "refused"
    reason: str

    def changes(self, record: Record) -> dict[str, Any]:
        return {"reason": self.reason}


@dataclass(frozen=True, slots=True)
class Voided(Event):
    """Confirmed: whether the deduction had happened or not, it is undone, and refused if it arrives late."""

    occasion = "voided"
    refunded_credits: int = 0


@dataclass(frozen=True, slots=True)
class Found(Event):
    """No voids here, but the deduction's transaction turned up: refund all of it."""

    occasion = "found"
    transaction_id: str

    def changes(self, record: Record) -> dict[str, Any]:
        return {"transaction_id": self.transaction_id, "refund_credits": record.amount_credits}


@dataclass(frozen=True, slots=True)
class NotFound(Event):
    """No voids here, and the deduction did not happen."""

    occasion = "not found"


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A refund, void or look-up without an answer that counts. Not an event: it is tried again, for ever.

    `sent` is False where no connection existed, so that the rest of a round need not be tried either.
    `declined`: whether a resent deduction was declined just now; None: nothing was heard of that. See
    `Undoing._without_void`.
    """

    reason: str
    retry_after_s: float | None = None
    sent: bool = True
    declined: bool | None = None


@dataclass(frozen=True, slots=True)
class NoVoid:
    """The service has no voids. Not an event: see `Undoing._without_void`."""


@dataclass(frozen=True, slots=True)
class NoLookup:
    """The service has no list of transactions to look in. Not an event: see `Undoing._without_void`."""


RefundAnswer = Refunded | AlreadyVoided | Refused | Unanswered
VoidAnswer = Voided | Refused | NoVoid | Unanswered
FindAnswer = Found | NotFound | NoLookup | Unanswered


def step(record: Record, event: Event, *, now: float) -> Record:
    """The record after the event.

    Args:
        now: Seconds since the epoch, for `due_at` and `closed_at`.

    Raises:
        ImpossibleEvent: The table has no such row; nothing changed.
    """
    occasion = event.occasion_for(record)
    try:
        state = TRANSITIONS[record.state][occasion]
    except KeyError:
        raise ImpossibleEvent(f"charge {record.id} is {record.state}; {event!r} cannot happen to it") from None
    closed_at = now if state in FINAL else None
    history = (*record.history, (occasion, now))
    return record.but(state=state, tries=0, due_at=now, closed_at=closed_at, history=history, **event.changes(record))


def orphaned(record: Record) -> Event | None:
    """What it means that nobody is serving this record's request any more; None: go on where it stands."""
    if record.state is State.OPENED:
        # It may have been sent in the instant before the crash.
        return Unknown("found after its request had ended, without an answer")
    if record.state is State.DEDUCTED:
        return Lost("the request ended before its outcome was on record")
    return None
