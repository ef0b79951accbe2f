"""The command line, as people run it: what it prints, what it does, and how it ends."""

import contextlib
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from metered_billing.cli import source, terminal
from metered_billing.ledger import postgres_books
from metered_billing.schemas import Schema

from .serving import free_port, start_service

ADMIN = {"Authorization": "Bearer admins"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`metered-billing serve`, in a process of its own; its URL."""
    directory = tmp_path_factory.mktemp("served")
    with start_service(directory) as (_, url):
        yield url


def call(url: str, path: str, key: str, **body: Any) -> dict[str, Any]:
    headers = {**ADMIN, "Idempotency-Key": key}
    response = httpx.post(f"{url}{path}", json=body, headers=headers, trust_env=False, verify=False)
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.slow
class TestService:
    def test_grant_then_balance_then_transactions(self, run: Any, served: str) -> None:
        """A person grants, looks, and sees the refund below its deduction."""
        where = {"CREDITS": served, "TOKEN": "admins"}
        granted = run("grant", "--tenant", "demo", "--user", "alice", "--reason", "welcome", "100", **where)
        assert (granted.code, granted.out) == (0, "demo / alice: 100 credits granted, 100 credits now\n")
        account = {"tenant_id": "demo", "user_id": "alice"}
        deduction = call(served, "/v1/deductions", "charge-1", amount=10, **account)
        path = f"/v1/deductions/{deduction['transaction_id']}/refunds"
        call(served, path, "charge-1:refund", amount=2, reason="failed items", items=["img-3"])
        call(served, "/v1/deductions", "charge-2", amount=1, **account)
        assert run("balance", "--tenant", "demo", "--user", "alice", **where).out == "demo / alice: 91 credits\n"
        lines = run("transactions", "--tenant", "demo", **where).out.splitlines()
        assert [re.split(r"  +", line.strip())[1:3] for line in lines[1:]] == [
            ["deduction", "alice"],
            ["deduction", "alice"],
            ["└ refund", "alice"],
            ["grant", "alice"],
        ]
        assert "failed items; img-3" in lines[3]
        document = json.loads(run("transactions", "--tenant", "demo", "--limit", "1", "--json", **where).out)
        assert [entry["idempotency_key"] for entry in document["items"]] == ["charge-2"]
        assert "older" in run("transactions", "--tenant", "demo", "--limit", "1", **where).out

    def test_grant_with_a_key_grants_once(self, run: Any, served: str) -> None:
        """For scripts, that may run twice."""
        grant = ["grant", "--tenant", "once", "--reason", "x", "--key", "invoice-7", "5"]
        for _ in range(2):
            assert run(*grant, "--credits", served, "--token", "admins").code == 0
        balance = run("balance", "--tenant", "once", "--json", "--credits", served, "--token", "admins")
        assert json.loads(balance.out) == {"balance": 5}

    @pytest.mark.parametrize(
        ("token", "sentence"), [("nonsense", "does not accept the token"), ("acmes", "needs an admin token")]
    )
    def test_refusal_is_one_sentence(self, run: Any, served: str, token: str, sentence: str) -> None:
        """Exit code 1, nothing on stdout, no traceback, and the token nowhere."""
        done = run("grant", "--tenant", "acme", "--reason", "x", "5", CREDITS=served, TOKEN=token)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert sentence in done.err
        assert token not in done.err

    def test_ledger_of_a_running_service_is_in_use(self, tmp_path: Path, run: Any) -> None:
        """A second `serve` and a direct look are refused, with a hint, until the first has stopped."""
        with start_service(tmp_path) as (process, url):
            call(url, "/v1/grants", "g", tenant_id="acme", amount=7, reason="x")
            for command in (["serve"], ["balance", "--tenant", "acme"]):
                done = run(*command, TOKENS="t=*", CREDITS="sqlite:///credits.db")
                assert done.code == 1
                assert "in use by process" in done.err
                assert "metered-billing serve" in done.err
                assert "Traceback" not in done.err
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        done = run("balance", "--tenant", "acme", CREDITS="sqlite:///credits.db")
        assert done.out == "acme (shared pool): 7 credits\n"


class TestFile:
    def test_file_without_a_service(self, run: Any) -> None:
        """The same commands on a ledger that nobody else has open."""
        file = {"CREDITS": "sqlite:///credits.db"}
        assert run("transactions", "--tenant", "acme", **file).out == "acme: no transactions\n"
        assert run("grant", "--tenant", "acme", "--reason", "x", "1", **file).out.endswith("1 credit now\n")
        assert run("balance", "--tenant", "acme", **file).out == "acme (shared pool): 1 credit\n"
        too_much = run("grant", "--tenant", "acme", "--reason", "x", str(2**53 - 1), **file)
        assert (too_much.code, "in its life" in too_much.err) == (1, True)

    @pytest.mark.parametrize("command", ["balance", "transactions"])
    def test_file_that_cannot_be_opened(self, run: Any, command: str) -> None:
        """One sentence, exit code 1."""
        done = run(command, "--tenant", "acme", "--credits", "sqlite:///no/such/credits.db")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "No such file" in done.err


class TestPostgres:
    def test_grant_then_balance_without_a_service(self, run: Any, pg_clean: str) -> None:
        """The same commands, beside whatever services run on the database."""
        assert run("grant", "--tenant", "acme", "--reason", "x", "5", CREDITS=pg_clean).out.endswith("5 credits now\n")
        assert run("balance", "--tenant", "acme", CREDITS=pg_clean).out == "acme (shared pool): 5 credits\n"
        assert "grant" in run("transactions", "--tenant", "acme", CREDITS=pg_clean).out

    def test_migrate_makes_the_tables_and_then_has_nothing_to_do(self, run: Any, pg_clean: str) -> None:
        """Exit code 0 both times, so that each deployment may run it."""
        for outcome in ("made, schema version 1", "schema version 1, nothing to do"):
            done = run("migrate", "--database", pg_clean, "--journal", pg_clean)
            assert (done.code, done.out) == (0, f"ledger: {outcome}\njournal: {outcome}\n")
        done = run("migrate", "--database", "sqlite:///credits.db", JOURNAL="directory")
        assert (done.code, done.out.count("not in PostgreSQL")) == (0, 2)

    def test_migrate_says_from_which_version_to_which(
        self, run: Any, pg_clean: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And fails where a later release has been."""
        run("migrate", "--database", pg_clean)
        earlier, step = postgres_books.SCHEMA, ("ALTER TABLE accounts ADD COLUMN note text",)
        with monkeypatch.context() as patched:
            patched.setattr(postgres_books, "SCHEMA", Schema("ledger", (*earlier.steps, step)))
            done = run("migrate", "--database", pg_clean)
            assert (done.code, done.out) == (0, "ledger: migrated from schema version 1 to 2\n")
        done = run("migrate", "--database", pg_clean)
        assert (done.code, "upgrade metered-billing" in done.err) == (1, True)

    @pytest.mark.parametrize(
        "command", [["migrate", "--database"], ["serve", "--database"], ["balance", "--tenant", "x", "--credits"]]
    )
    def test_database_that_is_not_there(self, run: Any, command: list[str]) -> None:
        """One sentence, exit code 1, and no password."""
        done = run(*command, "postgresql://ann:hunter2@127.0.0.1:1/credits", TOKENS="t=*")
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert "postgresql://127.0.0.1:1/credits cannot be reached" in done.err
        assert "hunter2" not in done.err

    @pytest.mark.parametrize(
        "command", [["migrate", "--database"], ["serve", "--database"], ["balance", "--tenant", "x", "--credits"]]
    )
    def test_missing_driver_is_one_sentence(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, command: list[str]
    ) -> None:
        """It says what to install."""
        for module in ("metered_billing.postgres", "metered_billing.ledger.postgres"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, "psycopg", None)
        done = run(*command, "postgresql://ann:hunter2@host/credits", TOKENS="t=*")
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert "pip install 'metered-billing[postgres]'" in done.err


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["balance", "--tenant", "acme"], "Say where the credits are"),
            (["balance", "--tenant", "acme", "--credits", "ftp://x"], "not a ledger"),
            (["balance", "--tenant", "acme", "--credits", "postgresql://x?nonsense=1"], "a PostgreSQL database is"),
            (["balance", "--tenant", "acme", "--credits", "http://x:y"], "cannot be sent"),
            (["balance", "--tenant", "acme", "--credits", "http://x", "--token", "é"], "token must be visible ASCII"),
            (["balance", "--tenant", "acme", "--credits", "http://127.0.0.1:99999"], "a port that there is not"),
            (["grant", "--tenant", "a", "--reason", "x", "1", "--key", "", "--credits", "http://x"], "idempotency_key"),
            (
                ["grant", "--tenant", "a", "--reason", "x", "1", "--key", "ké", "--credits", "http://x"],
                "idempotency_key",
            ),
            (["grant", "--tenant", "a", "--reason", "\udcff", "1", "--credits", "http://x"], "reason"),
            (["migrate", "--database", "postgresq://u@h/x"], "--database: not a place"),
            (["migrate", "--database", "POSTGRESQL:/u@h/x"], "--database: not a place"),
            (["migrate", "--database", " "], "--database: not a place"),
            (["migrate", "--journal", "mysql://x"], "--journal: not a place"),
            (["grant", "--tenant", "a\nb", "--reason", "x", "1", "--credits", "sqlite:///c.db"], "tenant_id"),
            (["grant", "--tenant", "acme", "--reason", "x", "0", "--credits", "sqlite:///c.db"], "amount"),
            (["grant", "--tenant", "acme", "--reason", "x", "1.5", "--credits", "sqlite:///c.db"], "amount"),
            (["balance"], "--tenant"),
            (["dance"], "dance"),
            (["serve"], 'METERED_BILLING_TOKENS="SECRET=admin"'),
            (["serve", "--tokens-file", "nope"], "No such file"),
            (["migrate"], "--database URL, --journal URL"),
            (["migrate", "--database", "postgresql://x?nonsense=1"], "--database: a PostgreSQL database is"),
            (["serve", "--port", "70000"], "port"),
        ],
    )
    def test_asked_for_wrongly(self, run: Any, arguments: list[str], sentence: str) -> None:
        """Exit code 2, and what is wrong."""
        done = run(*arguments)
        assert (done.code, done.out) == (2, "")
        assert sentence in done.err
        assert "Traceback" not in done.err

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://u:pw/hunter2@127.0.0.1:1/x",
            "postgresql://u:pw@hunter2@127.0.0.1:1/x",
            "postgresql:/u:hunter2@127.0.0.1/x",
            "Postgres:u:hunter2@127.0.0.1/x",
        ],
    )
    @pytest.mark.parametrize(
        "command",
        [["balance", "--tenant", "x", "--credits"], ["migrate", "--database"], ["charges", "list", "--journal"]],
    )
    def test_password_that_spoils_its_url_is_shown_nowhere(self, run: Any, command: list[str], url: str) -> None:
        """It is refused, and what it was read as is not told."""
        done = run(*command, url)
        assert (done.code, done.out) == (2, "")
        assert "hunter2" not in done.err

    def test_token_that_cannot_be_sent_is_not_shown(self, run: Any) -> None:
        """A line break in it would be quoted by the HTTP client."""
        done = run("balance", "--tenant", "acme", CREDITS="http://127.0.0.1:1", TOKEN="tok\nen-secret")
        assert (done.code, "secret" in done.err, done.err.count("\n")) == (2, False, 1)

    def test_answer_that_drips_is_given_up(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each read is in time, and the whole never ends: a cron job would hang for ever."""
        monkeypatch.setattr(source, "TIMEOUT_S", 0.5)
        stop = threading.Event()

        class Dripping(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while not stop.wait(0.05):
                        self.wfile.write(b" ")

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        with HTTPServer(("127.0.0.1", 0), Dripping) as server:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            done = run("balance", "--tenant", "acme", CREDITS=f"http://127.0.0.1:{server.server_port}")
            stop.set()
            server.shutdown()
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "No answer from" in done.err

    def test_service_whose_port_is_taken_does_not_start(self, run: Any) -> None:
        """Exit code 1: 3 would say that it was done, and found something."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = run("serve", "--port", str(taken.getsockname()[1]), TOKENS="t=*")
        assert (done.code, "did not start" in done.err) == (1, True)

    @pytest.mark.parametrize("url", ["ftp://x", "postgresql://ann:hunter2@x?nonsense=1"])
    def test_serve_on_something_else(self, run: Any, url: str) -> None:
        """It says what it can serve on, and shows no password."""
        done = run("serve", "--database", url, TOKENS="t=*")
        assert (done.code, done.err.startswith("metered-billing: --database: ")) == (2, True)
        assert "postgresql://" in done.err
        assert "hunter2" not in done.err

    def test_service_that_is_not_there(self, run: Any) -> None:
        """Exit code 1. For a grant: how to repeat it without granting twice."""
        nobody = f"http://127.0.0.1:{free_port()}"
        done = run("balance", "--tenant", "acme", CREDITS=nobody)
        assert (done.code, done.err.startswith(f"metered-billing: No answer from {nobody}")) == (1, True)
        done = run("grant", "--tenant", "acme", "--reason", "x", "5", CREDITS=nobody)
        assert re.search(r"repeat it with --key cli-[-0-9a-f]{36}", done.err)

    @pytest.mark.parametrize(
        ("status", "content"),
        [
            (200, b"<html>"),
            (200, b"[]"),
            (200, b'{"hello": "world"}'),
            (200, b'{"balance":"NaN","items":[{"id":1}]}'),
            (404, b'{"detail":"Not Found"}'),  # a service behind a mapping: these are words of its framework's
        ],
    )
    def test_something_else_than_a_service(self, run: Any, status: int, content: bytes) -> None:
        """A sentence, and no guess at what it means."""

        class Elsewhere(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            for command in ("balance", "transactions"):
                done = run(command, "--tenant", "acme", CREDITS=f"http://127.0.0.1:{server.server_port}")
                assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
                assert "credits service" in done.err
            server.shutdown()

    def test_missing_extra_is_one_sentence(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It says what to install."""
        for module in [name for name in sys.modules if name.startswith("metered_billing.cli.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "typer", None)
        done = run("serve")
        assert done.code == 1
        assert "pip install 'metered-billing[service]'" in done.err


class TestTerminal:
    def test_text_from_elsewhere_is_not_obeyed(self, run: Any) -> None:
        """Neither escape sequences nor rich's own markup, in the table, in sentences, or in JSON."""
        evil = "\x1b[2J\x9b31m[bold]\u202e\u2028\r\x07 :smile: [link=x]"
        file = {"CREDITS": "sqlite:///credits.db"}
        run("grant", "--tenant", "acme", "--user", "\u202eecila", "--reason", evil, "1", **file)
        for options in ([], ["--json"]):
            out = run("transactions", "--tenant", "acme", *options, **file).out
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", out)
            assert "[bold]" in out
            assert ":smile: [link=x]" in out
        assert "\u202e" not in run("balance", "--tenant", "acme", "--user", "\u202eecila", **file).out

    def test_refund_without_its_deduction_stands_alone(self) -> None:
        """Where the page ends between the two."""

        def entry(kind: str, name: str, transaction: str) -> dict[str, str]:
            return {"id": name, "kind": kind, "transaction_id": transaction}

        void, lost = entry("void", "v", "d"), entry("refund", "r2", "older")
        refund, deduction = entry("refund", "r1", "d"), entry("deduction", "d", "d")
        assert terminal.arranged([void, lost, refund, deduction]) == [
            (lost, False),
            (deduction, False),
            (refund, True),
            (void, True),
        ]
