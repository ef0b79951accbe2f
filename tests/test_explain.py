"""A charge's story: every state and event has words, and they say what the record says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_billing import explain
from metered_billing.charge import (
    TRANSITIONS,
    AlreadyVoided,
    Declined,
    Deducted,
    Event,
    Lost,
    NotSent,
    Record,
    Refunded,
    Refused,
    Reported,
    State,
    Unknown,
    Unread,
    Voided,
    step,
)
from metered_billing.explain import as_document, story_of

from .scenes import NOON, charge

TEN = Deducted("t-1")
TWO_FAILED = Reported(8, ("img-3", "img-7"))


def told(record: Record, *, living: bool = True, now: float = NOON + 60) -> str:
    story = story_of(record, living=living, now=now)
    lines = [story.summary, *(" ".join(fact) for fact in story.facts)]
    lines += [f"{explain.moment(at)} {word} {text}" for at, word, text in story.events]
    return "\n".join([*lines, *(" ".join(fact) for fact in story.outcome)])


def test_every_event_has_words() -> None:
    """Each row of the table, and no others."""
    assert explain._EVENTS.keys() == {occasion for row in TRANSITIONS.values() for occasion in row}
    assert explain._SUMMARIES.keys() == set(State)


def test_partial_failure_says_who_paid_what_and_why() -> None:
    """Asked, deducted, delivered, refunded and kept, with the failed items, the request and the trace."""
    record = charge(
        TEN,
        TWO_FAILED,
        Refunded("r-1"),
        request_id="req-7",
        metadata={"endpoint": "create_products"},
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    )
    assert told(record).splitlines() == [
        "acme / ann paid 8 credits: 10 were taken, and 2 credits came back.",
        "asked 10 credits (10 x 1 credit)",
        "endpoint create_products",
        "request req-7",
        "transaction t-1",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736",
        "2025-11-25 12:00:00 opened on record, before anything was sent",
        "2025-11-25 12:00:01 deducted 10 credits taken from acme / ann",
        "2025-11-25 12:00:02 some failed delivered for 8 credits; 2 credits to go back,"
        " for img-3, img-7 (failed items)",
        f"2025-11-25 12:00:03 refunded 2 credits back with acme / ann, by the refund {record.refund_key}",
        "kept 8 credits",
        "pending nothing",
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (charge(TEN, Reported(10)), "paid 10 credits."),
        (charge(TEN, Reported(0), Refunded()), "paid nothing: all 10 credits came back."),
        (charge(Declined(3)), "paid nothing: the account held less than 10 credits."),
        (charge(NotSent("no route")), "paid nothing: the deduction was never sent."),
        (charge(Unknown("timeout"), Voided(10)), "paid nothing: the deduction of 10 credits was undone."),
        (charge(Unknown("timeout"), Voided(10)), "so it is undone (timeout)"),
        (charge(Unknown("timeout"), Refused("HTTP 404 not-found")), "may have paid 10 credits"),
        (charge(Unknown("timeout"), Refused("HTTP 404 not-found")), "a person has to decide (HTTP 404 not-found)"),
        (charge(TEN, Unread("KeyError in outcomes")), "paid 10 credits, by this record, which is disputed"),
        (charge(TEN, TWO_FAILED, AlreadyVoided()), "the whole deduction had been voided before"),
        (charge(TEN, Lost("killed"), AlreadyVoided()), "all 10 credits had come back before, by a void"),
        (charge(TEN, amount_credits=10, units=3), "asked 10 credits (3 units)"),
    ],
)
def test_each_end_has_its_own_story(record: Record, words: str) -> None:
    """Declined, abandoned, voided and disputed charges are told as what they are."""
    assert words in told(record)


@pytest.mark.parametrize(
    ("record", "living", "words"),
    [
        (charge(), True, "the request is being served, for 1 min"),
        (charge(), False, "undoing the deduction, whether it happened or not; its process died"),
        (charge(TEN), False, "a refund of 10 credits; its process died"),
        (charge(TEN, TWO_FAILED), True, "a refund of 2 credits, for 1 min now: no attempt yet, due now"),
        (
            replace(charge(TEN, TWO_FAILED), tries=3, due_at=NOON + 90),
            True,
            "3 without an answer, next at 2025-11-25 12:01:30",
        ),
    ],
)
def test_what_is_pending_is_told_with_its_time(record: Record, living: bool, words: str) -> None:
    """What is still to come, and when, or who has to do it."""
    assert words in told(record, living=living)


def test_record_of_an_older_release_is_told_without_its_history() -> None:
    """It has none."""
    record = replace(charge(TEN, Reported(10)), history=())
    assert "did not write down what happened" in told(record)


EVENTS: list[Event] = [
    TEN,
    Declined(1),
    Declined(1, certain=False),
    NotSent("x"),
    Unknown("x"),
    Reported(10),
    TWO_FAILED,
    Reported(0, tuple(map(str, range(1_000)))),
    Lost("x"),
    Unread("x"),
    Refunded(),
    AlreadyVoided(),
    Refused("x"),
    Voided(),
]


@given(st.lists(st.sampled_from(EVENTS), max_size=6), st.booleans(), st.floats(-1e300, 1e300))
def test_every_past_can_be_told(events: list[Event], living: bool, now: float) -> None:
    """Whatever happened, whatever the clock says; long lists are cut in sentences and whole in JSON."""
    record = charge()
    for event in events:
        if event.occasion_for(record) in TRANSITIONS.get(record.state, {}):
            record = step(record, event, now=NOON)
    text = told(record, living=living, now=now)
    assert len(text) < 3_000
    document = as_document(record, living=living)
    assert document["refund_items"] == list(record.refund_items)
    assert len(document["history"]) == len(record.history)
