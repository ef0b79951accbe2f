"""Undoing: the refund or the void that is due, and what stands in for a void where the service has none.

One attempt each. It is the settler that writes down what came of it, and comes back with what got no answer.
"""

from dataclasses import replace

from metered_billing import names
from metered_billing.charge import (
    Declined,
    Deducted,
    Event,
    Found,
    NoLookup,
    NotFound,
    NotSent,
    NoVoid,
    Record,
    RefundAnswer,
    Refused,
    State,
    Unanswered,
    step,
)
from metered_billing.credits import Credits
from metered_billing.journal import Journal
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry

LOOK_AGAIN_AFTER_S = 300.0
"""Where there are no voids and declines are forgotten: how long a copy of a deduction may be under way."""


class Undoing:
    """Asks for what gives credits back, whatever the service can do.

    Args:
        credits: Who moves the credits.
        journal: Where it is on record that a copy of a deduction may be under way again, before it is sent.
    """

    def __init__(
        self,
        credits: Credits,  # noqa: A002 - the field's word
        journal: Journal,
        runtime: Runtime,
        telemetry: Telemetry,
    ) -> None:
        self._credits = credits
        self._journal = journal
        self._runtime = runtime
        self._telemetry = telemetry

    async def ask(self, record: Record) -> tuple[Event, Record] | Unanswered:
        """Refund or void, whichever is due. Returns the answer, and the record after it."""
        try:
            answer: Event | NoVoid | Unanswered
            if record.state is State.REFUNDING:
                answer = await self._refund(record)
            else:
                answer = await self._credits.void(record)
            if isinstance(answer, NoVoid):
                answer = await self._without_void(record)
            if isinstance(answer, Unanswered):
                return answer
            return answer, step(record, answer, now=self._runtime.now())
        except Exception as error:
            # A bug in a backend must not lose the refund, nor stand in the way of others.
            self._telemetry.log(names.LOG_BUG, record, exc_info=error)
            # A deduction may have been sent again before it raised: a copy may be under way.
            return Unanswered(f"{type(error).__name__} in the credits backend", declined=False)

    async def _refund(self, record: Record) -> RefundAnswer:
        answer = await self._credits.refund(record)
        if isinstance(answer, Refused) and record.refund_items:
            # Perhaps for the names of its items: how many, or what is in them. The credits go back without.
            return await self._credits.refund(replace(record, refund_items=()))
        return answer

    async def _without_void(self, record: Record) -> Event | Unanswered:
        """Send the very same deduction again under its key: a transaction that comes back can be refunded.

        A decline is the end of it where declines are remembered, and where it is the service's own. Where they
        are forgotten a copy may still be under way: look once more, without sending, when it cannot be any longer.
        Where there is nothing to look in, ask once more then: whatever had arrived in between is told.
        """
        quiet = record.declined_at is not None
        if record.declined_at is not None:
            early_s = record.declined_at + LOOK_AGAIN_AFTER_S - self._runtime.now()
            if early_s > 0:  # adopted: what is adopted is due at once
                return Unanswered("declined; looking again later", retry_after_s=min(early_s, LOOK_AGAIN_AFTER_S))
            found = await self._credits.find(record)
            if not isinstance(found, NoLookup):
                return found
            # From here on a copy may be under way again: whoever goes on after a crash has to wait again, too.
            if not await self._journal.write(record, replace(record, declined_at=None), durable=True):
                return Unanswered("somebody else has it")
        answer = await self._credits.deduct(record)
        if isinstance(answer, Deducted):
            return Found(answer.transaction_id)
        if isinstance(answer, Declined):
            if answer.after_unknown:
                return Unanswered("declined, in doubt", declined=False)
            remembered = self._credits.remembers_declines and not answer.forgotten
            # A proxy's 402 says nothing of the deduction behind it.
            if answer.certain and (quiet or remembered):
                return NotFound()
            if not remembered:
                return Unanswered("declined; looking again later", retry_after_s=LOOK_AGAIN_AFTER_S, declined=True)
            return Unanswered("declined, in doubt")
        return Unanswered(answer.reason, answer.retry_after_s, sent=not isinstance(answer, NotSent), declined=False)
