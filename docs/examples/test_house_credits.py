"""The mapping, without a network."""

from dataclasses import replace
from typing import Any

import pytest
from house_credits import HouseCredits

from metered_billing import Account
from metered_billing.credits.contract import Declined, Deducted, Record, Refunded, Refused, Reply, Unanswered, Unknown

HOUSE = HouseCredits()
CHARGE = Record(id="charge-1", account=Account("acme", "ann"), amount_credits=10, units=10, opened_at=0.0)
REFUND = replace(CHARGE, transaction_id="tx-1", refund_credits=2, reason="failed items")


def test_calls() -> None:
    who = {"tenantId": "acme", "userId": "ann"}
    assert HOUSE.deduction(CHARGE).body == {**who, "credits": 10, "reference": "charge-1"}
    assert HOUSE.refund(REFUND).body == {"transactionId": "tx-1", "credits": 2, "reason": "failed items"}


@pytest.mark.parametrize(
    ("status", "body", "answer"),
    [
        (200, {"transactionId": "tx-1", "remainingCredits": 90}, Deducted("tx-1", 90)),
        (409, {"error": "INSUFFICIENT_CREDITS", "available": 3}, Declined(3)),
        (200, {}, Unknown("broken reply (HTTP 200)")),
        (503, None, Unknown("HTTP 503")),
    ],
)
def test_answers_to_a_deduction(status: int, body: Any, answer: object) -> None:
    assert HOUSE.read_deduction(CHARGE, Reply(status, {}, body)) == answer


@pytest.mark.parametrize(
    ("status", "body", "answer"),
    [
        (200, {"refundId": "re-1", "credits": 2, "remainingCredits": 92}, Refunded("re-1", 92)),
        (409, {"error": "ALREADY_REFUNDED", "refundId": "re-1", "credits": 2}, Refunded("re-1")),
        (409, {"error": "ALREADY_REFUNDED", "refundId": "re-1", "credits": 5}, Refused("ALREADY_REFUNDED")),
        (404, {"error": "UNKNOWN_TRANSACTION"}, Refused("UNKNOWN_TRANSACTION")),
        (404, None, Unanswered("HTTP 404")),  # a proxy's: it is tried again
    ],
)
def test_answers_to_a_refund(status: int, body: Any, answer: object) -> None:
    assert HOUSE.read_refund(REFUND, Reply(status, {}, body)) == answer
