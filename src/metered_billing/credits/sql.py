"""The ledger, as credits: no service in between."""

import re
from collections.abc import Sequence
from pathlib import Path

from metered_billing.charge import (
    MAX_ID_LENGTH,
    AlreadyVoided,
    Declined,
    DeductAnswer,
    Deducted,
    FindAnswer,
    Found,
    NotFound,
    NotSent,
    Record,
    RefundAnswer,
    Refunded,
    Refused,
    Unanswered,
    Unknown,
    VoidAnswer,
    Voided,
)
from metered_billing.ledger import (
    Answer,
    Deduct,
    Grant,
    Ledger,
    LedgerError,
    LedgerNotOpened,
    Page,
    Refund,
    Void,
)
from metered_billing.ledger.answers import CHARGE_VOIDED, INSUFFICIENT_CREDITS
from metered_billing.ledger.commands import MAX_ITEMS, MAX_REASON_LENGTH
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class SqlCredits:
    """Credits kept in a SQLite file that this process owns, or in a PostgreSQL database that several processes use.

    Implements `Credits`. Opened when it is first used, or by `start`, which says at once what is wrong with it.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, a path, or `postgresql://user@host:port/database`.

    Raises:
        ValueError: The URL is of another kind.
        ImportError: PostgreSQL, without `metered-billing[postgres]`.
    """

    remembers_declines = True

    def __init__(self, url: str | Path, *, runtime: Runtime | None = None, telemetry: Telemetry | None = None) -> None:
        self.ledger: Ledger = Ledger(url, runtime, committed=(telemetry or Telemetry()).committed("ledger"))

    @property
    def realm(self) -> str:
        return self.ledger.place

    async def start(self) -> None:
        """Open the ledger.

        Raises:
            LedgerLocked: Another process has it; the sentence says what to do.
            LedgerNotOpened: It cannot be opened.
        """
        await self.ledger.start()

    async def aclose(self) -> None:
        """Close the ledger, for the next owner; the next call opens it again."""
        await self.ledger.close()

    async def deduct(self, record: Record) -> DeductAnswer:
        """Take `record.amount_credits`, under the key `record.id`."""
        try:
            answer = await self.ledger.deduct(
                Deduct(
                    idempotency_key=record.id,
                    tenant_id=record.account.tenant_id,
                    user_id=record.account.user_id,
                    amount=record.amount_credits,
                    request_id=record.request_id,
                    metadata=record.metadata,
                )
            )
        except LedgerNotOpened as error:
            return NotSent(str(error))
        except LedgerError as error:
            return Unknown(str(error))
        except ValueError as error:
            return Unknown(str(error), misconfigured=True)
        if answer.done:
            return Deducted(answer.body["transaction_id"], answer.body["balance"])
        if answer.refusal == INSUFFICIENT_CREDITS:
            return Declined(answer.body["balance"])
        # Voided before is an answer to be expected; any other refusal is a bug of ours.
        return Unknown(_why(answer), misconfigured=answer.refusal != CHARGE_VOIDED)

    async def refund(self, record: Record) -> RefundAnswer:
        """Give `record.refund_credits` back, under the key `record.refund_key`."""
        try:
            answer = await self.ledger.refund(
                Refund(
                    idempotency_key=record.refund_key,
                    transaction_id=record.transaction_id or "",
                    amount=record.refund_credits,
                    reason=_readable(record.reason or "refund"),
                    items=_storable(record.refund_items),
                    only_tenant=record.account.tenant_id,
                )
            )
        except LedgerError as error:
            return _unanswered(error)
        except ValueError as error:
            return Refused(str(error))
        if answer.done:
            return Refunded(answer.body["refund_id"], answer.body["balance"])
        if answer.refusal == CHARGE_VOIDED:
            return AlreadyVoided()
        return Refused(_why(answer))

    async def void(self, record: Record) -> VoidAnswer:
        """Undo the deduction with the key `record.id`, whether it happened or not."""
        try:
            answer = await self.ledger.void(
                Void(
                    idempotency_key=record.id,
                    tenant_id=record.account.tenant_id,
                    user_id=record.account.user_id,
                )
            )
        except LedgerError as error:
            return _unanswered(error)
        except ValueError as error:
            return Refused(str(error))
        return Voided(answer.body["refunded"]) if answer.done else Refused(_why(answer))

    async def find(self, record: Record) -> FindAnswer:
        """Look for the transaction under the key `record.id`."""
        try:
            transaction_id = await self.ledger.find(record.account.tenant_id, record.id)
        except LedgerError as error:
            return _unanswered(error)
        return NotFound() if transaction_id is None else Found(transaction_id)

    # For people, tests and the command line: these raise `LedgerError` and `ValueError`.

    async def grant(
        self,
        tenant_id: str,
        user_id: str | None = None,
        *,
        amount: int,
        reason: str,
        idempotency_key: str,
    ) -> Answer:
        """Put credits into an account, once a key."""
        return await self.ledger.grant(
            Grant(
                idempotency_key=idempotency_key,
                tenant_id=tenant_id,
                user_id=user_id,
                amount=amount,
                reason=reason,
            )
        )

    async def balance(self, tenant_id: str, user_id: str | None = None) -> int:
        """What the account holds, in credits."""
        return await self.ledger.balance(tenant_id, user_id)

    async def transactions(
        self, tenant_id: str, user_id: str | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page:
        """A page of entries, newest first; see `Ledger.transactions`."""
        return await self.ledger.transactions(tenant_id, user_id, cursor=cursor, limit=limit)


# A refund must not fail for the words that explain it: an exception's text, or ids out of a response.


def _readable(reason: str) -> str:
    return reason.replace("\x00", "?").encode(errors="replace").decode()[:MAX_REASON_LENGTH]


def _storable(items: Sequence[str]) -> tuple[str, ...]:
    readable = (_CONTROL.sub("?", _readable(item))[:MAX_ID_LENGTH] for item in items[:MAX_ITEMS])
    return tuple(item for item in readable if item)


def _why(answer: Answer) -> str:
    return f"{answer.refusal}: {answer.body['detail']}"


def _unanswered(error: LedgerError) -> Unanswered:
    return Unanswered(str(error), sent=not isinstance(error, LedgerNotOpened))
