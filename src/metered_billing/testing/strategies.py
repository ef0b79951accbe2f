"""What may go wrong, for property tests with Hypothesis."""

from collections.abc import Sequence
from typing import cast, get_args

from metered_billing.testing.faults import FAULTS, Fault, Operation

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("metered_billing.testing.strategies needs Hypothesis: pip install hypothesis") from error


def faults(
    *, operations: Sequence[Operation] = get_args(Operation), max_size: int = 8
) -> "st.SearchStrategy[list[tuple[Operation, Fault]]]":
    """Lists of (operation, fault), for `Billing.fail_next(operation, fault, optional=True)` one after the other.

    Args:
        operations: What may go wrong.
        max_size: How many faults there are at most.
    """
    pairs = [(operation, fault) for operation in operations for fault in FAULTS if operation in FAULTS[fault].only]
    return st.lists(cast("st.SearchStrategy[tuple[Operation, Fault]]", st.sampled_from(pairs)), max_size=max_size)
