"""Charges with a past, and journals and ledgers that hold them, for what looks into these."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from metered_billing.charge import Account, Event, Record, step
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import new_uuid7

ANN = Account("acme", "ann")
NOON = 1_764_072_000.0
"""2025-11-25 12:00:00 UTC."""


def charge(*events: Event, opened_at: float = NOON, **fields: Any) -> Record:
    """A charge of 10 credits to which these events happened, a second apart."""
    given: dict[str, Any] = {"id": new_uuid7(), "account": ANN, "amount_credits": 10, "units": 10, **fields}
    record = Record(opened_at=opened_at, **given)
    for number, event in enumerate(events):
        record = step(record, event, now=opened_at + number + 1)
    return record


async def keep(directory: Path, records: Iterable[Record], realm: str = "") -> None:
    """Write them into a journal, as a process that has died since."""
    journal = SqliteJournal(directory)
    await journal.start(realm)
    await put(journal, records)
    await journal.close()


async def put(journal: SqliteJournal, records: Iterable[Record]) -> None:
    """Write them into a journal that is open."""
    for record in records:
        await journal.open(replace(record, owner=journal.owner))
