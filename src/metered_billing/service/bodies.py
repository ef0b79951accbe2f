"""What clients send: the JSON bodies, checked field by field, and the commands that they become."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    ValidationError,
    WrapValidator,
)
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger import Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.commands import MAX_ITEMS, MAX_REASON_LENGTH, check_metadata
from metered_billing.service.problems import fields

MAX_OPERATIONS = 1000
"""The most operations in one batch."""


MAX_TRACEPARENT_LENGTH = 255

WITHOUT_NUL = r"^[^\x00]*$"


def _without_nul(value: str) -> str:
    if "\x00" in value:
        raise ValueError("NUL characters are not allowed")
    return value


def _metadata(value: dict[str, str]) -> dict[str, str]:
    check_metadata(value)
    return value


Id = Annotated[str, StringConstraints(strict=True, pattern=r"^[^\x00-\x1f\x7f]{1,255}$")]
Key = Annotated[str, StringConstraints(strict=True, pattern=r"^[\x21-\x7e]{1,255}$")]
Amount = Annotated[int, Field(strict=True, ge=1, le=MAX_AMOUNT, description="Whole credits.")]
Reason = Annotated[
    str,
    StringConstraints(strict=True, min_length=1, max_length=MAX_REASON_LENGTH),
    AfterValidator(_without_nul),
    # For the description alone.
    Field(json_schema_extra={"pattern": WITHOUT_NUL}),
]
Items = Annotated[list[Id], Field(max_length=MAX_ITEMS, description="The ids of what failed.")]
Metadata = Annotated[
    dict[str, str],
    AfterValidator(_metadata),
    Field(
        description="For people to read: a flat map of strings, at most 2 KiB as JSON.",
        json_schema_extra={
            "propertyNames": {"pattern": WITHOUT_NUL},
            "additionalProperties": {"type": "string", "pattern": WITHOUT_NUL},
        },
    ),
]


class _Body(BaseModel):
    # A misspelt `user_id`, ignored, would charge the tenant's shared pool.
    model_config = ConfigDict(extra="forbid")


class _AccountBody(_Body):
    tenant_id: Id
    user_id: Annotated[Id | None, Field(description="Without one it is the tenant's shared pool that is meant.")] = None


class DeductionBody(_AccountBody):
    """Take credits from an account."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "tenant_id": "acme",
                    "user_id": "alice",
                    "amount": 10,
                    "request_id": "req-7f3a",
                    "metadata": {"route": "/create-products"},
                }
            ]
        }
    )

    amount: Amount
    request_id: Id | None = None
    metadata: Metadata | None = None

    def command(self, key: str) -> Deduct:
        return Deduct(
            idempotency_key=key,
            tenant_id=self.tenant_id,
            user_id=self.user_id,
            amount=self.amount,
            request_id=self.request_id,
            metadata=self.metadata,
        )


class RefundBody(_Body):
    """Give credits of a deduction back."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"amount": 2, "reason": "failed items", "items": ["img-3", "img-7"]}]}
    )

    amount: Amount
    reason: Reason
    items: Items | None = None

    def command(self, key: str, transaction_id: str, only_tenant: str | None) -> Refund:
        return Refund(
            idempotency_key=key,
            transaction_id=transaction_id,
            amount=self.amount,
            reason=self.reason,
            items=tuple(self.items or ()),
            only_tenant=only_tenant,
        )


class VoidBody(_AccountBody):
    """Undo the deduction that has this key, whether it happened or not."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "idempotency_key": "01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10",
                    "tenant_id": "acme",
                    "user_id": "alice",
                }
            ]
        }
    )

    idempotency_key: Key

    def command(self) -> Void:
        return Void(idempotency_key=self.idempotency_key, tenant_id=self.tenant_id, user_id=self.user_id)


class GrantBody(_AccountBody):
    """Put credits into an account."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"tenant_id": "acme", "user_id": "alice", "amount": 1000, "reason": "invoice 2041"}]
        }
    )

    amount: Amount
    reason: Reason

    def command(self, key: str) -> Grant:
        return Grant(
            idempotency_key=key,
            tenant_id=self.tenant_id,
            user_id=self.user_id,
            amount=self.amount,
            reason=self.reason,
        )


class _Operation(BaseModel):
    traceparent: Annotated[
        str | None, Field(max_length=MAX_TRACEPARENT_LENGTH, description="The operation's own trace (W3C).")
    ] = None

    @property
    def carrier(self) -> Mapping[str, str]:
        return {} if self.traceparent is None else {"traceparent": self.traceparent}


class DeductOperation(DeductionBody, _Operation):
    op: Literal["deduct"]
    idempotency_key: Key

    def to_command(self, only_tenant: str | None) -> Command:
        return self.command(self.idempotency_key)


class RefundOperation(RefundBody, _Operation):
    op: Literal["refund"]
    idempotency_key: Key
    transaction_id: Id

    def to_command(self, only_tenant: str | None) -> Command:
        return self.command(self.idempotency_key, self.transaction_id, only_tenant)


class VoidOperation(VoidBody, _Operation):
    op: Literal["void"]

    def to_command(self, only_tenant: str | None) -> Command:
        return self.command()


Operation = DeductOperation | RefundOperation | VoidOperation


@dataclass(frozen=True, slots=True)
class Malformed:
    """An operation that cannot be read: it gets its own 422, and its neighbours go through."""

    errors: tuple[dict[str, str], ...]


def _or_malformed(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        if details[0]["type"].startswith("union_tag"):
            return Malformed(({"field": "op", "message": "Input should be deduct, refund or void"},))
        return Malformed(tuple(fields(details)))


class BatchBody(_Body):
    """Operations to do in order; each stands alone."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "operations": [
                        {"op": "deduct", "idempotency_key": "k1", "tenant_id": "acme", "amount": 10},
                        {
                            "op": "refund",
                            "idempotency_key": "k0:refund",
                            "transaction_id": "01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10",
                            "amount": 2,
                            "reason": "failed items",
                        },
                        {"op": "void", "idempotency_key": "k2", "tenant_id": "acme"},
                    ]
                }
            ]
        }
    )

    operations: Annotated[
        list[Annotated[Annotated[Operation, Discriminator("op")], WrapValidator(_or_malformed)]],
        Field(max_length=MAX_OPERATIONS),
    ]


KEY_HEADER = r'^[!#-~][!-~]{0,254}$|^"(?:[!#-\[\]-~]|\\["\\]){1,255}"$'
"""The same for the description: what stands in quotes, or does not begin with one."""

_QUOTED = re.compile(r'"((?:[\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE = re.compile(r"[\x21-\x7e]+")


def idempotency_key(values: list[str]) -> str:
    """The key of an `Idempotency-Key` header, bare or as the IETF draft's quoted string.

    Raises:
        ValueError: There is none, or several, or it is not 1 to 255 visible ASCII characters.
    """
    if not values:
        raise ValueError("this header is required")
    if len(values) > 1:
        raise ValueError("this header must be sent once")
    value = values[0].strip(" \t")
    if value.startswith('"'):
        match = _QUOTED.fullmatch(value)
        key = re.sub(r"\\(.)", r"\1", match[1]) if match else ""
    else:
        key = value if _BARE.fullmatch(value) else ""
    if not 1 <= len(key) <= 255:
        raise ValueError("must be 1 to 255 visible ASCII characters, bare or as one quoted string")
    return key
