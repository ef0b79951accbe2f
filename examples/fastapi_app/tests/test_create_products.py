"""What the app charges for its pictures, with the fixtures that metered-billing brings along."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings

from examples.fastapi_app.app import app
from metered_billing.testing import Billing, Fault, Operation, in_memory
from metered_billing.testing.strategies import faults

ALICE = {"Authorization": "Bearer demo"}  # user alice, of the tenant demo
PICTURE = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
NO_PICTURE = "bm8gcGljdHVyZQ=="

client = TestClient(app, headers=ALICE)


def pictures(good: int, bad: int) -> dict[str, Any]:
    """A body for `POST /create-products`: so many pictures, and so many files that are none."""
    files = {f"good-{number}": PICTURE for number in range(good)}
    files |= {f"bad-{number}": NO_PICTURE for number in range(bad)}
    return {"product_groups": [{"name": "Cup", "images": [{"id": name, "data": files[name]} for name in files]}]}


def test_pictures_that_fail_are_refunded(billing: Billing) -> None:
    """Ten pictures, two of which are none: 8 credits are kept."""
    billing.grant("demo", 100, user_id="alice")
    response = client.post("/create-products", json=pictures(good=8, bad=2))
    assert response.headers["Credits-Refunded"] == "2"
    billing.assert_charged("demo", "alice", kept=8, refunded=2)
    assert billing.entries("demo", "alice")[-1].items == ("bad-0", "bad-1")


def test_lost_reply_is_charged_once(billing: Billing) -> None:
    """The credits service has done it, and its answer is lost: the app asks again, and nothing is taken twice."""
    billing.grant("demo", 100, user_id="alice")
    billing.fail_next("deduct", "lost reply")
    response = client.post("/create-products", json=pictures(good=8, bad=2))
    assert response.status_code == 200
    billing.assert_charged("demo", "alice", kept=8, refunded=2)
    billing.assert_balanced()


def test_too_few_credits_are_402(billing: Billing) -> None:
    """Nine credits for ten pictures: nothing runs, and nothing is charged."""
    billing.grant("demo", 9, user_id="alice")
    response = client.post("/create-products", json=pictures(good=10, bad=0))
    assert response.status_code == 402
    billing.assert_not_charged("demo", "alice")


def test_service_that_is_down_is_503(billing: Billing) -> None:
    """No credits, no work; and once it is up again, all is as before."""
    billing.grant("demo", 100, user_id="alice")
    billing.down()
    assert client.post("/create-products", json=pictures(good=1, bad=0)).status_code == 503
    billing.up()
    assert client.post("/create-products", json=pictures(good=1, bad=0)).status_code == 200
    billing.assert_charged("demo", "alice", kept=1)


def test_refund_goes_through_in_the_end(billing: Billing) -> None:
    """However often it fails, the customer has the answer at once and the credits back in the end."""
    billing.grant("demo", 100, user_id="alice")
    billing.fail_next("refund", "500 after commit", times=10)
    assert client.post("/create-products", json=pictures(good=8, bad=2)).status_code == 200
    billing.assert_charged("demo", "alice", kept=8, refunded=2)
    assert [call.status for call in billing.calls if call.operation == "refund"] == [500] * 10 + [200]


@pytest.mark.anyio
async def test_statement_shows_the_refund(billing: Billing) -> None:
    """Asynchronous, and between the app's start-up and its shutdown. What the app itself asks of the credits
    service is answered, too."""
    billing.grant("demo", 100, user_id="alice")
    async with billing.client(app, headers=ALICE) as asynchronous:
        await asynchronous.post("/create-products", json=pictures(good=8, bad=2))
        statement = (await asynchronous.get("/me")).json()
    assert statement["balance"] == 92
    assert [entry["amount"] for entry in statement["transactions"]] == [2, -10, 100]


@settings(max_examples=10, deadline=None)
@given(faults())
def test_books_are_balanced_whatever_goes_wrong(faults: list[tuple[Operation, Fault]]) -> None:
    """Each example has a credits service of its own."""
    with in_memory() as billing:
        billing.grant("demo", 100, user_id="alice")
        for operation, fault in faults:
            billing.fail_next(operation, fault, optional=True)
        response = client.post("/create-products", json=pictures(good=3, bad=2))
        billing.assert_balanced()
        assert billing.balance("demo", "alice") == (97 if response.status_code == 200 else 100)
