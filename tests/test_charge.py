"""A charge's state machine: each row of its table, nothing beside the table, and the sums."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_billing.charge import (
    FINAL,
    MAX_AMOUNT,
    MAX_ID_LENGTH,
    MAX_ITEMS,
    MAX_ITEMS_BYTES,
    TRANSITIONS,
    Account,
    AlreadyVoided,
    Declined,
    Deducted,
    Event,
    Found,
    ImpossibleEvent,
    Lost,
    NotFound,
    NotSent,
    Record,
    Refunded,
    Refused,
    Reported,
    State,
    Unanswered,
    Unknown,
    Unread,
    Voided,
    after_unknown,
    opened,
    orphaned,
    step,
)

OPENED = Record(id="c1", account=Account("t1"), amount_credits=10, units=10, opened_at=100.0)
NOW = 200.0


def a_record(state: State, *, refund_credits: int = 0) -> Record:
    """A charge of 10 credits in this state."""
    return dataclasses.replace(OPENED, state=state, refund_credits=refund_credits)


def test_changed_copy_is_what_replace_makes() -> None:
    """The same record, as strictly checked; what it has no field for is refused, not carried along unseen."""
    changes: dict[str, Any] = {"state": State.REFUNDING, "refund_credits": 2, "reason": "failed items"}
    assert OPENED.but(**changes) == dataclasses.replace(OPENED, **changes)
    with pytest.raises(ValueError, match="refunded"):
        OPENED.but(refund_credits=11)
    with pytest.raises(TypeError, match=r"refund_credit$"):
        OPENED.but(refund_credit=2)


def test_opened_charge_is_a_record_with_all_else_at_its_default() -> None:
    """Nothing of another charge is in it, and no two share what can be changed."""
    account = Account("acme", "ann")
    charge = opened("c2", account, amount_credits=20, units=2, now=NOW, owner="here")
    known: dict[str, Any] = {"id": "c2", "account": account, "amount_credits": 20, "units": 2, "owner": "here"}
    assert charge == Record(**known, opened_at=NOW, due_at=NOW)
    assert charge.metadata is not opened("c3", account, amount_credits=20, units=2, now=NOW, owner="here").metadata
    told = opened("c2", account, amount_credits=20, units=2, now=NOW, owner="here", request_id="r", metadata={"a": "b"})
    assert told == charge.but(request_id="r", metadata={"a": "b"})
    with pytest.raises(ValueError, match="an amount of 0"):
        opened("c2", account, amount_credits=0, units=0, now=NOW, owner="here")


# The design's table, row by row: state, refund due, what happened, what follows.
ROWS: list[tuple[State, int, Event, State]] = [
    (State.OPENED, 0, Deducted("tx"), State.DEDUCTED),
    (State.OPENED, 0, Declined(), State.DECLINED),
    (State.OPENED, 0, Declined(certain=False), State.VOIDING),
    (State.OPENED, 0, Declined(after_unknown=True), State.VOIDING),
    (State.OPENED, 0, Declined(forgotten=True), State.VOIDING),
    (State.OPENED, 0, Declined(certain=False, after_unknown=True), State.VOIDING),
    (State.OPENED, 0, NotSent("no connection"), State.ABANDONED),
    (State.OPENED, 0, Unknown("timed out"), State.VOIDING),
    (State.DEDUCTED, 0, Reported(10), State.SETTLED),
    (State.DEDUCTED, 0, Reported(8), State.REFUNDING),
    (State.DEDUCTED, 0, Reported(0), State.REFUNDING),
    (State.DEDUCTED, 0, Lost("died"), State.REFUNDING),
    (State.DEDUCTED, 0, Unread("the reader raised"), State.DISPUTED),
    (State.REFUNDING, 2, Refunded(), State.SETTLED),
    (State.REFUNDING, 10, Refunded(), State.SETTLED),
    (State.REFUNDING, 10, AlreadyVoided(), State.VOIDED),
    (State.REFUNDING, 2, AlreadyVoided(), State.DISPUTED),
    (State.REFUNDING, 2, Refused("no"), State.DISPUTED),
    (State.VOIDING, 0, Voided(), State.VOIDED),
    (State.VOIDING, 0, Refused("no"), State.DISPUTED),
    (State.VOIDING, 0, Found("tx"), State.REFUNDING),
    (State.VOIDING, 0, NotFound(), State.VOIDED),
]

# One event for each name that a row of the table can have.
OCCASIONS: Mapping[str, tuple[Event, int]] = {
    event.occasion_for(a_record(state, refund_credits=due)): (event, due) for state, due, event, _ in ROWS
}


@pytest.mark.parametrize(("state", "due", "event", "after"), ROWS, ids=[f"{s}-{e!r}-{due}" for s, due, e, _ in ROWS])
def test_step_follows_each_row_of_the_table(state: State, due: int, event: Event, after: State) -> None:
    """Every row of the design leads where the design says."""
    assert step(a_record(state, refund_credits=due), event, now=NOW).state is after


def test_rows_of_the_design_are_all_there_are() -> None:
    """The table holds the design's rows and no other."""
    rows = {(s, e.occasion_for(a_record(s, refund_credits=due)), after) for s, due, e, after in ROWS}
    table = {(s, name, after) for s, outgoing in TRANSITIONS.items() for name, after in outgoing.items()}
    assert rows == table


