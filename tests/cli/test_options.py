"""Commands look for what is not said where the app looks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from metered_billing.ssm import Parameters
from tests.docs.sandbox import serving_thread
from tests.serving import free_port

BALANCE = ("balance", "--tenant", "acme")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ledger = Ledger(tmp_path_factory.mktemp("service") / "credits.db")
    port = free_port()
    with serving_thread(create_app(ledger, Tokens({"t": "*"})), port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def in_ssm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What SSM has, and how often it was asked."""
    there: dict[str, Any] = {"asked": 0}

    def read(self: Parameters) -> dict[str, str]:
        there["asked"] += 1
        return {name: value for name, value in there.items() if name != "asked"}

    monkeypatch.setattr(Parameters, "read", read)
    return there


def dotenv(**settings: str) -> None:
    Path(".env").write_text("".join(f"METERED_BILLING_{name}={value}\n" for name, value in settings.items()))


def test_credits_and_token_from_dotenv(run: Any, service: str) -> None:
    """Both, or one of them beside the environment's."""
    dotenv(CREDITS=service, TOKEN="t")
    assert run(*BALANCE).out == "acme (shared pool): 0 credits\n"
    assert run(*BALANCE, CREDITS=service).code == 0
    assert run(*BALANCE, TOKEN="wrong").code == 1


def test_credits_and_token_from_ssm(run: Any, service: str, in_ssm: dict[str, Any]) -> None:
    """In one call."""
    in_ssm.update(credits=service, token="t")
    assert run(*BALANCE, SSM_PREFIX="/prod").code == 0
    assert in_ssm["asked"] == 1


def test_token_that_was_found_goes_to_no_other_service(run: Any, service: str, in_ssm: dict[str, Any]) -> None:
    """Whoever names another place names the token, too; then nothing is looked for."""
    in_ssm.update(credits="http://prod.internal", token="t")
    done = run(*BALANCE, "--credits", service, SSM_PREFIX="/prod")
    assert (done.code, in_ssm["asked"]) == (1, 0)
    assert "does not accept the token" in done.err
    assert run(*BALANCE, "--credits", service, "--token", "t", SSM_PREFIX="/prod").code == 0
    assert in_ssm["asked"] == 0


def test_journal_from_dotenv(run: Any) -> None:
    """Else it is the default."""
    Path("elsewhere").mkdir()
    dotenv(JOURNAL="elsewhere")
    assert run("charges", "list").out == "no charges\n"
    assert "metered-billing-journal" in run("charges", "list", "--journal", "metered-billing-journal").err
    Path(".env").unlink()
    missing = run("charges", "list").err
    assert "there is no journal at metered-billing-journal. Say where the app's journal is" in missing


def test_journal_that_cannot_be_read_is_not_looked_for_elsewhere(run: Any) -> None:
    """It is known where it is."""
    done = run("charges", "list", "--journal", f"postgresql://me:hunter2@127.0.0.1:{free_port()}/billing")
    assert done.code == 1
    assert "/billing cannot be reached: " in done.err
    assert "Say where" not in done.err
    assert "hunter2" not in done.err


def test_what_is_no_setting_is_said(run: Any) -> None:
    """As the app would."""
    dotenv(CREDIT="hunter2")
    done = run(*BALANCE)
    assert (done.code, done.out) == (2, "")
    assert "METERED_BILLING_CREDIT in .env is no setting; did you mean METERED_BILLING_CREDITS?" in done.err
    assert "hunter2" not in done.err


def test_ssm_without_boto3_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""

    def read(self: Parameters) -> None:
        raise ImportError("settings in AWS SSM need boto3")

    monkeypatch.setattr(Parameters, "read", read)
    done = run(*BALANCE, SSM_PREFIX="/prod")
    assert (done.code, done.err) == (1, "metered-billing: settings in AWS SSM need boto3.\n")
