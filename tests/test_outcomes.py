"""What succeeded of what was paid for: prices, reports, readers, and values that mean harm."""

import dataclasses
import gzip
import json
import random
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonpath_rfc9535 import find

from metered_billing.charge import MAX_AMOUNT
from metered_billing.outcomes import (
    BodyReader,
    ById,
    Delivered,
    InOrder,
    LineReader,
    Outcome,
    Paid,
    Said,
    StatusReader,
    by_status,
    compile_path,
    cost_of,
    count,
    from_returned,
    none_kept,
    reader_for,
    whole_number,
)
from metered_billing.outcomes.decode import Unreadable, read_json
from metered_billing.outcomes.paid import id_of, shown
from metered_billing.outcomes.select import entry, succeeded

THREE = Paid(3)
ABC = Paid(6, {"a": 1, "b": 2, "c": 3})
LIMIT = 1000
JSON, NDJSON, SSE = "application/json", "application/x-ndjson", "text/event-stream"


def read(
    body: object,
    *,
    paid: Paid = THREE,
    path: str | None = None,
    content_type: str | None = JSON,
    encoding: str | None = None,
    status: int = 200,
    chunk: int | None = None,
    complete: bool = True,
    said: Said | None = None,
    limit: int = LIMIT,
) -> Outcome:
    """The outcome of this response, read in chunks of so many bytes."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader = reader_for(status, content_type, encoding, compile_path(path) if path else None, paid, limit)
    for start in range(0, len(sent), chunk or max(len(sent), 1)):
        reader.feed(sent[start : start + (chunk or len(sent))])
    return reader.finish(said or Said(paid), complete=complete)


def short(value: object) -> str:
    """A test's id for a value that may be too long, or too rude, for one."""
    try:
        return repr(value)[:30]
    except (ValueError, RuntimeError):
        return type(value).__name__


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def events(*values: object) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def said(paid: Paid, *items: str, units: int = 0) -> Said:
    it = Said(paid)
    for item in items:
        it.fail(item)
    if units:
        it.fail(units=units)
    return it


# What was paid for.


def test_paid_amount_is_units_times_price() -> None:
    """Units are priced, whatever they are of."""
    assert Paid(3, None, 5).amount_credits == 15


class Size(IntEnum):
    BIG = 7


class Name(str, Enum):  # noqa: UP042 - whose str() is not its value
    CAT = "cat"


@pytest.mark.parametrize(
    ("cost", "paid"),
    [
        (0, Paid(0)),
        (3, Paid(3)),
        (Size.BIG, Paid(7)),
        (MAX_AMOUNT, Paid(MAX_AMOUNT)),
        ({}, Paid(0, {})),
        ({"a": 1, "b": 0}, Paid(1, {"a": 1, "b": 0})),
        ({1: 2, -5: 1}, Paid(3, {"1": 2, "-5": 1})),
        ({Name.CAT: 2}, Paid(2, {"cat": 2})),
        ({"x" * 255: 1}, Paid(1, {"x" * 255: 1})),
        ({"zero\u200bwidth": 1}, Paid(1, {"zero\u200bwidth": 1})),
        ({"a": MAX_AMOUNT}, Paid(MAX_AMOUNT, {"a": MAX_AMOUNT})),
        (MappingProxyType({"a": 1}), Paid(1, {"a": 1})),
    ],
    ids=short,
)
def test_cost_of_takes_whole_numbers_and_mappings(cost: object, paid: Paid) -> None:
    """A cost is a number of units, or units by item id; an int as an id is its decimal string."""
    assert cost_of(cost) == paid


def test_cost_of_makes_plain_values_of_special_ones() -> None:
    """What goes on record is int and str, nobody's subclass of them."""
    paid = cost_of({Name.CAT: Size.BIG})
    assert paid.by_item is not None
    assert {(type(item), type(units)) for item, units in paid.by_item.items()} == {(str, int)}
    assert type(cost_of(Size.BIG).units) is int


def test_cost_of_keeps_its_own_copy_in_the_same_order() -> None:
    """What the app does with its mapping afterwards changes no price."""
    cost = {"b": 1, "a": 2}
    paid = cost_of(cost)
    cost["c"] = 9
    assert list((paid.by_item or {}).items()) == [("b", 1), ("a", 2)]


def test_cost_of_with_a_price() -> None:
    """Every unit costs the price; a price of 0 is free."""
    assert cost_of({"a": 2}, price=3).amount_credits == 6
    assert cost_of(2, price=0).amount_credits == 0


@pytest.mark.parametrize(
    ("cost", "error", "words"),
    [
        (None, TypeError, "this is NoneType None"),
        (True, TypeError, "this is bool True"),
        (1.0, TypeError, "this is float 1.0"),
        ("3", TypeError, "^cost must be a whole number of units, or a mapping of item id to units; this is str '3'"),
        ([1, 2], TypeError, r"this is list \[1, 2\]"),
        (np.int64(3), TypeError, "this is int64"),
        (-1, ValueError, "^cost must be from 0 to 9007199254740991; this is int -1"),
        (MAX_AMOUNT + 1, ValueError, "must be from 0 to 9007199254740991"),
        (10**5000, ValueError, "int that cannot be shown"),
        ({"a": -1}, ValueError, "the units of an item must be from 0"),
        ({"a": True}, TypeError, "the units of an item must be a whole number; this is bool True"),
        ({"a": 0.5}, TypeError, "this is float 0.5"),
        ({"a": MAX_AMOUNT, "b": 1}, ValueError, "the units of all items must be from 0"),
        ({1: 1, "1": 1}, ValueError, "two items have the id '1'"),
        ({"": 1}, ValueError, "this is str ''"),
        ({"x" * 256: 1}, ValueError, "1 to 255 characters"),
        ({"a\nb": 1}, ValueError, r"this is str 'a\\nb'"),
        ({"\ud800": 1}, ValueError, r"this is str '\\ud800'"),
        ({True: 1}, TypeError, "this is bool True"),
        ({None: 1}, TypeError, "this is NoneType None"),
        ({10**300: 1}, ValueError, "this is int 1000"),
        ({10**5000: 1}, TypeError, "this is int that cannot be shown"),
    ],
    ids=short,
)
def test_cost_of_refuses_all_else(cost: object, error: type[Exception], words: str) -> None:
    """A cost that is none is refused, and the error says what it was."""
    with pytest.raises(error, match=words):
        cost_of(cost)


@pytest.mark.parametrize("price", [True, 1.5, "2", None])
def test_cost_of_refuses_a_price_that_is_no_number(price: object) -> None:
    """Credits are whole."""
    with pytest.raises(TypeError, match="price must be a whole number"):
        cost_of(1, price=price)


def test_cost_of_with_a_negative_price_raises() -> None:
    """Nobody is paid for a request."""
    with pytest.raises(ValueError, match="price must be from 0"):
        cost_of(1, price=-1)


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Noisy:
    def __repr__(self) -> str:
        return "a\x1b[31m\n" * 100


@pytest.mark.parametrize(
    "value",
    [Rude(), Noisy(), "x" * 10_000, ["y" * 1000] * 1000, b"\x00" * 500],
    ids=short,
)
def test_cost_of_shows_any_value_safely(value: object) -> None:
    """An error's text is short and printable, whatever it is about, and never another error."""
    with pytest.raises(TypeError) as caught:
        cost_of(value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


class Wordy:
    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        return self._words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Wordy("x" * 80), "x" * 80),
        (["x" * 76], f"['{'x' * 76}']"),
        (["x" * 77], f"['{'x' * 77}…"),
        (Wordy("x" * 40 + "y" * 41), f"{'x' * 38}...{'y' * 39}"),
        (Wordy("a\x1b\nb"), "a??b"),
    ],
    ids=short,
)
def test_shown_values_are_cut_at_80_characters(value: object, text: str) -> None:
    """What is too long ends in dots, and a character that would harm a terminal is a question mark."""
    assert shown(value) == text
    assert len(text) <= 80


def test_id_of_an_int_that_is_nobodys() -> None:
    """Python would not write out an int of thousands of digits, so it is no id."""
    assert id_of(2**4095 - 1) == str(2**4095 - 1)
    assert id_of(2**4095) is None


def test_whole_number_names_what_it_is_about() -> None:
    """The caller's word for it stands in the error."""
    assert whole_number("max_units", 5) == 5
    with pytest.raises(TypeError, match="max_units must be a whole number; this is str 'x'"):
        whole_number("max_units", "x")


# What the route says.


def test_said_items_are_remembered_once() -> None:
    """Saying twice that an item failed is saying it once."""
    it = said(ABC, "b", "b", "a")
    assert it.items == {"a", "b"}
    assert it.units == 0


