"""What differs between a charge as the journal has it and the service's entries: each kind, and nothing else."""

from dataclasses import replace

import pytest

from metered_billing.charge import (
    Declined,
    Deducted,
    Lost,
    NotSent,
    Record,
    Refunded,
    Reported,
    Unknown,
    Unread,
    Voided,
)
from metered_billing.reconcile import KINDS, Entry, Worksheet, compare, entry_of, happened_at, made_at, net_of, unknown
from metered_billing.runtime import new_uuid7

from .scenes import NOON, charge

WHEN = "2025-11-25T12:00:01.000Z"
TEN = Deducted("t-1")
SETTLED = charge(TEN, Reported(8), Refunded())
WHOLE = charge(TEN, Reported(10))
GONE = charge(TEN, Lost("killed"), Refunded())
VOIDED = charge(Unknown("timeout"), Voided(10))


def entry(record: Record, kind: str, amount: int, **changes: object) -> Entry:
    key = {"deduction": record.id, "refund": record.refund_key, "void": record.id}[kind]
    made = Entry(f"{kind}-1" if kind != "deduction" else "t-1", kind, "t-1", key, "acme", "ann", amount, WHEN)
    return replace(made, **changes)  # type: ignore[arg-type]


def took(record: Record, **changes: object) -> Entry:
    return replace(entry(record, "deduction", -10), **changes)  # type: ignore[arg-type]


def gave(record: Record, amount: int, **changes: object) -> Entry:
    return entry(record, "refund", amount, **changes)


@pytest.mark.parametrize(
    ("record", "entries"),
    [
        (SETTLED, [took(SETTLED), gave(SETTLED, 2)]),
        (WHOLE, [took(WHOLE)]),
        (GONE, [gave(GONE, 10), took(GONE)]),
        (VOIDED, []),
        (VOIDED, [took(VOIDED), entry(VOIDED, "void", 10)]),
        (charge(Declined(3)), []),
        (charge(NotSent("x")), []),
        # Not final, or for a person: nothing is expected of them.
        (charge(), [took(SETTLED)]),
        (charge(TEN), []),
        (charge(TEN, Reported(8)), []),
        (charge(TEN, Unread("x")), []),
    ],
)
def test_agreement_is_no_difference(record: Record, entries: list[Entry]) -> None:
    """In every state, in whatever order the entries come."""
    assert compare(record, entries) is None


@pytest.mark.parametrize(
    ("record", "entries", "kind", "more"),
    [
        (SETTLED, [], "no deduction", -8),
        (GONE, [], "no deduction", 0),
        (SETTLED, [took(SETTLED), gave(SETTLED, 2), took(SETTLED, id="t-2")], "deducted twice", 10),
        (WHOLE, [took(WHOLE, amount=-11)], "other deduction", 1),
        (WHOLE, [took(WHOLE, user_id="bob")], "other deduction", 0),
        (WHOLE, [took(WHOLE, tenant_id="other")], "other deduction", 0),
        (WHOLE, [took(WHOLE, transaction_id="t-9")], "other deduction", 0),
        (WHOLE, [took(WHOLE, idempotency_key="another charge's")], "other deduction", 0),
        (SETTLED, [took(SETTLED)], "not refunded", 2),
        (SETTLED, [took(SETTLED), gave(SETTLED, 1)], "not refunded", 1),
        (SETTLED, [took(SETTLED), gave(SETTLED, 3)], "refunded otherwise", -1),
        (WHOLE, [took(WHOLE), gave(WHOLE, 1)], "refunded otherwise", -1),
        (SETTLED, [took(SETTLED), gave(SETTLED, 2, idempotency_key="by hand")], "refunded otherwise", 0),
        (SETTLED, [took(SETTLED), gave(SETTLED, 2), entry(SETTLED, "void", 8)], "refunded otherwise", -8),
        (VOIDED, [took(VOIDED)], "not undone", 10),
        (charge(Declined(3)), [took(SETTLED)], "not undone", 10),
        (charge(NotSent("x")), [took(SETTLED), gave(SETTLED, 4)], "not undone", 6),
    ],
)
def test_each_difference_has_its_kind_and_amount(record: Record, entries: list[Entry], kind: str, more: int) -> None:
    """And how many more credits the service has taken than the journal says."""
    found = compare(record, entries)
    assert found is not None
    assert (found.kind, found.credits) == (kind, more)
    assert found.kind in KINDS


def test_every_kind_is_documented() -> None:
    """An unknown deduction too."""
    assert unknown(took(SETTLED)).kind in KINDS
    assert unknown(took(SETTLED)).credits == 10


@pytest.mark.parametrize("item", [{}, {"amount": True}, {"amount": 1.5}, {"amount": -1, "id": 7, "kind": "deduction"}])
def test_answer_of_something_else_is_no_entry(item: dict[str, object]) -> None:
    """It is not guessed at."""
    with pytest.raises(ValueError, match="not an entry"):
        entry_of(item)


def test_entry_without_a_transaction_is_its_own() -> None:
    """A service of one's own may leave it out for deductions."""
    item = {
        "id": "t-7",
        "kind": "deduction",
        "idempotency_key": "k",
        "tenant_id": "a",
        "amount": -1,
        "created_at": WHEN,
    }
    assert entry_of(item).transaction_id == "t-7"
    assert net_of([entry_of(item)]) == 1


def test_charge_is_made_when_its_key_says() -> None:
    """By the app's clock; a key that is no UUIDv7 leaves the service's; where nothing can be read, nothing is said."""
    made = made_at(took(SETTLED))
    assert made is not None
    assert made > NOON  # the id is of today
    other = took(SETTLED, idempotency_key="order-7")
    assert made_at(other) == happened_at(other) == NOON + 1
    assert made_at(replace(other, created_at="yesterday")) is None


def test_worksheet_puts_both_sides_together() -> None:
    """Only what differs comes back, with all its entries; a deduction without a charge is unknown."""
    missing, lone = charge(TEN, Reported(10)), charge(TEN, Reported(10), account=SETTLED.account)
    with Worksheet() as sheet:
        for record in (SETTLED, missing, charge(), charge(TEN, Unread("x"))):
            sheet.add_charge(record)
        sheet.add_entry(took(SETTLED))
        sheet.add_entry(gave(SETTLED, 3))
        stray = replace(took(lone), id="t-5", transaction_id="t-5")
        sheet.add_entry(stray)
        found = {record.id: {one.id for one in entries} for record, entries in sheet.differing()}
        # `missing` names the transaction t-1, so that is shown: it is of another key.
        assert found == {SETTLED.id: {"t-1", "refund-1"}, missing.id: {"t-1", "refund-1"}}
        assert list(sheet.unknown()) == [stray]
        assert sheet.counts() == (2, 3)
        assert dict(sheet.tenants()) == {"acme": NOON}


def test_key_of_another_tenant_is_unknown() -> None:
    """Keys belong to their tenant."""
    with Worksheet() as sheet:
        sheet.add_charge(SETTLED)
        foreign = took(SETTLED, tenant_id="other", id=new_uuid7())
        sheet.add_entry(foreign)
        assert list(sheet.unknown()) == [foreign]
