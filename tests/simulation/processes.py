"""Processes and machines: what dies together, and what it holds on to."""

import asyncio
import contextvars
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from metered_billing.runtime import Runtime
from tests.simulation.loop import PROCESS

if TYPE_CHECKING:
    from tests.simulation.disk import Connection
    from tests.simulation.world import World

EPOCH = 1_700_000_000.0


class Dead(Exception):
    """Code of a process that is no more tried to do something."""


class Machine:
    """A host: its wall clock, and the processes that lose their power together."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.clock_off_s = 0.0
        self.processes: list[Process] = []

    def now(self) -> float:
        return EPOCH + self.world.loop.clock_s + self.clock_off_s

    def lose_power(self) -> None:
        """Everything on it dies at once, and what was not synced to disk may be gone."""
        for process in list(self.processes):
            if process.alive:
                process.kill("power loss")
        self.world.disk.lose_power(self.name)


class Process:
    """A process: once it is dead, none of its callbacks runs again, and nothing that it holds is held."""

    def __init__(self, world: "World", name: str, machine: Machine) -> None:
        self.world = world
        self.name = name
        self.machine = machine
        self.alive = True
        self.ready = False
        self.stopping = False
        self.ended_in_chaos = False
        self.app: Any = None
        self.biller: Any = None
        self.journal: Any = None
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.connections: list[Connection] = []
        self.locks: list[Any] = []
        # What others wait for from it: they see the connection go.
        self.expected: dict[asyncio.Future[Any], None] = {}
        self.grave: list[Any] = []
        self.buried: list[asyncio.Task[Any]] = []
        self.died = asyncio.Event()
        self._fuses: list[tuple[int, Callable[[], None]]] = []
        self._steps = 0
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)
        machine.processes.append(self)
        self.runtime = Runtime(
            now=machine.now,
            monotonic=world.loop.time,
            random=world.random,
            new_id=world.new_id,
            executor=lambda: Executor(self),
            connect=lambda path: world.disk.connect(path, self),
            every=self._every,
        )

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call something as this process."""
        return self._context.copy().run(call, *args)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self.run(lambda: self.world.loop.create_task(work, name=name))  # type: ignore[no-any-return]

    def check(self) -> None:
        """Nothing of a dead process may act on the world.

        Raises:
            Dead: It is one.
        """
        if not self.alive:
            raise Dead(self.name)

    # Steps: what lies between two of them, a kill can strike.

    def steps(self) -> bool:
        """Whether it is alive to take one more step."""
        if self._fuses:
            self._steps += 1
            while self._fuses and self._fuses[0][0] <= self._steps:
                self._fuses.pop(0)[1]()
        return self.alive

    def after_steps(self, number: int, call: Callable[[], None]) -> None:
        """Let something happen to it between its next so many steps and the one after."""
        self._fuses.append((self._steps + number, call))
        self._fuses.sort(key=lambda fuse: fuse[0])

    # Its end.

    def kill(self, why: str) -> None:
        """From here on nothing that it does has any effect. Its files stay as they were."""
        if not self.alive:
            return
        self.world.note(self.name, "dies", why)
        self.world.struck(why, self)
        self._end()

    def exit(self) -> None:
        """It has come to its own end."""
        if self.alive:
            self.world.note(self.name, "exits")
            self._end()

    def _end(self) -> None:
        self.alive = self.ready = False
        self.ended_in_chaos = self.world.chaos
        self.buried = sorted((task for task in self.tasks if not task.done()), key=hash)
        while self.connections:
            self.connections.pop().abandon()
        self.machine.processes.remove(self)
        for lock in self.locks:
            lock.release()
        self.locks.clear()
        for expected in self.expected:
            if not expected.done():
                expected.set_exception(ConnectionResetError(self.name))
        self.expected.clear()
        self.world.buried(self)
        self.died.set()

    def _every(self, interval_s: float, call: Callable[[], None]) -> Callable[[], None]:
        stopped = False

        def beat() -> None:
            if not stopped:
                call()
                self.world.loop.call_later(interval_s, beat)

        def stop() -> None:
            nonlocal stopped
            stopped = True

        self.world.loop.call_later(interval_s, beat)
        return stop


class Executor:
    """The one thread of a process: runs what is submitted in order, each a little later, now and then much later."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._jobs: deque[Callable[[], Any]] = deque()
        self._open = True

    def submit(self, job: Callable[[], Any], /) -> None:
        if not self._open:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._schedule()

    def shutdown(self, wait: bool = True) -> None:
        self._open = False

    def _schedule(self) -> None:
        world = self._process.world
        world.loop.call_later(world.disk.latency_s(self._process), self._run)

    def _run(self) -> None:
        try:
            self._jobs[0]()
        except Dead:
            pass
        except Exception as error:
            self._process.world.problem(f"a job of {self._process.name}'s thread raised {error!r}")
        self._jobs.popleft()
        if self._jobs:
            self._schedule()