IMPOSSIBLE = [(state, name) for state in State for name in OCCASIONS if name not in TRANSITIONS.get(state, {})]


@pytest.mark.parametrize(("state", "occasion"), IMPOSSIBLE)
def test_step_with_an_impossible_event_raises(state: State, occasion: str) -> None:
    """What the table does not have cannot happen, and the error names the charge, its state and the event."""
    event, due = OCCASIONS[occasion]
    with pytest.raises(ImpossibleEvent, match=rf"charge c1 is {state}; {type(event).__name__}\("):
        step(a_record(state, refund_credits=due), event, now=NOW)


def test_step_with_a_bare_event_raises() -> None:
    """An event that is none of ours has no row, and changes nothing."""
    with pytest.raises(ImpossibleEvent):
        step(OPENED, Event(), now=NOW)
    assert Event().changes(OPENED) == {}


def test_final_states_have_no_way_out() -> None:
    """Exactly the final states have no row that leaves them."""
    assert set(TRANSITIONS) == set(State) - FINAL
    assert all(a_record(state).final for state in FINAL)
    assert not any(a_record(state).final for state in TRANSITIONS)


def test_every_state_can_be_reached_and_left_for_a_final_one() -> None:
    """No state is dead: each is reachable from `opened`, and from each a final one is reachable."""

    def reachable(start: State) -> set[State]:
        seen, todo = {start}, [start]
        while todo:
            for after in TRANSITIONS.get(todo.pop(), {}).values():
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return seen

    assert reachable(State.OPENED) == set(State)
    assert all(reachable(state) & FINAL for state in State)


def test_states_are_called_in_every_journal_what_they_are_called_here() -> None:
    """Journals on disk hold these words: another word would lose the charges that they hold."""
    words = "opened deducted refunding voiding settled declined abandoned voided disputed"
    assert [str(state) for state in State] == words.split()


def test_step_into_a_final_state_closes_the_record() -> None:
    """A final charge says when it became so; one that goes on is due at once, with its tries at 0."""
    waiting = dataclasses.replace(a_record(State.REFUNDING, refund_credits=2), tries=7, due_at=150.0)
    settled = step(waiting, Refunded(), now=NOW)
    assert (settled.closed_at, settled.tries, settled.due_at) == (NOW, 0, NOW)
    voiding = step(dataclasses.replace(OPENED, tries=3), Unknown("timed out"), now=NOW)
    assert (voiding.closed_at, voiding.tries, voiding.due_at) == (None, 0, NOW)