def test_said_units_add_up_to_what_was_paid_for() -> None:
    """Units that failed add up, and all of them may fail, but no more than that."""
    it = Said(THREE)
    it.fail(units=0)
    it.fail(units=1)
    it.fail(units=2)
    assert it.units == 3
    with pytest.raises(ValueError, match="4 units cannot have failed: 3 were paid for"):
        it.fail(units=1)
    assert it.units == 3


@pytest.mark.parametrize(
    ("paid", "item", "units", "error", "words"),
    [
        (ABC, None, None, TypeError, "either an item's id"),
        (ABC, "a", 1, TypeError, "either an item's id"),
        (ABC, "d", None, ValueError, "no such item was paid for: 'd'"),
        (ABC, 1, None, TypeError, "an item's id is a string"),
        (ABC, None, 1, TypeError, "priced by item"),
        (THREE, "a", None, TypeError, r"priced by a number of units: say fail\(units=…\)"),
        (THREE, 2, None, TypeError, r"say fail\(units=…\)"),
        (THREE, None, -1, ValueError, r"^fail\(units=…\) must be from 0"),
        (THREE, None, True, TypeError, "must be a whole number; this is bool True"),
        (THREE, None, 1.0, TypeError, "must be a whole number; this is float"),
    ],
)
def test_said_refuses_what_was_not_paid_for(
    paid: Paid, item: Any, units: Any, error: type[Exception], words: str
) -> None:
    """A slip of the route is an error in plain words, and changes nothing."""
    it = Said(paid)
    with pytest.raises(error, match=words):
        it.fail(item, units=units)
    assert (it.items, it.units) == (set(), 0)


def test_said_from_many_threads_loses_nothing() -> None:
    """A route that works in threads may say in each of them what failed."""
    it = Said(Paid(4000))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: it.fail(units=1), range(4000)))
    assert it.units == 4000


def test_said_from_two_threads_at_the_same_moment_adds_both() -> None:
    """One waits for the other to have added its units, or else one of the two refunds would be lost."""
    it = Said(THREE)
    others: list[threading.Thread] = []

    class Interrupted:
        """What was paid for, where another thread comes in as soon as it is looked at."""

        by_item = None

        @property
        def units(self) -> int:
            if not others:
                others.append(threading.Thread(target=it.fail, kwargs={"units": 1}))
                others[0].start()
                others[0].join(0.1)  # it cannot come to its end before we have
            return 3

    it._paid = Interrupted()  # type: ignore[assignment]
    it.fail(units=1)
    others[0].join()
    assert it.units == 2


# Statuses.


@pytest.mark.parametrize(
    "status", ["succeeded", "success", "ok", "OK", "Succeeded", "SUCCESS", True, 200, 204, 299, 200.0]
)
def test_status_that_means_success(status: object) -> None:
    """These, and only these, are kept."""
    assert succeeded(status)


@pytest.mark.parametrize(
    "status",
    [
        *["failed", "error", "", " ok", "ok ", "200", "true", "okay", "done", "o\u212a", "\ufb01", "x" * 9999],
        *[False, None, 0, 1, 199, 300, 299.5, 200.5, 10**400, -200, float("nan"), float("inf")],
        *[[], ["ok"], {}, {"status": "ok"}],
    ],
    ids=short,
)
def test_status_that_means_failure(status: object) -> None:
    """All else failed: when in doubt the credits go back."""
    assert succeeded(status) is False


# Counting for a cost that was a number.


@pytest.mark.parametrize(
    ("flags", "outcome"),
    [
        ([True, True, True], Outcome(3)),
        ([True, False, True], Outcome(2)),
        ([], Outcome(0, mismatch="3 paid for, 0 reported")),
        ([True, True], Outcome(2, mismatch="3 paid for, 2 reported")),
        ([False, True, True, True], Outcome(2, mismatch="3 paid for, 4 reported")),
        ([True, True, True, False], Outcome(3, mismatch="3 paid for, 4 reported")),
    ],
)
def test_count_booleans_for_a_number(flags: list[bool], outcome: Outcome) -> None:
    """The first as many as were paid for count; what is missing failed."""
    assert count(THREE, InOrder(flags), Said(THREE)) == outcome


def test_count_by_id_for_a_number_that_is_not_the_number_paid_for() -> None:
    """All of it succeeded, and yet it is not all that was paid for, or more than that."""
    assert count(THREE, ById([(None, True)] * 3), said(THREE)) == Outcome(3)
    assert count(THREE, ById([(None, True)] * 2), said(THREE)) == Outcome(2, (), "3 paid for, 2 reported")
    assert count(THREE, ById([(None, True)] * 4), said(THREE)) == Outcome(3, (), "3 paid for, 4 reported")
    assert count(THREE, ById([(None, True)] * 3), said(THREE, units=1)) == Outcome(2)


def test_count_names_the_failed_for_a_number() -> None:
    """Failed entries are named in the refund, but only those that were paid for."""
    report = ById([("x", False), (None, False), ("y", True), ("z", False)])
    assert count(THREE, report, Said(THREE)) == Outcome(1, ("x",), "3 paid for, 4 reported")


@pytest.mark.parametrize(
    "item",
    ["", "x" * 256, "a\nb", "\x7f", "\ud800"],
    ids=short,
)
def test_count_does_not_name_what_the_ledger_would_refuse(item: str) -> None:
    """An id that no refund can carry is left out, so that the refund itself goes through."""
    assert count(Paid(1), ById([(item, False)]), Said(Paid(1))) == Outcome(0)


@pytest.mark.parametrize(
    ("delivered", "outcome"),
    [
        (0, Outcome(0)),
        (2, Outcome(2)),
        (3, Outcome(3)),
        (4, Outcome(3, mismatch="3 paid for, 4 reported")),
        (10**5000, Outcome(3, mismatch="3 paid for, that cannot be shown reported")),
    ],
    ids=short,
)
def test_count_units_delivered(delivered: int, outcome: Outcome) -> None:
    """Fewer units than were paid for are a refund and no surprise; more are clamped."""
    assert count(THREE, Delivered(delivered), Said(THREE)) == outcome


@pytest.mark.parametrize(("units", "kept"), [(0, 2), (1, 2), (2, 1), (3, 0)])
def test_count_with_units_said_keeps_the_smaller(units: int, kept: int) -> None:
    """What the route said and what the response reports may be the same failures: they are not added up."""
    it = said(THREE, units=units)
    assert count(THREE, InOrder([True, True, False]), it).kept_units == kept
    assert count(THREE, Delivered(2), it).kept_units == kept


# Counting for a cost that was a mapping.


@pytest.mark.parametrize(
    ("entries", "outcome"),
    [
        ([("a", True), ("b", True), ("c", True)], Outcome(6)),
        ([("c", True), ("b", False), ("a", True)], Outcome(4, ("b",))),
        ([("b", False), ("a", False), ("c", True)], Outcome(3, ("a", "b"))),
        ([("a", True), ("c", True)], Outcome(4, ("b",), "1 of 3 items not reported ('b')")),
        ([], Outcome(0, ("a", "b", "c"), "3 of 3 items not reported ('a', 'b', 'c')")),
        (
            [("a", True), ("b", True), ("c", True), ("d", True), ("e", False)],
            Outcome(6, (), "2 reported that were not paid for ('d', 'e')"),
        ),
        (
            [(None, True), ("a", True), ("b", True), ("c", True)],
            Outcome(6, (), "1 reported without an id"),
        ),
        (
            [("a", True), ("b", True), ("c", True), ("a", True)],
            Outcome(6, (), "1 reported again ('a')"),
        ),
        (
            [("a", False), ("b", True), ("c", True), ("a", True)],
            Outcome(5, ("a",), "1 reported again ('a')"),
        ),
        (
            [("a", True), ("b", True), ("c", True), ("a", False), ("a", True)],
            Outcome(5, ("a",), "2 reported again ('a', …)"),
        ),
    ],
)
def test_count_by_id_for_a_mapping(entries: list[tuple[str | None, bool]], outcome: Outcome) -> None:
    """Items are matched by id; an item succeeded only if every mention of it says so."""
    assert count(ABC, ById(entries), Said(ABC)) == outcome


@pytest.mark.parametrize(
    ("flags", "outcome"),
    [
        ([True, True, True], Outcome(6)),
        ([True, False, True], Outcome(4, ("b",))),
        ([True], Outcome(1, ("b", "c"), "2 of 3 items not reported ('b', 'c')")),
        ([False, True, True, True], Outcome(5, ("a",), "3 paid for, 4 reported")),
    ],
)
def test_count_booleans_for_a_mapping_go_by_its_order(flags: list[bool], outcome: Outcome) -> None:
    """Booleans pair with the items in the order in which they were priced."""
    assert count(ABC, InOrder(flags), Said(ABC)) == outcome


