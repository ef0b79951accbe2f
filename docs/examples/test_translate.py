"""Tests of translate.py."""

from pathlib import Path

import httpx
import pytest
from translate import create_app

from metered_billing import SqlCredits, settled


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_words_that_are_not_known_are_refunded(tmp_path: Path) -> None:
    ledger = SqlCredits(tmp_path / "credits.db")
    await ledger.grant("acme", "ann", amount=5, reason="test", idempotency_key="grant-1")
    app = create_app(credits=ledger, journal=tmp_path / "journal")

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        response = await client.post(
            "/translate", json={"words": ["cat", "xyzzy"]}, headers={"Authorization": "Bearer ann"}
        )

    assert response.status_code == 200
    assert response.headers["Credits-Refunded"] == "1"
    await settled()  # the refund goes out after the response
    assert await ledger.balance("acme", "ann") == 4
    await ledger.aclose()
