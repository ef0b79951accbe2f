"""What a settler has on one event loop: its tasks, and when its recovery is to look again."""

import asyncio
import contextlib
import math
from collections.abc import Callable


class LoopTasks:
    """The tasks that settle, and the one that recovers.

    Attributes:
        recovering: Passes of recovery under way.
        resting: Whether recovery waits, or has come to its end.
        stopping: Whether it is to take up nothing more.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.recovery: asyncio.Task[None] | None = None
        self.recovering = 0
        self.resting = False
        self.stopping = False
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