def test_count_units_delivered_for_a_mapping() -> None:
    """A number is what is kept in total; no item is named but what the route named."""
    assert count(ABC, Delivered(4), Said(ABC)) == Outcome(4)
    assert count(ABC, Delivered(9), Said(ABC)) == Outcome(6, (), "6 paid for, 9 reported")
    assert count(ABC, Delivered(5), said(ABC, "c")) == Outcome(3, ("c",))
    assert count(ABC, Delivered(2), said(ABC, "c")) == Outcome(2, ("c",))
    assert count(ABC, Delivered(9), said(ABC, "c")) == Outcome(3, ("c",), "6 paid for, 9 reported")


def test_count_with_items_said_is_the_union() -> None:
    """What the route said adds to what the response reports."""
    report = ById([("a", True), ("b", False), ("c", True)])
    assert count(ABC, report, said(ABC, "a", "b")) == Outcome(3, ("a", "b"))


def test_count_items_without_units_change_no_sum() -> None:
    """An item may be free: it can fail, and nothing goes back."""
    paid = Paid(1, {"a": 0, "b": 1})
    assert count(paid, ById([("a", False), ("b", True)]), Said(paid)) == Outcome(1, ("a",))


def test_mismatch_names_the_first_three() -> None:
    """Enough to know what to look for."""
    paid = Paid(4, dict.fromkeys("abcd", 1))
    words = "4 of 4 items not reported ('a', 'b', 'c', …)"
    assert count(paid, ById([]), Said(paid)).mismatch == words


def test_mismatch_names_40_characters_of_an_id() -> None:
    """A long id is known by how it begins."""
    paid = Paid(1, {"0123456789" * 5: 1})
    words = f"1 of 1 items not reported ('{'0123456789' * 4}')"
    assert count(paid, ById([]), Said(paid)).mismatch == words


def test_mismatch_stays_short_and_printable() -> None:
    """Thousands of hostile ids make one short line of log."""
    paid = Paid(1000, {f"{n}-{'y' * 200}": 1 for n in range(1000)})
    report = ById([(f"\x1b\n{n}" + "\ud800" * 500, True) for n in range(1000)] + [(None, True)])
    mismatch = count(paid, report, Said(paid)).mismatch
    assert mismatch is not None
    assert mismatch.isprintable()
    assert len(mismatch) <= 300
    assert mismatch.startswith("1000 of 1000 items not reported ('0-y")


# By the status code alone.


@pytest.mark.parametrize("status", [200, 204, 302, 399])
def test_by_status_keeps_all_of_a_success(status: int) -> None:
    """2xx and 3xx keep all, less what the route said."""
    assert by_status(status, ABC, Said(ABC)) == Outcome(6)
    assert by_status(status, ABC, said(ABC, "b")) == Outcome(4, ("b",))
    assert by_status(status, THREE, said(THREE, units=1)) == Outcome(2)


@pytest.mark.parametrize("status", [100, 199, 400, 404, 500, 599])
def test_by_status_keeps_nothing_of_an_error(status: int) -> None:
    """An answered 500 never keeps the charge."""
    assert by_status(status, ABC, Said(ABC)) == none_kept(ABC) == Outcome(0, ("a", "b", "c"))
    assert by_status(status, THREE, Said(THREE)) == none_kept(THREE) == Outcome(0)


# What the app's own function returned.


@pytest.mark.parametrize(
    ("value", "report"),
    [
        ([], InOrder([])),
        ([True, False], InOrder([True, False])),
        ((True,), InOrder([True])),
        ((flag for flag in (True, False)), InOrder([True, False])),
        ({"a": True}.values(), InOrder([True])),
        ({"a": True, 7: False, Name.CAT: True}, ById([("a", True), ("7", False), ("cat", True)])),
        (0, Delivered(0)),
        (Size.BIG, Delivered(7)),
        (10**30, Delivered(10**30)),
    ],
    ids=short,
)
def test_from_returned_takes_three_shapes(value: object, report: object) -> None:
    """Booleans in order, a mapping of id to boolean, or units delivered."""
    assert from_returned(value) == report


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (None, TypeError, "this is NoneType None"),
        (True, TypeError, "this is bool True"),
        (2.0, TypeError, "this is float 2.0"),
        ("ok", TypeError, "this is str 'ok'"),
        (b"ok", TypeError, "outcomes must return booleans in order.* this is bytes"),
        (bytearray(b"ok"), TypeError, "outcomes must return booleans in order.* this is bytearray"),
        ({True}, TypeError, "this is set"),
        ({"a": True}.keys(), TypeError, "this is dict_keys"),
        (-1, ValueError, "from 0; this is int -1"),
        ([True, 1], TypeError, "must be a bool; this is int 1"),
        (["ok"], TypeError, "must be a bool; this is str 'ok'"),
        (np.array([True]), TypeError, "must be a bool; this is bool_? "),
        ({"a": "ok"}, TypeError, "must be a bool; this is str 'ok'"),
        ({True: True}, TypeError, "must be a string or an int; this is bool True"),
        ({None: True}, TypeError, "must be a string or an int; this is NoneType None"),
    ],
)
def test_from_returned_refuses_all_else(value: object, error: type[Exception], words: str) -> None:
    """A reader that returns anything else is the app's mistake, and is told so."""
    with pytest.raises(error, match=words):
        from_returned(value)


def test_from_returned_an_id_that_nobody_can_have_is_unknown() -> None:
    """An int of thousands of digits is nobody's id, and no crash either."""
    assert from_returned({10**5000: True}) == ById([(None, True)])


# Paths.


@pytest.mark.parametrize(
    "text",
    [
        *["", "x", "$.a[", "$[?foo(@)]", "$.a[99999999999999999999]", "$[?@.a==1e400]", "\x00", "$.."],
        "$[?" + "(" * 5000 + "@.a" + ")" * 5000 + "]",
    ],
    ids=short,
)
def test_compile_path_refuses_what_is_no_path(text: str) -> None:
    """A bad path is found when the route is decorated, and the error shows it."""
    with pytest.raises(ValueError, match=r"not a JSONPath \(RFC 9535\): '") as caught:
        compile_path(text)
    assert len(str(caught.value)) < 400
    assert repr(text[:10])[1:-1] in str(caught.value)


def test_path_selects_statuses_for_a_number() -> None:
    """Selected values that are no objects are the statuses themselves."""
    body = {"images": [{"state": "ok"}, {"state": "failed"}, {"state": 200}]}
    assert read(body, path="$.images[*].state") == Outcome(2)


def test_path_selects_objects_for_a_number() -> None:
    """Selected objects are counted by `status`; those that failed are named by `id`."""
    images = [{"id": 1, "status": "ok"}, {"id": "two", "status": "failed"}, {"id": 3.5}]
    assert read({"images": images}, path="$.images[*]") == Outcome(1, ("two",))


def test_path_selects_objects_for_a_mapping() -> None:
    """Objects are matched by id, wherever they stand and in whatever order."""
    body = {"x": [{"id": "c", "status": "ok"}], "y": [{"id": "b", "status": "no"}, {"id": "a", "status": True}]}
    assert read(body, paid=ABC, path="$[*][*]") == Outcome(4, ("b",))


def test_path_selecting_statuses_for_a_mapping_reports_nobody() -> None:
    """Without ids nothing says which item succeeded: all goes back, and the mismatch says why."""
    outcome = read({"x": ["ok", "ok", "ok"]}, paid=ABC, path="$.x[*]")
    words = "3 of 3 items not reported ('a', 'b', 'c'); 3 reported without an id"
    assert outcome == Outcome(0, ("a", "b", "c"), words)


def test_path_with_int_ids_matches_their_decimal_strings() -> None:
    """A cost function and a response may disagree on whether 7 is a number; true and 7.0 are no ids."""
    paid = cost_of({7: 1, "8": 1})
    assert read([{"id": "7", "status": "ok"}, {"id": 8, "status": "ok"}], paid=paid, path="$[*]") == Outcome(2)
    assert read([{"id": 7.0, "status": "ok"}], paid=paid, path="$[*]").kept_units == 0
    paid = cost_of({"True": 1})
    assert read([{"id": True, "status": "ok"}], paid=paid, path="$[*]").kept_units == 0


def test_path_that_matches_nothing_refunds_all() -> None:
    """What the response does not report was not delivered, and the path stands in the mismatch."""
    assert read({}, path="$.x[*]") == Outcome(0, (), "3 paid for, 0 reported; '$.x[*]' matched nothing")
    outcome = read({}, paid=ABC, path="$.x[*]")
    assert (outcome.kept_units, outcome.failed_items) == (0, ("a", "b", "c"))
    assert str(outcome.mismatch).endswith("'$.x[*]' matched nothing")


def test_path_that_cannot_be_applied_is_counted_by_status() -> None:
    """Whatever a body makes the JSONPath library raise, it costs nobody anything."""
    outcome = read(b'[{"id": "a", "status": "\\ud800"}]', path="$[?match(@.id, @.status)]")
    assert outcome == Outcome(3, unreadable="the path cannot be applied: UnicodeEncodeError")


