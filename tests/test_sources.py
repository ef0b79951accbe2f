"""Where settings come from: which source wins, what is refused, and that no error shows a value."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette

from metered_billing import HttpCredits, MeteredBillingMiddleware, Settings
from metered_billing.sources import InvalidSettings
from metered_billing.ssm import Parameters, ParametersUnreadable
from tests.stand import ANN

SECRET = "hunter2"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory and environment."""
    for name in [name for name in os.environ if name.upper().startswith("METERED_BILLING")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_ssm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What SSM has, under whatever prefix."""
    there: dict[str, str] = {}

    def read(self: Parameters) -> dict[str, str]:
        if not there:
            raise ParametersUnreadable("no permission")
        return dict(there)

    monkeypatch.setattr(Parameters, "read", read)
    return there


def refusal(**given: Any) -> str:
    """What is said, with everything that a log would show of it."""
    with pytest.raises(InvalidSettings) as error:
        Settings(**given)
    assert SECRET not in str(error.value)
    assert SECRET not in str(error.value.__cause__)
    assert error.value.__context__ is None or error.value.__suppress_context__
    return str(error.value)


def dotenv(text: str) -> None:
    Path(".env").write_text(text, encoding="utf-8")


# Which wins.


def test_first_source_that_has_it_wins(monkeypatch: pytest.MonkeyPatch, in_ssm: dict[str, str]) -> None:
    """Code, the environment, `.env`, SSM, the default: setting by setting."""
    in_ssm.update(credits="http://ssm", token="in-ssm", journal="in-ssm")
    dotenv("METERED_BILLING_CREDITS=http://file\nMETERED_BILLING_TOKEN=in-file\nMETERED_BILLING_SSM_PREFIX=/prod\n")
    monkeypatch.setenv("METERED_BILLING_CREDITS", "http://environment")
    settings = Settings()
    assert (settings.credits, settings.journal) == ("http://environment", "in-ssm")
    assert settings.token == SecretStr("in-file")
    assert settings.sources == {
        "credits": "environment",
        "token": ".env",
        "journal": "SSM",
        "settle": "default",
        "ssm_prefix": ".env",
    }
    settings = Settings(credits="http://code", journal="here", token=None)
    assert (settings.credits, settings.journal, settings.token) == ("http://code", "here", None)
    assert settings.sources == {**dict.fromkeys(("credits", "token", "journal"), "code"), "settle": "default"} | {
        "ssm_prefix": ".env"
    }
    settings = Settings(_env_file=None)
    assert settings.sources == {**dict.fromkeys(Settings.model_fields, "default"), "credits": "environment"}
    assert settings.journal == "metered-billing-journal"


def test_ssm_is_asked_only_for_what_is_nowhere_before(in_ssm: dict[str, str]) -> None:
    """With everything else given, its being down is no trouble."""
    given: dict[str, Any] = {"credits": "http://code", "token": SecretStr("t"), "ssm_prefix": "/prod"}
    assert "no permission" in refusal(**given)
    Settings(journal="here", **given)
    Settings(**(given | {"ssm_prefix": None}))


def test_names_may_be_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capitals win."""
    monkeypatch.setenv("metered_billing_token", "small")
    assert Settings().token == SecretStr("small")
    monkeypatch.setenv("METERED_BILLING_TOKEN", "CAPITAL")
    monkeypatch.setenv("Metered_Billing_Token", "mixed")
    assert Settings().token == SecretStr("CAPITAL")


@pytest.mark.parametrize(
    "text",
    [
        "METERED_BILLING_TOKEN=t",
        "export METERED_BILLING_TOKEN='t'  # quoted\n\nOTHER=1\n",
        "\ufeffMETERED_BILLING_TOKEN=t\r\n",
        'X=t\nMETERED_BILLING_TOKEN="${X}"\n',
    ],
)
def test_dotenv_as_others_read_it(text: str) -> None:
    """Quotes, `export`, comments, other names; and what editors elsewhere put in front."""
    dotenv(text)
    assert Settings().token == SecretStr("t")


def test_dotenv_of_another_kind_is_not_read() -> None:
    """Some call their virtual environment so."""
    Path(".env").mkdir()
    assert Settings().sources["token"] == "default"


# What is refused.


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("METERED_BILLING_TOKN", "did you mean METERED_BILLING_TOKEN?"),
        ("METERED_BILLING_CREDITS_URL", "did you mean METERED_BILLING_CREDITS?"),
        ("metered_billing_ssmprefix", "did you mean METERED_BILLING_SSM_PREFIX?"),
        ("METERED_BILLING_X", "there are METERED_BILLING_CREDITS, METERED_BILLING_TOKEN, METERED_BILLING_JOURNAL,"),
    ],
)
def test_variable_that_is_no_setting(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    """A slip of the pen would otherwise leave the default in force, unseen."""
    monkeypatch.setenv(name, SECRET)
    said = refusal()
    assert said.startswith(f"{name} in the environment is no setting; ")
    assert hint in said
    monkeypatch.delenv(name)
    dotenv(f"{name}={SECRET}")
    assert refusal().startswith(f"{name} in .env is no setting; ")


@pytest.mark.parametrize("sign", [":", "-", " "])
def test_value_that_ended_up_in_the_name_is_not_shown(monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    """`TOKEN:c2VjcmV0=` is a slip of the pen, and its `=` the secret's own."""
    said = "METERED_BILLING_TOKEN… in {} is no setting; did you mean METERED_BILLING_TOKEN?"
    dotenv(f"'METERED_BILLING_TOKEN{sign}{SECRET}'==\n")
    assert refusal() == said.format(".env")
    monkeypatch.setenv(f"METERED_BILLING_TOKEN{sign}{SECRET}", "=")
    assert refusal() == said.format("the environment")


@pytest.mark.parametrize(("name", "hint"), [("Token", "; did you mean token?"), ("zzz", "; there are credits, ")])
def test_parameter_that_is_no_setting(in_ssm: dict[str, str], name: str, hint: str) -> None:
    """The prefix is ours alone."""
    in_ssm[name] = SECRET
    assert refusal(ssm_prefix="/prod").startswith(f"/prod/{name} in AWS SSM is no setting{hint}")


def variables(*folders: str) -> set[str]:
    """Every one that is named there."""
    command = ["grep", "-rhoE", "--include=*.py", "METERED_BILLING_[A-Z_]+", *folders]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("name", sorted(variables("src", "examples", "docs")))
def test_variable_of_another_part_is_let_be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The service, the command line and the demo run beside the app, in one environment."""
    monkeypatch.setenv(name, "/prod" if name.endswith("PREFIX") else "x")
    Settings(credits="http://x", token=None, journal="x", settle="background")


@pytest.mark.parametrize(
    "name",
    [
        "METERED_BILLING_SERVICE_HOST",
        "METERED_BILLING_SERVICE_PORT",
        "METERED_BILLING_SERVICE_PORT_HTTP",
        "METERED_BILLING_PORT",
        "METERED_BILLING_PORT_8080_TCP",
        "METERED_BILLING_PORT_8080_TCP_PROTO",
        "METERED_BILLING_CREDITS_SERVICE_HOST",
        "METERED_BILLING_CREDITS_PORT_53_UDP_ADDR",
    ],
)
def test_variable_that_kubernetes_adds_is_let_be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It puts some into every pod for a service called metered-billing, or metered-billing-credits."""
    monkeypatch.setenv(name, "tcp://10.0.0.1:8080")
    assert Settings().credits is None
    dotenv(f"{name}=x")
    assert "in .env is no setting" in refusal()


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_empty_value_is_refused(monkeypatch: pytest.MonkeyPatch, in_ssm: dict[str, str], name: str) -> None:
    """It comes of a variable that is not set where the deployment was written."""
    monkeypatch.setenv(f"METERED_BILLING_{name}", "")
    assert refusal() == f"METERED_BILLING_{name} in the environment is empty: give it a value, or remove it"
    monkeypatch.delenv(f"METERED_BILLING_{name}")
    for line in ("=", ""):
        dotenv(f"METERED_BILLING_{name}{line}\n")
        assert refusal() == f"METERED_BILLING_{name} in .env is empty: give it a value, or remove it"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (f'A=1\nMETERED_BILLING_TOKEN="{SECRET}\nB=2\n'.encode(), "line 2 is no NAME=VALUE"),
        (f"\n\n={SECRET}\n".encode(), "line 3 is no NAME=VALUE"),
        (f"METERED_BILLING_TOKEN={SECRET}\xe9\n".encode("latin-1"), "it is not UTF-8"),
        (f"METERED_BILLING_TOKEN:{SECRET}\n".encode(), "line 1 is no NAME=VALUE"),
        (f"METERED_BILLING_TOKEN_{SECRET}\n".encode(), "line 1 is no NAME=VALUE"),
    ],
)
def test_dotenv_that_cannot_be_read(content: bytes, why: str) -> None:
    """What stands behind the mistake would be lost without a word."""
    Path(".env").write_bytes(content)
    assert refusal() == f".env cannot be read: {why}"


