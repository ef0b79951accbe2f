"""`metered-billing token`: secrets are said once, digests are kept, and a file is changed as a whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from metered_billing.service import Tokens
from metered_billing.service.tokens import new_token


def test_new_says_the_secret_alone_on_stdout(run: Any, tmp_path: Path) -> None:
    """For `TOKEN=$(metered-billing token new …)`; the file has the digest, and the rest goes to stderr."""
    done = run("token", "new", "--scope", "tenant:acme, inc", "--expires", "2999-01-01", "--file", "tokens")
    secret = done.out.strip()
    text = (tmp_path / "tokens").read_text()
    assert done.code == 0
    assert secret not in text + done.err
    token = Tokens.of_lines(text).find(secret)
    assert token is not None
    assert (token.scope, token.plain) == ("tenant:acme, inc", False)
    assert f"token {token.id} is in tokens" in done.err


def test_new_without_a_file_says_the_line(run: Any, tmp_path: Path) -> None:
    """To be put where the service reads it."""
    done = run("token", "new", "--scope", "*")
    line = done.err.partition("--tokens-file: ")[2].strip()
    assert Tokens.of_lines(line).find(done.out.strip()) is not None
    assert not list(tmp_path.iterdir())


def test_new_as_json(run: Any) -> None:
    """For scripts that need more than the secret."""
    made = json.loads(run("token", "new", "--scope", "read", "--expires", "2999-01-01T09:30:00+09:30", "--json").out)
    assert Tokens.of_lines(made["line"]).find(made["secret"]) is not None
    assert made["line"].endswith(" expires=2999-01-01T09:30:00+09:30 read")
    assert (made["scope"], made["expires"], made["state"]) == ("read", "2999-01-01T00:00:00Z", "valid")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["new", "--scope", "everything"], "is not a scope: *, tenant:ID, admin"),
        (["new", "--scope", "*", "--expires", "soon"], "2027-01-01T09:30:00Z"),
        (["new", "--scope", "*", "--expires", "2001-01-01"], "that has been"),
        (["new", "--scope", "tenant:a\nb"], "control characters"),
    ],
)
def test_new_asked_for_wrongly(run: Any, arguments: list[str], sentence: str) -> None:
    """Exit code 2, a sentence, and no secret."""
    done = run("token", *arguments)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err


def test_list_shows_no_secret_and_no_whole_digest(run: Any, tmp_path: Path) -> None:
    """Ids, scopes, and what is to be rotated."""
    secret, token, line = new_token("tenant:acme", "2999-01-01")
    (tmp_path / "tokens").write_text(f"# mine\n{line}\nplain expires=2001-01-01 admin\nother read\n")
    done = run("token", "list", "--file", "tokens")
    words = [line.split() for line in done.out.splitlines()[1:]]
    assert words[0] == [token.id, "tenant:acme", "2999-01-01T00:00:00Z", "digest", "valid"]
    assert words[1][1:] == ["admin", "2001-01-01T00:00:00Z", "plain", "secret", "expired"]
    assert words[2][1:] == ["read", "never", "plain", "secret", "valid"]
    as_json = run("token", "list", "--file", "tokens", "--json").out
    for shown in (done.out, as_json):
        assert token.digest.hex()[:12] not in shown
        assert secret not in shown
    assert [entry["id"] for entry in json.loads(as_json)] == [line[0] for line in words]


def test_list_says_what_expires_soon(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 14 days, so that somebody rotates it before it does."""
    (tmp_path / "tokens").write_text("s expires=2027-01-15 admin\n")
    monkeypatch.setattr("metered_billing.cli.tokens.time.time", lambda: 1_798_761_600.0 + 1)  # 2027-01-01
    assert "expires soon" in run("token", "list", "--file", "tokens").out


def test_revoke_takes_it_out(run: Any, tmp_path: Path) -> None:
    """By its id; a second time there is none."""
    made = json.loads(run("token", "new", "--scope", "*", "--file", "tokens", "--json").out)
    done = run("token", "revoke", made["id"], "--file", "tokens")
    assert (done.code, done.out) == (
        0,
        f"token {made['id']} (*) is out of tokens; the service lets it in for a second at most\n",
    )
    assert (tmp_path / "tokens").read_text() == ""
    again = run("token", "revoke", made["id"], "--file", "tokens")
    assert (again.code, again.out) == (1, "")
    assert "there is no token" in again.err
    assert run("token", "list", "--file", "tokens").out == "no tokens\n"


@pytest.mark.parametrize("command", [["new", "--scope", "*"], ["list"], ["revoke", "01234567"]])
def test_file_that_cannot_be_read(run: Any, tmp_path: Path, command: list[str]) -> None:
    """A sentence that names the line and shows no secret; the file stays."""
    (tmp_path / "tokens").write_text("fine *\nhush everything\n")
    done = run("token", *command, "--file", "tokens")
    assert (done.code, done.out) == (1, "")
    assert "line 2" in done.err
    assert "hush" not in done.err
    assert (tmp_path / "tokens").read_text() == "fine *\nhush everything\n"
