"""`reconcile`: zero where both sides agree, and each kind of difference where somebody tampered with one."""

import asyncio
import json
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered
from metered_billing.charge import Deducted, Lost, Record, Refunded, Reported, Unread, step
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import new_uuid7
from tests.docs.sandbox import serving_thread
from tests.scenes import charge, keep
from tests.serving import free_port, start_service
from tests.stand import serving

JOURNAL = Path("metered-billing-journal")
LEDGER = "sqlite:///credits.db"


def app_on(credits: Any, **options: Any) -> FastAPI:  # noqa: A002 - the field's word
    """An app whose requests cost 10, of which so many fail."""
    app = FastAPI()
    app.add_middleware(
        MeteredBillingMiddleware, credits=credits, account=lambda request: Account("acme", "ann"), **options
    )

    @app.post("/work")
    @metered(cost=10)
    async def work(failed: int = 0, seconds: float = 0) -> dict[str, list[dict[str, str]]]:
        await asyncio.sleep(seconds)
        return {"results": [{"status": "failed" if number < failed else "ok"} for number in range(10)]}

    return app


def used() -> None:
    """An app in this directory was asked for three things: all of it, a part, and more than there was."""

    async def main() -> None:
        credits = SqlCredits("credits.db")  # noqa: A001
        await credits.grant("acme", "ann", amount=25, reason="test", idempotency_key="grant")
        async with serving(app_on(credits)) as client:
            for path in ("/work", "/work?failed=2", "/work"):
                await client.post(path)

    asyncio.run(main())


def tampered(statement: str, file: str = "credits.db") -> None:
    """Change what stands in the ledger, or in the journal."""
    with closing(sqlite3.connect(file)) as connection, connection:
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        assert connection.execute(statement).rowcount > 0


def in_ledger() -> str:
    """All of it."""
    with closing(sqlite3.connect("credits.db")) as connection:
        return "".join(connection.iterdump())


def in_journal(statement: str) -> None:
    tampered(statement, str(JOURNAL / "charges-0.db"))


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "code", "sentence"),
        [
            ([], 2, "Say where the credits are"),
            (["--credits", "ftp://x"], 2, "not a ledger"),
            (["--credits", LEDGER, "--since", "x"], 2, "--since"),
            (["--credits", LEDGER, "--contract", "house_credits:HouseCredits"], 2, "a mapping has no list of all"),
            (["--credits", LEDGER, "--journal", "mysql://x:secret@y"], 2, "--journal"),
            (["--credits", LEDGER, "--journal", "nowhere"], 1, "no journal at nowhere"),
            (["--credits", "http://127.0.0.1:1"], 1, "No answer from http://127.0.0.1:1"),
        ],
    )
    def test_asked_for_wrongly(self, run: Any, arguments: list[str], code: int, sentence: str) -> None:
        """One sentence, no table, no secret."""
        used()
        done = run("reconcile", *arguments)
        assert (done.code, done.out) == (code, "")
        assert sentence in done.err
        assert "secret" not in done.err

    @pytest.mark.slow
    def test_wrong_token_is_no_difference(self, run: Any, tmp_path: Path) -> None:
        """It fails: nothing was compared. So for a token of another tenant."""
        used()
        asyncio.run(keep(JOURNAL, [charge(Deducted("t"), Reported(10), account=Account("other"))]))
        with start_service(tmp_path) as (_, url):
            for token, sentence in (("nonsense", "does not accept the token"), ("acmes", "another tenant")):
                done = run("reconcile", CREDITS=url, TOKEN=token)
                assert (done.code, done.out) == (1, "")
                assert sentence in done.err

    @pytest.mark.parametrize(
        "page",
        [
            {"items": [{}], "next_cursor": None},
            {"items": [], "next_cursor": "on and on"},
            {"items": 7, "next_cursor": None},
            {"hello": "world"},
        ],
    )
    def test_something_else_than_a_service(self, run: Any, page: object) -> None:
        """A sentence, neither a difference nor a loop without end."""
        used()
        with answering(page) as url:
            done = run("reconcile", CREDITS=url)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)

    def test_corrupt_file_is_named_and_zero_is_not_claimed(self, run: Any) -> None:
        """Exit code 3, although what could be read agrees."""
        used()
        (JOURNAL / "charges-1.db").write_bytes(b"rubbish" * 1_000)
        done = run("reconcile", CREDITS=LEDGER)
        assert done.code == 3
        assert "charges-1.db" in done.err
        assert done.out.startswith("0 differences")