def test_dotenv_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise."""
    dotenv("")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refusal() == ".env cannot be read: Permission denied"


@pytest.mark.parametrize("prefix", ["prod", "/", "//", "/a//b", "/a b", f"https://{SECRET}@x", "/a\n"])
def test_prefix_that_is_no_path(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """All of SSM is not ours."""
    monkeypatch.setenv("METERED_BILLING_SSM_PREFIX", prefix)
    assert refusal().startswith("METERED_BILLING_SSM_PREFIX in the environment: it must be a path such as /")


@pytest.mark.parametrize("setting", list(Settings.model_fields))
def test_value_of_another_type_is_not_shown(setting: str) -> None:
    """Nor by pydantic."""
    assert refusal(**{setting: [SECRET]}).startswith(setting)


def test_word_that_is_none_is_refused_by_its_name_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """With those that there are."""
    monkeypatch.setenv("METERED_BILLING_SETTLE", SECRET)
    assert refusal() == "METERED_BILLING_SETTLE in the environment: input should be 'background' or 'inline'"


BAD: list[tuple[str, str]] = [
    ("credits", f"http:/{SECRET}"),
    ("credits", f"http://:{SECRET}@/"),
    ("credits", f"http://host:{SECRET}/"),
    ("credits", f"http://host:99999/{SECRET}"),
    ("credits", f"http://u:{SECRET}@host"),
    ("credits", f"http://ho st/{SECRET}"),
    ("credits", f"htp://{SECRET}"),
    ("credits", SECRET),
    ("credits", f"postgresql://u:{SECRET}@host/db?nonsense=1"),
    ("token", f"{SECRET}\n"),
    ("token", f"{SECRET}\r\nx: y"),
    ("token", f"{SECRET} "),
    ("token", f"{SECRET}é"),
    ("journal", f"redis://{SECRET}"),
    ("journal", f"postgresql://u:{SECRET}@host/db?nonsense=1"),
]


@pytest.mark.parametrize(("setting", "value"), BAD)
def test_bad_value_is_refused_at_start_up_by_its_name_and_source(
    monkeypatch: pytest.MonkeyPatch, in_ssm: dict[str, str], setting: str, value: str
) -> None:
    """From wherever it is; and it is not shown."""
    good = {"credits": "http://credits", "token": "t", "journal": "j"}

    def said(start: str) -> None:
        with pytest.raises(InvalidSettings) as error:
            MeteredBillingMiddleware(Starlette(), account=lambda: ANN)
        assert str(error.value).startswith(start)
        assert SECRET not in str(error.value)
        assert error.value.__suppress_context__

    in_ssm.update(good, **{setting: value})
    monkeypatch.setenv("METERED_BILLING_SSM_PREFIX", "/prod")
    said(f"/prod/{setting} in AWS SSM: ")
    in_ssm.update(good)
    if "\n" not in value:
        dotenv(f"METERED_BILLING_{setting.upper()}='{value}'")
        said(f"METERED_BILLING_{setting.upper()} in .env: ")
    monkeypatch.setenv(f"METERED_BILLING_{setting.upper()}", value)
    said(f"METERED_BILLING_{setting.upper()} in the environment: ")


def test_what_the_middleware_is_given_is_not_blamed_on_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller knows where that is from."""
    for name, value in (("CREDITS", "http://credits"), ("JOURNAL", "j")):
        monkeypatch.setenv(f"METERED_BILLING_{name}", value)
    for given in ({"credits": "ftp://x"}, {"journal": "redis://x"}):
        with pytest.raises(ValueError) as error:
            MeteredBillingMiddleware(Starlette(), account=lambda: ANN, **given)  # type: ignore[arg-type]
        assert not isinstance(error.value, InvalidSettings)


