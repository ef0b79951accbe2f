"""Bearer tokens: who may call the service, for which tenant, what for, and until when.

    METERED_BILLING_TOKENS="secret=*,secret2=tenant:acme,secret3=admin"

or a file, one token a line: the secret or its digest, white space, until when where it expires, and the scope; lines
that begin with # are comments.

    sha256:6f0c…e1 expires=2027-01-01 tenant:acme

Scopes: `*` moves credits of all tenants, `tenant:ID` of one, `admin` of all, and may grant; `read` looks at all, and
`read:tenant:ID` at one.

A digest is SHA-256 without salt or stretching. Those make guessing slow, and nobody guesses 256 random bits: the
digest is taken of secrets that `new_token` made. A secret that a person thought up belongs into no file.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from metered_billing.charge import Account

VARIABLE = "METERED_BILLING_TOKENS"

SCOPES = "*, tenant:ID, admin, read, read:tenant:ID"

HINT = (
    f'The service needs a token: set {VARIABLE}="SECRET=admin" (scopes: {SCOPES}; several are '
    "separated by commas), or name a file with --tokens-file, as `metered-billing token new` makes it"
)

_SCOPE = r"\*|admin|read|(?:read:)?tenant:.+"
# Greedy: a base64 secret may end in "=".
_ENTRY = re.compile(rf"(?P<secret>.+)=(?P<scope>{_SCOPE})")
_LINE = re.compile(rf"(?P<secret>\S+)\s+(?:expires=(?P<expires>\S+)\s+)?(?P<scope>{_SCOPE})")
_SECRET = re.compile(r"[\x21-\x7e]+")
_DIGEST = re.compile(r"sha256:(?P<hex>[0-9a-f]{64})")
_DIGEST_PREFIX = "sha256:"
# RFC 3339, or its date alone: the beginning of that day.
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d(?:[Tt]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d))?")

_ID_LENGTH = 8


class InvalidTokens(ValueError):
    """The tokens cannot be read. The sentence names the entry by number, never by its secret."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a token may do.

    Attributes:
        tenant_id: For this tenant only; None for all.
        grants: May put credits into accounts.
        moves: May deduct, refund and void; else only look.
    """

    tenant_id: str | None = None
    grants: bool = False
    moves: bool = True

    def covers(self, tenant_id: str) -> bool:
        return self.tenant_id in (None, tenant_id)


@dataclass(frozen=True, slots=True)
class Token:
    """One token, without its secret.

    Attributes:
        scope: As it is written.
        expires_at: Seconds since the epoch, from when on it opens nothing; None: never.
        plain: It stands in its file as it is sent.
    """

    digest: bytes
    scope: str
    access: Access
    expires_at: float | None = None
    plain: bool = False

    @property
    def id(self) -> str:
        """The first digits of the digest: what people call it by."""
        return self.digest.hex()[:_ID_LENGTH]


class Tokens:
    """The tokens that the service accepts, as digests: the secrets themselves are not kept.

    Args:
        scopes: Scope by secret, or by `sha256:` and its digest.

    Raises:
        ValueError: A scope is none.
    """

    def __init__(self, scopes: Mapping[str, str]) -> None:
        self._tokens = tuple(_token(secret, scope) for secret, scope in scopes.items())

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[Token]:
        return iter(self._tokens)

    def find(self, secret: str) -> Token | None:
        """The token that has this secret, expired or not.

        Looks at all of them, and in constant time, so that how long it takes says nothing.
        """
        digest = _digest(secret)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    def access(self, secret: str, now: float | None = None) -> Access | None:
        """What the secret may do; None if it is none of ours, or has expired."""
        token = self.find(secret)
        return None if token is None or has_expired(token, now) else token.access

    @classmethod
    def parse(cls, text: str) -> "Tokens":
        """Read the environment variable's form.

        Raises:
            InvalidTokens: An entry has another form, or repeats a secret.
        """
        entries = [entry.strip() for entry in text.split(",")]
        return cls._of("entry", _ENTRY, enumerate(entries, 1))

    @classmethod
    def read(cls, file: Path) -> "Tokens":
        """Read a file.

        Raises:
            InvalidTokens: It cannot be read, anybody may write to it, a line has another form, or repeats a secret.
        """
        return cls.of_lines(text_of(file))

    @classmethod
    def of_lines(cls, text: str) -> "Tokens":
        """Read a file's text.

        Raises:
            InvalidTokens: A line has another form, or repeats a secret.
        """
        numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
        return cls._of("line", _LINE, ((n, line) for n, line in numbered if not line.startswith("#")))

    @classmethod
    def load(cls, file: Path | None = None, environ: Mapping[str, str] = os.environ) -> "Tokens":
        """From the file if one is named, else from the environment.

        Raises:
            InvalidTokens: There is none, or they cannot be read.
        """
        tokens = cls.parse(environ.get(VARIABLE, "")) if file is None else cls.read(file)
        if not tokens:
            raise InvalidTokens(HINT)
        return tokens

    @classmethod
    def _of(cls, unit: str, form: re.Pattern[str], entries: Iterable[tuple[int, str]]) -> "Tokens":
        shape = "SECRET=SCOPE" if form is _ENTRY else "SECRET [expires=TIME] SCOPE, with sha256:DIGEST for a secret"
        read: dict[bytes, Token] = {}
        for number, entry in entries:
            if not entry:
                continue
            match = form.fullmatch(entry)
            if match is None or not _SECRET.fullmatch(match["secret"]):
                raise InvalidTokens(f"{unit} {number} of the tokens is not of the form {shape} (scopes: {SCOPES})")
            try:
                token = _token(match["secret"], match["scope"], match.groupdict().get("expires"))
            except ValueError as error:
                raise InvalidTokens(f"{unit} {number} of the tokens: {error}") from None
            if token.digest in read:
                raise InvalidTokens(f"{unit} {number} of the tokens repeats the secret of an earlier one")
            read[token.digest] = token
        tokens = cls({})
        tokens._tokens = tuple(read.values())
        return tokens


def text_of(file: Path) -> str:
    """What stands in a file of tokens.

    Raises:
        InvalidTokens: It cannot be read, or anybody may write to it, and so let himself in.
    """
    try:
        if file.stat().st_mode & 0o002:
            raise InvalidTokens(f"anybody may write to the tokens file {file}: chmod o-w it")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidTokens(f"the tokens file {file} cannot be read: {reason}") from None


def new_token(scope: str, expires: str | None = None) -> tuple[str, Token, str]:
    """A new secret, the token, and its line for a file, which holds the digest alone.

    Raises:
        ValueError: The scope or the time is none.
    """
    secret = f"mb_{secrets.token_urlsafe(32)}"
    token = _token(secret, scope, expires)
    until = "" if expires is None else f"expires={expires} "
    line = f"{_DIGEST_PREFIX}{token.digest.hex()} {until}{scope}"
    try:
        read = [(each.digest, each.access) for each in Tokens.of_lines(line)]
    except InvalidTokens:
        read = []
    if read != [(token.digest, token.access)]:
        raise ValueError(f"{scope!r} cannot stand in a line of a file")
    return secret, token, line


def has_expired(token: Token, now: float | None = None) -> bool:
    """Whether it opens nothing any more."""
    return token.expires_at is not None and token.expires_at <= (_now() if now is None else now)


def moment(seconds: float) -> str:
    """A time as RFC 3339 has it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _token(secret: str, scope: str, expires: str | None = None) -> Token:
    digest = _DIGEST.fullmatch(secret)
    if digest is None and secret.startswith(_DIGEST_PREFIX):
        raise ValueError("sha256: is followed by 64 hexadecimal digits, in lower case")
    return Token(
        bytes.fromhex(digest["hex"]) if digest else _digest(secret),
        scope,
        _access(scope),
        None if expires is None else _seconds(expires),
        plain=digest is None,
    )


def _seconds(expires: str) -> float:
    try:
        if _MOMENT.fullmatch(expires):
            at = datetime.fromisoformat(expires.upper())
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        pass
    raise ValueError("write when it expires as 2027-01-01 or 2027-01-01T09:30:00Z")


def _access(scope: str) -> Access:
    looks = scope == "read" or scope.startswith("read:")
    of_tenant = scope.removeprefix("read:") if looks else scope
    if of_tenant.startswith("tenant:"):
        return Access(Account(of_tenant.removeprefix("tenant:")).tenant_id, moves=not looks)
    if scope not in ("*", "admin", "read"):
        raise ValueError(f"{scope!r} is not a scope: {SCOPES}")
    return Access(grants=scope == "admin", moves=not looks)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
