"""`check-config`: what is set, from where, whether it works; and nothing of a secret."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metered_billing.cli import check_config
from metered_billing.cli.check_config import NOBODY
from metered_billing.credits.contract import Contract, Reply
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger import Ledger
from metered_billing.postgres import migrate
from metered_billing.service import Tokens, create_app
from metered_billing.ssm import Parameters, ParametersUnreadable
from tests.docs.sandbox import serving_thread
from tests.serving import free_port

SECRET = "hunter2"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A credits service that knows three tokens."""
    tokens = Tokens({SECRET: "*", "admin": "admin", "acmes": "tenant:acme"})
    ledger = Ledger(tmp_path_factory.mktemp("service") / "credits.db")
    port = free_port()
    with serving_thread(create_app(ledger, tokens), port):
        yield f"http://127.0.0.1:{port}"


class Odd:
    """A service that answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.health = 200
        self.balance: Response = JSONResponse({"balance": 0})
        self.asked: list[Request] = []

    def app(self) -> Starlette:
        async def health(_: Request) -> Response:
            return Response(status_code=self.health)

        async def balance(request: Request) -> Response:
            self.asked.append(request)
            return self.balance

        return Starlette(routes=[Route("/base/healthz", health), Route("/base/v1/balance", balance)])


@pytest.fixture(scope="module")
def _odd() -> Iterator[tuple[Odd, str]]:
    odd = Odd()
    port = free_port()
    with serving_thread(odd.app(), port):
        yield odd, f"http://127.0.0.1:{port}/base/"


@pytest.fixture
def odd(_odd: tuple[Odd, str]) -> tuple[Odd, str]:
    vars(_odd[0]).update(vars(Odd()))
    return _odd


Checked = Callable[..., tuple[bool, dict[str, str], dict[str, tuple[str, str]]]]


@pytest.fixture
def checked(run: Any) -> Checked:
    """Whether all is well, where each setting is from, and what came of each check; text and JSON say the same."""

    def checked(*arguments: str, **environment: str) -> Any:
        text = run("check-config", *arguments, **environment)
        machine = run("check-config", "--json", *arguments, **environment)
        assert text.code == machine.code
        assert SECRET not in text.out + text.err + machine.out + machine.err
        document = json.loads(machine.out)
        assert document["ok"] == (text.code == 0)
        for check in document["checks"]:
            assert check["said"] in text.out
            assert (check["do"] in text.out) or check["result"] == "ok"
        sources = {each["setting"]: each["from"] for each in document["settings"]}
        return document["ok"], sources, {each["what"]: (each["result"], each["said"]) for each in document["checks"]}

    return checked


# What is set.


def test_settings_and_their_sources(run: Any, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the token, its length alone."""
    monkeypatch.setattr(Parameters, "read", lambda self: {"journal": "journal"})
    Path(".env").write_text(f"METERED_BILLING_TOKEN={SECRET}\n")
    done = run("check-config", CREDITS=service, SSM_PREFIX="/prod")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[:6] == [
        ["setting", "from", "value"],
        ["credits", "environment", service],
        ["token", ".env", "a", "secret", "of", "7", "characters"],
        ["journal", "SSM", "journal"],
        ["settle", "default", "background"],
        ["ssm_prefix", "environment", "/prod"],
    ]
    assert [line[:2] for line in lines[7:]] == [["ok", "credits"], ["ok", "token"], ["ok", "journal"]]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"TOKN": SECRET},
            "METERED_BILLING_TOKN in the environment is no setting; did you mean METERED_BILLING_TOKEN?",
        ),
        ({"SSM_PREFIX": "/prod"}, "METERED_BILLING_SSM_PREFIX in the environment: no permission"),
        (
            {"CREDITS": f"http://u:{SECRET}@x"},
            "METERED_BILLING_CREDITS in the environment: the credits URL must have no",
        ),
        ({"CREDITS": f"x@{SECRET}"}, "METERED_BILLING_CREDITS in the environment: credits must be an http(s)://,"),
        (
            {"CREDITS": "http://x", "TOKEN": f"{SECRET} "},
            "METERED_BILLING_TOKEN in the environment: the credits token must be visible ASCII without spaces"
            "; it begins or ends with a space or a line break",
        ),
        ({"JOURNAL": f"redis://{SECRET}"}, "METERED_BILLING_JOURNAL in the environment: journal must be a directory"),
        (
            {"JOURNAL": f"postgresql://u:{SECRET}@x/db?nonsense=1"},
            "METERED_BILLING_JOURNAL in the environment: a PostgreSQL database is named by",
        ),
    ],
)
def test_bad_settings(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    """As the app would say at its start."""

    def unreadable(self: Parameters) -> dict[str, str]:
        raise ParametersUnreadable("no permission")

    monkeypatch.setattr(Parameters, "read", unreadable)
    ok, _, checks = checked(**environment)
    assert not ok
    assert checks["settings"][0] == "wrong"
    assert checks["settings"][1].startswith(says)


def test_credits_that_are_given_in_code(checked: Checked) -> None:
    """They cannot be tried here, and nothing is wrong."""
    ok, sources, checks = checked()
    assert ok
    assert set(sources.values()) == {"default"}
    assert checks["credits"][0] == "look"
    assert "token" not in checks


# A service.


@pytest.mark.parametrize(
    ("token", "result", "says"),
    [
        (SECRET, "ok", "accepted, and sees every tenant"),
        ("admin", "ok", "accepted, and sees every tenant"),
        ("acmes", "ok", "accepted, and does not see every tenant"),
        ("wrong", "wrong", "the service does not accept it (401)"),
        (None, "wrong", "none is set, and the service wants one"),
    ],
)
def test_token(checked: Checked, service: str, token: str | None, result: str, says: str) -> None:
    """What a real service says to it, when it is asked for a balance that nobody has."""
    ok, _, checks = checked(CREDITS=service, **({} if token is None else {"TOKEN": token}))
    assert ok == (result == "ok")
    assert checks["credits"] == ("ok", f"{service} answers")
    assert checks["token"] == (result, says)


@pytest.mark.parametrize(
    ("health", "result", "says"),
    [(404, "look", "answers, but not to /healthz (404)"), (503, "wrong", "answers 503"), (204, "ok", "answers")],
)
def test_health(checked: Checked, odd: tuple[Odd, str], health: int, result: str, says: str) -> None:
    """A service of another shape need not have it."""
    there, url = odd
    there.health = health
    ok, _, checks = checked(CREDITS=url)
    assert ok == (result != "wrong")
    assert checks["credits"] == (result, f"{url.rstrip('/')} {says}")
    assert checks["token"] == ("ok", "none is needed, and sees every tenant")
    assert there.asked[0].query_params["tenant_id"] == NOBODY


@pytest.mark.parametrize("answer", [Response(status_code=404), Response("x"), JSONResponse({"balance": "much"})])
def test_service_of_another_shape(checked: Checked, odd: tuple[Odd, str], answer: Response) -> None:
    """Whether it accepts the token is not known."""
    there, url = odd
    there.balance = answer
    ok, _, checks = checked(CREDITS=url, TOKEN="t")
    assert ok
    assert checks["token"][0] == "look"
    assert checks["token"][1].startswith("not known: the service answers")


def test_url_with_the_version_in_it_is_said_to_be_that() -> None:
    """Which is what people write first, and every request would be answered 500."""
    answer = httpx.Response(404, json={"type": "urn:metered-billing:no-such-route"})
    health = check_config._health("http://x/v1", answer)
    token = check_config._token("t", Contract(), Reply(404, {}, answer.json()))
    assert "without /v1" in health.do
    assert "without /v1" in token.do
    assert "--contract" in token.do


def test_mapping_is_used(checked: Checked, odd: tuple[Odd, str]) -> None:
    """It says where the token goes, and how a balance is asked for and read."""
    there, url = odd
    Path("own_check.py").write_text(
        "from metered_billing.credits.contract import Contract\n"
        "class Own(Contract):\n"
        "    auth_header = 'X-Key'\n"
        "    auth_scheme = ''\n"
        "    def read_balance(self, reply): return reply.body['much']\n"
    )
    there.balance = JSONResponse({"much": 1})
    ok, _, checks = checked("--contract", "own_check:Own", CREDITS=url, TOKEN="t")
    assert (ok, checks["token"][0]) == (True, "ok")
    assert there.asked[0].headers["x-key"] == "t"


@pytest.mark.parametrize(
    ("status", "read", "says"),
    [
        (403, "None", "not known: the service answers HTTP 403"),  # which may say that the token is none
        (404, "None", "not known: the service answers HTTP 404"),
        (404, "reply.body['much']", "not known: the mapping raised TypeError"),
    ],
)
def test_token_behind_a_mapping_is_not_called_accepted(
    checked: Checked, odd: tuple[Odd, str], status: int, read: str, says: str
) -> None:
    """By an answer that any service may give to what it does not know; nor is its URL said to be wrong."""
    there, url = odd
    Path("own_doubt.py").write_text(
        "from metered_billing.credits.contract import Contract\n"
        "class Own(Contract):\n"
        f"    def read_balance(self, reply): return {read}\n"
    )
    sys.modules.pop("own_doubt", None)
    there.health, there.balance = 404, Response(status_code=status)
    ok, _, checks = checked("--contract", "own_doubt:Own", CREDITS=url, TOKEN="t")
    assert (ok, checks["credits"][0], checks["token"][0]) == (True, "ok", "look")
    assert checks["token"][1].startswith(says)


def test_mapping_that_cannot_ask_is_told(checked: Checked, odd: tuple[Odd, str]) -> None:
    """In a line like any other."""
    Path("own_lost.py").write_text(
        "from metered_billing.credits.contract import Contract\n"
        "class Own(Contract):\n"
        "    def balance(self, account): raise LookupError('no such account')\n"
    )
    ok, _, checks = checked("--contract", "own_lost:Own", CREDITS=odd[1], TOKEN="t")
    assert (ok, checks["token"]) == (True, ("look", "not known: the mapping raised LookupError: no such account"))


def test_clock_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is far off is worth a look; one that cannot be read is not."""
    monkeypatch.setattr(check_config, "time", SimpleNamespace(time=lambda: 1_445_412_480.0))

    def skew(date: str) -> list[str]:
        return [check.said for check in check_config._clock(httpx.Response(200, headers={"date": date}))]

    assert skew("Wed, 21 Oct 2015 07:28:59 GMT") == []
    assert skew("Wed, 21 Oct 2015 07:30:00 GMT") == ["the service's is +120 s from this one"]
    assert skew("yesterday") == []


def test_service_that_is_not_there(checked: Checked) -> None:
    """The token cannot be tried."""
    url = f"http://127.0.0.1:{free_port()}"
    ok, _, checks = checked(CREDITS=url, TOKEN=SECRET)
    assert not ok
    assert checks["credits"][0] == "wrong"
    assert checks["credits"][1].startswith(f"{url} cannot be reached: ")
    assert "token" not in checks


def test_service_that_does_not_answer(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it longer than was said."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ok, _, checks = checked("--timeout", "0.1", CREDITS=url)
    assert not ok
    assert checks["credits"][0] == "wrong"


# Ledgers and journals in files.


def test_ledger_in_a_file(checked: Checked) -> None:
    """It is not opened: its owner may be at work."""
    assert checked(CREDITS="sqlite:///credits.db")[2]["credits"] == (
        "ok",
        "the ledger credits.db is not there yet, and will be made",
    )
    assert not Path("credits.db").exists()
    Path("credits.db").touch()
    assert checked(CREDITS="sqlite:///credits.db")[2]["credits"] == ("ok", "the ledger credits.db may be written")
    ok, _, checks = checked(CREDITS="sqlite:///nowhere/credits.db")
    assert not ok
    assert checks["credits"][0] == "wrong"


@contextlib.contextmanager
def denied(name: str) -> Iterator[None]:
    """To us, as it would be to somebody who is not root."""
    access = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path).name != name and access(path, mode))
        yield


def test_files_without_permission(checked: Checked) -> None:
    """Before the app finds it out."""
    Path("credits.db").touch()
    Path("metered-billing-journal").mkdir()
    with denied("credits.db"):
        ok, _, checks = checked(CREDITS="sqlite:///credits.db")
    assert not ok
    assert checks["credits"] == ("wrong", "the ledger credits.db may not be written")
    with denied("metered-billing-journal"):
        assert checked()[2]["journal"] == ("wrong", "metered-billing-journal may not be written")
    with denied(Path.cwd().name):
        assert checked(JOURNAL="other")[2]["journal"][0] == "wrong"


async def test_journal_that_an_app_has_open(checked: Checked) -> None:
    """It is left as it is."""
    journal = SqliteJournal("journal")
    await journal.start("http://credits")
    try:
        before = sorted(path.name for path in Path("journal").iterdir())
        ok, _, checks = await asyncio.to_thread(lambda: checked(JOURNAL="sqlite:///journal"))
        assert ok
        assert checks["journal"] == ("ok", "the directory journal may be written")
        assert sorted(path.name for path in Path("journal").iterdir()) == before
    finally:
        await journal.close()


def test_journal_with_a_file_that_cannot_be_read(checked: Checked) -> None:
    """The app would start; somebody should look."""
    Path("journal").mkdir()
    Path("journal/charges-0.db").write_bytes(b"a letter" * 100)
    ok, _, checks = checked(JOURNAL="journal")
    assert ok
    assert checks["journal"] == ("look", "charges-0.db: file is not a database")


def test_journal_that_is_a_file(checked: Checked) -> None:
    """No directory."""
    Path("journal").touch()
    assert checked(JOURNAL="journal")[2]["journal"] == ("wrong", "journal is no directory")


# On PostgreSQL.


@pytest.mark.slow
def test_database(checked: Checked, pg_url: str) -> None:
    """Reached, and of which version; nothing is made."""
    from metered_billing.journal.postgres import SCHEMA

    def journal() -> tuple[str, str]:
        return checked(JOURNAL=pg_url)[2]["journal"]

    assert journal()[0] == "ok"
    assert journal()[1].endswith("is reached; the journal's tables will be made")
    assert checked(CREDITS=pg_url)[2]["credits"][1].endswith("is reached; the ledger's tables will be made")
    migrate(pg_url, SCHEMA)
    assert journal()[1].endswith(f"is reached; the journal's tables are of version {SCHEMA.version}")
    assert checked(CREDITS=pg_url)[2]["credits"][1].endswith("is reached; the ledger's tables will be made")
    with psycopg.connect(pg_url, autocommit=True) as connection:
        for version in (SCHEMA.version + 1, SCHEMA.version - 1):
            connection.execute("UPDATE metered_billing.versions SET version = %s", (version,))
            if version:
                assert journal()[0] == "wrong"
                assert f"the journal's tables are of version {version}, this release needs" in journal()[1]
        connection.execute("DROP ROLE IF EXISTS checking")
        connection.execute("CREATE ROLE checking LOGIN")
        connection.execute("DELETE FROM metered_billing.versions")
        role = str(psycopg.conninfo.conninfo_to_dict(pg_url)["user"])
        poor = pg_url.replace(f"{role}@", "checking@").replace(f"{role}:", "checking:")
        assert checked(JOURNAL=poor)[2]["journal"][0] == "wrong"
        connection.execute("DROP SCHEMA metered_billing CASCADE")
        connection.execute("REVOKE CREATE ON DATABASE " + str(connection.info.dbname) + " FROM PUBLIC")
        assert "this role may not make them" in checked(JOURNAL=poor)[2]["journal"][1]
        connection.execute("DROP ROLE checking")


def test_database_that_is_not_there(checked: Checked) -> None:
    """Its password is not shown."""
    url = f"postgresql://u:{SECRET}@127.0.0.1:{free_port()}/db"
    ok, _, checks = checked(CREDITS=url, JOURNAL=url)
    assert not ok
    assert checks["credits"][0] == checks["journal"][0] == "wrong"
    assert "cannot be reached" in checks["journal"][1]


@pytest.mark.slow
def test_ledger_that_the_app_may_write_to_is_told(checked: Checked, pg_url: str) -> None:
    """Where a service keeps the credits: an app that keeps them itself has to write to both."""
    from metered_billing.ledger.postgres_books import SCHEMA as LEDGER

    service = "http://127.0.0.1:1"
    assert checked(CREDITS=service, JOURNAL=pg_url)[2]["journal"][0] == "ok"
    migrate(pg_url, LEDGER)
    assert checked(CREDITS=pg_url, JOURNAL=pg_url)[2]["journal"][0] == "ok"
    result, said = checked(CREDITS=service, JOURNAL=pg_url)[2]["journal"]
    assert (result, said[:41]) == ("look", "a ledger is in the same database, and thi")
    with psycopg.connect(pg_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE app_alone LOGIN; GRANT CREATE ON SCHEMA metered_billing TO app_alone")
        connection.execute(
            "GRANT USAGE ON SCHEMA metered_billing TO app_alone; GRANT SELECT ON metered_billing.versions TO app_alone"
        )
        role = str(psycopg.conninfo.conninfo_to_dict(pg_url)["user"])
        poor = pg_url.replace(f"{role}@", "app_alone@").replace(f"{role}:", "app_alone:")
        try:
            assert checked(CREDITS=service, JOURNAL=poor)[2]["journal"][0] == "ok"
        finally:
            connection.execute("DROP OWNED BY app_alone; DROP ROLE app_alone")