def test_path_with_a_filter_and_descent() -> None:
    """All of RFC 9535 may be used."""
    body = {"a": {"id": "a", "status": "ok"}, "n": [{"id": "b", "status": "ok"}, {"id": "c", "status": "ok"}]}
    assert read(body, paid=ABC, path="$..[?@.id]") == Outcome(6)


# Bodies without a path.


@pytest.mark.parametrize(
    "body",
    [
        {"results": [{"status": "ok"}, {"status": "no"}, {"status": "ok"}]},
        {"items": [{"status": "ok"}, {"status": "no"}, {"status": "ok"}]},
        {"results": [True, False, True]},
        {"results": {"x": True, "y": {"status": "no"}, "z": {"status": 201}}},
        {"results": [1, 2, 3], "items": [True, False, True]},
        {"results": [True], "items": [True, False, True]},
        {"results": [True, False, True], "items": [True, True, True]},
    ],
)
def test_body_without_a_path_reports_in_results_or_items(body: object) -> None:
    """`results` is looked at first, then `items`."""
    assert read(body) == Outcome(2)


@pytest.mark.parametrize(
    "body",
    [
        {"items": ["a", "b", "c"]},
        {"items": [{"id": 1}, {"id": 2}, {"id": 3}]},
        {"items": [{"id": 1}, {"id": 2, "status": "failed"}, {"id": 3, "status": "ok"}]},
        {"items": [False, False, "c"]},
        {"results": "abc"},
        {"results": None},
        {"other": [False, False, False]},
        [False, False, False],
        "text",
        7,
        None,
    ],
)
def test_body_without_a_path_is_counted_by_status(body: object) -> None:
    """A list of other things, or of another length, is no report: the status code decides, silently."""
    assert read(body) == Outcome(3)
    assert read(body, status=302) == Outcome(3)
    assert read(body, said=said(THREE, units=1)) == Outcome(2)


@pytest.mark.parametrize("name", ["results", "items"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_body_without_a_path_of_another_length_is_not_read(name: str, number: int) -> None:
    """It may well be a report, so that is said; where one unit was paid for, a list is just a list."""
    outcome = read({name: [False] * number})
    assert outcome == Outcome(3, mismatch=f"`{name}` does not report on exactly what was paid for, and was not read")
    assert read({name: [False] * (number + 1)}, paid=Paid(1)) == Outcome(1)
    assert read({name: [False] * 3}, paid=Paid(2)).mismatch == outcome.mismatch


def test_body_without_a_path_of_two_lists_says_which_it_looked_at_first() -> None:
    """Where neither `results` nor `items` fits, the one that was likelier a report is named."""
    outcome = read({"results": [False], "items": [False]})
    assert outcome == Outcome(3, mismatch="`results` does not report on exactly what was paid for, and was not read")


def test_body_without_a_path_where_nothing_was_paid_for() -> None:
    """An empty list is a report on nothing."""
    assert read({"results": []}, paid=Paid(0)) == Outcome(0)
    assert read({"results": []}, paid=Paid(0, {})) == Outcome(0)


def reporting(ids: str, **others: Any) -> list[Any]:
    """An object for each id, all of them succeeded but for these."""
    return [{"id": item, "status": others.get(item, "ok")} for item in ids]


@pytest.mark.parametrize("paid", [THREE, ABC])
@pytest.mark.parametrize(
    "listed",
    [
        reporting("abc"),
        reporting("cab"),
        reporting("abc", a="Succeeded"),
        reporting("abc", b=200),
        reporting("abc", b="failed"),
        reporting("abc", b=["ok"]),
        reporting("ab"),
        reporting("abca"),
        reporting("aab"),
        reporting("abd"),
        reporting("abcd"),
        [*reporting("ab"), {"status": "ok"}],
        [*reporting("ab"), {"id": ["c"], "status": "ok"}],
        [*reporting("ab"), {"id": "c"}],
        [*reporting("ab"), "ok"],
        ["ok", "ok", "ok"],
    ],
    ids=short,
)
def test_body_is_counted_entry_by_entry_or_as_if(paid: Paid, listed: list[Any]) -> None:
    """Where all has succeeded no entry is looked at by itself, and nothing comes out otherwise."""
    expected = count(paid, ById([entry(each) for each in listed]), Said(paid))
    assert read({"results": listed}, paid=paid, path="$.results[*]") == expected
    if expected.kept_units == paid.units and expected.mismatch is None and listed != ["ok", "ok", "ok"]:
        assert read({"items": listed}, paid=paid) == expected
    elif len(listed) != 3:
        assert read({"results": listed}, paid=paid).mismatch is not None


def test_body_that_lists_nothing_is_none_in_which_all_succeeded() -> None:
    """Not even where nothing was paid for."""
    assert read({"results": []}, paid=Paid(0), path="$.results[*]").mismatch == "'$.results[*]' matched nothing"


def test_body_in_which_all_succeeded_but_what_the_route_said() -> None:
    """What the route said counts here too."""
    body = {"results": reporting("abc")}
    assert read(body, paid=ABC, path="$.results[*]", said=said(ABC, "b")) == Outcome(4, ("b",))


def test_body_without_a_path_for_a_mapping_needs_exactly_its_ids() -> None:
    """Other ids, or too few of them, are somebody else's list: the status code decides, and that is said."""
    unread = "`results` does not report on exactly what was paid for, and was not read"
    a, b, c, d = ({"id": item, "status": "no" if item == "b" else "ok"} for item in "abcd")
    assert read({"results": [c, a, b]}, paid=ABC) == Outcome(4, ("b",))
    assert read({"results": [a, b]}, paid=ABC) == Outcome(6, mismatch=unread)
    assert read({"results": [a, b, c, d]}, paid=ABC) == Outcome(6, mismatch=unread)
    assert read({"results": [a, b, d]}, paid=ABC) == Outcome(6, mismatch=unread)
    assert read({"results": [False, False, False]}, paid=ABC) == Outcome(6, mismatch=unread)
    assert read({"results": []}, paid=ABC) == Outcome(6)
    assert read({"results": [d]}, paid=Paid(1, {"a": 1})) == Outcome(1, mismatch=unread)
    assert read({"results": [a, b, c, {**a, "status": "no"}]}, paid=ABC) == Outcome(
        3, ("a", "b"), "1 reported again ('a')"
    )


@pytest.mark.parametrize("status", ["shipped", "pending", "", None, 7, 1e9, {}, 99, 600, 600.0])
def test_body_without_a_path_is_no_report_where_no_status_is_an_outcome(status: object) -> None:
    """A list of three orders is no report on three units, whatever their status."""
    assert read({"items": [{"id": n, "status": status} for n in range(3)]}) == Outcome(3)


@pytest.mark.parametrize("word", ["failed", "Error", "FAILURE", "ok", True, False, 200, 404, 503.0])
def test_body_without_a_path_is_a_report_where_one_status_is_an_outcome(word: object) -> None:
    """Beside a word for an outcome, any other word means failure."""
    outcome = read({"items": [{"status": "no face"}, {"status": word}, {"status": "ok"}]})
    assert outcome.kept_units == (2 if word in ("ok", True, 200) else 1)


@pytest.mark.parametrize("word", ["failed", "Failure", "FAIL", "error", "errored", 100, 101, 404, 503.0, 599, False])
def test_body_without_a_path_is_a_report_where_every_status_is_a_failure(word: object) -> None:
    """Nothing succeeded, and that is what it says."""
    assert read({"items": [{"status": word}] * 3}) == Outcome(0)


# Which reader, and bodies that cannot be read.


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        ("application/json", BodyReader),
        ("Application/JSON; charset=utf-8", BodyReader),
        ("text/json", BodyReader),
        ("application/vnd.shop+json;v=2", BodyReader),
        ("application/x-ndjson", LineReader),
        ("Application/NDJSON", LineReader),
        ("application/jsonl; charset=utf-8", LineReader),
        ("application/jsonlines", LineReader),
        ("application/x-jsonlines", LineReader),
        ("text/event-stream;charset=UTF-8", LineReader),
        ("image/png", StatusReader),
        ("text/html", StatusReader),
        ("", StatusReader),
        (None, StatusReader),
    ],
)
def test_reader_for_goes_by_the_content_type(content_type: str | None, kind: type) -> None:
    """JSON is read at its end, lines as they pass, anything else not at all."""
    assert type(reader_for(200, content_type, None, None, THREE, LIMIT)) is kind


@pytest.mark.parametrize("content_type", [JSON, NDJSON, SSE, "image/png"])
@pytest.mark.parametrize("status", [400, 500])
def test_error_responses_are_not_read(status: int, content_type: str) -> None:
    """A 4xx or 5xx refunds all, whatever it says."""
    body = lines({"status": "ok"}, {"status": "ok"}, {"status": "ok"})
    assert read(body, path="$.status", content_type=content_type, status=status) == Outcome(0)


