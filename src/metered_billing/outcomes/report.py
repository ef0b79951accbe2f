"""The counting: what a report says, against what was paid for. Every rule about a mismatch is here.

What is kept is what the report says has succeeded. An item that it does not mention failed, an item that
was not paid for is ignored, and each such difference is put in words (`Outcome.mismatch`).
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AnySet
from dataclasses import dataclass
from typing import Protocol

from metered_billing.outcomes.paid import Paid, Said, described, id_of, is_id, shown


@dataclass(frozen=True, slots=True)
class Outcome:
    """What stays paid, and why not the rest.

    Attributes:
        kept_units: From 0 to the units that were paid for.
        failed_items: The ids of the failed items, in order, as far as they have ids.
        mismatch: How the report differs from what was paid for, in words of at most 300 characters, or None.
        unreadable: Why the response could not be read, so that its status code decided; or None.
    """

    kept_units: int
    failed_items: tuple[str, ...] = ()
    mismatch: str | None = None
    unreadable: str | None = None


@dataclass(frozen=True, slots=True)
class InOrder:
    """A report of items in the order in which they were paid for: whether each succeeded."""

    succeeded: list[bool]


@dataclass(frozen=True, slots=True)
class ById:
    """A report of items by id (None: it has none), in the order of their mention."""

    entries: list[tuple[str | None, bool]]


@dataclass(frozen=True, slots=True)
class Delivered:
    """A report of nothing but the units delivered."""

    units: int


Report = InOrder | ById | Delivered


def count(paid: Paid, report: Report, said: Said) -> Outcome:
    """What stays paid by this report, and by what the route said itself."""
    if isinstance(report, Delivered):
        return _count_delivered(paid, report.units, said)
    tally = tally_for(paid)
    if isinstance(report, ById):
        for item, ok in report.entries:
            tally.add(item, ok)
    elif paid.by_item is None:
        for ok in report.succeeded:
            tally.add(None, ok)
    else:
        for item, ok in zip(paid.by_item, report.succeeded, strict=False):
            tally.add(item, ok)
        if len(report.succeeded) > len(paid.by_item):
            return tally.outcome(said, also=_paid_and_reported(len(paid.by_item), len(report.succeeded)))
    return tally.outcome(said)


def by_status(status: int, paid: Paid, said: Said, *, unreadable: str | None = None) -> Outcome:
    """What stays paid by the status code alone: all that the route did not say has failed, or nothing."""
    if not is_success(status):
        return none_kept(paid)
    outcome = _count_delivered(paid, paid.units, said)
    return Outcome(outcome.kept_units, outcome.failed_items, unreadable=unreadable)


def none_kept(paid: Paid) -> Outcome:
    """All of it failed: an error, a broken connection, an exception."""
    return Outcome(0, tuple(paid.by_item or ()))


def is_success(status: int) -> bool:
    """Whether a response of this status can have succeeded items: 2xx and 3xx."""
    return 200 <= status < 400


def from_returned(value: object) -> Report:
    """What the app's own `outcomes` function returned, as a report.

    Args:
        value: Booleans in order (any iterable that has an order), a mapping of item id to boolean, or an
            int of units delivered.

    Raises:
        TypeError, ValueError: Anything else; the text says what it was.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"outcomes: units delivered must be from 0; this is {described(value)}")
        return Delivered(int(value))
    if isinstance(value, Mapping):
        return ById([(_id(key), _flag(ok)) for key, ok in value.items()])
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | AnySet):
        return InOrder([_flag(ok) for ok in value])
    raise TypeError(
        "outcomes must return booleans in order, a mapping of item id to boolean, "
        f"or a whole number of units delivered; this is {described(value)}"
    )


class Tally(Protocol):
    """Counts a report entry by entry, in memory bounded by what was paid for."""

    reported: int
    """Entries so far."""

    def add(self, item: str | None, ok: bool) -> None:
        """One more entry of the report."""

    def outcome(
        self, said: Said, *, early: bool = False, unreadable: str | None = None, also: str | None = None
    ) -> Outcome:
        """What stays paid.

        Args:
            early: The response broke off: what is missing is no surprise.
            unreadable: Some of it could not be read. Then nobody knows about the items that are missing, and
                they are kept, as by the status code (but never where the response broke off).
            also: One more mismatch, in words.
        """


def tally_for(paid: Paid) -> Tally:
    return _NumberTally(paid) if paid.by_item is None else _MappingTally(paid, paid.by_item)


