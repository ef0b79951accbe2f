"""`reconcile --repair`: refunds and voids that the service has lost are sent again, under the keys that they had."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from metered_billing.charge import NoVoid, Record, Refused, Unanswered
from metered_billing.cli import terminal
from metered_billing.cli.charges import looking_into
from metered_billing.cli.failure import Failure
from metered_billing.cli.lookup import Silent, entries_of
from metered_billing.cli.options import secret
from metered_billing.cli.source import open_source
from metered_billing.credits import Credits
from metered_billing.explain import in_words
from metered_billing.journal.reading import Wanted
from metered_billing.ledger import LedgerError
from metered_billing.reconcile import MOVES_NOTHING, Difference, Entry, compare, net_of
from metered_billing.runtime import Runtime
from metered_billing.settings import open_credits

AT_ONCE = 64
"""How many are under way at a time."""

Lost = tuple[Record, Collection[str]]
"""A charge that something is to be given back of, and its transactions at the service."""


def is_repairable(difference: Difference | None, entries: Iterable[Entry]) -> bool:
    """Whether the service keeps what the journal has as given back, and nobody has begun to give it back since.

    All else is for a person: to take credits again is nothing that a comparison may decide.
    """
    if difference is None or difference.kind != "not refunded":
        # A void gives back what is left, whatever came back before.
        return difference is not None and difference.kind == "not undone"
    return all(entry.kind == "deduction" for entry in entries)


class Repairs:
    """What was sent again, each charge once. What is there already moves nothing, so it may be done at any time.

    Attributes:
        tried: The charges' ids.
        charges: How many agree now.
        back: How many credits went back, by the service's transactions.
        failed: Why not, by the charge's id.
    """

    def __init__(self, journal: str, url: str, token: str | None) -> None:
        self._journal, self._url, self._token = journal, url, token
        self.tried: set[str] = set()
        self.charges = 0
        self.back = 0
        self.failed: dict[str, str] = {}

    @property
    def says(self) -> str:
        return f"Repaired: {self.charges:,} charges. {in_words(self.back)} went back."

    async def make(self, lost: Sequence[Lost]) -> None:
        """Send each again.

        Raises:
            Failure: The credits cannot be had, or not any more.
        """
        try:
            for at in range(0, len(lost), AT_ONCE):
                some = lost[at : at + AT_ONCE]
                await self._repeat(some)
                if len(lost) > AT_ONCE:
                    terminal.complain(f"{at + len(some):,} of {len(lost):,} looked at. {self.says}")
        except Failure as failure:
            raise Failure(f"{failure} {self.says} Say it again for the rest.", in_doubt=True) from None

    async def _repeat(self, lost: Sequence[Lost]) -> None:
        self.tried |= {record.id for record, _ in lost}
        whole = self._as_kept([record for record, _ in lost])
        # Looked at once more: somebody may have begun to give it back by hand.
        before = await self._entries(lost)
        due = [each for each in lost if self._is_due(whole[each[0].id], before[each[0].id])]
        async with self._credits() as credits:  # noqa: A001 - the field's word
            await asyncio.gather(*(self._send(credits, whole[record.id]) for record, _ in due))
        # By what is there: an answer may have been lost, and another may have done it meanwhile.
        for charge_id, entries in (await self._entries(due)).items():
            self.back += net_of(before[charge_id]) - net_of(entries)
            if compare(whole[charge_id], entries) is None:
                self.charges += 1
                self.failed.pop(charge_id, None)

    def _as_kept(self, records: Sequence[Record]) -> Mapping[str, Record]:
        """With all that the journal has of them: the reason and the items are for who asks what a refund was for."""
        kept = {record.id: record for record in records}
        with looking_into(self._journal) as reader:
            for record in records:
                for seen in reader.charges(Wanted(name=record.id, tenant_id=record.account.tenant_id)):
                    if seen.record.id == record.id:
                        kept[record.id] = seen.record
        return kept

    async def _entries(self, lost: Sequence[Lost]) -> dict[str, list[Entry]]:
        async with open_source(self._url, self._token) as source:
            return {
                record.id: [entry for name in sorted(names) for entry in await entries_of(source, name)]
                for record, names in lost
            }

    @staticmethod
    def _is_due(record: Record, entries: list[Entry]) -> bool:
        return is_repairable(compare(record, entries), entries)

    @asynccontextmanager
    async def _credits(self) -> AsyncIterator[Credits]:
        try:
            credits = open_credits(self._url, secret(self._token), Runtime(), Silent())  # noqa: A001
            await credits.start()
        except (ValueError, ImportError, LedgerError) as error:
            raise Failure(f"{error}.") from None
        try:
            yield credits
        finally:
            await credits.aclose()

    async def _send(self, credits: Credits, record: Record) -> None:  # noqa: A002 - the field's word
        answer = await (credits.void if record.state in MOVES_NOTHING else credits.refund)(record)
        if isinstance(answer, Refused | Unanswered):
            self.failed[record.id] = answer.reason
        elif isinstance(answer, NoVoid):
            self.failed[record.id] = "the service has no voids"
