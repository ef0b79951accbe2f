"""Metered billing for FastAPI and Starlette: paid first, paid for what succeeded, once."""

from metered_billing.biller import Charge
from metered_billing.charge import Account
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.sql import SqlCredits
from metered_billing.errors import BillingError, CreditsUnavailable, InsufficientCredits, InvalidCost
from metered_billing.metered import current_charge, metered
from metered_billing.middleware import MeteredBillingMiddleware
from metered_billing.settings import Settings
from metered_billing.settler import settled

__all__ = [
    "Account",
    "BillingError",
    "Charge",
    "CreditsUnavailable",
    "HttpCredits",
    "InsufficientCredits",
    "InvalidCost",
    "MeteredBillingMiddleware",
    "Settings",
    "SqlCredits",
    "current_charge",
    "metered",
    "settled",
]
