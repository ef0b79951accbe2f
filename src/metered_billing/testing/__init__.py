"""The test kit, for tests of apps that use metered-billing. See docs/how-to/test-your-routes.md.

The fixtures `billing`, `billing_service` and `billing_server` are a pytest plugin, `pytest_metered_billing`.
"""

from metered_billing.testing.billing import Billing
from metered_billing.testing.entries import Entry
from metered_billing.testing.faults import FAULTS, Fault, Operation
from metered_billing.testing.opening import in_memory, in_process, on_a_socket
from metered_billing.testing.wire import Call

__all__ = [
    "FAULTS",
    "Billing",
    "Call",
    "Entry",
    "Fault",
    "Operation",
    "in_memory",
    "in_process",
    "on_a_socket",
]
