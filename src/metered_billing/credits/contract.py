"""The credits API, version 1, as its client sees it: which call to make, and what an answer means.

No network here: `HttpCredits` sends what this builds and hands back what came. A service with other paths
and fields gets a subclass of `Contract` that overrides the few methods that differ.
See docs/reference/credits-api.md and docs/reference/answers.md.
"""

import email.utils
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from metered_billing.charge import (
    MAX_AMOUNT,
    MAX_ITEMS,
    Account,
    AlreadyVoided,
    Declined,
    DeductAnswer,
    Deducted,
    FindAnswer,
    Found,
    NotFound,
    NoVoid,
    Record,
    RefundAnswer,
    Refunded,
    Refused,
    Unanswered,
    Unknown,
    VoidAnswer,
    Voided,
)
from metered_billing.errors import TYPE_PREFIX

__all__ = [
    "Account",
    "AlreadyVoided",
    "Call",
    "Contract",
    "Declined",
    "DeductAnswer",
    "Deducted",
    "FindAnswer",
    "Found",
    "NoVoid",
    "NotFound",
    "Page",
    "Record",
    "RefundAnswer",
    "Refunded",
    "Refused",
    "Reply",
    "Unanswered",
    "Unknown",
    "VoidAnswer",
    "Voided",
]
"""What a mapping is written with."""

RETRIED = frozenset({408, 425, 429})
"""Answers that ask for patience."""

NO_ROUTE = frozenset({"no-such-route", "method-not-allowed"})
"""Problems that the reference service has for a wrong address: no more of a refusal than a proxy's 404."""

MAX_REASON_LENGTH = 255

MAX_PATIENCE_S = 3600.0
"""How long the service may ask us to wait. A slip in its Retry-After must not put off a refund for years."""

M = TypeVar("M", bound=BaseModel)
Params = Mapping[str, str | int]


# Neither is frozen: that makes them twice as slow to make, and each operation has one of each.


@dataclass(slots=True)
class Call:
    """An HTTP call to make: a path below the service's URL, and a body that goes as JSON.

    Attributes:
        key: Sent as `Idempotency-Key`.
        headers: What this call has besides, such as a key under another name. They are seen in logs: no secrets.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    key: str | None = None
    params: Params | None = None
    headers: Mapping[str, str] | None = None


@dataclass(slots=True)
class Reply:
    """An HTTP answer: `body` is its JSON, or None where it has none that can be read.

    Attributes:
        doubt: Why an earlier copy of the same call may have taken effect, or take it yet.
    """

    status: int
    headers: Mapping[str, str]
    body: Any
    doubt: str | None = field(default=None, kw_only=True)

    @property
    def problem(self) -> str | None:
        """The NAME of a problem of this contract, or None: then it may be a proxy that speaks, or a wrong address."""
        return None if self._name in NO_ROUTE else self._name

    @property
    def _name(self) -> str | None:
        if not self.headers.get("content-type", "").lower().startswith("application/problem+json"):
            return None
        kind = self.body.get("type") if isinstance(self.body, dict) else None
        if isinstance(kind, str) and kind.startswith(TYPE_PREFIX):
            return kind.removeprefix(TYPE_PREFIX)
        return None

    def __str__(self) -> str:
        return f"HTTP {self.status}" + (f" {self._name[:100]}" if self._name else "")


@dataclass(frozen=True, slots=True)
class Page:
    """One page of an account's transactions, and the cursor of the next."""

    items: Sequence[Mapping[str, Any]]
    next_cursor: str | None


Credits = Annotated[int, Field(strict=True, ge=0, le=MAX_AMOUNT)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=255)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _DeductionAnswer(_Answer):
    transaction_id: Name
    tenant_id: str | None = None
    user_id: str | None = None
    amount: Credits
    balance: Credits | None = None


class _RefundAnswer(_Answer):
    refund_id: Name
    transaction_id: str | None = None
    amount: Credits
    balance: Credits | None = None


class _VoidAnswer(_Answer):
    status: Literal["voided"]
    refunded: Credits = 0


class _Entry(_Answer):
    id: Name | None = None
    transaction_id: Name | None = None


class _BalanceAnswer(_Answer):
    balance: Credits


class _PageAnswer(_Answer):
    items: list[dict[str, Any]]
    next_cursor: str | None = None


