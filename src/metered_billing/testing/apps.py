"""The apps of a test: whatever their middleware was given, meanwhile they are billed at the kit's service.

Each middleware, also one that was built by an earlier test or by an import, gets a biller of its own for the time of
the test: a client of the kit's service, and a journal in the test's directory. What is tried again is tried again at
once, and what waits for its next attempt need not wait: the biller's clock is put forward.
"""

import asyncio
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from metered_billing.biller import Biller
from metered_billing.charge import Record
from metered_billing.credits.breaker import RetryBudget
from metered_billing.credits.http import HttpCredits
from metered_billing.journal.reading import SqliteReader, Wanted
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.middleware import MeteredBillingMiddleware
from metered_billing.runtime import Runtime
from metered_billing.settler import Settler
from metered_billing.testing.faults import Plan
from metered_billing.testing.unsynced import connect_unsynced

PASSES = 4
"""How often a refund or void is tried in vain, beyond what was to go wrong, until it counts as one that cannot be."""

QUIET_WITHIN_S = 30.0
"""What refunds and voids that are under way may take."""

REQUESTS_WITHIN_S = 1.0
"""What is waited for requests in other threads. One that a test holds up on purpose is not waited for any longer."""

ELSEWHERE_WITHIN_S = 5.0
"""What an app in another process may take for its refunds and voids. It tries again in its own time."""

NEVER = 1 << 30
"""Failures that open the circuit: a test of an app wants each of its requests to be tried."""


class _Clock:
    """The wall clock of the billers; it can be put forward."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def now(self) -> float:
        return time.time() + self._ahead_s

    def put_forward_to(self, at: float) -> None:
        self._ahead_s += max(at - self.now(), 0.0)


async def _at_once(_: float) -> None:
    await asyncio.sleep(0)


class _App:
    """One middleware's biller, for the time of a test."""

    def __init__(
        self, url: str, token: str, directory: Path, attempt_timeout_s: float, middleware: MeteredBillingMiddleware
    ) -> None:
        telemetry = middleware.telemetry
        self.directory = directory
        self._closed = False
        self.clock = _Clock()
        runtime = Runtime(now=self.clock.now, sleep=_at_once, connect=connect_unsynced)
        self.credits = HttpCredits(
            url,
            token=token,
            attempt_timeout_s=attempt_timeout_s,
            breaker_failures=NEVER,
            runtime=runtime,
            telemetry=telemetry,
        )
        # A tenth of the calls is a good share of retries where customers wait; here each is wanted.
        self.credits._budget = RetryBudget(reserve=NEVER)
        self.journal = SqliteJournal(directory, runtime=runtime, telemetry=telemetry)
        self.biller = Biller(
            self.credits, self.journal, runtime=runtime, telemetry=telemetry, inline=middleware.settle == "inline"
        )

    @property
    def settler(self) -> Settler:
        return self.biller._settler

    @property
    def busy(self) -> bool:
        """Whether a refund or a void is under way somewhere."""
        return any(
            here.tasks or here.recovering or not here.resting
            for loop, here in list(self.settler._loops.items())
            if loop.is_running()
        )

    async def settle(self, plan: Plan) -> None:
        """Bring every charge to its end, as far as it can be brought."""
        started = self.biller.started
        if not started:
            await self.biller.start()
        try:
            await self._quiet()
            in_vain = 0
            while in_vain < PASSES and await self.journal.unsettled(self.clock.now()):
                due = await self.journal.next_due(self.clock.now())
                if due is not None:
                    self.clock.put_forward_to(due)
                met = plan.met
                if await self.biller.recover():
                    in_vain += plan.met == met
                else:  # it is another's just now: of whoever settles beside us, after an answer of their own
                    in_vain += 1
                    await asyncio.sleep(0.005)
                await self._quiet()
        finally:
            if not started:
                await self.biller.drain(QUIET_WITHIN_S)

    async def _quiet(self) -> None:
        began, here = time.monotonic(), asyncio.get_running_loop()
        while self.busy:
            if time.monotonic() > began + QUIET_WITHIN_S:
                raise TimeoutError(f"refunds and voids are still under way after {QUIET_WITHIN_S:g} s")
            await asyncio.sleep(0.001)
        # A server in another thread has sent its last byte a moment before its charge is let go of.
        while self._requests_elsewhere(here) and time.monotonic() < began + REQUESTS_WITHIN_S:  # noqa: ASYNC110 - threads
            await asyncio.sleep(0.001)

    def _requests_elsewhere(self, here: asyncio.AbstractEventLoop) -> bool:
        return self.busy or any(at is not here and at.is_running() for at in list(self.settler._live.values()))

    async def aclose(self) -> None:
        """Stop it on this event loop, and close its journal."""
        await self.biller.drain(1)
        await self._close()

    def close(self) -> None:
        """Stop it wherever it runs, and close its journal."""
        if self._closed:
            return
        for loop in self.idle_loops():
            loop.run_until_complete(self.biller.drain(0))
        for loop in list(self.settler._loops):
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(self.biller.drain(1), loop).result(QUIET_WITHIN_S)
        run(self._close())

    def idle_loops(self) -> list[asyncio.AbstractEventLoop]:
        """Event loops that it is at work on, and that nobody runs at the moment."""
        return [loop for loop in list(self.settler._loops) if not loop.is_closed() and not loop.is_running()]

    async def _close(self) -> None:
        self._closed = True
        await self.journal.close()
        await self.credits.aclose()


