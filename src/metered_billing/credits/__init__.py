"""How credits move: what the biller asks of whoever keeps the credits.

`http.HttpCredits` asks a credits service; `sql.SqlCredits` is the ledger in this process.
"""

from typing import Protocol

from metered_billing.charge import DeductAnswer, FindAnswer, Record, RefundAnswer, VoidAnswer


class Credits(Protocol):
    """Moves credits, at most once a key. Never raises for what the other side says or fails to say:
    answers are values (`Declined`), and so is the lack of one (`Unknown`, `Unanswered`).

    A cancelled call says nothing: the caller takes it as unknown.
    """

    @property
    def realm(self) -> str:
        """Which credits these are: a URL or a path, without secrets.

        A charge can only be undone where it was made, so the journal keeps to one realm.
        """
        ...

    @property
    def remembers_declines(self) -> bool:
        """Whether a deduction once declined is declined for ever under its key."""
        ...

    async def start(self) -> None:
        """Get ready, once, on this event loop; what raises here keeps the app from starting."""
        ...

    async def deduct(self, record: Record) -> DeductAnswer:
        """Take `record.amount_credits` from its account, under the key `record.id`."""
        ...

    async def refund(self, record: Record) -> RefundAnswer:
        """Give `record.refund_credits` back to its transaction, under the key `record.refund_key`."""
        ...

    async def void(self, record: Record) -> VoidAnswer:
        """Undo the deduction with the key `record.id`, whether it happened or not."""
        ...

    async def find(self, record: Record) -> FindAnswer:
        """Look, without moving anything, for the transaction under the key `record.id`."""
        ...

    async def aclose(self) -> None:
        """Let go of connections and files; it can be used again afterwards."""
        ...
