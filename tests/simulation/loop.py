"""An event loop in virtual time, on which every callback belongs to a process, and dies with it.

Nothing waits: when nothing is left to do now, the clock jumps to the next timer. So hours of backoff take no
time, and the same seed gives the same run, callback by callback.
"""

import asyncio
import heapq
import itertools
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.processes import Process

PROCESS: "ContextVar[Process | None]" = ContextVar("simulated_process", default=None)
"""Whose code is running. A task, a timer and a callback carry it in their context; None is the world itself."""


class Deadlock(Exception):
    """Nothing is left that could ever happen."""


class Endless(Exception):
    """Callback follows callback without the clock moving."""


class NumberedTask(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address: a set of them is cancelled in one order."""

    number: int

    def __new__(cls, coro: Any, *, loop: "VirtualLoop", **_: Any) -> "NumberedTask":
        task = super().__new__(cls)
        task.number = next(loop.numbers)
        return task

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time is its own."""

    MOST_STEPS = 400_000

    _ready: Any
    _scheduled: Any

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.clock_s = 0.0
        self.steps = 0

    def time(self) -> float:
        return self.clock_s

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        self._check_closed()  # type: ignore[attr-defined]
        task = NumberedTask(coro, loop=self, name=None if name is None else str(name), context=context)
        process = (context.get(PROCESS) if context is not None else None) or PROCESS.get()
        if process is not None:
            process.tasks.add(task)
        return task

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready:
            if not timers:
                raise Deadlock
            self.clock_s = max(self.clock_s, timers[0]._when)
        while timers and timers[0]._when <= self.clock_s:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if process is not None and not process.steps():
                process.grave.append(handle)
                continue
            self.steps += 1
            handle._run()
        if self.steps > self.MOST_STEPS:
            raise Endless

    def _write_to_self(self) -> None:
        """There is one thread, so nobody sleeps who would have to be woken."""

    def _process_events(self, events: Any) -> None:
        """There are none: nothing here is a socket."""

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Generators of dead processes are not finished by anybody."""