class Apps:
    """The billers of a test.

    Args:
        directory: Where the journals are kept.
        attempt_timeout_s: What one call to the service may take.

    Attributes:
        elsewhere: The journal of apps in other processes, which their environment names.
    """

    def __init__(self, url: str, token: str, directory: Path, attempt_timeout_s: float) -> None:
        self._made = (url, token)
        self._directory = directory
        self.elsewhere = directory / "journal"
        self._attempt_timeout_s = attempt_timeout_s
        self._apps: list[_App] = []
        self._by_middleware: weakref.WeakKeyDictionary[MeteredBillingMiddleware, _App] = weakref.WeakKeyDictionary()

    @contextmanager
    def billed(self) -> Iterator[None]:
        """Every middleware of this process is billed here meanwhile."""

        def get(middleware: MeteredBillingMiddleware) -> Biller:
            return self._of(middleware).biller

        def put(middleware: MeteredBillingMiddleware, biller: Biller) -> None:
            # It is made during the test: after it, it has what it was made with.
            vars(middleware)["biller"] = biller

        if isinstance(vars(MeteredBillingMiddleware).get("biller"), property):
            raise RuntimeError(
                "one of billing, billing_service and billing_server at a time: an app has one service. Another is open:"
                " this test's, or that of a fixture with a wider scope"
            )
        with mock.patch.object(MeteredBillingMiddleware, "biller", property(get, put), create=True):
            try:
                yield
            finally:
                for app in self._apps:
                    app.close()

    @property
    def in_flight(self) -> bool:
        """Whether a request has left a refund or a void that is just on its way."""
        return any(here.tasks for app in self._apps for here in list(app.settler._loops.values()))

    def records(self, *, unsettled: bool = False) -> list[Record]:
        """The charges in all journals, oldest first."""
        directories = [self.elsewhere, *(app.directory for app in self._apps)]
        found = [record for directory in directories for record in _records(directory, unsettled=unsettled)]
        return sorted(found, key=lambda record: record.id)

    async def settle(self, plan: Plan) -> None:
        """Bring every charge to its end, as far as it can be brought.

        Args:
            plan: What is to go wrong meanwhile.
        """
        for app in self._apps:
            await app.settle(plan)
        deadline = time.monotonic() + ELSEWHERE_WITHIN_S
        while _records(self.elsewhere, unsettled=True) and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.02)

    def settle_idle(self, plan: Plan) -> None:
        """The same for what is on event loops that stand still, as an asynchronous test's does when it has ended."""
        for app in self._apps:
            for loop in app.idle_loops():
                loop.run_until_complete(app.settle(plan))

    async def aclose(self) -> None:
        """Let go of what is on this event loop."""
        for app in self._apps:
            await app.aclose()

    def _of(self, middleware: MeteredBillingMiddleware) -> _App:
        app = self._by_middleware.get(middleware)
        if app is None:
            directory = self._directory / f"journal-{len(self._apps)}"
            app = _App(*self._made, directory, self._attempt_timeout_s, middleware)
            self._by_middleware[middleware] = app
            self._apps.append(app)
        return app


def _records(directory: Path, *, unsettled: bool) -> list[Record]:
    """The charges in a journal, oldest first; none where there is none yet."""
    if not directory.is_dir():
        return []
    with SqliteReader(directory) as reader:
        return [seen.record for seen in reader.charges(Wanted(unsettled=unsettled, oldest_first=True))]


def run(work: Any) -> None:
    """Run it to its end, on an event loop that nobody else sees."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(work)