def test_picture_is_counted_by_its_status() -> None:
    """Without a path that is how it should be; with one it is reported."""
    assert read(b"\x89PNG", content_type="image/png") == Outcome(3)
    words = "its content type is 'image/png'"
    assert read(b"\x89PNG", content_type="image/png", path="$[*]") == Outcome(3, unreadable=words)
    assert read(b"", content_type=None, path="$[*]", status=204).unreadable == "its content type is ''"


@pytest.mark.parametrize("content_type", [JSON, NDJSON, SSE])
def test_other_content_encoding_is_counted_by_status(content_type: str) -> None:
    """Brotli and its like we cannot undo."""
    outcome = read(b"?", content_type=content_type, encoding="br", path="$[*]", said=said(THREE, units=1))
    assert outcome == Outcome(2, unreadable="its content encoding is 'br'")


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON: Expecting value at character 0"),
        (b"{", "not JSON"),
        (b'{"a": "\xff"}', "not JSON: invalid start byte at byte 7"),
        (b'{"a": "' + "\u00e9".encode("latin-1") + b'"}', "not JSON"),
        (b"1" * 5000, "JSON beyond us: ValueError"),
        (DEEP, "JSON beyond us: RecursionError"),
        (b"[" * 200 + b"]" * 200, "the path cannot be applied: JSONPathRecursionError"),
        (b" " * 1_000_001, "more than 1000000 bytes"),
    ],
    ids=short,
)
def test_body_that_cannot_be_read_is_counted_by_status(body: bytes, words: str) -> None:
    """Nobody is punished for a body that is beyond us; the outcome says why it was not read."""
    outcome = read(body, path="$..x", limit=1_000_000, said=said(THREE, units=1))
    assert (outcome.kept_units, outcome.mismatch) == (2, None)
    assert words in str(outcome.unreadable)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_body_in_any_unicode_encoding(coding: str) -> None:
    """JSON says itself how it is encoded."""
    assert read('{"results": [true, false, true]}'.encode(coding)) == Outcome(2)


def test_body_is_read_up_to_the_limit_and_no_further() -> None:
    """The limit is the last length that is read."""
    body = b"[true, false, true]"
    for chunk in (None, 1, 7):
        assert read(body, path="$[*]", limit=len(body), chunk=chunk) == Outcome(2)
        too_long = Outcome(3, unreadable=f"more than {len(body) - 1} bytes")
        assert read(body, path="$[*]", limit=len(body) - 1, chunk=chunk) == too_long


def test_body_too_long_is_no_longer_held() -> None:
    """What will not be read is not kept in memory either."""
    reader = reader_for(200, JSON, None, None, THREE, LIMIT)
    assert isinstance(reader, BodyReader)
    reader.feed(b"x" * LIMIT)
    reader.feed(b"x")
    assert reader._held == []


def test_body_that_broke_off_refunds_all() -> None:
    """Half a body reports nothing, even where what came of it could be read; unless it is said, it is whole."""
    for content_type in (JSON, "image/png"):
        assert reader_for(200, content_type, None, None, THREE, LIMIT).finish(Said(THREE)).kept_units == 3
    assert read([True, True, True], path="$[*]", complete=False) == Outcome(0)
    assert read([True, True, True], path="$[*]", complete=False, paid=ABC) == none_kept(ABC)
    assert read(b"\x89PNG", content_type="image/png", complete=False) == Outcome(0)


# Compressed bodies.


def raw_deflate(body: bytes) -> bytes:
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeezer.compress(body) + squeezer.flush()


def members(body: bytes) -> bytes:
    """gzip as some write it: a member for each few bytes, and zeros at the end."""
    parts = [gzip.compress(body[start : start + 5]) for start in range(0, len(body) or 1, 5)]
    return b"".join(parts) + b"\0" * 20


CODED = [
    ("gzip", gzip.compress),
    ("GZIP", gzip.compress),
    (" x-gzip ", gzip.compress),
    ("gzip", members),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("identity", bytes),
    ("", bytes),
    (None, bytes),
]


@pytest.mark.parametrize("chunk", [None, 1, 3, 30])
@pytest.mark.parametrize(("encoding", "code"), CODED)
def test_compressed_body_is_read(encoding: str | None, code: Any, chunk: int | None) -> None:
    """What a GZip middleware inside of us sends is undone, however it is cut up."""
    assert read(code(b"[true, false, true]"), path="$[*]", encoding=encoding, chunk=chunk) == Outcome(2)
    stream = code(lines({"status": 200}, {"status": 500}, {"status": 201}))
    assert read(stream, content_type=NDJSON, encoding=encoding, chunk=chunk) == Outcome(2)


@pytest.mark.parametrize("content_type", [JSON, NDJSON, SSE])
@pytest.mark.parametrize(("encoding", "code"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_body_that_is_cut_short(content_type: str, encoding: str, code: Any) -> None:
    """A compressed body without its end was not read whole: the status code decides."""
    coded = code(b"null\n")
    for end in (0, 1, len(coded) - 1):
        outcome = read(coded[:end], path="$[*]", encoding=encoding, content_type=content_type)
        assert outcome.kept_units == 3
        assert "cut short" in str(outcome.unreadable)


@pytest.mark.parametrize("content_type", [JSON, NDJSON])
@pytest.mark.parametrize(("encoding", "name"), [("gzip", "gzip"), ("x-gzip", "gzip"), ("deflate", "deflate")])
def test_compressed_body_that_is_something_else(content_type: str, encoding: str, name: str) -> None:
    """A header that lies makes the body unreadable, and no crash."""
    assert read(zlib.compress(b"[]"), path="$[*]", encoding="gzip") == Outcome(3, unreadable="broken gzip")
    outcome = read(b"[true, true, false]\n", path="$[*]", encoding=encoding, content_type=content_type, chunk=4)
    assert outcome == Outcome(3, unreadable=f"broken {name}")


def test_compressed_body_keeps_to_the_first_trouble() -> None:
    """What was wrong first is what the outcome says, whatever follows."""
    outcome = read(b"no gzip at all", path="$[*]", encoding="gzip", chunk=4, limit=10)
    assert outcome == Outcome(3, unreadable="broken gzip")


def test_compressed_body_longer_than_is_taken_at_a_time() -> None:
    """Each byte is inflated once, however much comes in one chunk."""
    noise = random.Random(1).randbytes(40_000).hex()
    body = json.dumps([True, noise, True]).encode()
    for encoding, code in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        assert len(code(body)) > 40_000
        assert read(code(body), path="$[*]", encoding=encoding, limit=100_000) == Outcome(2)


def test_compressed_body_of_two_deflated_parts() -> None:
    """They follow each other as the members of a gzip file do."""
    body = zlib.compress(b"[true, fal") + zlib.compress(b"se, true]")
    assert read(body, path="$[*]", encoding="deflate") == Outcome(2)


def test_compressed_body_with_rubbish_after_it() -> None:
    """What follows a member must be another one."""
    body = gzip.compress(b"[true, true, false]")
    assert read(body + b"rubbish", path="$[*]", encoding="gzip") == Outcome(3, unreadable="broken gzip")


def test_compressed_bomb_is_not_inflated() -> None:
    """Neither side of the compression may be longer than the limit."""
    bomb = gzip.compress(b"[" + b" " * 50_000_000 + b"]")
    outcome = read(bomb, path="$[*]", encoding="gzip", limit=100_000)
    assert outcome == Outcome(3, unreadable="more than 100000 bytes when decompressed")
    assert read(bomb, path="$[*]", encoding="gzip").unreadable == "more than 1000 bytes"


@pytest.mark.no_cover
def test_compressed_bomb_in_a_stream_is_not_inflated() -> None:
    """A chunk that blows up ends the reading; what was reported before it stays reported."""
    first = gzip.compress(lines({"status": "failed"}))
    bomb = gzip.compress((b" " * 99 + b"\n") * 500_000)
    outcome = read(first + bomb + first, content_type=NDJSON, encoding="gzip")
    assert outcome == Outcome(2, unreadable="one chunk inflates to more than 8388608 bytes")


@pytest.mark.no_cover
def test_compressed_bomb_in_a_stream_ends_the_reading() -> None:
    """Of what comes after it nothing is looked at, and what was wrong first is what the outcome says."""
    reader = reader_for(200, NDJSON, "gzip", None, THREE, LIMIT)
    reader.feed(gzip.compress(lines({"status": "failed"})))
    reader.feed(gzip.compress(b"\n" * 10_000_000))
    reader.feed(gzip.compress(lines({"status": "failed"})))
    outcome = reader.finish(Said(THREE))
    assert outcome == Outcome(2, unreadable="one chunk inflates to more than 8388608 bytes")


def test_compressed_chunk_of_exactly_the_most_is_read() -> None:
    """8 MiB out of one chunk are no bomb; with one byte more, the line that it broke off in is not looked at."""
    line = b'{"status": "no"}'
    filled = (b" " * 1023 + b"\n") * (8 << 10)
    whole = filled[: -len(line)] + line
    limit = 2048
    assert read(gzip.compress(whole), content_type=NDJSON, encoding="gzip", limit=limit) == Outcome(
        0, mismatch="3 paid for, 1 reported"
    )
    longer = filled[:-100_000] + line.ljust(100_001)
    assert read(gzip.compress(longer), content_type=NDJSON, encoding="gzip", limit=200_000) == Outcome(
        3, unreadable="one chunk inflates to more than 8388608 bytes"
    )


@pytest.mark.no_cover
def test_compressed_stream_of_empty_lines_is_cheap() -> None:
    """Millions of lines that cannot be JSON are passed over without trying each of them."""
    body = gzip.compress(b"\n" * 4_000_000 + b"x\n" * 1_000_000)
    before = time.process_time()
    assert read(body, content_type=NDJSON, encoding="gzip", limit=10_000_000) == Outcome(3)
    # Trying them takes ten times as long.
    assert time.process_time() - before < 10


def test_compressed_output_of_exactly_one_piece() -> None:
    """Output that fills zlib's buffer to the brim is not mistaken for the end."""
    for size in (65_535, 65_536, 65_537, 131_072):
        body = b"[true, false, true]".ljust(size)
        assert read(gzip.compress(body), path="$[*]", encoding="gzip", limit=size) == Outcome(2)
        assert read(raw_deflate(body), path="$[*]", encoding="deflate", limit=size) == Outcome(2)


def test_bare_deflate_is_told_from_the_real_one() -> None:
    """Bare deflate may pass half of the test for RFC 1950's header, as two spaces do; it takes both halves."""
    body = raw_deflate(b"  [true, false, true]")
    assert int.from_bytes(body[:2]) % 31 == 0
    assert read(body, path="$[*]", encoding="deflate") == Outcome(2)
    # A stored block, whose padding is anything: RFC 1951, 3.2.4.
    text = b"[true, false, true]"
    size = len(text).to_bytes(2, "little") + (len(text) ^ 0xFFFF).to_bytes(2, "little")
    stored = b"\x08" + size + text + b"\x01\x00\x00\xff\xff"
    assert read(stored, path="$[*]", encoding="deflate") == Outcome(2)


# Streams.


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 64])
@pytest.mark.parametrize(("content_type", "sent"), [(NDJSON, lines), (SSE, events)])
def test_stream_without_a_path_is_read_by_its_status_fields(content_type: str, sent: Any, chunk: int | None) -> None:
    """Each line or event with a `status` reports on itself; all others are passed over."""
    body = sent(
        {"progress": 10},
        {"id": "a", "status": "ok"},
        "text",
        {"id": "b", "status": "failed"},
        {"id": "c", "status": 200},
    )
    assert read(body, paid=ABC, content_type=content_type, chunk=chunk) == Outcome(4, ("b",))
    assert read(body, content_type=content_type, chunk=chunk) == Outcome(2, ("b",))


