"""What the service answers, for the OpenAPI document. The ledger makes it: nothing is checked here."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_ID = "01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10"
_AT = "2026-03-01T09:30:00.000Z"

Time = Annotated[str, Field(description="RFC 3339, in UTC.", json_schema_extra={"format": "date-time"})]
Balance = Annotated[int, Field(ge=0, description="The account's, after it, in credits.")]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TransactionAnswer(_Answer):
    """Credits taken, or granted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "transaction_id": _ID,
                    "tenant_id": "acme",
                    "user_id": "alice",
                    "amount": 10,
                    "balance": 90,
                    "created_at": _AT,
                }
            ]
        }
    )

    transaction_id: str
    tenant_id: str
    user_id: str | None
    amount: Annotated[int, Field(ge=1)]
    balance: Balance
    created_at: Time


class RefundAnswer(_Answer):
    """Credits given back."""

    refund_id: str
    transaction_id: str
    amount: Annotated[int, Field(ge=1)]
    balance: Balance
    created_at: Time


class VoidAnswer(_Answer):
    """The deduction is undone, and refused should it still arrive."""

    status: Literal["voided"]
    refunded: Annotated[int, Field(ge=0, description="What the void gave back, in credits.")]


class BalanceAnswer(_Answer):
    """What the account holds; an unknown account holds 0."""

    balance: Annotated[int, Field(ge=0)]


class Entry(_Answer):
    """One movement of credits."""

    id: str
    kind: Literal["grant", "deduction", "refund", "void"]
    transaction_id: Annotated[
        str, Field(description="The deduction that a refund or void belongs to; else the entry's own id.")
    ]
    idempotency_key: str
    tenant_id: str
    user_id: str | None
    amount: Annotated[int, Field(description="Signed: what the balance changed by.")]
    balance: Balance
    created_at: Time
    reason: str | None
    request_id: str | None
    metadata: dict[str, str]
    items: list[str]


class EntryWithRefunds(Entry):
    """One movement of credits, with what came back of it, oldest first."""

    refunds: list[Entry]


class PageAnswer(_Answer):
    """Entries, newest first."""

    items: list[Entry]
    next_cursor: Annotated[str | None, Field(description="Of the next page; null on the last.")]


class Result(_Answer):
    """The answer to one operation of a batch: as if it had come alone."""

    status: int
    body: dict[str, object]
    replayed: bool = False


class BatchAnswer(_Answer):
    """One result for each operation, in their order."""

    results: list[Result]


class Health(_Answer):
    """The service and its ledger answer."""

    status: Literal["ok"]
