"""The ledger as a file: one owner, append-only, one commit a command, and pages of entries."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from metered_billing.ledger import (
    Answer,
    Ledger,
    LedgerCorrupt,
    LedgerLocked,
    LedgerNotOpened,
    LedgerUnavailable,
)
from metered_billing.ledger import store as store_module
from metered_billing.ledger.books import SqliteBooks
from metered_billing.ledger.rules import Held

from .asking import deduct, deducted, grant, granted, refund, void


def sql(ledger: Ledger, statement: str) -> list[tuple[object, ...]]:
    """Run a statement behind the ledger's back."""
    connection = sqlite3.connect(ledger.path)
    try:
        with connection:
            return connection.execute(statement).fetchall()
    finally:
        connection.close()


class TestOwner:
    async def test_second_ledger_on_the_same_file_is_refused(self, ledger: Ledger) -> None:
        """In one process too: two of them would decide on different balances."""
        await ledger.start()
        with pytest.raises(LedgerLocked, match="open in this process already"):
            await Ledger(ledger.path).start()

    async def test_other_name_of_the_same_file_is_refused(self, ledger: Ledger, tmp_path: Path) -> None:
        """A symbolic link is not a second ledger."""
        await ledger.start()
        link = tmp_path / "link.db"
        link.symlink_to(ledger.path)
        with pytest.raises(LedgerLocked):
            await Ledger(link).start()

    async def test_closed_ledger_can_be_owned_by_the_next(self, ledger: Ledger) -> None:
        """Closing lets go of the lock; the credits stay."""
        await granted(ledger, 7)
        await ledger.close()
        after = Ledger(ledger.path)
        assert await after.balance("acme", "alice") == 7
        with pytest.raises(LedgerLocked):
            await ledger.balance("acme")
        await after.close()
        assert await ledger.balance("acme", "alice") == 7

    async def test_other_process_is_refused_until_the_owner_dies(self, tmp_path: Path) -> None:
        """A killed owner leaves nothing to clean up."""
        script = textwrap.dedent("""
            import asyncio, sys
            from metered_billing.ledger import Ledger
            async def main():
                await Ledger(sys.argv[1]).start()
                print("open", flush=True)
                await asyncio.sleep(60)
            asyncio.run(main())
        """)
        file = tmp_path / "credits.db"
        with subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"open\n"
            ledger = Ledger(file)
            with pytest.raises(LedgerLocked, match=rf"process {owner.pid}.*metered-billing serve"):
                await ledger.start()
            owner.kill()
            owner.wait()
        await ledger.start()
        await ledger.close()

    async def test_forked_child_does_not_keep_a_dead_owners_lock(self, tmp_path: Path) -> None:
        """The lock would live as long as any process that shares the open file."""
        script = textwrap.dedent("""
            import asyncio, os, sys
            from metered_billing.ledger import Ledger
            asyncio.run(Ledger(sys.argv[1]).start())
            if os.fork() == 0:
                print(os.getpid(), flush=True)
                sys.stdin.read()
            os._exit(0)
        """)
        file = tmp_path / "credits.db"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as owner:
            assert owner.stdout is not None
            child = int(owner.stdout.readline())
            assert owner.wait() == 0
            os.kill(child, 0)  # it is alive
            ledger = Ledger(file)
            await ledger.start()
            await ledger.close()

    async def test_forked_child_does_not_own_the_ledger(self, ledger: Ledger) -> None:
        """The parent keeps it, whatever the child does with its copy of the object."""
        await ledger.start()
        child = os.fork()
        if child == 0:
            held = ledger._lock.held
            ledger._lock.release()
            os._exit(held)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(LedgerLocked):
            await Ledger(ledger.path).start()

    async def test_call_that_cannot_open_the_file_does_not_keep_the_lock(self, ledger: Ledger) -> None:
        """A file that is no ledger, say, is free for whoever can read it."""
        sql(ledger, "PRAGMA user_version = 99")
        with pytest.raises(LedgerNotOpened):
            await ledger.balance("acme")
        sql(ledger, "PRAGMA user_version = 0")
        other = Ledger(ledger.path)
        await other.start()
        await other.close()

    async def test_closing_under_load_ends_closed_and_free(self, ledger: Ledger) -> None:
        """Calls that were under way are answered; those that come later open it again."""
        await granted(ledger)
        calls = [asyncio.ensure_future(ledger.deduct(deduct(1, key=f"c-{n}"))) for n in range(50)]
        await asyncio.sleep(0)
        await asyncio.gather(ledger.close(), *calls)
        assert await ledger.balance("acme", "alice") == 50
        await ledger.close()
        other = Ledger(ledger.path)
        assert await other.balance("acme", "alice") == 50
        await other.close()

    async def test_directory_that_is_missing_is_a_clear_error(self, tmp_path: Path) -> None:
        """It names the file and the reason."""
        with pytest.raises(LedgerNotOpened, match=r"no/credits\.db cannot be opened: No such file"):
            await Ledger(tmp_path / "no" / "credits.db").start()


