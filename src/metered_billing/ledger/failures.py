"""Why the ledger could not answer. What it answers, a refusal too, is a value: see `answers`.

LedgerError
├── LedgerUnavailable      no answer; the command may or may not have happened
│   └── LedgerNotOpened    it was not opened or not reached; nothing can have happened
│       ├── LedgerLocked   another process has the file
│       └── LedgerBusy     other processes were in the way again and again
└── LedgerCorrupt          the rows contradict each other; nothing was written
"""


class LedgerError(Exception):
    """The ledger gave no answer."""


class LedgerUnavailable(LedgerError):
    """Storage trouble: whether the command happened is unknown. Repeat it under the same key."""


class LedgerNotOpened(LedgerUnavailable):
    """The ledger could not be opened or reached, or had no room in its queue; nothing happened."""


class LedgerLocked(LedgerNotOpened):
    """Another process owns the ledger's file; nothing happened."""


class LedgerBusy(LedgerNotOpened):
    """Other processes' transactions were in the way, however often it was tried; nothing happened."""


class LedgerCorrupt(LedgerError):
    """An invariant does not hold (refunded > deducted, balance < 0 …); nothing was written."""
