"""Whatever goes wrong, the books are in order."""

import pytest
from hypothesis import given, settings

from metered_billing.testing import FAULTS, Fault, Operation, in_memory
from metered_billing.testing.strategies import faults

from .shop import TEN, app

pytestmark = pytest.mark.anyio


@settings(max_examples=15)
@given(faults(max_size=10))
async def test_books_are_balanced_whatever_goes_wrong(faults: list[tuple[Operation, Fault]]) -> None:
    """And the balance is what the answers say."""
    async with in_memory() as billing:
        billing.grant("acme", 100)
        for operation, fault in faults:
            billing.fail_next(operation, fault, optional=True)
        async with billing.client(app) as client:
            answers = [await client.post("/work", json=TEN) for _ in range(2)]
        billing.assert_balanced()
        assert billing.balance("acme") == 100 - 8 * sum(answer.is_success for answer in answers)


@settings(max_examples=20)
@given(faults(operations=["refund", "void"], max_size=3))
def test_only_what_can_happen_is_drawn(faults: list[tuple[Operation, Fault]]) -> None:
    """To the operations that were asked for."""
    assert len(faults) <= 3
    for operation, fault in faults:
        assert operation in ("refund", "void")
        assert operation in FAULTS[fault].only
