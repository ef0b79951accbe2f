"""Tokens: how they are written, and that they are never shown."""

from pathlib import Path

import pytest

from metered_billing.service import Access, InvalidTokens, Tokens


def test_parse_reads_each_scope() -> None:
    """All tenants, one tenant, all and grants."""
    tokens = Tokens.parse("s1=*, s2=tenant:acme ,s3=admin,")
    assert len(tokens) == 3
    assert tokens.access("s1") == Access()
    assert tokens.access("s2") == Access("acme")
    assert tokens.access("s3") == Access(grants=True)


@pytest.mark.parametrize("unknown", ["", "s", "s11", "S1", "*", "s1=*", "é", "\udcff"])
def test_access_of_an_unknown_secret_is_none(unknown: str) -> None:
    """Nothing but the whole secret will do."""
    assert Tokens.parse("s1=*").access(unknown) is None


def test_parse_secret_may_end_in_equals_signs() -> None:
    """As base64 does."""
    assert Tokens.parse("c2VjcmV0==tenant:a=b").access("c2VjcmV0=") == Access("a=b")


@pytest.mark.parametrize(
    "text", ["hush", "hush=", "hush=everything", "=admin", "hush=tenant:", "hush =admin", "hush=tenant:a\tb"]
)
def test_parse_refuses_without_showing_the_secret(text: str) -> None:
    """The sentence names the entry by number."""
    with pytest.raises(InvalidTokens, match="entry 2") as raised:
        Tokens.parse(f"fine=*,{text}")
    assert "hush" not in str(raised.value)


def test_parse_refuses_a_repeated_secret() -> None:
    """Or the second scope would silently win."""
    with pytest.raises(InvalidTokens, match="entry 2 of the tokens repeats"):
        Tokens.parse("hush=tenant:acme,hush=admin")


def test_read_file(tmp_path: Path) -> None:
    """A secret and a scope a line; comments and empty lines are passed over."""
    file = tmp_path / "tokens"
    file.write_text("# for the app\ns1=x  *\n\n  s2\ttenant:acme, inc\n")
    tokens = Tokens.load(file, {"METERED_BILLING_TOKENS": "s3=admin"})
    assert tokens.access("s1=x") == Access()
    assert tokens.access("s2") == Access("acme, inc")
    assert tokens.access("s3") is None


def test_read_refuses_lines_and_files_it_cannot_read(tmp_path: Path) -> None:
    """By line number, or by the file's name."""
    file = tmp_path / "tokens"
    file.write_text("fine *\nhush=admin\n")
    with pytest.raises(InvalidTokens, match="line 2") as raised:
        Tokens.load(file)
    assert "hush" not in str(raised.value)
    file.write_bytes(b"\xff *")
    with pytest.raises(InvalidTokens, match="not UTF-8"):
        Tokens.load(file)
    with pytest.raises(InvalidTokens, match="No such file"):
        Tokens.load(tmp_path / "nope")


@pytest.mark.parametrize("environ", [{}, {"METERED_BILLING_TOKENS": " , "}])
def test_load_without_any_token_says_how_to_set_one(environ: dict[str, str]) -> None:
    """A service that anyone may call is never started by mistake."""
    with pytest.raises(InvalidTokens, match=r'METERED_BILLING_TOKENS="SECRET=admin"'):
        Tokens.load(None, environ)


def test_tokens_do_not_show_their_secrets() -> None:
    """They are kept as digests alone."""
    tokens = Tokens.parse("hush=admin")
    assert "hush" not in repr(tokens) + repr(vars(tokens))
