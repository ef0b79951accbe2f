"""Tokens are rotated under an app at work, with a real service in a process of its own."""

import asyncio
import logging
import threading
import time
from pathlib import Path

import pytest

from metered_billing import Account, HttpCredits
from metered_billing.charge import DeductAnswer, Deducted, Record, State, Unknown
from metered_billing.ledger import Grant, Ledger
from metered_billing.runtime import new_uuid7
from metered_billing.service.token_file import add_line, remove_token
from metered_billing.service.tokens import new_token
from tests.serving import start_service

WITHIN_S = 1.5
"""A second, and some for a busy machine."""


def record() -> Record:
    return Record(
        id=new_uuid7(),
        account=Account("acme"),
        amount_credits=1,
        units=1,
        state=State.OPENED,
        opened_at=time.time(),
        owner="test",
    )


async def deduct(token: str, url: str) -> DeductAnswer:
    client = HttpCredits(url, token=token)
    try:
        return await client.deduct(record())
    finally:
        await client.aclose()


@pytest.mark.slow
async def test_rotation_needs_no_restart_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old, both, new: whoever has one of them is served all the while; then the old one is rejected, loudly."""
    file = tmp_path / "tokens"
    old_secret, old, line = new_token("tenant:acme")
    add_line(file, line)
    ledger = Ledger(tmp_path / "credits.db")
    await ledger.start()
    await ledger.decide(Grant(idempotency_key="g", tenant_id="acme", user_id=None, amount=1000, reason="test"))
    await ledger.close()
    with start_service(tmp_path, "sqlite:///credits.db", "--tokens-file", "tokens") as (process, url):
        # So that it does not wait for somebody to read what it says.
        said: list[str] = []
        assert process.stderr is not None
        threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True).start()
        client = HttpCredits(url, token=old_secret)
        assert isinstance(await client.deduct(record()), Deducted)

        new_secret, new, line = new_token("tenant:acme", "2999-01-01")
        add_line(file, line)
        until = time.monotonic() + WITHIN_S
        while time.monotonic() < until:
            assert isinstance(await client.deduct(record()), Deducted)
            await asyncio.sleep(0.05)
        assert isinstance(await deduct(new_secret, url), Deducted)

        remove_token(file, old.id)
        await asyncio.sleep(WITHIN_S)
        caplog.set_level(logging.CRITICAL)
        answer = await client.deduct(record())
        assert isinstance(answer, Unknown)
        assert not answer.misconfigured
        assert "credits.token_rejected" in caplog.text
        assert old_secret not in caplog.text
        assert isinstance(await deduct(new_secret, url), Deducted)
        await client.aclose()
    log = "".join(said)
    assert f"added: {new.id}; removed: none" in log
    assert f"added: none; removed: {old.id}" in log
    assert old_secret not in log
    assert new_secret not in log
