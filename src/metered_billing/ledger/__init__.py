"""The ledger: accounts and entries, append-only. Below both the credits service and `SqlCredits`.

`commands` says what can be asked, `rules` decides it, `books` holds the rows, `store` commits them.
"""

from metered_billing.ledger.answers import Answer, Page
from metered_billing.ledger.commands import Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.failures import (
    LedgerCorrupt,
    LedgerError,
    LedgerLocked,
    LedgerNotOpened,
    LedgerUnavailable,
)
from metered_billing.ledger.store import Ledger

__all__ = [
    "Answer",
    "Command",
    "Deduct",
    "Grant",
    "Ledger",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerLocked",
    "LedgerNotOpened",
    "LedgerUnavailable",
    "Page",
    "Refund",
    "Void",
]
