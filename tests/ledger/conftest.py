"""An empty ledger, on each engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from metered_billing.ledger import Ledger


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty ledger is to be, on either engine."""
    if request.param == "PostgreSQL":
        url: str = request.getfixturevalue("pg_clean")
        return url
    return f"sqlite:///{tmp_path}/credits.db"


@pytest.fixture
async def ledger(place: str) -> AsyncIterator[Ledger]:
    """A fresh ledger, closed after the test."""
    ledger = Ledger(place)
    yield ledger
    await ledger.close()
