"""The kit's three fixtures, behind one."""

import pytest

from metered_billing.testing import Billing

KINDS = ["billing", "billing_service", "billing_server"]


@pytest.fixture(params=KINDS)
def each(request: pytest.FixtureRequest) -> Billing:
    """Each of the three, for what they have in common."""
    billing: Billing = request.getfixturevalue(request.param)
    return billing
