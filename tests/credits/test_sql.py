"""The ledger in this process, as credits. What all kinds of credits have in common: see tests/contract."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metered_billing.charge import (
    Account,
    Deducted,
    Found,
    NotSent,
    Record,
    Refunded,
    Refused,
    State,
    Unanswered,
    Unknown,
    Voided,
)
from metered_billing.credits.sql import SqlCredits
from metered_billing.ledger import LedgerLocked
from metered_billing.ledger.books import SqliteBooks
from metered_billing.ledger.places import sqlite_path

ALICE = Account("acme", "alice")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "credits.db"


def charge(**changes: Any) -> Record:
    return replace(Record(id="charge-1", account=ALICE, amount_credits=10, units=10, opened_at=0.0), **changes)


async def granted(credits_: SqlCredits, amount: int = 100) -> None:
    answer = await credits_.grant("acme", "alice", amount=amount, reason="test", idempotency_key=f"g-{amount}")
    assert answer.status == 201


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///credits.db", "credits.db"),
        ("sqlite:////var/lib/credits.db", "/var/lib/credits.db"),
        ("credits.db", "credits.db"),
        (Path("/var/lib/credits.db"), "/var/lib/credits.db"),
    ],
)
def test_sqlite_path(url: str | Path, path: str) -> None:
    """Three slashes are relative, four absolute, as SQLAlchemy has it; a path is a path."""
    assert sqlite_path(url) == Path(path)


@pytest.mark.parametrize(
    "url", ["", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:credits.db", "postgresql:h", "http://h"]
)
def test_sqlite_path_of_something_else(url: str) -> None:
    """Refused when it is configured, not at the first charge."""
    with pytest.raises(ValueError, match="sqlite:///"):
        SqlCredits(url)


async def test_grant_balance_and_transactions(file: Path) -> None:
    """What people and scripts need, without a service."""
    credits_ = SqlCredits(file)
    await granted(credits_)
    await credits_.deduct(charge())
    assert await credits_.balance("acme", "alice") == 90
    page = await credits_.transactions("acme", "alice")
    assert [entry["kind"] for entry in page.items] == ["deduction", "grant"]
    await credits_.aclose()


async def test_start_on_a_ledger_in_use_is_a_clear_error(file: Path) -> None:
    """Before the first charge, and in a sentence."""
    owner = SqlCredits(file)
    await owner.start()
    with pytest.raises(LedgerLocked, match="open in this process already"):
        await SqlCredits(file).start()
    await owner.aclose()


async def test_calls_on_a_ledger_in_use_are_answered(file: Path) -> None:
    """Not opened is not sent: nothing can have moved. Nothing is raised."""
    owner, second = SqlCredits(file), SqlCredits(file)
    await owner.start()
    answer = await second.deduct(charge())
    assert isinstance(answer, NotSent)
    assert "already" in answer.reason
    refunding = charge(state=State.REFUNDING, transaction_id="t", refund_credits=2)
    for unanswered in (
        await second.refund(refunding),
        await second.void(charge()),
        await second.find(charge()),
    ):
        assert isinstance(unanswered, Unanswered)
        assert not unanswered.sent
    await owner.aclose()
    assert isinstance(await second.void(charge()), Voided)
    await second.aclose()


async def test_storage_trouble_is_unknown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of SQLite's leaves a deduction unknown, and a refund or void to be tried again."""
    credits_ = SqlCredits(file)
    await granted(credits_)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        for method in ("remembered", "entry", "voided"):
            patched.setattr(SqliteBooks, method, fail)
        answer = await credits_.deduct(charge())
        assert isinstance(answer, Unknown)
        assert not answer.misconfigured
        refunding = charge(state=State.REFUNDING, transaction_id="t", refund_credits=2)
        for unanswered in (await credits_.refund(refunding), await credits_.void(charge())):
            assert isinstance(unanswered, Unanswered)
            assert unanswered.sent
    assert isinstance(await credits_.deduct(charge()), Deducted)
    await credits_.aclose()


@pytest.mark.parametrize("bad", [{"id": "two words"}, {"metadata": {"a": "x" * 3000}}, {"request_id": "\x00"}])
async def test_deduct_of_what_cannot_be_stored_is_our_bug(file: Path, bad: dict[str, Any]) -> None:
    """Nothing moves, and nothing is raised."""
    credits_ = SqlCredits(file)
    await granted(credits_)
    answer = await credits_.deduct(charge(**bad))
    assert isinstance(answer, Unknown)
    assert answer.misconfigured
    assert await credits_.balance("acme", "alice") == 100
    await credits_.aclose()


async def test_refund_does_not_fail_for_its_words(file: Path) -> None:
    """A reason out of an exception, ids out of a response: stored as far as they can be."""
    credits_ = SqlCredits(file)
    await granted(credits_)
    deducted = await credits_.deduct(charge())
    assert isinstance(deducted, Deducted)
    record = charge(
        state=State.REFUNDING,
        transaction_id=deducted.transaction_id,
        refund_credits=2,
        reason="\x00\ud800" + "x" * 5000,
        refund_items=("img\n3", "", "\udfff", "y" * 300, *(["z"] * 2000)),
    )
    assert isinstance(await credits_.refund(record), Refunded)
    entry = (await credits_.transactions("acme")).items[0]
    assert entry["reason"] == "??" + "x" * 1998
    assert entry["items"][:4] == ["img?3", "?", "y" * 255, "z"]
    await credits_.aclose()


async def test_refund_of_another_tenants_transaction_is_refused(file: Path) -> None:
    """Even within one process, an account gets back its own alone."""
    credits_ = SqlCredits(file)
    await granted(credits_)
    deducted = await credits_.deduct(charge())
    assert isinstance(deducted, Deducted)
    record = charge(
        account=Account("globex", "alice"),
        state=State.REFUNDING,
        transaction_id=deducted.transaction_id,
        refund_credits=2,
    )
    assert isinstance(await credits_.refund(record), Refused)
    assert await credits_.balance("acme", "alice") == 90
    await credits_.aclose()


def test_credits_serve_one_loop_after_another(file: Path) -> None:
    """As a test client does, that has a new loop for each request."""
    credits_ = SqlCredits(file)
    asyncio.run(granted(credits_))
    assert isinstance(asyncio.run(credits_.deduct(charge())), Deducted)
    assert isinstance(asyncio.run(credits_.find(charge())), Found)
    asyncio.run(credits_.aclose())
