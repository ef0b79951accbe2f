"""The ledger: accounts and entries, append-only. Below both the credits service and `SqlCredits`.

`commands` says what can be asked, `rules` decides it, whatever holds the rows: `sqlite` (with `books`), or
`postgres` (with `postgres_books`), each an `engine`. `store` is what callers use.
"""

from metered_billing.ledger.answers import Answer, Page
from metered_billing.ledger.commands import Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.failures import (
    LedgerBusy,
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
    "LedgerBusy",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerLocked",
    "LedgerNotOpened",
    "LedgerUnavailable",
    "Page",
    "Refund",
    "Void",
]
