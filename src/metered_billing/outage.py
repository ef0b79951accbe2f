"""A recovery that fails again and again, for hours perhaps: said when it begins, and when it is over."""

from collections.abc import Callable

from metered_billing import names
from metered_billing.charge import Record
from metered_billing.journal import JournalError
from metered_billing.telemetry import Telemetry

SAID_AT_MOST = 5
"""Different errors of one outage that are logged: what stands in a text may change each time."""


class Outage:
    """What is logged of it: each error once, then how often it was tried in vain, and for how long. All are counted.

    Args:
        monotonic: The clock, in seconds.
    """

    def __init__(self, telemetry: Telemetry, monotonic: Callable[[], float]) -> None:
        self._telemetry = telemetry
        self._monotonic = monotonic
        self._since = 0.0
        self._tries = 0
        self._stuck = False
        self._said: set[str] = set()

    def failed(self, error: Exception) -> None:
        """One look at the journal failed; the next one tries again."""
        self._telemetry.recovered("failed")
        if not self._stuck:
            self._tried()
        self._stuck = False
        self._say(error, None)

    def stuck(self, error: Exception, record: Record) -> None:
        """A look goes on, without this charge, which could not be moved on: others may be."""
        if not self._stuck:
            self._tried()
        self._stuck = True
        self._say(error, record)

    def looked(self) -> None:
        """A look came to its end: all is well again, unless a charge was stuck."""
        if self._stuck or self._tries == 0:
            self._stuck = False
            return
        outage_s = round(self._monotonic() - self._since, 1)
        self._telemetry.log(names.LOG_RESUMED, tries=self._tries, outage_s=outage_s)
        self._tries = 0
        self._said.clear()

    def _tried(self) -> None:
        if self._tries == 0:
            self._since = self._monotonic()
        self._tries += 1

    def _say(self, error: Exception, record: Record | None) -> None:
        expected = isinstance(error, JournalError)
        event = names.LOG_JOURNAL_FAILED if expected else names.LOG_BUG
        why = f"recovery failed: {error if expected else type(error).__name__}"
        if why in self._said or len(self._said) >= SAID_AT_MOST:
            self._telemetry.again(event, record, reason=why)
            return
        self._said.add(why)
        # A database that is away is a line; where it stands in our code helps nobody, but for a bug.
        self._telemetry.log(event, record, exc_info=None if expected else error, reason=why)