class Contract:
    """Version 1 of the credits API. For a service of another shape: a subclass that overrides what differs.

    Attributes:
        auth_header: The header in which the token goes.
        auth_scheme: What stands in front of the token there, as `Bearer` does; may be empty.
        remembers_declines: Whether a key once declined is declined for ever.
        batches: Whether the service takes many operations in one call (`batch`). In a subclass that asks for
            something otherwise, or reads it otherwise: only if it says so.
    """

    auth_header: ClassVar[str] = "Authorization"
    auth_scheme: ClassVar[str] = "Bearer"
    remembers_declines: ClassVar[bool] = True
    batches: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "batches" not in vars(cls) and not vars(cls).keys().isdisjoint(_IN_A_BATCH):
            cls.batches = False

    # Which call to make.

    def deduction(self, record: Record) -> Call:
        """Take the amount, under the charge's id."""
        body: dict[str, Any] = {**_account(record), "amount": record.amount_credits}
        if record.request_id is not None:
            body["request_id"] = record.request_id
        if record.metadata:
            body["metadata"] = dict(record.metadata)
        return Call("POST", "/v1/deductions", body, key=record.id)

    def refund(self, record: Record) -> Call:
        """Give `refund_credits` back against the charge's transaction, under its `refund_key`."""
        body: dict[str, Any] = {
            "amount": record.refund_credits,
            "reason": _readable(record.reason or "failed items"),
        }
        if record.refund_items:
            body["items"] = list(record.refund_items[:MAX_ITEMS])
        return Call(
            "POST", f"/v1/deductions/{segment(record.transaction_id or '')}/refunds", body, key=record.refund_key
        )

    def void(self, record: Record) -> Call | None:
        """None: this service has no voids."""
        return Call("POST", "/v1/voids", {**_account(record), "idempotency_key": record.id})

    def batched(self, operation: str, record: Record, call: Call) -> Mapping[str, Any]:
        """A call that was made above, as a batch has it.

        Args:
            operation: `deduct`, `refund` or `void`.
        """
        key = {} if call.key is None else {"idempotency_key": call.key}
        transaction = {"transaction_id": record.transaction_id} if operation == "refund" else {}
        return {"op": operation, **key, **(call.body or {}), **transaction}

    def batch(self, operations: Sequence[bytes]) -> tuple[str, bytes]:
        """The path and the body of a batch of what `batched` made, as JSON."""
        return "/v1/batch", b'{"operations":[' + b",".join(operations) + b"]}"

    def transactions(self, tenant_id: str, user_id: str | None, cursor: str | None, limit: int) -> Call | None:
        """A page of the account's transactions, the latest first; a cursor comes from the page before.

        None: this service has no list that could be looked through for a key.
        """
        params: dict[str, str | int] = {"tenant_id": tenant_id, "limit": limit}
        if user_id is not None:
            params["user_id"] = user_id
        if cursor is not None:
            params["cursor"] = cursor
        return Call("GET", "/v1/transactions", params=params)

    def balance(self, account: Account) -> Call:
        """For `metered-billing conformance`, which goes by the balance: the library itself does not ask."""
        user = {} if account.user_id is None else {"user_id": account.user_id}
        return Call("GET", "/v1/balance", params={"tenant_id": account.tenant_id, **user})

    # What an answer means. `Unknown` and `Unanswered` here mean: heard, and no wiser.

    def read_deduction(self, record: Record, reply: Reply) -> DeductAnswer:
        """Whether the credits were taken; a reply that does not say so for certain is `Unknown`."""
        if reply.status in (200, 201):
            answer = parse(_DeductionAnswer, reply.body)
            if answer is None or answer.amount != record.amount_credits or not _names(answer, record.account):
                return Unknown(f"broken reply ({reply})")
            return Deducted(answer.transaction_id, answer.balance)
        if reply.status == 402:
            said = reply.body if isinstance(reply.body, dict) else {}
            balance = said.get("balance")
            held = balance if type(balance) is int and balance >= 0 else None
            # A proxy's 402 says nothing of the deduction behind it: the client hears it, and a void makes sure.
            own_words = reply.problem == "insufficient-credits" or not said.keys().isdisjoint(("balance", "required"))
            return Declined(held, certain=own_words)
        if reply.status == 409 and reply.problem == "charge-voided":
            return Unknown("it was voided before it arrived")
        # An answer of the 4xx kind says that we asked wrongly; what asks for patience does not.
        wrong = 300 <= reply.status < 500 and reply.status not in {401, 403, 409, *RETRIED}
        return Unknown(str(reply), misconfigured=wrong)

    def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
        """Whether they are back; `Refused` only where the service itself said no, for good."""
        if reply.status in (200, 201):
            answer = parse(_RefundAnswer, reply.body)
            ours = (None, record.transaction_id)
            if answer is None or answer.amount != record.refund_credits or answer.transaction_id not in ours:
                return Unanswered(f"broken reply ({reply})")
            return Refunded(answer.refund_id, answer.balance)
        if reply.status == 409 and reply.problem == "charge-voided":
            return AlreadyVoided()
        return _refused(reply)

    def read_void(self, record: Record, reply: Reply) -> VoidAnswer:
        """Whether the deduction is undone, or the service has no voids."""
        if reply.status in (200, 201):
            answer = parse(_VoidAnswer, reply.body)
            if answer is None:
                return Unanswered(f"broken reply ({reply})")
            return Voided(answer.refunded)
        if reply.status == 409 and reply.problem == "charge-voided":
            return Voided()
        if reply.status in (404, 405, 501):
            return NoVoid() if reply.problem is None else Refused(str(reply))
        return _refused(reply)

    def read_batch(self, reply: Reply, size: int) -> "Sequence[Reply | None] | None":
        """Each operation's own answer, in order, and None where it cannot be read. None: this is no batch's answer."""
        results = reply.body.get("results") if reply.status == 200 and isinstance(reply.body, dict) else None
        if not isinstance(results, list) or len(results) != size:
            return None
        return [_result(result) for result in results]

    def read_transactions(self, reply: Reply) -> Page | None:
        """None: no such answer."""
        answer = parse(_PageAnswer, reply.body) if reply.status == 200 else None
        return None if answer is None else Page(answer.items, answer.next_cursor or None)

    def read_balance(self, reply: Reply) -> int | None:
        """In whole credits. None: no such answer."""
        answer = parse(_BalanceAnswer, reply.body) if reply.status == 200 else None
        return None if answer is None else answer.balance

    def find(self, record: Record, page: Page) -> FindAnswer:
        """Look for the record's deduction on a page."""
        for item in page.items:
            if item.get("kind") == "deduction" and item.get("idempotency_key") == record.id:
                entry = parse(_Entry, item)
                transaction_id = entry and (entry.transaction_id or entry.id)
                return Found(transaction_id) if transaction_id else Unanswered("a transaction without an id")
        return NotFound()


