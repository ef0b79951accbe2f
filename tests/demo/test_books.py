"""The books are read whole, and it is said whether they balance."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from examples.fastapi_app.desk import books as desk_books
from examples.fastapi_app.desk.books import Books, Unreadable, balance_of, count_charges

from metered_billing.ledger import Deduct, Grant, Ledger, Refund
from metered_billing.service import Tokens, create_app

pytestmark = pytest.mark.anyio


class Service(httpx.ASGITransport):
    """One that may be gone."""

    gone = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.gone:
            raise httpx.ConnectError("refused")
        return await super().handle_async_request(request)


def entry(kind: str, amount: int, transaction_id: str = "t", user: str = "alice") -> dict[str, Any]:
    return {"id": transaction_id, "kind": kind, "amount": amount, "transaction_id": transaction_id, "user_id": user}


def test_balance_of_books_that_balance() -> None:
    """Granted less deducted plus returned is what is there, for each user."""
    entries = [entry("grant", 100), entry("deduction", -10, "d"), entry("refund", 2, "d"), entry("void", 8, "d")]
    assert balance_of([*entries, entry("grant", 3, user="poor")], {"alice": 100, "poor": 3}) == {
        "users": [
            {"user_id": "alice", "balance": 100, "granted": 100, "deducted": 10, "returned": 10, "balanced": True},
            {"user_id": "poor", "balance": 3, "granted": 3, "deducted": 0, "returned": 0, "balanced": True},
        ],
        "balanced": True,
    }


def test_balance_of_books_that_do_not() -> None:
    """A balance that the entries do not explain, and a deduction that gave back more than it took, are both seen."""
    assert not balance_of([entry("grant", 100)], {"alice": 99})["balanced"]
    entries = [entry("grant", 100), entry("deduction", -10, "d"), entry("refund", 10, "d"), entry("void", 10, "d")]
    (alice, poor) = balance_of([*entries, entry("grant", 3, user="poor")], {"alice": 110, "poor": 3})["users"]
    assert (alice["balanced"], poor["balanced"]) == (False, True)


async def test_now_and_statement_of_a_real_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages are read, what is new is added, and a service that is gone is no empty account."""
    monkeypatch.setattr(desk_books, "PAGE", 2)
    monkeypatch.setattr(desk_books, "FRESH_S", 0.0)
    ledger = Ledger(tmp_path / "credits.db")
    await ledger.start()
    service = Service(create_app(ledger, Tokens({"secret": "admin"})))
    books = Books("http://credits", "secret", tmp_path / "journal", transport=service)
    for user in ("alice", "poor"):
        await ledger.grant(
            Grant(idempotency_key=user, tenant_id="demo", user_id=user, amount=100, reason="to start with")
        )
    for number in range(3):
        deducted = await ledger.deduct(
            Deduct(idempotency_key=f"d{number}", tenant_id="demo", user_id="alice", amount=10)
        )
        await ledger.refund(
            Refund(
                idempotency_key=f"r{number}",
                transaction_id=str(deducted.body["transaction_id"]),
                amount=2,
                reason="failed items",
            )
        )
        now = await books.now()
        assert now is not None
        alice = {user["user_id"]: user for user in now["users"]}["alice"]
        assert (alice["deducted"], alice["returned"]) == (10 * (number + 1), 2 * (number + 1))
        assert (now["balanced"], now["unsettled"], now["disputed"]) == (True, {}, 0)
    statement = await books.statement("alice")
    assert statement["balance"] == 76
    assert [one["kind"] for one in statement["entries"]] == ["refund", "deduction"] * 3 + ["grant"]
    service.gone = True
    assert await books.now() is None
    with pytest.raises(Unreadable):
        await books.statement("alice")
    await books.close()
    await ledger.close()


def test_count_charges_no_journal_yet_has_none(tmp_path: Path) -> None:
    """An app that has not started has nothing unsettled; a file in the journal's place cannot be read."""
    assert count_charges(tmp_path / "none") == {"unsettled": {}, "disputed": 0}
