"""What can be asked of the ledger: deduct, refund, void, grant. Checked when made, then immutable."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from metered_billing.charge import MAX_AMOUNT, MAX_ID_LENGTH, Account

MAX_ITEMS = 1000
"""The most item ids that one refund names."""

MAX_METADATA_BYTES = 2048
"""The largest metadata, as JSON in UTF-8."""

MAX_REASON_LENGTH = 2000
"""The longest reason, in characters."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_ID = re.compile(r"[^\x00-\x1f\x7f]{1,255}")
_STORABLE_ID = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduct:
    """Take `amount` credits from an account, once a key.

    Raises (as all commands do when made):
        ValueError: A field is not what section "Limits" of docs/reference/credits-api.md says.
    """

    kind: ClassVar[str] = "deduction"
    idempotency_key: str
    tenant_id: str
    user_id: str | None = None
    amount: int
    request_id: str | None = None
    metadata: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        _check_key(self.idempotency_key)
        _check_account(self.tenant_id, self.user_id)
        _check_amount(self.amount)
        if self.request_id is not None:
            _check_id("request_id", self.request_id)
        if self.metadata is not None:
            check_metadata(self.metadata)

    @property
    def payload_hash(self) -> bytes:
        """What has to be the same when the key is used again; never metadata or request id."""
        return _hash(f"{self.kind}\x1f{self.tenant_id}\x1f{self.user_id or ''}\x1f{self.amount}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """Give `amount` credits back to the account that a deduction took them from, once a key.

    Attributes:
        only_tenant: To any other tenant's deduction the answer is "not found". None: no such limit.
        items: The ids of what failed, for people to read.
    """

    kind: ClassVar[str] = "refund"
    idempotency_key: str
    transaction_id: str
    amount: int
    reason: str
    items: tuple[str, ...] = ()
    only_tenant: str | None = None

    def __post_init__(self) -> None:
        _check_key(self.idempotency_key)
        _check_id("transaction_id", self.transaction_id)
        _check_amount(self.amount)
        _check_reason(self.reason)
        if len(self.items) > MAX_ITEMS:
            raise ValueError(f"items: at most {MAX_ITEMS}")
        for item in self.items:
            _check_id("items", item)

    @property
    def payload_hash(self) -> bytes:
        return _hash(f"{self.kind}\x1f{self.transaction_id}\x1f{self.amount}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """Undo the deduction with this key, whether it happened, was declined, or never arrived.

    The key is the deduction's: a void has none of its own, so it can be repeated without end.
    """

    kind: ClassVar[str] = "void"
    idempotency_key: str
    tenant_id: str
    user_id: str | None = None

    def __post_init__(self) -> None:
        _check_key(self.idempotency_key)
        _check_account(self.tenant_id, self.user_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Put `amount` credits into an account, once a key. The only way credits come into being."""

    kind: ClassVar[str] = "grant"
    idempotency_key: str
    tenant_id: str
    user_id: str | None = None
    amount: int
    reason: str

    def __post_init__(self) -> None:
        _check_key(self.idempotency_key)
        _check_account(self.tenant_id, self.user_id)
        _check_amount(self.amount)
        _check_reason(self.reason)

    @property
    def payload_hash(self) -> bytes:
        return _hash(f"{self.kind}\x1f{self.tenant_id}\x1f{self.user_id or ''}\x1f{self.amount}")


Command = Deduct | Refund | Void | Grant


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Refuse what is not a flat map of strings of at most 2 KiB.

    Raises:
        ValueError: In a sentence for whoever sent it.
    """
    if type(metadata) is not dict and not isinstance(metadata, Mapping):
        raise ValueError("metadata must be a flat map of strings")
    length = 0
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError("metadata must be a flat map of strings")
        _check_text("metadata", key)
        _check_text("metadata", value)
        length += len(key) + len(value) + 2
    # No character takes more than six bytes, and what stands around an item ten: the short need not be written out.
    if (
        length * 6 >= MAX_METADATA_BYTES
        and len(json.dumps(dict(metadata), ensure_ascii=False).encode()) > MAX_METADATA_BYTES
    ):
        raise ValueError(f"metadata must be at most {MAX_METADATA_BYTES} bytes of JSON")


def _check_text(name: str, value: str) -> None:
    # PostgreSQL stores no NUL, and neither engine a lone surrogate.
    if "\x00" in value:
        raise ValueError(f"{name} must not contain NUL characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be valid Unicode") from None


def _check_reason(reason: str) -> None:
    if not isinstance(reason, str) or not 1 <= len(reason) <= MAX_REASON_LENGTH:
        raise ValueError(f"reason must be 1 to {MAX_REASON_LENGTH} characters")
    _check_text("reason", reason)


def _check_key(key: str) -> None:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"idempotency_key must be 1 to {MAX_ID_LENGTH} visible ASCII characters")


def _check_id(name: str, value: str) -> None:
    if isinstance(value, str) and _STORABLE_ID.fullmatch(value):
        return
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError(f"{name} must be 1 to {MAX_ID_LENGTH} characters without control characters")
    _check_text(name, value)


def _check_account(tenant_id: str, user_id: str | None) -> None:
    if type(tenant_id) is str and (user_id is None or type(user_id) is str):
        _account(tenant_id, user_id)  # the same ones come again and again
    else:
        Account(tenant_id, user_id)


@lru_cache(maxsize=4096)
def _account(tenant_id: str, user_id: str | None) -> Account:
    return Account(tenant_id, user_id)


def _check_amount(amount: int) -> None:
    # `type`, because True is an int and would take one credit.
    if type(amount) is not int or not 1 <= amount <= MAX_AMOUNT:
        raise ValueError(f"amount must be a whole number from 1 to {MAX_AMOUNT}")


def _hash(payload: str) -> bytes:
    # Its parts stand between control characters, of which they can have none themselves.
    return hashlib.sha256(payload.encode()).digest()