@pytest.mark.parametrize(("content_type", "sent"), [(NDJSON, lines), (SSE, events)])
def test_stream_with_a_path(content_type: str, sent: Any) -> None:
    """The path is applied to each line, and may select several entries of it."""
    body = sent({"done": [{"id": "c", "status": "ok"}, {"id": "a", "status": "ok"}]}, {"done": []}, {"status": 1})
    outcome = read(body, paid=ABC, content_type=content_type, path="$.done[*]")
    assert outcome == Outcome(4, ("b",), "1 of 3 items not reported ('b')")


@pytest.mark.parametrize(("content_type", "sent"), [(NDJSON, lines), (SSE, events)])
def test_stream_that_reports_nothing(content_type: str, sent: Any) -> None:
    """Without a path the status code decides; with one, nothing was delivered."""
    body = sent({"token": "a"}, {"token": "b"})
    assert read(body, content_type=content_type) == Outcome(3)
    words = "3 paid for, 0 reported; '$.x' matched nothing"
    assert read(body, content_type=content_type, path="$.x") == Outcome(0, (), words)
    assert read(b"", content_type=content_type) == Outcome(3)
    assert read(b"", content_type=content_type, path="$.x") == Outcome(0, (), words)
    assert read(body, paid=ABC, content_type=content_type) == Outcome(6)
    assert read(body, paid=ABC, content_type=content_type, path="$.x").failed_items == ("a", "b", "c")


def test_stream_with_more_and_fewer_reports_than_units() -> None:
    """As in a body: the first count, what is missing failed, both are reported."""
    many = lines(*[{"status": "ok"}] * 5)
    assert read(many, content_type=NDJSON) == Outcome(3, (), "3 paid for, 5 reported")
    few = lines({"status": "ok"})
    assert read(few, content_type=NDJSON) == Outcome(1, (), "3 paid for, 1 reported")


def test_stream_that_broke_off_keeps_what_it_had_reported() -> None:
    """What had been reported as succeeded is kept; the rest, and a half line, is not."""
    body = lines({"id": "c", "status": "ok"}, {"id": "a", "status": "no"}) + b'{"id": "b", "status": "ok"}'
    outcome = read(body, paid=ABC, content_type=NDJSON, complete=False)
    assert outcome == Outcome(3, ("a", "b"), "the stream ended early")
    assert read(body, content_type=NDJSON, complete=False) == Outcome(1, ("a",), "the stream ended early")
    assert read(body, paid=ABC, content_type=NDJSON) == Outcome(5, ("a",))


def test_stream_that_broke_off_after_all_was_reported() -> None:
    """Nothing was missing, so nothing is refunded, and nothing is odd."""
    body = lines({"status": "ok"}, {"status": "ok"}, {"status": "no"})
    assert read(body, content_type=NDJSON, complete=False) == Outcome(2)
    body = lines({"id": "a", "status": "ok"}, {"id": "c", "status": "ok"}, {"id": "b", "status": "no"})
    assert read(body, paid=ABC, content_type=NDJSON, complete=False) == Outcome(4, ("b",))


def test_stream_that_broke_off_with_nothing_reported_refunds_all() -> None:
    """Also where no path was given: the status code went out before the work was done."""
    for paid in (THREE, ABC):
        outcome = read(lines({"token": "a"}), paid=paid, content_type=NDJSON, complete=False)
        assert outcome == Outcome(0, tuple(paid.by_item or ()), "the stream ended early")


def test_stream_that_broke_off_and_was_compressed() -> None:
    """What could be decompressed counts; that the rest is missing is no surprise."""
    squeezer = zlib.compressobj(wbits=31)
    sent = squeezer.compress(lines({"status": "ok"})) + squeezer.flush(zlib.Z_SYNC_FLUSH)
    outcome = read(sent, content_type=NDJSON, encoding="gzip", complete=False)
    assert outcome == Outcome(1, (), "the stream ended early")


def test_stream_with_what_the_route_said() -> None:
    """What the route says adds to what the stream reports."""
    body = lines(*[{"id": item, "status": "ok"} for item in "abc"])
    assert read(body, paid=ABC, content_type=NDJSON, said=said(ABC, "a")) == Outcome(5, ("a",))
    assert read(body, content_type=NDJSON, said=said(THREE, units=2)) == Outcome(1)


@pytest.mark.parametrize(
    "line",
    [b"", b"\r", b"  ", b"[DONE]", b"plain text", b'{"status": ', b'{"status": "\xff"}', b"\x00\x01"],
)
def test_stream_line_that_is_not_json_is_passed_over(line: bytes) -> None:
    """A stream may carry other things too."""
    body = line + b"\n" + lines({"status": "ok"}, {"status": "ok"}) + line + b"\n" + lines({"status": "no"})
    assert read(body, content_type=NDJSON) == Outcome(2)


@pytest.mark.parametrize("chunk", [None, 1, 999])
@pytest.mark.parametrize(("content_type", "sent"), [(NDJSON, lines), (SSE, events)])
def test_stream_with_a_line_too_long_is_read_without_it(content_type: str, sent: Any, chunk: int | None) -> None:
    """It is skipped. Nobody knows what it reported, so what is missing is kept; what failed is not."""
    body = sent(
        {"id": "a", "status": "no"},
        {"id": "b", "status": "ok", "picture": "x" * LIMIT},
        {"id": "c", "status": "ok"},
    )
    words = f"a line of more than {LIMIT} bytes"
    assert read(body, paid=ABC, content_type=content_type, chunk=chunk) == Outcome(5, ("a",), unreadable=words)
    assert read(body, content_type=content_type, chunk=chunk) == Outcome(2, ("a",), unreadable=words)
    broken = read(body, paid=ABC, content_type=content_type, chunk=chunk, complete=False)
    assert broken == Outcome(3, ("a", "b"), "the stream ended early", words)
    broken = read(body, content_type=content_type, chunk=chunk, complete=False)
    assert broken == Outcome(1, ("a",), "the stream ended early", words)