def test_ssm_without_boto3_says_what_to_install() -> None:
    """And only who names a prefix needs it."""
    code = (
        "import sys\n"
        "sys.modules['boto3'] = sys.modules['botocore'] = None\n"
        "from metered_billing import Settings\n"
        "Settings()\n"
        "try: Settings(ssm_prefix='/prod')\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "settings in AWS SSM Parameter Store need boto3: pip install 'metered-billing[ssm]'"


# The token.


def test_token_that_is_not_from_ssm_is_fixed(in_ssm: dict[str, str]) -> None:
    """Nobody looks for another."""
    in_ssm["credits"] = "http://x"
    assert Settings(token=SecretStr("t"), ssm_prefix="/prod").token_source() == SecretStr("t")
    assert Settings(ssm_prefix="/prod").token_source() is None
    assert Settings().token_source() is None


async def test_token_from_ssm_is_read_there_again(in_ssm: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """When it is rejected; where SSM is down or has none, what is held stays."""
    in_ssm["token"] = "one"
    source = Settings(ssm_prefix="/prod").token_source()
    assert source is not None
    assert not isinstance(source, SecretStr)
    HttpCredits("http://credits", token=source)
    in_ssm["token"] = "two"
    assert await source.another_than(source.held()) == SecretStr("two")
    del in_ssm["token"]
    assert await source.another_than(source.held()) is None
    assert 'credits.token_stale reason="no permission"' in caplog.text
    assert source.held() == SecretStr("two")