def test_step_leaves_the_record_before_as_it_was() -> None:
    """Records are immutable: `step` makes the next one."""
    before = dataclasses.asdict(OPENED)
    step(OPENED, Deducted("tx"), now=NOW)
    assert dataclasses.asdict(OPENED) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPENED.state = State.SETTLED  # type: ignore[misc]


# What an event changes beside the state.


def test_deducted_keeps_the_transaction_id() -> None:
    """The service's name for the deduction is what its refund will be made against."""
    assert step(OPENED, Deducted("tx-9", balance=3), now=NOW).transaction_id == "tx-9"


@pytest.mark.parametrize(
    ("state", "event", "reason"),
    [
        (State.OPENED, Declined(balance=1), "insufficient credits"),
        (State.OPENED, NotSent("refused"), "refused"),
        (State.OPENED, Unknown("timed out"), "timed out"),
        (State.DEDUCTED, Lost("died"), "died"),
        (State.DEDUCTED, Unread("KeyError"), "KeyError"),
        (State.REFUNDING, Refused("closed account"), "closed account"),
    ],
)
def test_reason_is_kept_in_words(state: State, event: Event, reason: str) -> None:
    """Whatever goes wrong with a charge is on its record for support to read."""
    assert step(a_record(state), event, now=NOW).reason == reason


def test_reported_some_failed_refunds_the_rest() -> None:
    """Only failed items are refunded, and they are named."""
    refunding = step(a_record(State.DEDUCTED), Reported(8, failed_items=("a", "b"), reason="2 failed"), now=NOW)
    assert (refunding.refund_credits, refunding.refund_items, refunding.reason) == (2, ("a", "b"), "2 failed")
    assert refunding.kept_credits == 8


def test_reported_all_succeeded_refunds_nothing() -> None:
    """Nothing is due, even where an item that cost nothing failed."""
    settled = step(a_record(State.DEDUCTED), Reported(10, failed_items=("free",)), now=NOW)
    assert (settled.refund_credits, settled.refund_items, settled.reason) == (0, (), None)
    assert settled.kept_credits == 10


def test_reported_without_a_reason_says_that_items_failed() -> None:
    """A refund never goes out without words for it."""
    assert step(a_record(State.DEDUCTED), Reported(8), now=NOW).reason == "failed items"


@pytest.mark.parametrize("length", [3, 40])
def test_reported_with_very_many_failed_items_names_the_first(length: int) -> None:
    """A refund names a thousand items and no more, however short they are; its amount counts them all."""
    items = tuple(f"{n:0{length}}" for n in range(2 * MAX_ITEMS))
    assert step(a_record(State.DEDUCTED), Reported(0, items), now=NOW).refund_items == items[:1_000]
    assert MAX_ITEMS == 1_000


def test_reported_with_ids_as_long_as_may_be_names_them_all() -> None:
    """64 KiB of ids are named to the last; one byte more, and the last is not."""
    items = tuple(f"{n:0128}" for n in range(512))
    assert sum(map(len, items)) == MAX_ITEMS_BYTES == 65_536
    assert step(a_record(State.DEDUCTED), Reported(0, items), now=NOW).refund_items == items
    longer = (*items[:-1], items[-1] + "x")
    assert step(a_record(State.DEDUCTED), Reported(0, longer), now=NOW).refund_items == items[:-1]


def test_reported_with_half_a_surrogate_pair_still_refunds() -> None:
    """What no database can hold must not stop the money."""
    refunding = step(a_record(State.DEDUCTED), Reported(0, ("\ud800",)), now=NOW)
    assert (refunding.refund_credits, refunding.refund_items) == (10, ("\ud800",))


@pytest.mark.parametrize("kept", [-1, 11])
def test_reported_more_than_was_paid_or_less_than_nothing_raises(kept: int) -> None:
    """A refund below zero or above the amount can never be put on record."""
    with pytest.raises(ValueError, match=r"charge c1: .* of 10 refunded"):
        step(a_record(State.DEDUCTED), Reported(kept), now=NOW)


