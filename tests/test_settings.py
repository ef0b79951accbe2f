"""Settings: from words to clients and journals."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr, ValidationError

from metered_billing import HttpCredits, MeteredBillingMiddleware, Settings, SqlCredits
from metered_billing.credits.contract import Contract
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.runtime import Runtime
from metered_billing.settings import open_credits, open_journal
from metered_billing.telemetry import Telemetry


def opened(url: str, token: str | None = None) -> object:
    return open_credits(url, SecretStr(token) if token else None, Runtime(), Telemetry())


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://credits.internal", HttpCredits),
        ("https://credits.internal/base", HttpCredits),
        ("HTTPS://credits.internal", HttpCredits),
        ("sqlite:///credits.db", SqlCredits),
        ("postgresql://user:hunter2@host/db", SqlCredits),
    ],
)
def test_credits_of_a_url(url: str, kind: type) -> None:
    """The scheme says which client it is; nothing is connected by that."""
    assert isinstance(opened(url), kind)


@pytest.mark.parametrize(
    "url",
    [
        "credits.db",
        "ftp://user:hunter2@host",
        "postgresql://user:hunter2@host/db?nonsense=1",
        "http://",
        "http://u:hunter2@h/",
    ],
)
def test_credits_of_what_is_no_url_is_refused_without_its_secrets(url: str) -> None:
    """The error names the kind of URL, never what stands in it."""
    with pytest.raises(ValueError) as error:
        opened(url)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (Contract(), "a Contract: a mapping goes into HttpCredits"),
        (Contract, "the class Contract: a mapping goes into HttpCredits"),
        (HttpCredits, "the class HttpCredits"),
        (Path("credits.db"), "Path"),
    ],
)
def test_client_that_is_none_is_refused(given: Any, sentence: str) -> None:
    """At start-up, where each request would find out by an AttributeError."""
    with pytest.raises(ValueError, match=sentence):
        Settings().open_credits(given, Runtime(), Telemetry())


def test_token_that_cannot_be_a_header_is_refused_without_showing_it() -> None:
    """A line break in a token would write headers."""
    with pytest.raises(ValueError) as error:
        opened("http://credits.internal", "hunter2\r\nx: y")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("place", ["dir", Path("dir"), "sqlite:///dir", "sqlite:////tmp/dir"])
def test_journal_of_a_directory(place: str | Path) -> None:
    """A path or its URL; nothing is opened by that."""
    assert isinstance(open_journal(place, Runtime(), Telemetry()), SqliteJournal)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_journal_of_a_database(scheme: str) -> None:
    """Its URL; nothing is connected by that."""
    assert isinstance(open_journal(f"{scheme}://user:hunter2@host/db", Runtime(), Telemetry()), PostgresJournal)


@pytest.mark.parametrize("place", ["", "redis://user:hunter2@host", "postgresql://user:hunter2@host/db?nonsense=1"])
def test_journal_of_what_is_no_directory_is_refused_without_its_secrets(place: str) -> None:
    """Likewise."""
    with pytest.raises(ValueError) as error:
        open_journal(place, Runtime(), Telemetry())
    assert "hunter2" not in str(error.value)


def test_settings_cannot_be_changed_and_do_not_show_the_token() -> None:
    """They are read once."""
    settings = Settings(token=SecretStr("hunter2"))
    assert "hunter2" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.journal = "elsewhere"


def test_passwords_in_urls_are_not_shown() -> None:
    """Settings are printed, and stand in tracebacks."""
    url = "postgresql://app:hunter2@db/credits"
    assert "hunter2" not in f"{Settings(credits=url, journal=url)!r} {Settings(credits=url, journal=url)}"


def test_database_without_its_driver_says_what_to_install() -> None:
    """And only who names a database needs the driver."""
    code = """
        import sys
        sys.modules["psycopg"] = None
        from metered_billing.runtime import Runtime
        from metered_billing.settings import open_credits, open_journal
        from metered_billing.telemetry import Telemetry
        open_journal("directory", Runtime(), Telemetry())
        open_credits("sqlite:///credits.db", None, Runtime(), Telemetry())
        for attempt in (
            lambda url: open_journal(url, Runtime(), Telemetry()),
            lambda url: open_credits(url, None, Runtime(), Telemetry()),
        ):
            try:
                attempt("postgresql://user:hunter2@host/db")
            except ImportError as error:
                print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.count("pip install 'metered-billing[postgres]'") == 2
    assert "hunter2" not in run.stdout


@pytest.mark.parametrize(
    ("environment", "settle"),
    [
        ({}, "background"),
        ({"AWS_LAMBDA_FUNCTION_NAME": "app"}, "inline"),
        ({"AWS_LAMBDA_FUNCTION_NAME": "app", "METERED_BILLING_SETTLE": "background"}, "background"),
    ],
)
def test_settling_is_inline_by_itself_on_aws_lambda(
    environment: dict[str, str], settle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left for later there waits for the next request; who asks for that all the same gets it."""
    monkeypatch.delenv("AWS_LAMBDA_FUNCTION_NAME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert MeteredBillingMiddleware(FastAPI(), credits="sqlite:///x.db", account=lambda: None).settle == settle
