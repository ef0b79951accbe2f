"""When calls are let through, when not, and what their results count for."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_billing.credits.breaker import Admitted, Breaker, Open, RetryBudget


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[str]:
    """The states that were reported."""
    return []


@pytest.fixture
def breaker(clock: Clock, changes: list[str]) -> Breaker:
    """Opens at the third failure, for 10 seconds."""
    return Breaker(3, 10.0, clock, changes.append)


def begin(breaker: Breaker) -> Admitted:
    """A call that is let through."""
    admitted = breaker.admit()
    assert isinstance(admitted, Admitted)
    return admitted


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.report(begin(breaker), failed=True)


def trip(breaker: Breaker) -> None:
    fail(breaker, 3)
    assert breaker.state == "open"


class TestOpening:
    def test_failures_in_a_row_open_it(self, breaker: Breaker, changes: list[str]) -> None:
        """The third failure in a row opens it; nothing is let through for 10 seconds."""
        fail(breaker, 2)
        assert breaker.state == "closed"
        assert breaker.remaining_s() == 0

        fail(breaker)

        assert breaker.admit() == Open(10.0)
        assert breaker.remaining_s() == 10.0
        assert changes == ["open"]

    def test_success_in_between_forgives(self, breaker: Breaker) -> None:
        """Only failures in a row count."""
        fail(breaker, 2)
        breaker.report(begin(breaker), failed=False)
        fail(breaker, 2)

        assert breaker.state == "closed"

    def test_cancelled_call_counts_neither_way(self, breaker: Breaker) -> None:
        """A call that was cancelled neither opens it nor forgives a failure."""
        for _ in range(10):
            breaker.report(begin(breaker), failed=None)
        assert breaker.state == "closed"

        fail(breaker, 2)
        breaker.report(begin(breaker), failed=None)
        fail(breaker)

        assert breaker.state == "open"

    def test_remaining_shrinks(self, breaker: Breaker, clock: Clock) -> None:
        """Whoever is turned away learns how long it still takes."""
        trip(breaker)
        clock.now += 7.5

        assert breaker.admit() == Open(2.5)

    def test_late_results_do_not_extend_it(self, breaker: Breaker, clock: Clock, changes: list[str]) -> None:
        """Calls begun before it opened say nothing about the service now, however they end."""
        late = [begin(breaker) for _ in range(10)]
        trip(breaker)
        clock.now += 6

        for admitted in late[:5]:
            breaker.report(admitted, failed=True)
        for admitted in late[5:]:
            breaker.report(admitted, failed=False)

        assert breaker.admit() == Open(4.0)
        assert changes == ["open"]


class TestProbing:
    def test_one_probe_at_a_time(self, breaker: Breaker, clock: Clock) -> None:
        """When the time is over exactly one call is let through, until it has ended."""
        trip(breaker)
        clock.now += 10

        probe = begin(breaker)

        assert probe.probe
        assert [breaker.admit() for _ in range(100)] == [Open(1.0)] * 100
        assert breaker.state == "half-open"
        assert breaker.remaining_s() == 0

    def test_probe_that_succeeds_closes_it(self, breaker: Breaker, clock: Clock, changes: list[str]) -> None:
        """The service is back: everybody is let through, and failures count from nought."""
        trip(breaker)
        clock.now += 10

        breaker.report(begin(breaker), failed=False)

        assert breaker.state == "closed"
        assert [begin(breaker).probe for _ in range(3)] == [False] * 3
        fail(breaker, 2)
        assert breaker.state == "closed"
        assert changes == ["open", "half-open", "closed"]

    def test_probe_that_fails_opens_it_anew(self, breaker: Breaker, clock: Clock) -> None:
        """One failure of the probe is enough, and the time begins again."""
        trip(breaker)
        clock.now += 12

        fail(breaker)

        assert breaker.admit() == Open(10.0)

    def test_cancelled_probe_makes_room_for_another(self, breaker: Breaker, clock: Clock) -> None:
        """A cancelled probe neither opens nor closes it: the next call is the probe."""
        trip(breaker)
        clock.now += 10

        breaker.report(begin(breaker), failed=None)

        assert breaker.state == "half-open"
        assert begin(breaker).probe

    def test_late_results_do_not_end_the_probe(self, breaker: Breaker, clock: Clock) -> None:
        """A call begun while it was closed neither closes it, nor makes room for a second probe."""
        early = [begin(breaker), begin(breaker)]
        trip(breaker)
        clock.now += 10
        begin(breaker)

        breaker.report(early[0], failed=False)
        breaker.report(early[1], failed=True)

        assert breaker.state == "half-open"
        assert breaker.admit() == Open(1.0)

    def test_results_from_before_the_outage_do_not_count_after_it(self, breaker: Breaker, clock: Clock) -> None:
        """Closed again is not closed still: old failures are not added to new ones."""
        old = [begin(breaker) for _ in range(5)]
        trip(breaker)
        clock.now += 10
        breaker.report(begin(breaker), failed=False)

        for admitted in old:
            breaker.report(admitted, failed=True)

        assert breaker.state == "closed"

    def test_nobody_need_listen(self, clock: Clock) -> None:
        """Telling somebody of the changes is optional."""
        breaker = Breaker(1, 1.0, clock)

        fail(breaker)

        assert breaker.state == "open"


@given(st.lists(st.sampled_from(["begin", "ok", "failed", "cancelled", "wait"]), max_size=60), st.randoms())
def test_no_order_of_events_shuts_the_service_out(events: list[str], random: Random) -> None:
    """Whatever happens in whatever order: when all calls have ended and the time is over, one is let through."""
    clock = Clock()
    breaker = Breaker(3, 10.0, clock)
    under_way: list[Admitted] = []
    results = {"ok": False, "failed": True, "cancelled": None}
    for event in events:
        if event == "wait":
            clock.now += 4
        elif event == "begin":
            admitted = breaker.admit()
            if isinstance(admitted, Admitted):
                under_way.append(admitted)
        elif under_way:
            breaker.report(under_way.pop(random.randrange(len(under_way))), results[event])
        assert sum(each.probe for each in under_way) <= 1
    for admitted in under_way:
        breaker.report(admitted, None)
    clock.now += 10

    assert isinstance(breaker.admit(), Admitted)


class TestRetryBudget:
    def test_reserve_is_for_a_start(self) -> None:
        """A few retries are there from the beginning, and no more without calls."""
        budget = RetryBudget(share=0.1, reserve=3)

        assert [budget.take() for _ in range(5)] == [True, True, True, False, False]

    def test_calls_earn_retries(self) -> None:
        """So many calls earn one retry."""
        budget = RetryBudget(share=0.125, reserve=1)
        assert budget.take()

        for _ in range(7):
            budget.called()
        assert not budget.take()
        budget.called()

        assert budget.take()
        assert not budget.take()

    def test_earnings_are_not_hoarded(self) -> None:
        """A quiet day does not pay for a storm: no more than the reserve is kept."""
        budget = RetryBudget(share=1, reserve=2)
        for _ in range(100):
            budget.called()

        assert [budget.take() for _ in range(3)] == [True, True, False]
