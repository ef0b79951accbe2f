"""What can go wrong, and how much of it in one run.

Each seed gets a random few of the faults, each at a rate of its own ("swarm testing"): where everything
always fails a little, nothing ever comes far enough to fail in a rare way.
"""

from random import Random

NETWORK = (
    "refused",
    "no connection in time",
    "request lost",
    "request late",
    "reply lost",
    "reset after the request",
    "duplicate",
    "5xx before",
    "5xx after",
    "slow",
    "trickling reply",
    "reply cut short",
    "stray proxy before",
    "stray proxy after",
    "broken reply",
    "wrong Retry-After",
    "compressed reply",
)

DISK = (
    "disk hangs",
    "disk full",
    "disk full at commit",
    "I/O error at commit",
    "I/O error after a commit",
)

DEATHS = (
    "killed in a transaction",
    "killed before a commit",
    "killed after a commit",
    "killed between two steps",
    "killed during a call",
    "service killed during a call",
    "power loss after a commit",
    "power loss",
)

PEOPLE = (
    "client leaves",
    "cancelled",
    "stopped",
    "recovered by hand",
    "lock file removed",
    "clock jumps",
    "partition",
    "token rejected",
    "support voids",
    "support refunds",
    "refused for good",
)

KINDS = (*NETWORK, *DISK, *DEATHS, *PEOPLE)

_HIGHEST = {
    "disk hangs": 0.2,
    "disk full": 0.1,
    "disk full at commit": 0.1,
    "I/O error at commit": 0.1,
    "I/O error after a commit": 0.1,
    "killed in a transaction": 0.03,
    "killed before a commit": 0.03,
    "killed after a commit": 0.03,
    "power loss after a commit": 0.02,
    "killed during a call": 0.2,
    "service killed during a call": 0.2,
}
"""The most often that one strikes, where it is not half of the occasions."""


class Profile:
    """Which faults one run has, and how often each strikes, as a share of its occasions."""

    def __init__(self, random: Random) -> None:
        share = random.choice((0.0, 0.05, 0.15, 0.3, 0.5))
        self.rates: dict[str, float] = {}
        for kind in KINDS:
            if random.random() < share:
                self.rates[kind] = _HIGHEST.get(kind, 0.5) * random.choice((0.2, 0.5, 1.0))
        self._list()

    def dwell_on(self, random: Random, *kinds: str) -> None:
        """Have these in every other run: they are what a service of this kind is weak in."""
        if random.random() < 0.5:
            self.rates |= dict.fromkeys(kinds, random.choice((0.2, 0.5)))
            self._list()

    def drop(self, kind: str) -> None:
        self.rates.pop(kind, None)
        self._list()

    def _list(self) -> None:
        self.network = [(kind, self.rates[kind]) for kind in NETWORK if kind in self.rates]

    def of_call(self, random: Random) -> str | None:
        """What happens to one call: one thing at most."""
        if not self.network:
            return None
        kind, rate = self.network[random.randrange(len(self.network))]
        # The more kinds there are, the more calls fail; never all of them.
        return kind if random.random() < min(rate * len(self.network) ** 0.5, 0.7) else None
