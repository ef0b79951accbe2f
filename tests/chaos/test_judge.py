"""The judge of the storm finds what is wrong with a request: else a storm would prove nothing."""

from typing import Any

import pytest

from tests.chaos.judge import Moves, Seen, fault, judge, moves_of


def seen(path: str = "/work", good: int = 8, status: int | None = 200, **more: Any) -> Seen:
    return Seen("r", path, good, status, **more)


TAKEN = [-10]


@pytest.mark.parametrize(
    ("request_seen", "moves", "why"),
    [
        (seen(), Moves(), "ran free"),
        (seen(), Moves(TAKEN, []), "paid 10, and may be [8] after 200"),
        (seen(), Moves(TAKEN, [10]), "paid 0, and may be [8] after 200"),
        (seen(), Moves([-10, -10], [2]), "deducted 2 times"),
        (seen(), Moves([-20], [12]), "deducted [-20]"),
        (seen(), Moves(TAKEN, [1, 1]), "2 refunds: [1, 1]"),
        (seen(status=503), Moves(TAKEN, []), "paid 10, and may be [0] after 503"),
        (seen(status=402), Moves(TAKEN, [2]), "paid 8, and may be [0] after 402"),
        (seen(status=None), Moves(TAKEN, []), "paid 10, and may be [0, 8] after no answer"),
        (seen("/raise", status=None), Moves(TAKEN, [2]), "paid 8, and may be [0] after no answer"),
        (
            seen("/stream", status=None),
            Moves(TAKEN, [1]),
            "paid 9, and may be [0, 1, 2, 3, 4, 5, 6, 7, 8] after no answer",
        ),
        (seen(excused=True), Moves(TAKEN, [5]), "paid 5, and may be [0, 8] after 200"),
    ],
)
def test_what_is_wrong_is_found(request_seen: Seen, moves: Moves, why: str) -> None:
    """Each way to lose money, with the words for it."""
    assert fault(request_seen, moves) == why


@pytest.mark.parametrize(
    ("request_seen", "moves"),
    [
        (seen(), Moves(TAKEN, [2])),
        (seen(good=10), Moves(TAKEN, [])),
        (seen(status=503), Moves()),
        (seen(status=503), Moves(TAKEN, [10])),
        (seen(status=500), Moves(TAKEN, [10])),
        (seen(status=None), Moves(TAKEN, [2])),
        (seen(status=None), Moves(TAKEN, [10])),
        (seen(status=None), Moves()),
        (seen("/stream", status=None), Moves(TAKEN, [7])),
        (seen(excused=True), Moves(TAKEN, [10])),
    ],
)
def test_what_is_right_is_let_be(request_seen: Seen, moves: Moves) -> None:
    """What the promises allow."""
    assert fault(request_seen, moves) is None


def test_charge_that_nobody_asked_for_is_found() -> None:
    """A deduction under a request id that no client sent."""
    ended, wrong = judge([seen(status=503)], {"other": Moves(TAKEN, [])})
    assert (dict(ended), wrong) == ({"503": 1}, ["other: charged, and nobody asked"])


def test_moves_are_told_by_request() -> None:
    """Refunds and voids belong to the request of their deduction."""
    deduction = {"id": "t1", "kind": "deduction", "request_id": "r1", "transaction_id": "t1", "amount": -10}
    refund = {"id": "t2", "kind": "refund", "request_id": None, "transaction_id": "t1", "amount": 3}
    grant = {"id": "t0", "kind": "grant", "request_id": None, "transaction_id": "t0", "amount": 50}
    moves = moves_of([refund, deduction, grant])
    assert {name: (each.deductions, each.returns, each.net) for name, each in moves.items()} == {"r1": ([-10], [3], 7)}
