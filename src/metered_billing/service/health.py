"""Whether the ledger answers: what a load balancer asks of each instance, every few seconds, and anybody may."""

import asyncio

from metered_billing.ledger import Ledger, LedgerError, LedgerUnavailable

TIMEOUT_S = 2.0

GOOD_FOR_S = 0.25
"""How long an answer is given again: however many ask, without a token, the ledger is read four times a second."""


class Health:
    """Asks the ledger, one question at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._asked: asyncio.Task[LedgerError | None] | None = None
        self._stale_at = 0.0

    async def check(self) -> None:
        """Return if the ledger answers, or has just now.

        Raises:
            LedgerError: It does not.
        """
        loop = asyncio.get_running_loop()
        asked = self._asked
        if asked is None or asked.get_loop() is not loop or (asked.done() and loop.time() >= self._stale_at):
            self._asked = asked = loop.create_task(self._ask())
        # Whoever asked first may leave before the others have their answer.
        error = await asyncio.shield(asked)
        if error is not None:
            raise error

    async def _ask(self) -> LedgerError | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._ledger.check()
        except TimeoutError:
            return LedgerUnavailable(f"no answer within {TIMEOUT_S} s")
        except LedgerError as error:
            return error
        finally:
            self._stale_at = asyncio.get_running_loop().time() + GOOD_FOR_S
        return None