def test_stream_with_an_unfinished_line_too_long() -> None:
    """The last line too may be too long, and nothing of it is held."""
    body = lines({"status": "no"}) + b"x" * 5000
    words = f"a line of more than {LIMIT} bytes"
    for chunk in (None, 100):
        assert read(body, content_type=NDJSON, chunk=chunk) == Outcome(2, unreadable=words)


def test_stream_line_of_exactly_the_limit_is_read() -> None:
    """The limit is the last length that is read, without the line's end."""
    line = b'{"status": "no"}'.ljust(LIMIT)
    for chunk in (None, 1, 500):
        assert read(line + b"\n" + line + b"\n" + line, content_type=NDJSON, chunk=chunk) == Outcome(0)
        longer = read(line + b"\n" + line + b" \n" + line, content_type=NDJSON, chunk=chunk)
        assert longer == Outcome(1, unreadable=f"a line of more than {LIMIT} bytes")


def test_stream_line_that_is_beyond_us_is_unreadable() -> None:
    """Too deep, or an int too long: the line may have reported something, so what is missing is kept."""
    for line in (DEEP, b"1" * 5000):
        body = lines({"status": "no"}) + line + b"\n" + lines({"status": "ok"})
        outcome = read(body, content_type=NDJSON, limit=1_000_000)
        assert (outcome.kept_units, outcome.mismatch) == (2, None)
        assert "beyond us" in str(outcome.unreadable)


def test_stream_holds_no_more_than_a_line() -> None:
    """However long the stream and its lines, what is held is bounded."""
    reader = reader_for(200, NDJSON, None, None, THREE, LIMIT)
    assert isinstance(reader, LineReader)
    for _ in range(1000):
        reader.feed(b"x" * 100)
    assert len(reader._splitter._held) <= LIMIT  # type: ignore[attr-defined]


def test_events_hold_no_more_than_one() -> None:
    """However much data one event has, what is held is bounded, and nothing where it is too much."""
    reader = reader_for(200, SSE, None, None, THREE, LIMIT)
    assert isinstance(reader, LineReader)
    for _ in range(1000):
        reader.feed(b"data: " + b"x" * 99 + b"\n")
    assert reader._splitter._data == []  # type: ignore[attr-defined]


# Server-sent events.


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_events_by_the_standard(end: bytes, chunk: int | None) -> None:
    """Line ends of all kinds, a BOM, comments, other fields, data in several lines, `[DONE]`."""
    body = end.join(
        [
            b"\xef\xbb\xbf: a comment",
            b"",
            b"event: item",
            b"id: 1",
            b'data: {"id": "a",',
            b'data:"status": "ok"}',
            b"retry: 10",
            b"",
            b"",
            b'data: {"id": "b", "status": "failed"}',
            b"",
            b'data2: {"id": "b", "status": "failed"}',
            b' data: {"id": "b", "status": "failed"}',
            b"",
            b'data: {"id": "c", "status": "ok"}',
            b"",
            b"data",
            b"data:",
            b"",
            b"data: [DONE]",
            b"",
            b"",
        ]
    )
    assert read(body, paid=ABC, content_type=SSE, chunk=chunk) == Outcome(4, ("b",))


def test_events_bom_before_the_first_data() -> None:
    """A byte order mark at the start belongs to no field; later on it does."""
    body = b"\xef\xbb\xbf" + events({"status": "no"}) + b"\xef\xbb\xbf" + events({"status": "no"})
    for chunk in (None, 1):
        assert read(body, paid=Paid(1), content_type=SSE, chunk=chunk) == Outcome(0)


def test_events_with_other_fields_between_their_data() -> None:
    """Only an empty line ends an event."""
    body = b'data: {"status":\n: a comment\nid: 7\ndata: "no"}\n\n'
    assert read(body, paid=Paid(1), content_type=SSE) == Outcome(0)


def test_events_of_exactly_the_limit() -> None:
    """The limit holds for an event's data with its line ends."""
    half = b"data: " + b'{"status":'.ljust(499) + b"\n"
    fits = half + b"data: " + b'"no"}'.ljust(499) + b"\n\n"
    longer = half + b"data: " + b'"no"}'.ljust(500) + b"\n\n"
    assert read(fits, paid=Paid(1), content_type=SSE) == Outcome(0)
    words = f"a line of more than {LIMIT} bytes"
    assert read(longer + fits, paid=Paid(2), content_type=SSE) == Outcome(1, unreadable=words)


def test_events_last_one_without_its_empty_line() -> None:
    """It counts where the stream was completed, as the server did send it; otherwise it does not."""
    body = events({"status": "ok"}, {"status": "ok"}) + b'data: {"status": "ok"}'
    for end in (b"", b"\n", b"\r", b"\r\n"):
        assert read(body + end, content_type=SSE) == Outcome(3)
        assert read(body + end, content_type=SSE, complete=False) == Outcome(2, (), "the stream ended early")


def test_events_after_a_carriage_return_at_a_chunks_end() -> None:
    """The two halves of a CRLF in two chunks, or with an empty chunk between them, are one line end."""
    for between in ([], [b""]):
        reader = reader_for(200, SSE, None, None, THREE, LIMIT)
        for chunk in [b'data: {"status":\r', *between, b"\ndata: 200}\r\n\r\n"]:
            reader.feed(chunk)
        assert reader.finish(Said(THREE)) == Outcome(1, (), "3 paid for, 1 reported")


def test_events_line_end_in_the_next_chunk_is_a_line_of_its_own() -> None:
    """A carriage return somewhere in a chunk makes no half of the line end that the next one begins with."""
    reader = reader_for(200, SSE, None, None, Paid(1), LIMIT)
    for chunk in (b'data: {"status": "ok"}\rid: 7', b"\n\n"):
        reader.feed(chunk)
    assert reader.finish(Said(Paid(1)), complete=False) == Outcome(1)


def test_events_byte_order_mark_after_an_empty_line_is_none() -> None:
    """It is one at the very start alone."""
    body = b"\n\xef\xbb\xbf" + events({"status": "no"})
    assert read(body, paid=Paid(1), content_type=SSE) == Outcome(1)


def test_events_data_in_several_lines_is_joined_by_line_ends() -> None:
    """As the standard has it: two halves of a number are no number."""
    assert read(b"data: 20\ndata: 0\n\n" + events(200), paid=Paid(2), path="$", content_type=SSE) == Outcome(
        1, mismatch="2 paid for, 1 reported"
    )


def test_events_first_line_too_long() -> None:
    """The start of a stream may be too long as well."""
    body = b"data: " + b"x" * 5000 + b"\n\n" + events({"status": "no"})
    assert read(body, content_type=SSE) == Outcome(2, unreadable=f"a line of more than {LIMIT} bytes")


def test_events_too_long_in_several_lines() -> None:
    """The limit holds for an event's data as a whole, and is forgotten with the event."""
    long = b"".join(b"data: " + b" " * 300 + b"\n" for _ in range(5))
    body = long + b"data: null\n\n" + events({"status": "no"}, {"status": "ok"})
    outcome = read(body, content_type=SSE)
    assert outcome == Outcome(2, unreadable=f"a line of more than {LIMIT} bytes")


# Whatever comes.

PATHS = [None, "$", "$.*", "$..*", "$.results[*]", "$[*].status", "$..[?@.id]", "$[?@.a < @.b]", "$[::-1]"]
PATHS += ["$[?length(@.id) > 1]", "$..[?match(@.id, @.status)]", "$[?count(@..*) == 2]", "$[?@ == $]"]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["ok", "Failed", "a", "b", "c", 200, 404, "\ud800", "\x00"]),
)
OBJECTS = st.fixed_dictionaries({}, optional={"id": SCALARS, "status": SCALARS, "a": SCALARS, "b": SCALARS})
VALUES = st.recursive(
    st.one_of(SCALARS, OBJECTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.sampled_from(["results", "items", "id", "status", "x"]), inner, max_size=4),
    ),
    max_leaves=15,
)
PAIDS = st.one_of(
    st.builds(Paid, st.integers(0, 8)),
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 4), max_size=5).map(cost_of),
)
TYPES = st.sampled_from([JSON, NDJSON, SSE, "text/html", None])