class answering:  # noqa: N801 - a context manager
    """A server that answers everything with one document."""

    def __init__(self, document: object) -> None:
        content = json.dumps(document).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class TestAgreement:
    def test_zero_differences(self, run: Any) -> None:
        """Kept, refunded in part, declined: exit code 0."""
        used()
        done = run("reconcile", CREDITS=LEDGER)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("0 differences: 3 charges and 3 transactions of 1 tenants since ")
        document = json.loads(run("reconcile", "--json", CREDITS=LEDGER).out)
        assert (document["differences"], document["charges"], document["pending"]) == ([], 3, 0)

    def test_empty_journal_has_nothing_to_compare(self, run: Any) -> None:
        """Without a word about what a service may have."""
        JOURNAL.mkdir()
        assert run("reconcile", CREDITS=LEDGER).out == "0 differences: 0 charges and 0 transactions of 0 tenants\n"

    def test_journal_that_lost_its_disk(self, run: Any) -> None:
        """What it should have known is found when a person says since when, and of whom."""
        used()
        for path in JOURNAL.iterdir():
            path.unlink()
        done = run("reconcile", "--tenant", "acme", "--since", "1h", "--json", CREDITS=LEDGER)
        assert done.code == 3
        assert [one["kind"] for one in json.loads(done.out)["differences"]] == ["unknown deduction"] * 2

    def test_what_the_journal_has_forgotten_is_no_difference(self, run: Any) -> None:
        """Nor what was there before it; nor, with `--since`, what is older."""
        used()
        in_journal("DELETE FROM charges WHERE id = (SELECT MIN(id) FROM charges)")
        assert run("reconcile", CREDITS=LEDGER).code == 0
        in_journal("DELETE FROM charges WHERE id = (SELECT MIN(id) FROM charges)")
        assert run("reconcile", CREDITS=LEDGER).code == 0

    def test_forgotten_beside_an_old_dispute_is_no_difference(self, run: Any) -> None:
        """Disputed charges stay for ever, and say nothing about how far back the others go."""
        used()
        in_journal("DELETE FROM charges WHERE id = (SELECT MIN(id) FROM charges)")
        month = 30 * 86_400
        old = charge(Deducted("t-9"), Unread("x"), opened_at=time.time() - month)
        asyncio.run(keep(JOURNAL, [old]))
        # Whatever is beyond 7 days may be forgotten: make the ledger's first deduction that old.
        key = uuid7_at(time.time() - month + 60)
        tampered(
            f"UPDATE entries SET created_at = '2020-01-01T00:00:00.000Z', idempotency_key = '{key}'"
            " WHERE kind = 'deduction' AND seq = (SELECT MIN(seq) FROM entries WHERE kind = 'deduction')"
        )
        document = json.loads(run("reconcile", "--json", CREDITS=LEDGER).out)
        assert document["differences"] == []
        assert [one["charge_id"] for one in document["attention"]] == [old.id]

    def test_clock_of_the_service_far_off_is_no_difference(self, run: Any) -> None:
        """A page that ends too early is not believed: each transaction that seems to lack is asked for."""
        used()
        tampered("UPDATE entries SET created_at = '2001-01-01T00:00:00.000Z'")
        assert run("reconcile", CREDITS=LEDGER).code == 0

    def test_tenant_and_since_narrow_it_down(self, run: Any) -> None:
        """Another tenant's differences are not seen; nor older ones."""
        used()
        tampered("DELETE FROM entries WHERE kind = 'deduction'")
        assert run("reconcile", CREDITS=LEDGER).code == 3
        assert run("reconcile", "--tenant", "other", CREDITS=LEDGER).code == 0
        assert run("reconcile", "--since", "0s", CREDITS=LEDGER).code == 0