class _NumberTally:
    """For a cost that was a number: the first `units` entries count, whatever their ids are."""

    __slots__ = ("_failed", "_failed_ids", "_paid", "reported")

    def __init__(self, paid: Paid) -> None:
        self._paid = paid
        self.reported = 0
        self._failed = 0
        self._failed_ids: list[str] = []

    def add(self, item: str | None, ok: bool) -> None:
        self.reported += 1
        if ok or self.reported > self._paid.units:
            return
        self._failed += 1
        # A refund that names what the ledger refuses as an id would be refused as a whole.
        if item is not None and is_id(item):
            self._failed_ids.append(item)

    def outcome(
        self, said: Said, *, early: bool = False, unreadable: str | None = None, also: str | None = None
    ) -> Outcome:
        units = self._paid.units
        missing = max(units - self.reported, 0)
        # A stream of fewer tokens than were paid for is none, where the route said how many fewer.
        unexplained = missing > said.units
        mismatch = []
        if unexplained and early:
            mismatch.append(_ENDED_EARLY)
        elif self.reported > units or (unexplained and unreadable is None):
            mismatch.append(_paid_and_reported(units, self.reported))
        if unreadable is not None and not early:
            missing = 0
        kept = min(units - said.units, units - self._failed - missing)
        return Outcome(kept, tuple(self._failed_ids), _in_words(mismatch, also), unreadable)


class _MappingTally:
    """For a cost that was a mapping: entries are matched by id, and every mention of an item must agree."""

    __slots__ = ("_by_item", "_nameless", "_paid", "_repeated", "_results", "_unknown", "reported")

    def __init__(self, paid: Paid, by_item: Mapping[str, int]) -> None:
        self._paid = paid
        self._by_item = by_item
        self.reported = 0
        self._results: dict[str, bool] = {}
        self._nameless = 0
        self._unknown = _Some()
        self._repeated = _Some()

    def add(self, item: str | None, ok: bool) -> None:
        self.reported += 1
        if item is None:
            self._nameless += 1
        elif item not in self._by_item:
            self._unknown.add(item)
        elif item in self._results:
            self._repeated.add(item)
            self._results[item] = self._results[item] and ok
        else:
            self._results[item] = ok

    def outcome(
        self, said: Said, *, early: bool = False, unreadable: str | None = None, also: str | None = None
    ) -> Outcome:
        unreported_ok = unreadable is not None and not early
        failed = tuple(
            item for item in self._by_item if item in said.items or not self._results.get(item, unreported_ok)
        )
        kept = self._paid.units - sum(self._by_item[item] for item in failed)
        missing = len(self._by_item) - len(self._results)
        mismatch = []
        if missing and early:
            mismatch.append(_ENDED_EARLY)
        elif missing and unreadable is None:
            names = _Some(item for item in self._by_item if item not in self._results)
            mismatch.append(f"{missing} of {len(self._by_item)} items not reported{names}")
        if self._unknown.number:
            mismatch.append(f"{self._unknown.number} reported that were not paid for{self._unknown}")
        if self._nameless:
            mismatch.append(f"{self._nameless} reported without an id")
        if self._repeated.number:
            mismatch.append(f"{self._repeated.number} reported again{self._repeated}")
        return Outcome(kept, failed, _in_words(mismatch, also), unreadable)


def _count_delivered(paid: Paid, units: int, said: Said) -> Outcome:
    mismatch = None
    if units > paid.units:
        mismatch = _paid_and_reported(paid.units, units)
    if paid.by_item is None:
        return Outcome(min(paid.units - said.units, units), (), mismatch)
    if not said.items:
        return Outcome(min(paid.units, units), (), mismatch)
    failed = tuple(item for item in paid.by_item if item in said.items)
    left = paid.units - sum(paid.by_item[item] for item in failed)
    return Outcome(min(left, units), failed, mismatch)


_ENDED_EARLY = "the stream ended early"


def _paid_and_reported(paid: int, reported: int) -> str:
    return f"{paid} paid for, {shown(reported)} reported"


def _in_words(differences: list[str], also: str | None) -> str | None:
    if also is not None:
        differences.append(also)
    text = "; ".join(differences)
    return text[:300] or None


class _Some:
    """How many there were, and the first three by name."""

    __slots__ = ("_names", "number")

    def __init__(self, items: Iterable[str] = ()) -> None:
        self.number = 0
        self._names: list[str] = []
        for item in items:
            self.add(item)

    def add(self, item: str) -> None:
        self.number += 1
        if len(self._names) < 3 and (name := shown(item[:40])) not in self._names:
            self._names.append(name)

    def __str__(self) -> str:
        more = ", …" if self.number > len(self._names) else ""
        return f" ({', '.join(self._names)}{more})"


def _id(key: object) -> str | None:
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise TypeError(f"outcomes: an item's id must be a string or an int; this is {described(key)}")
    return id_of(key)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"outcomes: whether an item succeeded must be a bool; this is {described(value)}")
    return value
