"""The ledger in a SQLite file: one owner, append-only, and what else a file can be."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from metered_billing.ledger import (
    Ledger,
    LedgerCorrupt,
    LedgerLocked,
    LedgerNotOpened,
    LedgerUnavailable,
)
from metered_billing.ledger.books import SqliteBooks
from metered_billing.ledger.rules import Held
from metered_billing.ledger.sqlite import SqliteEngine

from .asking import deduct, deducted, file_of, grant, granted, refund, void


def sql(ledger: Ledger, statement: str) -> list[tuple[object, ...]]:
    """Run a statement behind the ledger's back."""
    connection = sqlite3.connect(file_of(ledger))
    try:
        with connection:
            return connection.execute(statement).fetchall()
    finally:
        connection.close()


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """A fresh ledger in a file."""
    ledger = Ledger(tmp_path / "credits.db")
    yield ledger
    await ledger.close()


class TestOwner:
    async def test_second_ledger_on_the_same_file_is_refused(self, ledger: Ledger) -> None:
        """In one process too: two of them would decide on different balances."""
        await ledger.start()
        with pytest.raises(LedgerLocked, match="open in this process already"):
            await Ledger(file_of(ledger)).start()

    async def test_other_name_of_the_same_file_is_refused(self, ledger: Ledger, tmp_path: Path) -> None:
        """A symbolic link is not a second ledger."""
        await ledger.start()
        link = tmp_path / "link.db"
        link.symlink_to(file_of(ledger))
        with pytest.raises(LedgerLocked):
            await Ledger(link).start()

    async def test_closed_ledger_can_be_owned_by_the_next(self, ledger: Ledger) -> None:
        """Closing lets go of the lock; the credits stay."""
        await granted(ledger, 7)
        await ledger.close()
        after = Ledger(file_of(ledger))
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
            assert isinstance(ledger._engine, SqliteEngine)
            held = ledger._engine._lock.held
            ledger._engine._lock.release()
            os._exit(held)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(LedgerLocked):
            await Ledger(file_of(ledger)).start()

    async def test_call_that_cannot_open_the_file_does_not_keep_the_lock(self, ledger: Ledger) -> None:
        """A file that is no ledger, say, is free for whoever can read it."""
        sql(ledger, "PRAGMA user_version = 99")
        with pytest.raises(LedgerNotOpened):
            await ledger.balance("acme")
        sql(ledger, "PRAGMA user_version = 0")
        other = Ledger(file_of(ledger))
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
        other = Ledger(file_of(ledger))
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
        file_of(ledger).write_text("dear diary, " * 100)
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

    async def test_batch_on_a_ledger_in_use_is_an_error_each(self, ledger: Ledger) -> None:
        """Nothing is raised for the batch as a whole."""
        await ledger.start()
        answers = await Ledger(file_of(ledger)).batch([void(), void()])
        assert [type(answer) for answer in answers] == [LedgerLocked, LedgerLocked]


async def test_ledger_whose_file_was_removed_moves_nothing(tmp_path: Path) -> None:
    """What is written to a file without a name would be gone with the process."""
    ledger = Ledger(tmp_path / "credits.db")
    await granted(ledger, 100)
    (tmp_path / "credits.db").unlink()
    with pytest.raises(LedgerNotOpened, match="was removed while it was in use: restart"):
        await ledger.deduct(deduct(10))
    await ledger.close()


async def test_ledger_file_is_made(tmp_path: Path) -> None:
    """Starting makes the file and its lock, in a directory that exists."""
    ledger = Ledger(tmp_path / "new.db")
    await ledger.start()
    await ledger.close()
    assert {"new.db", "new.db.lock"} <= {path.name for path in tmp_path.iterdir()}