def uuid7_at(at: float) -> str:
    return f"{int(at * 1_000):012x}"[:8] + "-" + f"{int(at * 1_000):012x}"[8:] + "-7" + new_uuid7()[15:]


class TestDifferences:
    @pytest.mark.parametrize(
        ("tamper", "statement", "kind", "credits_more"),
        [
            (tampered, "DELETE FROM entries WHERE amount = -10 AND seq = 2", "no deduction", -10),
            (tampered, "UPDATE entries SET amount = -11 WHERE seq = 2", "other deduction", 1),
            (tampered, "UPDATE entries SET user_id = 'bob' WHERE seq = 2", "other deduction", 0),
            (tampered, "DELETE FROM entries WHERE kind = 'refund'", "not refunded", 2),
            (tampered, "UPDATE entries SET amount = 1 WHERE kind = 'refund'", "not refunded", 1),
            (tampered, "UPDATE entries SET amount = 3 WHERE kind = 'refund'", "refunded otherwise", -1),
            (tampered, "UPDATE entries SET idempotency_key = 'x' WHERE kind = 'refund'", "refunded otherwise", 0),
            (
                tampered,
                "INSERT INTO entries SELECT 99, 'copy', kind, 'copy', idempotency_key, tenant_id, user_id, amount,"
                " balance, created_at, reason, request_id, metadata, items FROM entries WHERE seq = 2",
                "deducted twice",
                10,
            ),
            (
                tampered,
                "INSERT INTO entries SELECT 99, 'new', kind, 'new', 'other-app', tenant_id, user_id, amount,"
                " balance, '2999-01-01T00:00:00.000Z', reason, request_id, metadata, items FROM entries WHERE seq = 2",
                "unknown deduction",
                10,
            ),
            (
                in_journal,
                "UPDATE charges SET state = 'voided' WHERE id = (SELECT MIN(id) FROM charges)",
                "not undone",
                10,
            ),
            (
                in_journal,
                "DELETE FROM charges WHERE id = (SELECT MAX(id) FROM charges WHERE state = 'settled')",
                "unknown deduction",
                10,
            ),
        ],
    )
    def test_each_kind_is_found(
        self, run: Any, tamper: Callable[[str], None], statement: str, kind: str, credits_more: int
    ) -> None:
        """One difference, exit code 3, named for people and in JSON; and nothing was moved by looking."""
        used()
        tamper(statement)
        before = in_ledger(), (JOURNAL / "charges-0.db").read_bytes()
        done = run("reconcile", CREDITS=LEDGER)
        assert done.code == 3
        assert f"{kind}: " in done.out
        assert "1 differences: " in done.out
        document = json.loads(run("reconcile", "--json", CREDITS=LEDGER).out)
        (found,) = document["differences"]
        assert (found["kind"], found["credits"]) == (kind, credits_more)
        assert (in_ledger(), (JOURNAL / "charges-0.db").read_bytes()) == before

    def test_deductions_of_others_are_counted_where_tenants_are_shared(self, run: Any) -> None:
        """`--shared`: not differences, but not hidden either. Without it a hint at it."""
        used()
        in_journal("DELETE FROM charges WHERE id = (SELECT MAX(id) FROM charges WHERE state = 'settled')")
        assert "--shared" in run("reconcile", CREDITS=LEDGER).out
        done = run("reconcile", "--shared", CREDITS=LEDGER)
        assert done.code == 0
        assert "1 deductions of others" in done.out


