"""A ledger in a directory of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from metered_billing.ledger import Ledger


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """A fresh ledger, closed after the test."""
    ledger = Ledger(tmp_path / "credits.db")
    yield ledger
    await ledger.close()
