"""Tests of translate.py."""

import pytest
from translate import create_app

from metered_billing.testing import Billing

ANN = {"Authorization": "Bearer ann"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_words_that_are_not_known_are_refunded(billing: Billing) -> None:
    billing.grant("acme", 5, user_id="ann")
    async with billing.client(create_app(), headers=ANN) as client:
        response = await client.post("/translate", json={"words": ["cat", "xyzzy"]})
    assert response.headers["Credits-Refunded"] == "1"
    billing.assert_charged("acme", "ann", kept=1, refunded=1)


@pytest.mark.anyio
async def test_lost_reply_is_charged_once(billing: Billing) -> None:
    billing.grant("acme", 5, user_id="ann")
    billing.fail_next("deduct", "lost reply")
    async with billing.client(create_app(), headers=ANN) as client:
        response = await client.post("/translate", json={"words": ["cat"]})
    assert response.status_code == 200
    billing.assert_charged("acme", "ann", kept=1)