def test_lost_and_found_refund_everything() -> None:
    """Without an outcome on record nothing is kept."""
    assert step(a_record(State.DEDUCTED), Lost("died"), now=NOW).refund_credits == 10
    found = step(a_record(State.VOIDING), Found("tx-7"), now=NOW)
    assert (found.refund_credits, found.transaction_id) == (10, "tx-7")


def test_unread_keeps_all() -> None:
    """An outcome that the app's own reader could not read is kept until a person has looked."""
    deducted = dataclasses.replace(a_record(State.DEDUCTED), transaction_id="tx")
    disputed = step(deducted, Unread("KeyError"), now=NOW)
    assert (disputed.refund_credits, disputed.kept_credits) == (0, 10)


def test_already_voided_says_why_only_where_it_is_a_dispute() -> None:
    """A full refund of a voided deduction is the same thing; a partial one is not, and says so."""
    refunding = dataclasses.replace(a_record(State.REFUNDING, refund_credits=10), reason="died")
    assert step(refunding, AlreadyVoided(), now=NOW).reason == "died"
    partial = step(a_record(State.REFUNDING, refund_credits=2), AlreadyVoided(), now=NOW)
    assert partial.reason == "2 credits were to be refunded, but all had been voided already"
    assert partial.refund_credits == 2


def test_disputed_void_keeps_nothing() -> None:
    """Whether anything was taken is what the dispute is about."""
    assert step(a_record(State.VOIDING), Refused("HTTP 422"), now=NOW).kept_credits == 0


@pytest.mark.parametrize("amount", [True, 1.0, "1"])
def test_record_takes_whole_numbers_alone(amount: Any) -> None:
    """Neither a bool nor a float is an amount."""
    with pytest.raises(ValueError, match="an amount of"):
        dataclasses.replace(OPENED, amount_credits=amount)
    with pytest.raises(ValueError, match="of 10 refunded"):
        dataclasses.replace(OPENED, refund_credits=amount)


def test_record_can_be_hashed() -> None:
    """It is frozen, after all."""
    assert {OPENED, dataclasses.replace(OPENED)} == {OPENED}


# After an attempt that went unanswered.


def test_after_unknown_a_confirmation_stands() -> None:
    """The key makes both copies one: taken is taken."""
    answer = Deducted("tx")
    assert after_unknown(answer, "timed out") is answer


def test_after_unknown_an_unknown_stays_unknown() -> None:
    """Two unanswered attempts are one doubt."""
    answer = Unknown("500", misconfigured=True)
    assert after_unknown(answer, "timed out") is answer


def test_after_unknown_a_decline_is_in_doubt() -> None:
    """The first copy may yet arrive, after a top-up: the deduction has to be voided."""
    declined = after_unknown(Declined(balance=3), "timed out")
    assert declined == Declined(balance=3, after_unknown=True)
    assert step(OPENED, declined, now=NOW).state is State.VOIDING


def test_after_unknown_not_sent_is_unknown() -> None:
    """That the second attempt found no connection says nothing about the first."""
    answer = after_unknown(NotSent("no connection", retry_after_s=3.0), "timed out")
    assert answer == Unknown("timed out; then no connection", retry_after_s=3.0)
    assert step(OPENED, answer, now=NOW).state is State.VOIDING


# A record that nobody serves any more.


def test_orphaned_opened_is_unknown() -> None:
    """It may have been sent in the instant before the crash: void it."""
    event = orphaned(OPENED)
    assert event is not None
    after = step(OPENED, event, now=NOW)
    assert (after.state, after.reason) == (State.VOIDING, "found after its request had ended, without an answer")


def test_orphaned_deducted_refunds_all() -> None:
    """A process that died before the outcome was on record gives everything back."""
    record = a_record(State.DEDUCTED)
    event = orphaned(record)
    assert event is not None
    after = step(record, event, now=NOW)
    assert (after.state, after.refund_credits) == (State.REFUNDING, 10)
    assert after.reason == "the request ended before its outcome was on record"


