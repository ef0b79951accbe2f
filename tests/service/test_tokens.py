"""Tokens: how they are written, and that they are never shown."""

import hashlib
import hmac
from pathlib import Path

import pytest

from metered_billing.service import Access, InvalidTokens, Tokens
from metered_billing.service.tokens import has_expired, moment, new_token


def test_parse_reads_each_scope() -> None:
    """All tenants, one tenant, all and grants."""
    tokens = Tokens.parse("s1=*, s2=tenant:acme ,s3=admin,s4=read,s5=read:tenant:acme")
    assert len(tokens) == 5
    assert tokens.access("s1") == Access()
    assert tokens.access("s2") == Access("acme")
    assert tokens.access("s3") == Access(grants=True)
    assert tokens.access("s4") == Access(moves=False)
    assert tokens.access("s5") == Access("acme", moves=False)


@pytest.mark.parametrize("unknown", ["", "s", "s11", "S1", "*", "s1=*", "é", "\udcff"])
def test_access_of_an_unknown_secret_is_none(unknown: str) -> None:
    """Nothing but the whole secret will do."""
    assert Tokens.parse("s1=*").access(unknown) is None


@pytest.mark.parametrize("secret", ["s1", "s3", "none"])
def test_find_compares_with_every_token(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """In constant time, and also once it is found: how long it takes says nothing of where it stands."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def compare_digest(known: bytes, sent: bytes) -> bool:
        compared.append(known)
        return compare(known, sent)

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    tokens = Tokens.parse("s1=*,s2=*,s3=*")
    tokens.find(secret)
    assert compared == [token.digest for token in tokens]


def test_parse_secret_may_end_in_equals_signs() -> None:
    """As base64 does."""
    assert Tokens.parse("c2VjcmV0==tenant:a=b").access("c2VjcmV0=") == Access("a=b")


@pytest.mark.parametrize(
    "text",
    [
        *("hush", "hush=", "hush=everything", "=admin", "hush=tenant:", "hush =admin", "hush=tenant:a\tb"),
        *("hush=read:", "hush=read:tenant:", "hush=read:acme", "sha256:hush=*", f"sha256:{'A' * 64}=*"),
    ],
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
    with pytest.raises(InvalidTokens, match=r"line 2 .* form SECRET \[expires=TIME\] SCOPE") as raised:
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


def digest(secret: str) -> str:
    return f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"


def test_digest_stands_for_its_secret() -> None:
    """In the variable and in a file; the digest itself opens nothing, for whoever has read the file."""
    for tokens in (Tokens.parse(f"{digest('hush')}=tenant:acme"), Tokens.of_lines(f"{digest('hush')} tenant:acme")):
        assert tokens.access("hush") == Access("acme")
        assert tokens.access(digest("hush")) is None
        assert tokens.access(digest("hush").removeprefix("sha256:")) is None
        assert [(token.id, token.plain) for token in tokens] == [(digest("hush")[7:15], False)]


def test_secret_and_its_digest_are_the_same_token() -> None:
    """Or the second scope would silently win."""
    with pytest.raises(InvalidTokens, match="line 2 of the tokens repeats"):
        Tokens.of_lines(f"hush read\n{digest('hush')} admin")


@pytest.mark.parametrize(
    ("written", "at"),
    [
        ("2027-01-01", 1_798_761_600.0),
        ("2027-01-01T09:30:00Z", 1_798_795_800.0),
        ("2027-01-01T09:30:00+09:30", 1_798_761_600.0),
        ("2027-01-01t00:00:00.5z", 1_798_761_600.5),
    ],
)
def test_token_expires_at_its_moment(written: str, at: float) -> None:
    """Not a moment later; a date alone is its beginning, in UTC."""
    tokens = Tokens.of_lines(f"hush expires={written} tenant:acme, inc\nother *")
    assert tokens.access("hush", now=at - 0.001) == Access("acme, inc")
    assert tokens.access("hush", now=at) is None
    assert tokens.access("other", now=at) == Access()
    assert has_expired(next(iter(tokens)), at)


@pytest.mark.parametrize(
    "written", ["2027", "2027-13-01", "20270101", "2027-01-01T09:30:00", "tomorrow", "2027-W01-1", "1798761600", ""]
)
def test_read_refuses_what_is_no_time(written: str) -> None:
    """A token that was to expire never lives for ever by mistake."""
    with pytest.raises(InvalidTokens, match="line 2") as raised:
        Tokens.of_lines(f"fine *\nhush expires={written} admin")
    assert "hush" not in str(raised.value)


def test_read_refuses_a_file_that_anybody_may_write_to(tmp_path: Path) -> None:
    """Whoever may write to it may let himself in."""
    file = tmp_path / "tokens"
    file.write_text("s *\n")
    file.chmod(0o646)
    with pytest.raises(InvalidTokens, match="chmod o-w"):
        Tokens.load(file)


def test_new_token_is_long_and_never_the_same() -> None:
    """256 random bits: what makes a plain SHA-256 enough; and the line has the digest alone."""
    secrets = set()
    for _ in range(100):
        secret, token, line = new_token("read:tenant:acme, inc", "2027-01-01")
        secrets.add(secret)
        assert len(secret) == len("mb_") + 43
        assert secret not in line
        read = Tokens.of_lines(line)
        assert read.find(secret) is not None
        assert read.access(secret, now=0) == Access("acme, inc", moves=False) == token.access
        assert [each.id for each in read] == [token.id]
    assert len(secrets) == 100


@pytest.mark.parametrize(
    ("scope", "expires"),
    [("everything", None), ("tenant:", None), ("tenant:acme\nx admin", None), ("tenant:a\u2028b", None), ("*", "soon")],
)
def test_new_token_refuses_what_a_line_cannot_hold(scope: str, expires: str | None) -> None:
    """Above all a scope that would add a line of its own."""
    with pytest.raises(ValueError):
        new_token(scope, expires)


def test_new_token_refuses_a_scope_that_would_be_read_otherwise() -> None:
    """A space at its end is lost when the line is read."""
    with pytest.raises(ValueError, match="cannot stand in a line"):
        new_token("tenant:acme ")


def test_moment_is_in_utc() -> None:
    """As RFC 3339 has it."""
    assert moment(1_798_761_600.0) == "2027-01-01T00:00:00Z"