_IN_A_BATCH = ("deduction", "refund", "void", "read_deduction", "read_refund", "read_void")

_PROBLEM = {"content-type": "application/problem+json"}


def _result(result: Any) -> Reply | None:
    status = result.get("status") if isinstance(result, dict) else None
    if type(status) is not int or not 200 <= status <= 599:
        return None
    # Each speaks for the service itself: whoever else had answered would not have known the batch.
    return Reply(status, _PROBLEM if status >= 400 else {}, result.get("body"))


def _refused(reply: Reply) -> Refused | Unanswered:
    # Only the service itself can refuse for good. A 404 without a type of ours is a proxy, or a
    # deployment under way; a rejected token is a rotation under way. Both pass.
    if reply.status in (400, 404, 409, 413, 422) and reply.problem is not None:
        return Refused(str(reply))
    return Unanswered(str(reply))


def _names(answer: _DeductionAnswer, account: Account) -> bool:
    """Whether an answer is about this account; it need not say whose it is. No user's, or "", is the shared pool."""
    return answer.tenant_id in (None, account.tenant_id) and answer.user_id in (None, account.user_id or "")


def _account(record: Record) -> dict[str, str]:
    account = record.account
    return {"tenant_id": account.tenant_id} | ({} if account.user_id is None else {"user_id": account.user_id})


def segment(text: str) -> str:
    """One segment of a path, whatever the text holds."""
    # A lone `..` would be resolved before it is sent: what is left is another call's path.
    return quote(text, safe="") if text.strip(".") else "%2E" * len(text)


def _readable(reason: str) -> str:
    # A refund must not fail for the words that explain it (an exception's text, say).
    return reason.replace("\x00", " ").encode(errors="replace").decode()[:MAX_REASON_LENGTH]


def parse(model: type[M], body: Any) -> M | None:
    """`body` as the model, or None where it is not one."""
    try:
        return model.model_validate(body)
    except ValidationError:
        return None


def read_json(content: bytes) -> Any:
    """The JSON of a body, or None where it cannot be read, too deep and too long numbers included."""
    try:
        return from_json(content)
    except ValueError:
        pass  # so it may be UTF-16, or a text with half a character: what is slower takes more
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """RFC 9110, section 10.2.3: seconds or a date; None where there is none that can be read."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value), MAX_PATIENCE_S)
    parsed = email.utils.parsedate_tz(value)
    if parsed is None:
        return None
    try:
        return min(max(email.utils.mktime_tz(parsed) - now, 0.0), MAX_PATIENCE_S)
    except (ValueError, OverflowError):
        return None