@pytest.mark.parametrize("state", sorted(set(State) - {State.OPENED, State.DEDUCTED}))
def test_orphaned_elsewhere_goes_on_where_it_stands(state: State) -> None:
    """A refund or void that is due stays due, whoever drives it; a final charge stays final."""
    assert orphaned(a_record(state)) is None


# Invariants of records and accounts.


@pytest.mark.parametrize("amount", [0, -1, MAX_AMOUNT + 1])
def test_record_with_an_impossible_amount_raises(amount: int) -> None:
    """A charge is of 1 to 2**53-1 credits."""
    with pytest.raises(ValueError, match=f"charge c1: an amount of {amount} credits"):
        dataclasses.replace(OPENED, amount_credits=amount)


@pytest.mark.parametrize("refund", [-1, 11])
def test_record_with_an_impossible_refund_raises(refund: int) -> None:
    """What goes back is never more than what was taken, and never less than nothing."""
    with pytest.raises(ValueError, match=f"charge c1: {refund} of 10 refunded"):
        dataclasses.replace(OPENED, refund_credits=refund)


@pytest.mark.parametrize("amount", [1, 9_007_199_254_740_991])
def test_record_at_the_limits_is_fine(amount: int) -> None:
    """The smallest and the largest amount are amounts, and can be refunded whole."""
    assert amount in (1, MAX_AMOUNT)
    whole = dataclasses.replace(OPENED, amount_credits=amount, refund_credits=amount)
    assert whole.refund_credits == whole.amount_credits


def test_record_begins_with_nothing_done() -> None:
    """A new charge is opened and due at once: nothing refunded, nothing tried."""
    assert OPENED.state is State.OPENED
    assert (OPENED.refund_credits, OPENED.refund_items, OPENED.tries, OPENED.due_at) == (0, (), 0, 0.0)
    assert (OPENED.transaction_id, OPENED.declined_at, OPENED.closed_at) == (None, None, None)
    assert OPENED.owner == ""


def test_answers_say_no_more_than_they_were_told() -> None:
    """Unless it is said, an answer is nobody's mistake, moved nothing, was sent, and tells of no decline."""
    assert not Unknown("timed out").misconfigured
    assert Voided().refunded_credits == 0
    assert (Unanswered("timed out").sent, Unanswered("timed out").declined) == (True, None)


def test_refund_key_is_the_charges_own() -> None:
    """One charge has one refund, so its key follows from the charge's id."""
    assert OPENED.refund_key == "c1:refund"


@pytest.mark.parametrize(
    ("state", "refund", "kept"),
    [
        (State.OPENED, 0, 0),
        (State.DEDUCTED, 0, 0),
        (State.REFUNDING, 2, 8),
        (State.SETTLED, 2, 8),
        (State.SETTLED, 0, 10),
        (State.DECLINED, 0, 0),
        (State.ABANDONED, 0, 0),
        (State.VOIDING, 0, 0),
        (State.VOIDED, 10, 0),
    ],
)
@pytest.mark.parametrize("transaction_id", [None, "tx"])
def test_kept_credits(state: State, refund: int, kept: int, transaction_id: str | None) -> None:
    """Paid for good is what the outcome left, and nothing before there is one, whether it was deducted or not."""
    record = dataclasses.replace(a_record(state, refund_credits=refund), transaction_id=transaction_id)
    assert record.kept_credits == kept


@pytest.mark.parametrize(("transaction_id", "kept"), [(None, 0), ("tx", 8)])
def test_kept_credits_of_a_disputed_refund(transaction_id: str | None, kept: int) -> None:
    """What was to go back is disputed, and the rest kept; where nothing is known to be taken, nothing is."""
    disputed = dataclasses.replace(a_record(State.DISPUTED, refund_credits=2), transaction_id=transaction_id)
    assert disputed.kept_credits == kept


@pytest.mark.parametrize("value", ["t", "ü" * MAX_ID_LENGTH, "a b/c?d#e"])
def test_account_takes_any_printable_id(value: str) -> None:
    """Ids are the app's own affair."""
    assert Account(value, value) == Account(value, value)
    assert Account(value).user_id is None