class TestFile:
    async def test_other_schema_version_is_a_clear_error(self, ledger: Ledger) -> None:
        """Written by a newer metered-billing: neither read nor changed."""
        await granted(ledger)
        await ledger.close()
        sql(ledger, "PRAGMA user_version = 99")
        with pytest.raises(LedgerNotOpened, match="schema version 99"):
            await ledger.start()
        assert sql(ledger, "SELECT count(*) FROM entries") == [(1,)]

    async def test_database_of_something_else_is_refused(self, ledger: Ledger) -> None:
        """A ledger is not put among other tables."""
        sql(ledger, "CREATE TABLE theirs (x)")
        with pytest.raises(LedgerNotOpened, match="not a ledger"):
            await ledger.start()
        assert sql(ledger, "SELECT name FROM sqlite_master") == [("theirs",)]

    async def test_file_that_is_no_database_is_refused(self, ledger: Ledger) -> None:
        """And left as it is."""
        ledger.path.write_text("dear diary, " * 100)
        with pytest.raises(LedgerNotOpened, match="not a database"):
            await ledger.start()

    @pytest.mark.parametrize("table", ["entries", "keys", "voids"])
    @pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET tenant_id = 'thief'"])
    async def test_rows_are_append_only(self, ledger: Ledger, table: str, statement: str) -> None:
        """The file itself refuses to forget or change them."""
        await deducted(ledger)
        await ledger.void(void())
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            sql(ledger, statement.format(table))

    async def test_negative_balance_is_refused_by_the_file_too(self, ledger: Ledger) -> None:
        """The last wall, should every other have fallen."""
        await granted(ledger)
        with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
            sql(ledger, "UPDATE accounts SET balance = -1")

    async def test_books_that_contradict_themselves_are_not_written_in(self, ledger: Ledger) -> None:
        """More refunded than deducted, by whatever means: an exception, and nothing moves."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.refund(refund(transaction, 10))
        columns = "id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance, created_at"
        sql(
            ledger,
            f"INSERT INTO entries ({columns}) VALUES ('x', 'refund', '{transaction}', 'x', 'acme', 'alice', "
            "1, 101, '')",
        )
        with pytest.raises(LedgerCorrupt, match=transaction):
            await ledger.void(void())
        assert await ledger.balance("acme", "alice") == 100

    @pytest.mark.parametrize("held", [Held(5, 3), Held(-2, 10)], ids=["more than granted", "less than nothing"])
    async def test_account_that_cannot_be_is_not_written_to(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, held: Held
    ) -> None:
        """The rules look once more before they move anything."""
        monkeypatch.setattr(SqliteBooks, "held", lambda *_: held)
        with pytest.raises(LedgerCorrupt, match="would leave a balance"):
            await ledger.grant(grant(1))
        monkeypatch.undo()
        assert await ledger.balance("acme", "alice") == 0

    async def test_command_that_the_file_refuses_is_not_answered(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Should the rules ever let a wrong row through: an exception, and nothing is written."""
        await granted(ledger, 5)
        monkeypatch.setattr("metered_billing.ledger.rules._move", lambda books, entry, held: books.write(entry))
        monkeypatch.setattr(SqliteBooks, "held", lambda *_: Held(-5, 0))
        with pytest.raises(LedgerCorrupt, match="CHECK"):
            await ledger.grant(grant(1))
        monkeypatch.undo()
        assert await ledger.balance("acme", "alice") == 5

    async def test_storage_trouble_is_unavailable(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        """SQLite's errors come out as the ledger's own, and leave unknown what happened."""
        await ledger.start()

        def full(self: SqliteBooks, *_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(SqliteBooks, "hold", full)
        with pytest.raises(LedgerUnavailable, match="disk is full") as raised:
            await ledger.grant(grant())
        assert not isinstance(raised.value, LedgerNotOpened)

    def test_ledger_serves_one_loop_after_another(self, tmp_path: Path) -> None:
        """As test clients do, that run each request in a loop of its own."""
        ledger = Ledger(tmp_path / "credits.db")

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
    async def test_batch_on_a_ledger_in_use_is_an_error_each(self, ledger: Ledger) -> None:
        """Nothing is raised for the batch as a whole."""
        await ledger.start()
        answers = await Ledger(ledger.path).batch([void(), void()])
        assert [type(answer) for answer in answers] == [LedgerLocked, LedgerLocked]

    async def test_batch_decides_in_order_in_one_commit(self, ledger: Ledger) -> None:
        """A grant, the deduction that it pays for, and the void of that."""
        await ledger.start()
        before = ledger._file.commits
        answers = await ledger.batch([grant(10), deduct(10), deduct(10, key="more"), void()])
        assert [answer.status for answer in answers if isinstance(answer, Answer)] == [201, 201, 402, 200]
        assert ledger._file.commits == before + 1

    async def test_batch_with_a_command_that_raises_does_the_others(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each stands alone, even where one finds the books corrupt."""
        await granted(ledger)
        decide: Callable[..., Answer] = store_module.decide  # type: ignore[attr-defined]

        def spoiled(books: SqliteBooks, command: object, stamp: object) -> Answer:
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


async def test_ledger_whose_file_was_removed_moves_nothing(tmp_path: Path) -> None:
    """What is written to a file without a name would be gone with the process."""
    ledger = Ledger(tmp_path / "credits.db")
    await granted(ledger, 100)
    (tmp_path / "credits.db").unlink()
    with pytest.raises(LedgerNotOpened, match="was removed while it was in use: restart"):
        await ledger.deduct(deduct(10))
    await ledger.close()
