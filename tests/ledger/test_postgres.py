"""The ledger on PostgreSQL: several at once on one database, and what the database itself refuses."""

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from threading import Thread
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from metered_billing.journal.postgres import PostgresJournal
from metered_billing.ledger import (
    Answer,
    Command,
    Deduct,
    Ledger,
    LedgerBusy,
    LedgerCorrupt,
    LedgerError,
    LedgerNotOpened,
    LedgerUnavailable,
    Void,
)
from metered_billing.ledger import postgres as module
from metered_billing.ledger.postgres_books import SCHEMA, PostgresBooks
from metered_billing.ledger.rules import Held
from metered_billing.postgres import PostgresDatabase, migrate
from metered_billing.runtime import Runtime
from metered_billing.schemas import Schema
from tests.docs.pages import EXAMPLES
from tests.journal.engines import charge

from .asking import deduct, deducted, grant, granted, refund, void


@pytest.fixture
async def ledger(pg_clean: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(pg_clean)
    yield ledger
    await ledger.close()


@pytest.fixture
async def ledgers(pg_clean: str) -> AsyncIterator[list[Ledger]]:
    """Three on one database, as of three processes."""
    ledgers = [Ledger(pg_clean) for _ in range(3)]
    yield ledgers
    for ledger in ledgers:
        await ledger.close()


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement behind the ledger's back."""
    with psycopg.connect(url, options="-c search_path=metered_billing") as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def at_once(*work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run each in a thread and an event loop of its own."""
    failures: list[BaseException] = []

    def run(each: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            asyncio.run(each())
        except BaseException as failure:
            failures.append(failure)

    threads = [Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def books_balance(url: str) -> None:
    """The whole of the truth, asked of the database itself."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    left: dict[str, int] = defaultdict(int)
    for kind, transaction, tenant, user, amount, balance in sql(
        url, "SELECT kind, transaction_id, tenant_id, user_id, amount, balance FROM entries ORDER BY seq"
    ):
        sums[tenant, user] += amount
        assert balance == sums[tenant, user] >= 0
        if kind != "grant":
            left[transaction] += amount
            assert left[transaction] <= 0
    held = {
        (tenant, user): balance
        for tenant, user, balance in sql(url, "SELECT tenant_id, user_id, balance FROM accounts")
    }
    assert {account: balance for account, balance in held.items() if balance} == {
        account: balance for account, balance in sums.items() if balance
    }
    # One entry a key, but for a void, whose key is its deduction's.
    assert sql(url, "SELECT 1 FROM entries GROUP BY tenant_id, idempotency_key, kind HAVING count(*) > 1") == []
    # And no key that is both somebody's deduction and voided for somebody else.
    assert (
        sql(
            url,
            "SELECT 1 FROM keys JOIN voids USING (tenant_id, idempotency_key) WHERE keys.kind <> 'void'"
            " AND keys.user_id <> voids.user_id",
        )
        == []
    )


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, url: str, command: Command) -> None:
    """Let another ledger decide `command`, and commit it, just before the next call of a method of the books."""
    go_on = getattr(PostgresBooks, method)

    async def decide() -> None:
        other = Ledger(url)
        assert (await other.decide(command)).done
        await other.close()

    def interrupted(books: PostgresBooks, *arguments: Any) -> None:
        monkeypatch.undo()
        asyncio.run(decide())  # we are in the ledger's own thread, which has no loop
        go_on(books, *arguments)

    monkeypatch.setattr(PostgresBooks, method, interrupted)


class TestSeveral:
    def test_anything_at_once_balances(self, pg_clean: str) -> None:
        """Deductions, refunds, voids, grants and batches, over few keys and accounts, from three ledgers in threads."""
        answered: dict[tuple[str, str, str, int], set[str]] = defaultdict(set)

        def work(seed: int) -> Callable[[], Coroutine[Any, Any, None]]:
            chance = random.Random(seed)
            transactions: list[str] = ["unknown"]

            def command() -> Command:
                key = f"key-{chance.randrange(150)}"
                tenant, user = chance.choice(["acme", "globex"]), chance.choice([None, "alice", "bob"])
                amount = chance.randint(1, 20)
                kind = chance.randrange(10)
                if kind < 5:
                    return Deduct(idempotency_key=key, tenant_id=tenant, user_id=user, amount=amount)
                if kind < 7:
                    return Void(idempotency_key=key, tenant_id=tenant, user_id=user)
                if kind < 9:
                    transaction = chance.choice(transactions[-20:])
                    return refund(transaction, amount, key=f"{key}:refund")
                return grant(amount, key=key, tenant_id=tenant, user=user)

            def note(command: Command, answer: Answer | LedgerError) -> None:
                assert isinstance(answer, Answer), answer
                assert answer.status in (200, 201, 402, 404, 409, 422)
                if isinstance(command, Deduct) and answer.done:
                    transactions.append(answer.body["transaction_id"])
                    name = (command.tenant_id, command.idempotency_key, command.user_id or "", command.amount)
                    answered[name].add(answer.body["transaction_id"])

            async def run() -> None:
                ledger = Ledger(pg_clean)
                for tenant in ("acme", "globex"):
                    for user in (None, "alice", "bob"):
                        await ledger.grant(grant(300, key=f"start-{user}", tenant_id=tenant, user=user))
                for _ in range(12):
                    singles = [command() for _ in range(chance.randint(1, 24))]
                    batch = [command() for _ in range(chance.randint(1, 12))]
                    deciding = asyncio.gather(*map(ledger.decide, singles))
                    batched = await ledger.batch(batch)
                    for each, answer in zip([*singles, *batch], [*await deciding, *batched], strict=True):
                        note(each, answer)
                await ledger.close()

            return run

        at_once(work(1), work(2), work(3))
        books_balance(pg_clean)
        assert all(len(transactions) == 1 for transactions in answered.values())
        assert len(answered) > 20

    async def test_one_account_is_never_overdrawn(self, ledgers: list[Ledger], pg_clean: str) -> None:
        """300 at once through three, for 200 credits: 200 succeed."""
        await granted(ledgers[0], 200)
        answers = await asyncio.gather(*(ledgers[n % 3].deduct(deduct(1, key=f"charge-{n}")) for n in range(300)))
        assert sorted(answer.status for answer in answers) == [201] * 200 + [402] * 100
        assert await ledgers[1].balance("acme", "alice") == 0
        books_balance(pg_clean)

    async def test_copies_take_effect_once(self, ledgers: list[Ledger]) -> None:
        """The same deduction through three, 60 times: one deduction, 60 equal answers."""
        await granted(ledgers[0], 100)
        answers = await asyncio.gather(*(ledgers[n % 3].deduct(deduct(10)) for n in range(60)))
        assert sorted(answer.status for answer in answers) == [200] * 59 + [201]
        assert len({answer.body["transaction_id"] for answer in answers}) == 1

    @pytest.mark.parametrize("tries", range(5))
    async def test_key_of_two_users_is_one_users(self, ledgers: list[Ledger], pg_clean: str, tries: int) -> None:
        """No account's lock keeps them apart: one is done, the other is told that the key is taken."""
        for user in ("alice", "bob"):
            await granted(ledgers[0], 100, user=user)
        keys = [f"charge-{tries}-{n}" for n in range(20)]
        firsts = asyncio.gather(*(ledgers[0].deduct(deduct(1, key=key)) for key in keys))
        seconds = asyncio.gather(*(ledgers[1].deduct(deduct(1, key=key, user="bob")) for key in reversed(keys)))
        for first, second in zip(await firsts, reversed(await seconds), strict=True):
            assert sorted([first.status, second.status]) == [201, 422]
        books_balance(pg_clean)

    @pytest.mark.parametrize("tries", range(5))
    async def test_void_and_deduction_of_two_users_do_not_both_win(
        self, ledgers: list[Ledger], pg_clean: str, tries: int
    ) -> None:
        """The key belongs to whoever came first, and the other is told so."""
        await granted(ledgers[0], 100)
        keys = [f"charge-{tries}-{n}" for n in range(20)]
        deductions = asyncio.gather(*(ledgers[0].deduct(deduct(1, key=key)) for key in keys))
        voids = asyncio.gather(*(ledgers[1].void(void(key, user="bob")) for key in keys))
        for deduction, voided in zip(await deductions, await voids, strict=True):
            assert sorted([deduction.done, voided.done]) == [False, True]
            assert 422 in (deduction.status, voided.status)
        books_balance(pg_clean)

    async def test_void_meets_its_deduction(self, ledgers: list[Ledger], pg_clean: str) -> None:
        """Whichever comes first, and whoever asks: nothing is kept."""
        await granted(ledgers[0], 100)
        keys = [f"charge-{n}" for n in range(40)]
        calls = [call for key in keys for call in (ledgers[0].deduct(deduct(1, key=key)), ledgers[1].void(void(key)))]
        answers = await asyncio.gather(*calls)
        assert {answer.status for answer in answers} <= {200, 201, 409}
        assert await ledgers[2].balance("acme", "alice") == 100
        books_balance(pg_clean)

    async def test_refunds_never_exceed_their_deduction(self, ledgers: list[Ledger], pg_clean: str) -> None:
        """Thirty refunds of 1 and a void, through three: 10 come back."""
        transaction = (await deducted(ledgers[0], 10)).body["transaction_id"]
        refunds = [ledgers[n % 3].refund(refund(transaction, 1, key=f"r-{n}")) for n in range(30)]
        *answers, voided = await asyncio.gather(*refunds, ledgers[2].void(void()))
        given = sum(answer.status == 201 for answer in answers)
        assert given + voided.body["refunded"] == 10
        assert await ledgers[0].balance("acme", "alice") == 100
        books_balance(pg_clean)

    async def test_refund_waits_for_its_deductions_account(
        self, ledger: Ledger, pg_clean: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the deduction is committed between the look at accounts and the decision, it begins again."""
        other = Ledger(pg_clean)
        transaction = (await deducted(other, 10)).body["transaction_id"]
        looked: list[int] = []
        fetch = PostgresBooks._fetch_entries

        def too_early(books: PostgresBooks, ids: Any) -> None:
            looked.append(1)
            if len(looked) > 1:
                fetch(books, ids)

        monkeypatch.setattr(PostgresBooks, "_fetch_entries", too_early)
        assert (await ledger.refund(refund(transaction, 3))).body["balance"] == 93
        assert len(looked) > 2
        await other.close()
        books_balance(pg_clean)

    @pytest.mark.parametrize("method", ["_lock", "flush"])
    @pytest.mark.parametrize("second", [void(user="bob"), deduct(user="bob"), grant(1, key="charge-1", user="bob")])
    async def test_key_taken_by_another_user_in_the_middle(
        self, ledger: Ledger, pg_clean: str, monkeypatch: pytest.MonkeyPatch, method: str, second: Command
    ) -> None:
        """Before the locks or after the decision: whoever commits later is rolled back, and sees who was first."""
        await granted(ledger)
        await granted(ledger, user="bob")
        interrupt(monkeypatch, method, pg_clean, deduct())
        answer = await ledger.decide(second)
        assert (answer.status, answer.refusal) == (422, "idempotency-key-reused")
        books_balance(pg_clean)

    async def test_refund_sees_the_void_that_it_waited_for(
        self, ledger: Ledger, pg_clean: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was committed before the lock was had is known: the refund is told of the void."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        interrupt(monkeypatch, "_lock", pg_clean, void())
        assert (await ledger.refund(refund(transaction))).refusal == "charge-voided"
        books_balance(pg_clean)

    async def test_started_at_once_make_the_tables_once(self, ledgers: list[Ledger]) -> None:
        """The first makes them while the others wait."""
        await asyncio.gather(*(ledger.start() for ledger in ledgers))
        await granted(ledgers[0], 7)
        assert await ledgers[2].balance("acme", "alice") == 7

    async def test_batch_that_others_are_in_the_way_of_is_done_singly(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A deadlock, say, that came again and again: it was rolled back, so each goes for itself."""
        await granted(ledger)
        flush = PostgresBooks.flush

        def deadlock(books: PostgresBooks) -> None:
            if len(books._new_keys) > 1:
                raise psycopg.errors.DeadlockDetected("told so")
            flush(books)

        monkeypatch.setattr(PostgresBooks, "flush", deadlock)
        answers = await ledger.batch([deduct(1, key="one"), deduct(2, key="two")])
        assert [answer.status for answer in answers if isinstance(answer, Answer)] == [201, 201]
        assert await ledger.balance("acme", "alice") == 97


class TestTrouble:
    async def test_server_that_is_not_there_is_a_clear_error(self) -> None:
        """Nothing happened; and no password in it."""
        ledger = Ledger("postgresql://ann:hunter2@127.0.0.1:1/credits")
        for call in (ledger.start(), ledger.deduct(deduct())):
            with pytest.raises(
                LedgerNotOpened, match=r"postgresql://127\.0\.0\.1:1/credits cannot be reached"
            ) as raised:
                await call
            assert "hunter2" not in str(raised.value)
        await ledger.close()

    async def test_role_needs_no_more_than_the_docs_say(self, ledger: Ledger, pg_clean: str) -> None:
        """Without its rights: a clear error. With them, it moves credits, and can make nothing."""
        await granted(ledger)
        role = f"teller_{os.getpid()}"
        sql(pg_clean, f"CREATE ROLE {role} LOGIN")
        teller = Ledger(pg_clean.replace("postgres@", f"{role}@"))
        try:
            with pytest.raises(LedgerNotOpened, match=r"may not use the schema metered_billing, .* grant it USAGE"):
                await teller.start()
            rights = (EXAMPLES / "rights-ledger.sql").read_text(encoding="utf-8")
            sql(pg_clean, rights.replace("TO credits;", f"TO {role};"))
            transaction = (await teller.deduct(deduct())).body["transaction_id"]
            assert (await teller.refund(refund(transaction))).done
            assert (await teller.void(void("never-seen"))).done
        finally:
            await teller.close()
            sql(pg_clean, f"DROP OWNED BY {role}")
            sql(pg_clean, f"DROP ROLE {role}")

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (psycopg.errors.QueryCanceled("canceling statement due to statement timeout"), LedgerNotOpened),
            (psycopg.errors.LockNotAvailable("lock timeout"), LedgerBusy),
            (psycopg.errors.CheckViolation("a wall"), LedgerCorrupt),
        ],
    )
    async def test_errors_are_the_ledgers_own(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, error: psycopg.Error, kind: type[LedgerError]
    ) -> None:
        """All of these were rolled back, and say so by their kind."""
        await granted(ledger)

        def fail(books: PostgresBooks) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(PostgresBooks, "flush", fail)
            with pytest.raises(kind, match=str(error)):
                await ledger.deduct(deduct())
        assert await ledger.balance("acme", "alice") == 100

    async def test_connection_that_breaks_while_committing_is_unknown(
        self, ledger: Ledger, pg_clean: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither done nor undone; the same key tells which."""
        await granted(ledger)
        finish = PostgresDatabase._finish

        def cut(database: PostgresDatabase, connection: Any) -> None:
            monkeypatch.undo()
            sql(
                pg_clean,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND application_name LIKE 'metered-billing%'",
            )
            finish(database, connection)

        monkeypatch.setattr(PostgresDatabase, "_finish", cut)
        with pytest.raises(LedgerUnavailable) as raised:
            await ledger.deduct(deduct())
        assert not isinstance(raised.value, LedgerNotOpened)
        assert (await ledger.deduct(deduct())).body["balance"] == 90

    @pytest.mark.parametrize("text", ["\x00", "a\x00b"])
    async def test_text_that_cannot_be_stored_is_not_found(self, ledger: Ledger, text: str) -> None:
        """PostgreSQL refuses to be asked for a NUL."""
        await granted(ledger)
        assert await ledger.balance(text, text) == 0
        assert await ledger.transaction(text) is None
        assert await ledger.find("acme", text) is None
        assert (await ledger.transactions("acme", text)).items == ()


class TestTables:
    @pytest.mark.parametrize("table", ["entries", "keys", "voids"])
    @pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET tenant_id = 'thief'", "TRUNCATE {}"])
    async def test_rows_are_append_only(self, ledger: Ledger, pg_clean: str, table: str, statement: str) -> None:
        """The database itself refuses to forget or change them."""
        await deducted(ledger)
        await ledger.void(void())
        with pytest.raises(psycopg.IntegrityError, match=f"{table} are append-only"):
            sql(pg_clean, statement.format(table))

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE accounts SET balance = -1",
            "UPDATE accounts SET balance = granted + 1",
            "INSERT INTO entries (id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance,"
            " created_at) VALUES ('x', 'deduction', 'x', 'x', 'acme', 'alice', 1, 1, '')",
            "INSERT INTO entries (id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance,"
            " created_at) VALUES ('x', 'present', 'x', 'x', 'acme', 'alice', 1, 1, '')",
        ],
    )
    async def test_rows_that_cannot_be_are_refused(self, ledger: Ledger, pg_clean: str, statement: str) -> None:
        """The last wall, should every other have fallen."""
        await granted(ledger)
        with pytest.raises(psycopg.errors.CheckViolation):
            sql(pg_clean, statement)

    async def test_command_that_the_tables_refuse_is_not_answered(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Should the rules ever let a wrong row through: an exception, and nothing is written."""
        await granted(ledger, 5)
        monkeypatch.setattr("metered_billing.ledger.rules._move", lambda books, entry, held: books.write(entry))
        monkeypatch.setattr(PostgresBooks, "held", lambda *_: Held(-5, 0))
        with pytest.raises(LedgerCorrupt, match="entries_balance_check"):
            await ledger.grant(grant(1))
        monkeypatch.undo()
        assert await ledger.balance("acme", "alice") == 5

    async def test_tables_of_a_later_release_are_left_alone(self, ledger: Ledger, pg_clean: str) -> None:
        """Neither read nor changed."""
        await granted(ledger)
        await ledger.close()
        sql(pg_clean, "UPDATE versions SET version = 99")
        with pytest.raises(LedgerNotOpened, match=r"schema version 99.*upgrade metered-billing"):
            await ledger.start()
        with pytest.raises(LedgerNotOpened, match="schema version 99"):
            await ledger.deduct(deduct())
        assert sql(pg_clean, "SELECT count(*) FROM entries") == [(1,)]

    async def test_tables_of_an_earlier_release_wait_for_migrate(
        self, ledger: Ledger, pg_clean: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other processes may be at work with them: only `migrate` brings them up to date; the credits stay."""
        await granted(ledger, 7)
        await ledger.close()
        second = ("ALTER TABLE accounts ADD COLUMN note text NOT NULL DEFAULT 'new'",)
        later = Schema("ledger", (*SCHEMA.steps, second))
        monkeypatch.setattr(module, "SCHEMA", later)
        with pytest.raises(LedgerNotOpened, match=r"version 1.*needs version 2: run `metered-billing migrate`"):
            await ledger.start()
        assert migrate(pg_clean, later) == 1
        assert migrate(pg_clean, later) == 2
        assert await ledger.balance("acme", "alice") == 7
        assert sql(pg_clean, "SELECT note FROM accounts") == [("new",)]
        assert sql(pg_clean, "SELECT version FROM versions WHERE what = 'ledger'") == [(2,)]

    async def test_release_that_runs_goes_on_beside_a_newer_one(
        self, ledger: Ledger, pg_clean: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tables that are migrated under a running service stop it at its next start, not before."""
        await granted(ledger, 7)
        later = Schema("ledger", (*SCHEMA.steps, ("ALTER TABLE accounts ADD COLUMN note text",)))
        assert migrate(pg_clean, later) == 1
        assert (await ledger.deduct(deduct(3))).done
        with monkeypatch.context() as patch:
            patch.setattr(module, "SCHEMA", later)
            newer = Ledger(pg_clean)
            assert (await newer.deduct(deduct(3, key="charge-2"))).done
            await newer.close()
        assert await ledger.balance("acme", "alice") == 1
        await ledger.close()
        with pytest.raises(LedgerNotOpened, match=r"version 2.*knows versions up to 1: upgrade metered-billing"):
            await ledger.start()

    async def test_migration_that_fails_changes_nothing(self, ledger: Ledger, pg_clean: str) -> None:
        """All of it is one transaction."""
        await granted(ledger, 7)
        broken = Schema("ledger", (*SCHEMA.steps, ("ALTER TABLE accounts ADD COLUMN note text", "nonsense")))
        with pytest.raises(psycopg.errors.SyntaxError):
            migrate(pg_clean, broken)
        assert sql(pg_clean, "SELECT version FROM versions WHERE what = 'ledger'") == [(1,)]
        assert await ledger.balance("acme", "alice") == 7


def test_runtime_is_the_ledgers_clock(pg_clean: str) -> None:
    """Times and ids come from outside."""
    ledger = Ledger(pg_clean, Runtime(now=lambda: 0.0, new_id=lambda: "an-id"))

    async def run() -> Answer:
        answer = await ledger.grant(grant())
        await ledger.close()
        return answer

    body = asyncio.run(run()).body
    assert (body["created_at"], body["transaction_id"]) == ("1970-01-01T00:00:00.000Z", "an-id")


@pytest.mark.slow
async def test_text_is_kept_whatever_encoding_the_connection_is_asked_for(pg_clean: str) -> None:
    """A group's statements are made of UTF-8."""
    url = f"{pg_clean}{'&' if '?' in pg_clean else '?'}client_encoding=LATIN1"
    ledger, journal = Ledger(url), PostgresJournal(url)
    assert (await ledger.decide(grant(10, reason="é 表 \\ '"))).done
    await ledger.close()
    await journal.start("")
    await asyncio.gather(*(journal.open(charge(journal, f"c{n}", request_id="é 表 \\ '")) for n in range(3)))
    await journal.close()
    assert sql(pg_clean, "SELECT reason FROM entries") == [("é 表 \\ '",)]
    assert sql(pg_clean, "SELECT request_id FROM charges") == [("é 表 \\ '",)] * 3


@pytest.mark.slow
async def test_database_that_cannot_hold_every_text_is_refused_at_the_start(pg_url: str) -> None:
    """Else the first customer with a name that it cannot hold would find out."""
    name = f"latin_{os.getpid()}"
    with psycopg.connect(pg_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0".encode())
        parts = urlsplit(pg_url)
        ledger = Ledger(urlunsplit(parts._replace(path=f"/{name}")))
        try:
            with pytest.raises(LedgerNotOpened, match="is encoded in LATIN1, which cannot hold every text"):
                await ledger.start()
        finally:
            await ledger.close()
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
