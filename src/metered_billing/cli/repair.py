"""`reconcile --repair`: refunds and voids that the service has lost are sent again, under the keys that they had."""

import asyncio
from collections.abc import Iterable, Sequence

from metered_billing.charge import NoVoid, Record, Refused, Unanswered
from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.cli.lookup import Silent
from metered_billing.cli.options import secret
from metered_billing.credits import Credits
from metered_billing.ledger import LedgerError
from metered_billing.reconcile import Difference, Entry
from metered_billing.runtime import Runtime
from metered_billing.settings import open_credits

AT_ONCE = 64
"""How many are under way at a time."""


def is_repairable(difference: Difference, entries: Iterable[Entry]) -> bool:
    """Whether the service keeps what the journal has as given back, and nobody has begun to give it back since.

    All else is for a person: to take credits again is nothing that a comparison may decide.
    """
    if difference.kind == "not undone":
        return True  # a void gives back what is left, whatever came back before
    return difference.kind == "not refunded" and all(entry.kind == "deduction" for entry in entries)


class Repairs:
    """What was repeated, each charge once.

    Attributes:
        failed: Why not, by the charge's id.
    """

    def __init__(self) -> None:
        self._tried: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def untried(self, found: Sequence[tuple[Record, Difference]]) -> list[tuple[Record, Difference]]:
        return [(record, difference) for record, difference in found if record.id not in self._tried]

    async def make(self, url: str, token: str | None, found: Sequence[tuple[Record, Difference]]) -> None:
        """Send each again. Whatever is there already moves nothing, so that it may be done at any time.

        Raises:
            Failure: The credits cannot be opened; nothing was moved.
        """
        try:
            credits = open_credits(url, secret(token), Runtime(), Silent())  # noqa: A001 - the field's word
            await credits.start()
        except (ValueError, ImportError, LedgerError) as error:
            raise Failure(f"{error}.") from None
        try:
            for at in range(0, len(found), AT_ONCE):
                some = found[at : at + AT_ONCE]
                await asyncio.gather(*(self._repeat(credits, *each) for each in some))
                if len(found) > AT_ONCE:
                    terminal.complain(f"{at + len(some):,} of {len(found):,} sent again")
        finally:
            await credits.aclose()

    async def _repeat(self, credits: Credits, record: Record, difference: Difference) -> None:  # noqa: A002
        self._tried[record.id] = difference.credits
        answer = await (credits.refund if difference.kind == "not refunded" else credits.void)(record)
        if isinstance(answer, Refused | Unanswered):
            self.failed[record.id] = answer.reason
        elif isinstance(answer, NoVoid):
            self.failed[record.id] = "the service has no voids"

    def done(self, still: Sequence[Difference]) -> tuple[int, int]:
        """How many charges differ no more, and how many credits went back for them.

        Args:
            still: What differs now.
        """
        left = {difference.charge_id for difference in still}
        back = [credits for charge, credits in self._tried.items() if charge not in left]  # noqa: A001
        return len(back), sum(back)
