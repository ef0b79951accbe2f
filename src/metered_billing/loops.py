"""What the biller has on one event loop: what it waits for, what settles, and when recovery is to look again."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable
from typing import Any


class Deadlines:
    """Ends what waits for too long: one timer for all of them, because a timer for each costs more than the wait.

    What is watched all waits equally long, so that the first in the queue is always the first to be late.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: deque[tuple[float, asyncio.Future[Any], Callable[[asyncio.Future[Any]], None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(
        self, future: "asyncio.Future[Any]", within_s: float, late: "Callable[[asyncio.Future[Any]], None]"
    ) -> None:
        """Call `late` with the future, should it not be done by then."""
        watched = self._watched
        while watched and watched[0][1].done():
            watched.popleft()
        when = self._loop.time() + within_s
        watched.append((when, future, late))
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._look)

    def let_go(self) -> None:
        """Have no timer while nobody waits."""
        watched = self._watched
        while watched and watched[0][1].done():
            watched.popleft()
        if self._timer is not None and not watched:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._watched:
            when, future, late = self._watched[0]
            if not future.done():
                if when > now:
                    self._timer = self._loop.call_at(when, self._look)
                    return
                late(future)
            self._watched.popleft()


class LoopTasks:
    """The tasks that settle, and the one that recovers.

    Attributes:
        recovering: Passes of recovery under way.
        resting: Whether recovery waits, or has come to its end.
        stopping: Whether it is to take up nothing more.
        quiet: Whether nothing is to be done before the next request; only where settling is inline.
        waiting: How many requests wait at their end for what settles; only there.
        looked_at: When recovery looked last, where it looks only while there are requests; by the wall clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.recovery: asyncio.Task[None] | None = None
        self.recovering = 0
        self.resting = False
        self.stopping = False
        self.quiet = False
        self.waiting = 0
        self.looked_at = -math.inf
        self._clock = clock
        self._wake_at = math.inf
        self._woken = asyncio.Event()

    def wake_in(self, wait_s: float) -> None:
        """Let recovery look again after so many seconds, if it would not do so earlier anyway."""
        if self._clock() + wait_s < self._wake_at:
            self._wake_at = self._clock() + wait_s
            self._woken.set()

    async def rest(self, at_most_s: float, at_least_s: float) -> None:
        """Wait until recovery is to look again, or to stop."""
        earliest = self._clock() + at_least_s
        self.wake_in(at_most_s)
        self.resting = True
        while not self.stopping and (wait_s := max(self._wake_at, earliest) - self._clock()) > 0:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
        self.resting = self.stopping
        self._wake_at = math.inf

    def stop(self) -> None:
        """Let recovery come to its end, with what it has under way."""
        self.stopping = True
        self._woken.set()

    async def end(self) -> None:
        """Cancel whatever is left, and what that leaves in turn."""
        self.stopping = True
        here = asyncio.current_task()
        while left := [task for task in (*self.tasks, self.recovery) if task and task is not here and not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left)
