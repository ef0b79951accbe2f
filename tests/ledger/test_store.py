"""The ledger as its callers see it, on either engine: concurrency, one commit a batch, pages of entries."""

import asyncio
from collections.abc import Callable

import pytest

from metered_billing.ledger import Answer, Ledger, LedgerCorrupt
from metered_billing.ledger import store as store_module
from metered_billing.ledger.engine import Rows
from metered_billing.ledger.postgres import PostgresEngine
from metered_billing.ledger.sqlite import SqliteEngine

from .asking import deduct, deducted, grant, granted, refund, void


def commits(ledger: Ledger) -> int:
    engine = ledger._engine
    if isinstance(engine, SqliteEngine):
        return engine._file.commits
    assert isinstance(engine, PostgresEngine)
    return engine._database.commits


def test_ledger_serves_one_loop_after_another(place: str) -> None:
    """As test clients do, that run each request in a loop of its own."""
    ledger = Ledger(place)

    async def once(number: int) -> Answer:
        return await ledger.grant(grant(1, key=f"grant-{number}"))

    for number in range(3):
        assert asyncio.run(once(number)).body["balance"] == number + 1
    asyncio.run(ledger.close())


class TestConcurrency:
    async def test_concurrent_deductions_never_overdraw(self, ledger: Ledger) -> None:
        """500 at once on an account for 300 of them: 300 succeed, and the balance ends at zero."""
        await granted(ledger, 300)
        answers = await asyncio.gather(*(ledger.deduct(deduct(1, key=f"charge-{number}")) for number in range(500)))
        assert sorted(answer.status for answer in answers) == [201] * 300 + [402] * 200
        assert await ledger.balance("acme", "alice") == 0

    async def test_concurrent_copies_take_effect_once(self, ledger: Ledger) -> None:
        """The same deduction, 50 times at once, is one deduction with 50 equal answers."""
        await granted(ledger, 100)
        answers = await asyncio.gather(*(ledger.deduct(deduct(10)) for _ in range(50)))
        assert sorted(answer.status for answer in answers) == [200] * 49 + [201]
        assert len({answer.body["transaction_id"] for answer in answers}) == 1
        assert await ledger.balance("acme", "alice") == 90

    async def test_cancelled_call_leaves_a_whole_outcome(self, ledger: Ledger) -> None:
        """Whoever stops waiting has not taken anything back: the replay tells what happened."""
        await granted(ledger, 100)
        calls = [asyncio.ensure_future(ledger.deduct(deduct(10, key=f"c-{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        replays = [await ledger.deduct(deduct(10, key=f"c-{n}")) for n in range(20)]
        taken = sum(answer.done for answer in replays)
        assert taken == 10
        assert await ledger.balance("acme", "alice") == 0


class TestBatch:
    async def test_batch_decides_in_order_in_one_commit(self, ledger: Ledger) -> None:
        """A grant, the deduction that it pays for, and the void of that."""
        await ledger.start()
        before = commits(ledger)
        answers = await ledger.batch([grant(10), deduct(10), deduct(10, key="more"), void()])
        assert [answer.status for answer in answers if isinstance(answer, Answer)] == [201, 201, 402, 200]
        assert commits(ledger) == before + 1

    async def test_batch_with_a_command_that_raises_does_the_others(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each stands alone, even where one finds the books corrupt."""
        await granted(ledger)
        decide: Callable[..., Answer] = store_module.decide  # type: ignore[attr-defined]

        def spoiled(books: Rows, command: object, stamp: object) -> Answer:
            if command == deduct(10, key="bad"):
                raise LedgerCorrupt("told so")
            return decide(books, command, stamp)

        monkeypatch.setattr(store_module, "decide", spoiled)
        one, bad, two = await ledger.batch([deduct(1), deduct(10, key="bad"), deduct(2, key="charge-2")])
        assert isinstance(one, Answer)
        assert isinstance(bad, LedgerCorrupt)
        assert isinstance(two, Answer)
        assert (one.status, two.body["balance"]) == (201, 97)


class TestTransactions:
    async def test_transactions_come_newest_first_page_by_page(self, ledger: Ledger) -> None:
        """Every entry once, though new ones are written between the pages."""
        await granted(ledger)
        for number in range(5):
            await ledger.deduct(deduct(1, key=f"charge-{number}"))
        seen, cursor = [], None
        while True:
            page = await ledger.transactions("acme", cursor=cursor, limit=2)
            seen += [item["idempotency_key"] for item in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
            await ledger.deduct(deduct(1, key=f"later-{cursor}"))
        assert seen == [f"charge-{number}" for number in (4, 3, 2, 1, 0)] + ["granted-alice-100"]

    async def test_transactions_of_one_account_or_of_all(self, ledger: Ledger) -> None:
        """A user's, the shared pool's (an empty user), or the whole tenant's; never another tenant's."""
        await granted(ledger, 1, user="alice")
        await granted(ledger, 2, user="bob")
        await granted(ledger, 3, user=None)
        await ledger.grant(grant(4, tenant_id="globex", user=None))

        async def amounts(user_id: str | None) -> list[int]:
            return [item["amount"] for item in (await ledger.transactions("acme", user_id)).items]

        assert await amounts("alice") == [1]
        assert await amounts("") == [3]
        assert await amounts(None) == [3, 2, 1]

    @pytest.mark.parametrize("cursor", ["", "x", "\x00", "é", "01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10"])
    async def test_cursor_of_somebody_elses_making_is_refused(self, ledger: Ledger, cursor: str) -> None:
        """A ValueError that says so."""
        with pytest.raises(ValueError, match="cursor"):
            await ledger.transactions("acme", cursor=cursor)

    async def test_transaction_shows_what_people_ask_about(self, ledger: Ledger) -> None:
        """The deduction with its metadata; its refunds with their reasons and items; the void."""
        await granted(ledger)
        command = deduct(10, metadata={"route": "/x"}, request_id="r-1")
        transaction_id = (await ledger.deduct(command)).body["transaction_id"]
        await ledger.refund(refund(transaction_id, 2, items=("img-3", "img-7")))
        await ledger.void(void())
        shown = await ledger.transaction(transaction_id)
        assert shown is not None
        assert (shown["amount"], shown["metadata"], shown["request_id"]) == (-10, {"route": "/x"}, "r-1")
        assert [(entry["kind"], entry["amount"], entry["items"]) for entry in shown["refunds"]] == [
            ("refund", 2, ["img-3", "img-7"]),
            ("void", 8, []),
        ]

    async def test_transaction_of_another_tenant_is_none(self, ledger: Ledger) -> None:
        """As if there were none."""
        transaction_id = (await deducted(ledger)).body["transaction_id"]
        assert await ledger.transaction(transaction_id, only_tenant="globex") is None
        assert await ledger.transaction("nope") is None

    async def test_find_knows_deductions_that_took_credits(self, ledger: Ledger) -> None:
        """Neither declines nor other operations are found."""
        transaction_id = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.deduct(deduct(1000, key="declined"))
        assert await ledger.find("acme", "charge-1") == transaction_id
        for key in ("declined", "granted-alice-100", "nope"):
            assert await ledger.find("acme", key) is None
