"""The ledger's rows as both engines have them: the columns, and what stands in them."""

import json
from collections.abc import Mapping
from json.encoder import encode_basestring as _quoted
from typing import Any

from metered_billing.ledger.rules import Entry, Remembered

ENTRY = (
    "id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, balance, created_at, reason, "
    "request_id, metadata, items"
)
"""An entry's columns."""

to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
"""Compact JSON. One encoder, for `json.dumps` would make one a call."""

KEY = "tenant_id, idempotency_key, kind, user_id, payload_hash, status, body, entry_id"
"""The columns of a key that was used."""

VOID = "tenant_id, idempotency_key, user_id, refunded, created_at"
"""The columns of a key that was voided."""

# No user is '': a primary key of NULLs would let one account have two rows.


def entry_values(entry: Entry) -> tuple[Any, ...]:
    """What is written into the columns of `ENTRY`."""
    return (
        entry.id,
        entry.kind,
        entry.transaction_id,
        entry.idempotency_key,
        entry.tenant_id,
        entry.user_id or "",
        entry.amount,
        entry.balance,
        entry.created_at,
        entry.reason,
        entry.request_id,
        None if entry.metadata is None else _flat_json(entry.metadata),
        to_json(entry.items) if entry.items else None,
    )


def entry_of(row: tuple[Any, ...]) -> Entry:
    """The entry that was read from the columns of `ENTRY`."""
    metadata: Mapping[str, str] | None = json.loads(row[11]) if row[11] else None
    return Entry(
        id=row[0],
        kind=row[1],
        transaction_id=row[2],
        idempotency_key=row[3],
        tenant_id=row[4],
        user_id=row[5] or None,
        amount=row[6],
        balance=row[7],
        created_at=row[8],
        reason=row[9],
        request_id=row[10],
        metadata=metadata,
        items=tuple(json.loads(row[12])) if row[12] else (),
    )


def key_values(tenant_id: str, key: str, what: Remembered) -> tuple[Any, ...]:
    """What is written into the columns of `KEY`."""
    body = None if what.body is None else to_json(dict(what.body))
    return (tenant_id, key, what.kind, what.user_id or "", what.payload_hash, what.status, body, what.entry_id)


def remembered_of(row: tuple[Any, ...]) -> Remembered:
    """What was read from the columns of `KEY`, without the key itself."""
    kind, user_id, payload_hash, status, body, entry_id = row
    return Remembered(kind, user_id or None, payload_hash, status, json.loads(body) if body else None, entry_id)


def entry_body(entry: Entry) -> dict[str, Any]:
    """An entry as JSON has it."""
    return {
        "id": entry.id,
        "kind": entry.kind,
        "transaction_id": entry.transaction_id,
        "idempotency_key": entry.idempotency_key,
        "tenant_id": entry.tenant_id,
        "user_id": entry.user_id,
        "amount": entry.amount,
        "balance": entry.balance,
        "created_at": entry.created_at,
        "reason": entry.reason,
        "request_id": entry.request_id,
        "metadata": dict(entry.metadata or {}),
        "items": list(entry.items),
    }


def _flat_json(metadata: Mapping[str, str]) -> str:
    # A flat map of strings needs no encoder, which costs as much as the rest of the row.
    return "{" + ",".join([f"{_quoted(name)}:{_quoted(value)}" for name, value in metadata.items()]) + "}"