class TestPending:
    def kept(self, *records: Record) -> None:
        asyncio.run(keep(JOURNAL, records))

    def test_left_by_the_dead_is_for_somebody(self, run: Any) -> None:
        """No difference: pending, and named, exit code 3."""
        self.kept(charge(Deducted("t-1")))
        done = run("reconcile", CREDITS=LEDGER)
        assert done.code == 3
        assert "0 differences" in done.out
        assert "1 pending, 1 for somebody to see to" in done.out
        assert "metered-billing recover" in done.out

    def test_disputed_is_listed_with_its_reason(self, run: Any) -> None:
        """For a person; not compared."""
        self.kept(charge(Deducted("t-1"), Unread("KeyError in outcomes")))
        done = run("reconcile", CREDITS=LEDGER)
        assert done.code == 3
        assert "KeyError in outcomes" in done.out

    def test_held_by_the_living_is_pending_until_it_ages(self, run: Any) -> None:
        """Exit code 0 while it is young; named after an hour."""

        async def main() -> None:
            journal = SqliteJournal(JOURNAL)
            await journal.start()
            young = charge(Deducted("t-1"), opened_at=time.time())
            await journal.open(replace(young, owner=journal.owner))
            done = await asyncio.to_thread(run, "reconcile", CREDITS=LEDGER)
            assert done.code == 0
            assert "1 pending, 0 for" in done.out
            old = charge(Deducted("t-2"), opened_at=time.time() - 4_000)
            await journal.open(replace(old, owner=journal.owner))
            done = await asyncio.to_thread(run, "reconcile", CREDITS=LEDGER)
            assert done.code == 3
            assert old.id in done.out
            assert young.id not in done.out
            await journal.close()

        asyncio.run(main())


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    with start_service(tmp_path) as (_, url):
        grant = {"tenant_id": "acme", "user_id": "ann", "amount": 10_000_000, "reason": "test"}
        headers = {"Authorization": "Bearer admins", "Idempotency-Key": "grant"}
        assert httpx.post(f"{url}/v1/grants", json=grant, headers=headers, trust_env=False, verify=False).is_success
        yield url


@pytest.mark.slow
def test_zero_differences_while_the_app_serves(run: Any, service: str) -> None:
    """Again and again under load: charges in flight are pending, never differences."""
    from metered_billing import HttpCredits

    port = free_port()
    app = app_on(HttpCredits(service, token="admins"))
    stop = threading.Event()
    answered = 0

    def load(number: int) -> None:
        nonlocal answered
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30, verify=False) as client:
            while not stop.is_set():
                client.post(f"/work?failed={number}&seconds={0.02 * number}")
                answered += 1

    with serving_thread(app, port):
        threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        try:
            pending = 0
            for _ in range(15):
                done = run("reconcile", "--json", CREDITS=service, TOKEN="admins")
                document = json.loads(done.out)
                assert document["differences"] == []
                assert done.code == 0
                pending += document["pending"]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert pending > 0  # else nothing was in flight, and nothing was tried
    done = run("reconcile", "--json", CREDITS=service, TOKEN="admins")
    document = json.loads(done.out)
    assert (done.code, document["pending"], document["charges"]) == (0, 0, answered)


@pytest.mark.slow
@pytest.mark.no_cover
def test_many_charges_take_bounded_memory(run: Any) -> None:
    """Both sides stand on disk, and are read page by page."""
    count = 6_000

    async def main() -> None:
        credits = SqlCredits("credits.db")  # noqa: A001
        await credits.grant("acme", "ann", amount=10 * count, reason="test", idempotency_key="grant")
        journal = SqliteJournal(JOURNAL)
        await journal.start(credits.realm)

        async def one(number: int) -> None:
            record = charge(opened_at=time.time())
            answer = await credits.deduct(record)
            assert isinstance(answer, Deducted)
            events = [answer, Reported(10)] if number % 10 else [answer, Lost("x")]
            for event in events:
                record = step(record, event, now=time.time())
            if not record.final:
                answer_to_refund = await credits.refund(record)
                assert isinstance(answer_to_refund, Refunded)
                record = step(record, answer_to_refund, now=time.time())
            await journal.open(replace(record, owner=journal.owner))

        for first in range(0, count, 1_000):
            await asyncio.gather(*map(one, range(first, first + 1_000)))
        await journal.close()
        await credits.aclose()

    asyncio.run(main())
    tracemalloc.start()
    try:
        done = run("reconcile", CREDITS=LEDGER)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.out.startswith("0 differences: 6,000 charges and 6,600 transactions")
    assert peak < 8_000_000, peak