@pytest.mark.parametrize("value", ["", "x" * (MAX_ID_LENGTH + 1), "a\nb", "a\x00", "a\x7f", "a\ud800", 7, b"t"])
def test_account_refuses_what_is_no_id(value: str) -> None:
    """Empty, too long, with control characters or not a string: named in the error, never echoed."""
    with pytest.raises(ValueError, match="tenant_id must be 1 to 255 characters"):
        Account(value)
    with pytest.raises(ValueError, match="user_id must be 1 to 255 characters"):
        Account("t", value)


def test_account_without_a_tenant_raises() -> None:
    """Only the user may be absent."""
    with pytest.raises(ValueError, match="tenant_id"):
        Account(None)  # type: ignore[arg-type]


# Whatever happens.

AMOUNTS = st.one_of(st.integers(1, 20), st.integers(1, MAX_AMOUNT))
WORDS = st.text(max_size=5)
EVENTS = st.one_of(
    st.builds(Deducted, WORDS),
    st.builds(Declined, certain=st.booleans(), after_unknown=st.booleans()),
    st.builds(NotSent, WORDS),
    st.builds(Unknown, WORDS),
    st.builds(Reported, st.integers(-2, 22), st.lists(WORDS).map(tuple)),
    st.builds(Lost, WORDS),
    st.builds(Unread, WORDS),
    st.builds(Refunded),
    st.builds(AlreadyVoided),
    st.builds(Refused, WORDS),
    st.builds(Voided),
    st.builds(Found, WORDS),
    st.builds(NotFound),
)


@given(amount=AMOUNTS, events=st.lists(EVENTS, max_size=30))
def test_any_sequence_of_events_keeps_the_sums(amount: int, events: list[Event]) -> None:
    """Whatever comes in whatever order: 0 <= refund <= amount, and a final charge never changes again."""
    record = dataclasses.replace(OPENED, amount_credits=amount)
    for event in events:
        before = record
        try:
            record = step(record, event, now=NOW)
        except (ImpossibleEvent, ValueError):
            assert record is before
            continue
        assert not before.final
        assert record.state in TRANSITIONS[before.state].values()
        assert 0 <= record.refund_credits <= record.amount_credits == amount
        assert 0 <= record.kept_credits <= amount - record.refund_credits
        assert record.final == (record.closed_at is not None)
        # All but the answer's own fields stay as they were.
        assert (record.id, record.account, record.opened_at) == (before.id, before.account, before.opened_at)


@given(st.lists(EVENTS, max_size=30), st.lists(EVENTS, max_size=30))
def test_a_refund_once_due_never_changes(before: list[Event], after: list[Event]) -> None:
    """From the moment that an outcome is on record, what goes back stays the same to the end."""

    def driven(record: Record, events: list[Event]) -> Record:
        for event in events:
            try:
                record = step(record, event, now=NOW)
            except (ImpossibleEvent, ValueError):
                continue
        return record

    record = driven(OPENED, before)
    if record.state is State.REFUNDING or record.final:
        later = driven(record, after)
        assert (later.refund_credits, later.refund_items) == (record.refund_credits, record.refund_items)


def test_reported_with_very_long_ids_names_the_first() -> None:
    """A refund whose body is too long for the service would be refused as a whole."""
    items = tuple(f"{number:03}" + "ü" * 250 for number in range(1000))
    named = step(a_record(State.DEDUCTED), Reported(0, items), now=NOW).refund_items
    assert named == items[: len(named)]
    assert 100 < len(named) < 1000
    assert sum(len(item.encode()) for item in named) <= MAX_ITEMS_BYTES


def test_history_tells_what_happened_and_when() -> None:
    """Each step is kept, oldest first, for whoever asks later."""
    deducted = step(OPENED, Deducted("tx"), now=201.0)
    refunding = step(deducted, Reported(8, ("a", "b")), now=202.0)
    assert step(refunding, Refunded("re"), now=203.0).history == (
        ("deducted", 201.0),
        ("some failed", 202.0),
        ("refunded", 203.0),
    )
