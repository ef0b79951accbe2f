"""What was paid for, and what the route says of it while it runs."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from metered_billing.charge import MAX_AMOUNT, MAX_ID_LENGTH

# Lone surrogates, which JSON can smuggle in as "\ud800", cannot be written to any database.
_ID = re.compile(rf"[^\x00-\x1f\x7f\ud800-\udfff]{{1,{MAX_ID_LENGTH}}}")

_LONGEST_INT_BITS = 4096
"""Ints beyond this are nobody's id: Python refuses to write out those of more than 4,300 digits."""


@dataclass(frozen=True, slots=True)
class Paid:
    """What was paid for.

    Attributes:
        units: All units together.
        by_item: Units by item id, in the order of the cost function; None where the cost was a number.
        price: Credits a unit.
    """

    units: int
    by_item: Mapping[str, int] | None = None
    price: int = 1

    @property
    def amount_credits(self) -> int:
        return self.units * self.price


class Said:
    """What the route said has failed, by `current_charge().fail(…)`.

    Attributes:
        items: Ids of failed items, where the cost was a mapping.
        units: Failed units, where it was a number.
    """

    __slots__ = ("_lock", "_paid", "items", "units")

    def __init__(self, paid: Paid) -> None:
        self._paid = paid
        # A route may work in threads, and each may say what failed in it.
        self._lock = Lock()
        self.items: set[str] = set()
        self.units: int = 0

    def fail(self, item: str | None = None, *, units: int | None = None) -> None:
        """One item failed, or so many units: they will be refunded, whatever the response reports.

        Args:
            item: Its id, where the cost was a mapping. Saying it again changes nothing.
            units: From 0, where the cost was a number. Adds to what was said before.

        Raises:
            TypeError: Neither or both, or not what the cost was made of.
            ValueError: An item that was not paid for, or more units than were.
        """
        if (item is None) == (units is None):
            raise TypeError('fail() takes either an item\'s id, fail("img-3"), or a number, fail(units=2)')
        if units is None:
            self._fail_item(item)
        else:
            self._fail_units(units)

    def _fail_item(self, item: Any) -> None:
        if self._paid.by_item is None:
            raise TypeError("this request was priced by a number of units: say fail(units=…), not an item")
        if not isinstance(item, str):
            raise TypeError(f'an item\'s id is a string, fail("img-3"); this is {described(item)}')
        if item not in self._paid.by_item:
            raise ValueError(f"no such item was paid for: {shown(item)}")
        self.items.add(item)

    def _fail_units(self, units: Any) -> None:
        if self._paid.by_item is not None:
            raise TypeError("this request was priced by item: say which one failed, fail(id), not units")
        units = whole_number("fail(units=…)", units)
        with self._lock:
            total = self.units + units
            if total > self._paid.units:
                raise ValueError(f"{total} units cannot have failed: {self._paid.units} were paid for")
            self.units = total


def cost_of(value: object, *, price: object = 1) -> Paid:
    """What a cost function returned (or a flat cost is), as what is to be paid for.

    Args:
        value: A whole number of units, or a mapping of item id to units. An id is a string of 1 to 255
            characters without control characters, or an int, which stands for its decimal string.
        price: Credits a unit, a whole number.

    Raises:
        TypeError, ValueError: Anything else; the text says what it was.
    """
    price = whole_number("price", price)
    if isinstance(value, int):
        return Paid(whole_number("cost", value), None, price)
    if not isinstance(value, Mapping):
        raise TypeError(
            f"cost must be a whole number of units, or a mapping of item id to units; this is {described(value)}"
        )
    by_item: dict[str, int] = {}
    for key, units in value.items():
        # As nearly always, without a call for each: what is printable has no control characters and no surrogates.
        plain = type(key) is str and key.isprintable() and 0 < len(key) <= MAX_ID_LENGTH
        item = key if plain else _checked_id(key)
        if item in by_item:
            raise ValueError(f"cost: two items have the id {shown(item)}")
        plain = type(units) is int and 0 <= units <= MAX_AMOUNT
        by_item[item] = units if plain else whole_number("cost: the units of an item", units)
    return Paid(whole_number("cost: the units of all items", sum(by_item.values())), by_item, price)


def whole_number(what: str, value: object) -> int:
    """`value` as it is, where it is an int (never a bool) from 0 to 2**53-1.

    Args:
        what: Its name, for the error's text.

    Raises:
        TypeError, ValueError: It is not; the text says what it was.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be a whole number; this is {described(value)}")
    if not 0 <= value <= MAX_AMOUNT:
        raise ValueError(f"{what} must be from 0 to {MAX_AMOUNT}; this is {described(value)}")
    return int(value)


def id_of(value: object) -> str | None:
    """An item's id as it is compared: a string, or an int's decimal string; None for all else."""
    if type(value) is str:
        return value
    if isinstance(value, str):
        # Not `str(value)`: of a str that is an Enum too it is the member's name.
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < _LONGEST_INT_BITS:
        return str(int(value))
    return None


def is_id(value: str) -> bool:
    """Whether an item can be called this in the ledger."""
    return _ID.fullmatch(value) is not None


def described(value: object) -> str:
    """Type and value, for an error's text."""
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """The value for a person to read: at most 80 characters, none of them a control character."""
    try:
        text = _SHORT.repr(value)
    except Exception:
        # Somebody's own __repr__, or an int of more than 4,300 digits.
        return "that cannot be shown"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:79]}…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _checked_id(key: object) -> str:
    item = id_of(key)
    if item is not None and is_id(item):
        return item
    kind = TypeError if item is None else ValueError
    raise kind(
        f"cost: an item's id must be a string (or an int) of 1 to {MAX_ID_LENGTH} characters, "
        f"no control characters; this is {described(key)}"
    )
