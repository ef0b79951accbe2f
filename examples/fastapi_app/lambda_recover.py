"""What a schedule calls every minute: it finishes what the app's instances left, frozen or killed."""

import asyncio
import dataclasses
import logging
from typing import Any

from metered_billing.recovery import recover

logging.getLogger("metered_billing").setLevel(logging.INFO)

SPARE_S = 5.0
"""What is kept of the function's time for closing."""


def handler(event: Any, context: Any) -> dict[str, int]:
    """Recover, and say what came of it: in the journal so many charges are left for the next time."""
    within_s = context.get_remaining_time_in_millis() / 1000 - SPARE_S
    return dataclasses.asdict(asyncio.run(recover(within_s)))
