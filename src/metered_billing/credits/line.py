"""A line in front of the credits service: alone at once, together while others are in flight.

No timer decides when a group goes out. What is asked for in one turn of the event loop goes at its end, if a call
may be made then; else as soon as one has come back, with all that has gathered by then. So an idle service answers
without any delay, and a busy one is asked for much at a time.
"""

import asyncio
import contextvars
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from opentelemetry import context as otel_context

from metered_billing.charge import Account

ALONE: Final = object()
"""What is told to an operation that is to make its own call: it has a place in the line until `leave`."""

MAX_WEIGHT: Final = 6 << 20
"""Bytes that a group may have, roughly: the service reads 8 MiB."""


class Waiting:
    """An operation that stands in line.

    Attributes:
        asked: What is asked for; the line does not look at it.
        account: Whose it is: when not all fit, accounts take turns.
        weight: Its size in bytes, roughly.
        told: What came of it: `ALONE`, or what the group's call says.
    """

    __slots__ = ("account", "asked", "told", "until", "weight")

    def __init__(self, asked: Any, account: Account, weight: int, until: float, told: "asyncio.Future[Any]") -> None:
        self.asked = asked
        self.account = account
        self.weight = weight
        self.until = until
        self.told = told

    @property
    def alone(self) -> bool:
        """Whether it was told so, be it that nobody has heard of it yet."""
        told = self.told
        return told.done() and not told.cancelled() and told.exception() is None and told.result() is ALONE

    def tell(self, outcome: Any) -> None:
        """Say what came of it, unless nobody waits any more."""
        if not self.told.done():
            self.told.set_result(outcome)

    def fail(self, error: Exception) -> None:
        """Say what is wrong with it, unless nobody waits any more."""
        if not self.told.done():
            self.told.set_exception(error)


class Line:
    """Who waits for a call to the service, on one event loop.

    Args:
        send: Makes one call for a group, and tells each what came of it.
        late: What is told to whoever has waited too long, or is left when the line closes: nothing was sent.
        lost: What is told to whoever was in a group that ended without a word: it may have been sent.
        at_once: Calls that may be in flight together.
        group: Operations that one call may carry.
        waiting: Operations that may wait.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Waiting]], Coroutine[Any, Any, None]],
        *,
        late: object,
        lost: object,
        at_once: int,
        group: int,
        waiting: int,
    ) -> None:
        self._send = send
        self._late = late
        self._lost = lost
        self._at_once = at_once
        self._group = group
        self._most = waiting
        self._loop = asyncio.get_running_loop()
        # A group is nobody's in particular: its call must not look like a part of one request's trace.
        self._context = contextvars.copy_context()
        self._context.run(otel_context.attach, otel_context.Context())
        self._queue: list[Waiting] = []
        self._held: Counter[Account] | None = None  # how many of each stand in the queue; not known until it is crowded
        self._in_flight = 0
        self._called = False
        self._tasks: dict[asyncio.Task[None], Sequence[Waiting]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def has_room(self, account: Account) -> bool:
        """Whether one more may join. When it gets crowded, no account may take more than half of the room."""
        half = max(self._most // 2, 1)
        if len(self._queue) < half:
            return True
        if len(self._queue) >= self._most:
            return False
        if self._held is None:
            self._held = Counter(waiting.account for waiting in self._queue)
        return self._held[account] < half

    def join(self, asked: Any, account: Account, weight: int, patience_s: float) -> Waiting:
        """Stand in line; then await `told`. Cancelled before it is sent, it never is."""
        waiting = Waiting(asked, account, weight, self._loop.time() + patience_s, self._loop.create_future())
        self._queue.append(waiting)
        if self._held is not None:
            self._held[account] += 1
        if not self._called and self._in_flight < self._at_once:
            # Whoever else was woken by the same commit asks in this turn of the loop.
            self._called = True
            self._loop.call_soon(self._next)
        elif self._in_flight >= self._at_once:
            self._watch(waiting.until)
        return waiting

    def leave(self) -> None:
        """Whoever was told `ALONE` is done."""
        self._in_flight -= 1
        if not self._loop.is_closed():
            self._next()

    async def forsake(self, waiting: Waiting) -> None:
        """Whoever waited has gone: the call that it was part of is broken off, if nobody waits for that any more."""
        for task, group in list(self._tasks.items()):
            if waiting in group and all(each.told.done() for each in group):
                if not task.cancelling():  # by another of them: twice, and it could not clean up
                    task.cancel()
                await asyncio.wait({task})

    async def aclose(self) -> None:
        """Send nothing more, and break off what is in flight."""
        queue = self._queue
        self._keep([])
        for waiting in queue:
            waiting.tell(self._late)
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._called = False
        while self._queue and self._in_flight < self._at_once and (group := self._take()):
            self._in_flight += 1
            if len(group) == 1:
                group[0].tell(ALONE)
                continue
            task = self._context.copy().run(self._loop.create_task, self._send(group))
            self._tasks[task] = group
            task.add_done_callback(partial(self._over, group))
        if self._queue:
            self._watch(min(waiting.until for waiting in self._queue))
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self, group: Sequence[Waiting], task: "asyncio.Task[None]") -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        for waiting in group:
            if isinstance(error, Exception):
                waiting.fail(error)
            else:
                waiting.tell(self._lost)
        self._in_flight -= 1
        self._next()

    def _take(self) -> list[Waiting]:
        """The next group: all who wait, or as many as fit, with the accounts taking turns."""
        queue = [waiting for waiting in self._queue if not waiting.told.done()]
        if len(queue) > self._group:
            turn: Counter[Account] = Counter()
            turns: defaultdict[int, list[Waiting]] = defaultdict(list)
            for waiting in queue:
                turns[turn[waiting.account]].append(waiting)
                turn[waiting.account] += 1
            queue = [waiting for number in sorted(turns) for waiting in turns[number]]
        size = weight = 0
        for waiting in queue[: self._group]:
            weight += waiting.weight
            if size and weight > MAX_WEIGHT:
                break
            size += 1
        self._keep(queue[size:])
        return queue[:size]

    def _keep(self, queue: list[Waiting]) -> None:
        self._queue = queue
        self._held = None

    def _watch(self, until: float) -> None:
        """Look at the latest then who has waited too long."""
        if self._timer is not None:
            if self._timer.when() <= until and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(until, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        for waiting in self._queue:
            if waiting.until <= now:
                waiting.tell(self._late)
        self._keep([waiting for waiting in self._queue if not waiting.told.done()])
        if self._queue:
            self._watch(min(waiting.until for waiting in self._queue))
