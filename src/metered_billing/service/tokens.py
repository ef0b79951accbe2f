"""Bearer tokens: who may call the service, for which tenant, and whether to grant.

    METERED_BILLING_TOKENS="secret=*,secret2=tenant:acme,secret3=admin"

or a file, one token a line: the secret, white space, the scope; lines that begin with # are comments.
Scopes: `*` moves credits of all tenants, `tenant:ID` of one, `admin` of all, and may grant.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from metered_billing.charge import Account

VARIABLE = "METERED_BILLING_TOKENS"

HINT = (
    f'The service needs a token: set {VARIABLE}="SECRET=admin" (scopes: *, tenant:ID, admin; several are '
    "separated by commas), or name a file with --tokens-file, a line each: SECRET SCOPE"
)

_SCOPE = r"\*|admin|tenant:.+"
# Greedy: a base64 secret may end in "=".
_ENTRY = re.compile(rf"(?P<secret>.+)=(?P<scope>{_SCOPE})")
_LINE = re.compile(rf"(?P<secret>\S+)\s+(?P<scope>{_SCOPE})")
_SECRET = re.compile(r"[\x21-\x7e]+")


class InvalidTokens(ValueError):
    """The tokens cannot be read. The sentence names the entry by number, never by its secret."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a token may do.

    Attributes:
        tenant_id: For this tenant only; None for all.
        grants: May put credits into accounts.
    """

    tenant_id: str | None = None
    grants: bool = False

    def covers(self, tenant_id: str) -> bool:
        return self.tenant_id in (None, tenant_id)


class Tokens:
    """The tokens that the service accepts, as digests: the secrets themselves are not kept.

    Args:
        scopes: Scope by secret.

    Raises:
        ValueError: A scope is none.
    """

    def __init__(self, scopes: Mapping[str, str]) -> None:
        self._access = tuple((_digest(secret), _access(scope)) for secret, scope in scopes.items())

    def __len__(self) -> int:
        return len(self._access)

    def access(self, secret: str) -> Access | None:
        """What the secret may do; None if it is none of ours.

        Looks at all of them, and in constant time, so that how long it takes says nothing.
        """
        digest = _digest(secret)
        found = None
        for known, access in self._access:
            if hmac.compare_digest(known, digest):
                found = access
        return found

    @classmethod
    def parse(cls, text: str) -> "Tokens":
        """Read the environment variable's form.

        Raises:
            InvalidTokens: An entry has another form, or repeats a secret.
        """
        entries = [entry.strip() for entry in text.split(",")]
        return cls(_scopes("entry", _ENTRY, enumerate(entries, 1)))

    @classmethod
    def read(cls, file: Path) -> "Tokens":
        """Read a file.

        Raises:
            InvalidTokens: It cannot be read, a line has another form, or repeats a secret.
        """
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InvalidTokens(f"the tokens file {file} cannot be read: {reason}") from None
        numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
        return cls(_scopes("line", _LINE, ((n, line) for n, line in numbered if not line.startswith("#"))))

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


def _scopes(unit: str, form: re.Pattern[str], entries: Iterable[tuple[int, str]]) -> dict[str, str]:
    scopes: dict[str, str] = {}
    for number, entry in entries:
        if not entry:
            continue
        match = form.fullmatch(entry)
        if match is None or not _SECRET.fullmatch(match["secret"]):
            raise InvalidTokens(f"{unit} {number} of the tokens has another form. {HINT}")
        if match["secret"] in scopes:
            raise InvalidTokens(f"{unit} {number} of the tokens repeats the secret of an earlier one")
        scopes[match["secret"]] = match["scope"]
        try:
            _access(match["scope"])
        except ValueError as error:
            raise InvalidTokens(f"{unit} {number} of the tokens: {error}") from None
    return scopes


def _access(scope: str) -> Access:
    if scope.startswith("tenant:"):
        return Access(Account(scope.removeprefix("tenant:")).tenant_id)
    if scope not in ("*", "admin"):
        raise ValueError(f"{scope!r} is not a scope: *, tenant:ID or admin")
    return Access(grants=scope == "admin")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