def cut(body: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The body in chunks of these sizes, over and over."""
    start = 0
    while start < len(body):
        size = sizes.pop(0)
        sizes.append(size)
        yield body[start : start + size]
        start += size


def check(outcome: Outcome, paid: Paid) -> None:
    """What holds for every outcome."""
    assert 0 <= outcome.kept_units <= paid.units
    for words in (outcome.mismatch, outcome.unreadable):
        assert words is None or (words.isprintable() and 0 < len(words) <= 300)
    if paid.by_item is None:
        assert len(outcome.failed_items) <= paid.units
    else:
        assert set(outcome.failed_items) <= set(paid.by_item)
        failed_units = sum(paid.by_item[item] for item in outcome.failed_items)
        assert outcome.kept_units == paid.units - failed_units
    json.dumps(outcome.failed_items).encode()
    "".join(outcome.failed_items).encode()


def read_cut(body: bytes, sizes: list[int], *args: Any, complete: bool) -> Outcome:
    status, content_type, encoding, path, paid, limit = args
    reader = reader_for(status, content_type, encoding, compile_path(path) if path else None, paid, limit)
    for chunk in cut(body, list(sizes)):
        reader.feed(chunk)
    return reader.finish(Said(paid), complete=complete)


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(
    body=st.one_of(st.binary(max_size=300), VALUES.map(lambda value: json.dumps(value).encode())),
    sizes=SIZES,
    status=st.sampled_from([200, 302, 404, 500]),
    content_type=TYPES,
    encoding=st.sampled_from([None, "gzip", "deflate", "br"]),
    path=st.sampled_from(PATHS),
    paid=PAIDS,
    limit=st.integers(1, 400),
    complete=st.booleans(),
)
def test_any_bytes_make_an_outcome(
    body: bytes,
    sizes: list[int],
    status: int,
    content_type: str | None,
    encoding: str | None,
    path: str | None,
    paid: Paid,
    limit: int,
    complete: bool,
) -> None:
    """No response can raise, keep more than was paid, or put harm into a log, however it is cut up."""
    arguments = (status, content_type, encoding, path, paid, limit)
    outcome = read_cut(body, sizes, *arguments, complete=complete)
    check(outcome, paid)
    whole = read_cut(body, [1000], *arguments, complete=complete)
    # A body that is broken in two ways is refused for what is seen first.
    assert (whole.unreadable is None) == (outcome.unreadable is None)
    assert dataclasses.replace(whole, unreadable=outcome.unreadable) == outcome


@given(
    values=st.lists(VALUES, max_size=5),
    sizes=SIZES,
    kind=st.sampled_from([(NDJSON, lines), (SSE, events)]),
    code=st.sampled_from(CODED),
    path=st.sampled_from(PATHS),
    paid=PAIDS,
    complete=st.booleans(),
)
def test_any_stream_reads_alike_however_it_is_sent(
    values: list[object],
    sizes: list[int],
    kind: tuple[str, Any],
    code: tuple[str | None, Any],
    path: str | None,
    paid: Paid,
    complete: bool,
) -> None:
    """Chunks, compression and framing change nothing about what a stream reports."""
    content_type, sent = kind
    encoding, coded = code
    plain = read_cut(lines(*values), [1000], 200, NDJSON, None, path, paid, 10_000, complete=complete)
    check(plain, paid)
    body = coded(sent(*values))
    assert read_cut(body, sizes, 200, content_type, encoding, path, paid, 10_000, complete=complete) == plain


@given(value=VALUES, path=st.sampled_from(PATHS[1:]), paid=PAIDS)
@example(value=[{"id": 1}], path="$..[?match(@.id, @.status)]", paid=THREE)
def test_any_json_can_be_asked_any_path(value: object, path: str, paid: Paid) -> None:
    """A path is applied to whatever the app sends: the outcome counts it, and is never an error."""
    outcome = read(value, paid=paid, path=path, limit=100_000)
    check(outcome, paid)
    assert outcome.unreadable is None or "match(" in path


STEPS = [".results", "['id']", ".x", ".*", "[*]", "[0]", "..*", "['items', 'x']", "[*, 'x']", "[?@.id]"]


@given(value=VALUES, steps=st.lists(st.sampled_from(STEPS), max_size=4))
@example(value={"x": [{"id": 1}, [2], {"id": {"id": 3}}]}, steps=[".x", "[*]", "['id']"])
@example(value=[{"x": 1, "id": 2}, [3, 4], 5], steps=["[*]", ".*"])
@example(value={"items": 1, "x": 2}, steps=["['items', 'x']"])
@example(value={"items": 1, "x": {"x": 2}}, steps=["..*"])
def test_path_of_names_and_wildcards_selects_what_the_library_selects(value: object, steps: list[str]) -> None:
    """Most paths are walked without the library: the same values in the same order, of any JSON there is."""
    text = "$" + "".join(steps)
    selected = [node.value for node in find(text, value)]  # type: ignore[arg-type]
    assert compile_path(text)(value) == [entry(one) for one in selected]


@given(flags=st.lists(st.booleans(), max_size=12), units=st.integers(0, 8), failed=st.integers(0, 8))
def test_numbers_are_counted_as_the_rules_say(flags: list[bool], units: int, failed: int) -> None:
    """kept = min(units - said, delivered), with the first `units` reported entries."""
    paid = Paid(units)
    it = said(paid, units=min(failed, units))
    outcome = count(paid, InOrder(flags), it)
    assert outcome.kept_units == min(units - it.units, sum(flags[:units]))
    # Fewer than were paid for are no mismatch where the route said how many fewer.
    assert (outcome.mismatch is None) == (units - it.units <= len(flags) <= units)


@given(
    entries=st.lists(st.tuples(st.sampled_from([*"abcdxyz", None]), st.booleans()), max_size=12),
    costs=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5)),
    data=st.data(),
)
def test_mappings_are_counted_as_the_rules_say(
    entries: list[tuple[str | None, bool]], costs: dict[str, int], data: st.DataObject
) -> None:
    """An item succeeded if it was mentioned, every mention says so, and the route did not say otherwise."""
    paid = cost_of(costs)
    spoken = data.draw(st.sets(st.sampled_from(sorted(costs)))) if costs else set()
    outcome = count(paid, ById(entries), said(paid, *spoken))
    check(outcome, paid)
    mentions: Mapping[str, list[bool]] = {item: [ok for id_, ok in entries if id_ == item] for item in costs}
    fine = [item for item, oks in mentions.items() if oks and all(oks) and item not in spoken]
    assert outcome.kept_units == sum(costs[item] for item in fine)
    assert outcome.failed_items == tuple(item for item in costs if item not in fine)
    assert (outcome.mismatch is None) == (sorted(costs) == sorted(str(id_) for id_, _ in entries))


def check_words(error: Exception) -> None:
    """What holds for every error's text."""
    assert str(error).isprintable()
    assert len(str(error)) < 300


# Built anew each time: Hypothesis cannot show it.
HUGE = st.builds(pow, st.just(10), st.just(5000))
ANYTHING = st.recursive(
    st.one_of(SCALARS, st.binary(max_size=5), st.complex_numbers(), st.builds(Rude), HUGE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner),
        st.dictionaries(st.one_of(SCALARS, HUGE), inner, max_size=4),
    ),
    max_leaves=10,
)


@given(
    text=st.one_of(
        st.binary(max_size=12),
        st.builds(
            lambda value, encoding: json.dumps(value, ensure_ascii=False).encode(encoding, "surrogatepass"),
            VALUES,
            st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]),
        ),
    ),
    before=st.sampled_from([b"", b" ", b"\n\t", b"\0", b"\xc2\xa0"]),
    after=st.sampled_from([b"", b" \n", b"\0", b"1", b"\xa0"]),
)
def test_any_bytes_are_the_json_that_python_reads(text: bytes, before: bytes, after: bytes) -> None:
    """Whatever way is the quickest: the same value, or none."""
    body = before + text + after
    try:
        value = json.loads(body)
    except ValueError:
        with pytest.raises(Unreadable):
            read_json(body)
    else:
        assert repr(read_json(body)) == repr(value)


@given(value=ANYTHING, price=st.one_of(st.just(1), ANYTHING))
def test_any_cost_is_a_price_or_an_error_in_words(value: object, price: object) -> None:
    """Whatever a cost function returns, it is a whole price or a short, printable error."""
    try:
        paid = cost_of(value, price=price)
    except (TypeError, ValueError) as error:
        check_words(error)
    else:
        assert type(paid.units) is int
        assert 0 <= paid.units <= MAX_AMOUNT
        assert paid.by_item is None or sum(paid.by_item.values()) == paid.units


@given(value=ANYTHING, paid=PAIDS)
def test_any_returned_value_is_a_report_or_an_error_in_words(value: object, paid: Paid) -> None:
    """Whatever an outcomes function returns, it can be counted, or is a short, printable error."""
    try:
        report = from_returned(value)
    except (TypeError, ValueError) as error:
        check_words(error)
    else:
        outcome = count(paid, report, Said(paid))
        assert 0 <= outcome.kept_units <= paid.units
        assert outcome.mismatch is None or re.fullmatch(r"[^\n\r\x00]{1,300}", outcome.mismatch)
