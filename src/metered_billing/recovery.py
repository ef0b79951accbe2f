"""Recovery by a schedule: where no process lives on to do it, or none that is not frozen between its requests."""

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from metered_billing.bounds import MONTH_S, number
from metered_billing.credits import Credits
from metered_billing.journal import Journal
from metered_billing.runtime import Runtime
from metered_billing.settings import Settings
from metered_billing.settler import Settler
from metered_billing.telemetry import Telemetry

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """What came of it.

    Attributes:
        tried: How often a charge was driven on.
        left: Charges that are not final yet; they stay in the journal, for the next time.
    """

    tried: int
    left: int


async def recover(
    within_s: float = 45.0,
    *,
    credits: str | Credits | None = None,  # noqa: A002 - the field's word
    journal: str | Path | Journal | None = None,
    settings: Settings | None = None,
    runtime: Runtime | None = None,
    telemetry: Telemetry | None = None,
) -> Recovered:
    """Take over what dead processes left in the journal, and drive it to its end, as `metered-billing recover` does.

    As often as you like, and beside running apps: what they have under way is theirs. All is closed at its end.

    Args:
        within_s: How long to try, at the most.
        credits: As the middleware's; by default `METERED_BILLING_CREDITS`.
        journal: As the middleware's; by default `METERED_BILLING_JOURNAL`.

    Raises:
        JournalError, LedgerError: The journal or the ledger cannot be had.
        ValueError: Nobody says where credits are kept, or what is said cannot be right.
    """
    number("within_s", within_s, most=MONTH_S, zero=True)
    settings, runtime, telemetry = settings or Settings(), runtime or Runtime(), telemetry or Telemetry()
    return await Recovery(
        settings.open_credits(credits, runtime, telemetry, asked_by="recover"),
        settings.open_journal(journal, runtime, telemetry),
        runtime,
        telemetry,
    ).run(within_s)


class Recovery:
    """One run: a place in the journal, as one more process has it.

    Args:
        more: Asked when nothing is left, with the seconds since the run began: whether more may turn up yet.
    """

    def __init__(
        self,
        credits: Credits,  # noqa: A002 - the field's word
        journal: Journal,
        runtime: Runtime,
        telemetry: Telemetry,
        *,
        more: Callable[[float], bool] = lambda after_s: False,
    ) -> None:
        self._credits = credits
        self._journal = journal
        self._runtime = runtime
        self._settler = Settler(credits, journal, runtime, telemetry)
        self._more = more
        self._tried = 0

    async def run(self, within_s: float) -> Recovered:
        """Recover until nothing is left to do, or the time is over; then close everything.

        Raises:
            JournalError, LedgerError: The journal or the ledger cannot be had.
        """
        try:
            await self._credits.start()
            await self._journal.start(self._credits.realm)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._until_done()
            return Recovered(self._tried, await self._left())
        finally:
            try:
                await self._journal.close()
            finally:
                await self._credits.aclose()

    async def _until_done(self) -> None:
        began = self._runtime.monotonic()
        while True:
            self._tried += await self._settler.recover()
            if not await self._left() and not self._more(self._runtime.monotonic() - began):
                return
            now = self._runtime.now()
            due = await self._journal.next_due(now)
            await self._runtime.sleep(min(max((due or math.inf) - now, 0.1), LOOK_EVERY_S))

    async def _left(self) -> int:
        return sum(count for count, _ in (await self._journal.unsettled(self._runtime.now())).values())
