"""Group commit: one thread, one connection, and one transaction for whatever is waiting.

Operations are functions of the connection. Those that arrive while a commit is under way share the next
one: a sync to disk, or a round trip to a server, is nearly all the cost, whether for one operation or for
sixty. A commit begins when a turn of the event loop has brought nothing new: whom one commit has woken ask for
the next in the same turn or two, and handing each of them to the thread alone costs more than all they do.
A thread of our own, because two coroutines on one connection get into each other's transactions.
What a transaction is, `sqlite` and `postgres` say.
"""

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from metered_billing.runtime import Executor

C = TypeVar("C")
T = TypeVar("T")

Committed = Callable[[int, float], None]
"""Is told of a commit that was synced to disk: how many operations it carried, and how many seconds it took."""

TURNS = 2
"""Turns of the event loop that a commit waits for more, as long as each brings some; alone, none."""

MAX_WAITING = 10_000
"""Operations that may wait for the thread; beyond it, a caller is refused rather than queued without end."""


class StorageError(Exception):
    """The database could not be written or read; the operation did not happen, unless said otherwise."""


class ConnectionLost(StorageError):
    """The database cannot be reached, or not any more; nothing of the transaction happened."""


class CommitUnknown(StorageError):
    """The connection broke while it committed: whether the operation happened is unknown."""


@dataclass(slots=True)  # not frozen: there are four a charge, and those are made faster
class Waiting(Generic[C]):
    """An operation in the queue. Without a `future`, nobody is told how it went."""

    operation: Callable[[C], Any]
    durable: bool
    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | None


Outcome = tuple[Any, BaseException | None]


class GroupCommit(Generic[C]):
    """A queue of operations, and the thread that commits them in groups.

    Args:
        name: Of the database, for errors.
        executor: The one thread. All of the database happens there.
        committed: Told of each durable commit, in the thread.
        clock: For how long they take, in seconds.
    """

    def __init__(
        self,
        name: str,
        executor: Executor,
        *,
        committed: Committed | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._executor = executor
        self._committed = committed
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[Waiting[C]] = []
        # Whether the thread has been asked to see to what waits; or the loop that gathers some more before.
        self._working = False
        self._gathering: asyncio.AbstractEventLoop | None = None
        self.commits = 0

    def run(self, operation: Callable[[C], T], *, durable: bool = True) -> asyncio.Future[T]:
        """Run `operation` in the thread, in a transaction shared with whatever else is waiting.

        It is queued at once, in the order of the calls; the future only tells how it went, and cancelling
        that does not take the operation back. An operation that raises is rolled back alone. It may run
        twice (the second time after all of the first was rolled back).

        Args:
            durable: Sync to disk before the future is done. Otherwise a power loss (not a crash of the
                process) may take the operation back, but never one before it that was durable.

        Raises:
            StorageError: Too many are waiting; nothing was queued.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue(Waiting(operation, durable, loop, future))
        return future

    def post(self, operation: Callable[[C], Any], *, durable: bool = False) -> None:
        """As `run`, from any thread, for whoever does not wait to hear how it went.

        Raises:
            StorageError: Too many are waiting; nothing was queued.
        """
        self._queue(Waiting(operation, durable, None, None))

    def _queue(self, waiting: Waiting[C]) -> None:
        with self._lock:
            if len(self._waiting) >= MAX_WAITING:
                raise StorageError(f"{self._name}: {MAX_WAITING} operations are waiting already")
            self._waiting.append(waiting)
            loop, gathering = waiting.loop, self._gathering
            if self._working or (gathering is not None and gathering is loop):
                return
            # One loop does not wait for another, which may be blocked, or closed.
            self._gathering = loop if gathering is None else None
            self._working = self._gathering is None
        if loop is not None and not self._working:
            loop.call_soon(self._gather, loop, 1, 0)
        else:
            self._submit()

    def _gather(self, loop: asyncio.AbstractEventLoop, before: int, turns: int) -> None:
        """Wait for one more turn of the loop, if the last one has brought more; else let the thread work."""
        waiting = len(self._waiting)
        if waiting > before and turns < TURNS and self._gathering is loop:
            loop.call_soon(self._gather, loop, waiting, turns + 1)
        else:
            self._work_now(loop)

    def _work_now(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the thread begin, if it is still that loop which gathers."""
        with self._lock:
            if self._gathering is not loop:
                return
            self._gathering, self._working = None, True
        self._submit()

    def _submit(self) -> None:
        try:
            self._executor.submit(self._work)
        except RuntimeError as error:  # the executor, or the whole interpreter, is shutting down
            self._refuse(StorageError(f"{self._name}: {error}"))

    def idle(self) -> asyncio.Future[None]:
        """Done when all that is queued has been committed, and the thread has nothing under way.

        Raises:
            RuntimeError: There is no thread any more.
        """
        loop = asyncio.get_running_loop()
        idle: asyncio.Future[None] = loop.create_future()
        self._submit_behind(lambda: tell(loop, [(idle, None, None)]))
        return idle

    def close(
        self, *, first: Callable[[], None] | None = None, then: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        """Finish what is waiting, then close the connection. The next `run` opens it again.

        It is queued at once; cancelling the future does not take it back.

        Args:
            first: Runs in the thread while it is still open.
            then: Runs in the thread when it is closed.
        """
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()

        def close() -> None:
            # Whatever raises, the rest is done: somebody waits.
            with contextlib.ExitStack() as last:
                last.callback(tell, loop, [(closed, None, None)])
                if then is not None:
                    last.callback(then)
                last.callback(self._disconnect)
                if first is not None:
                    first()

        try:
            self._submit_behind(close)
        except RuntimeError:  # no thread any more, so nothing is under way in it either
            close()
        return closed

    def _submit_behind(self, job: Callable[[], None]) -> None:
        """Run `job` in the thread, outside any transaction, when all that waits now has been committed.

        Raises:
            RuntimeError: There is no thread any more.
        """

        def run() -> None:
            # A loop may gather it still, or be just about to let the thread begin.
            self._commit_waiting()
            job()

        self._executor.submit(run)

    def _fail(self, future: asyncio.Future[Any], error: BaseException) -> None:
        """Tell whoever waits that it failed; on their loop."""
        future.set_exception(error)

    # Below: in the thread.

    def _transaction(self, batch: list[Waiting[C]]) -> list[Outcome]:
        """Run the operations in one transaction, and commit it.

        Raises:
            ConnectionLost, CommitUnknown: See there.
            BaseException: All of it is rolled back.
        """
        raise NotImplementedError  # an engine's

    def _disconnect(self) -> None:
        """Close the connection, if there is one."""
        raise NotImplementedError  # an engine's

    def _work(self) -> None:
        while True:
            self._commit_waiting()
            with self._lock:
                loops = {waiting.loop for waiting in self._waiting}
                loop = loops.pop() if len(loops) == 1 else None
                self._gathering, self._working = loop, loop is None and bool(self._waiting)
                if not self._waiting:
                    return
            try:
                if loop is None:  # they do not wait for each other, but for what else the thread has to do
                    self._executor.submit(self._work)
                else:  # behind the answers: whoever is woken by them may want to come along
                    loop.call_soon_threadsafe(self._gather, loop, 0, 0)
                return
            except RuntimeError:  # it is closed, or the executor is shutting down: nobody else sees to them
                with self._lock:
                    if self._gathering is not loop:
                        return
                    self._gathering, self._working = None, True

    def _commit_waiting(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, []
        if batch:
            self._answer(batch, self._commit(batch))

    def _refuse(self, error: StorageError) -> None:
        with self._lock:
            batch, self._waiting, self._working = self._waiting, [], False
        self._answer(batch, [(None, error)] * len(batch))

    def _answer(self, batch: list[Waiting[C]], outcomes: list[Outcome]) -> None:
        told = defaultdict(list)
        for waiting, (result, error) in zip(batch, outcomes, strict=True):
            if waiting.loop is not None and waiting.future is not None:
                told[waiting.loop].append((waiting.future, result, error))
        for loop, answers in told.items():
            tell(loop, answers, self._fail)

    def _commit(self, batch: list[Waiting[C]]) -> list[Outcome]:
        began = self._clock()
        try:
            outcomes = self._transaction(batch)
        except (ConnectionLost, CommitUnknown) as error:
            # One by one, each would wait for the same database; or, once more could be twice.
            return [(None, error)] * len(batch)
        except BaseException as error:
            if len(batch) == 1:
                return [(None, _tellable(error))]
        else:
            self.commits += 1
            self._tell_committed(batch, began)
            return outcomes
        # One of them spoiled the transaction: each for itself, so that its neighbours go through.
        return [self._commit([waiting])[0] for waiting in batch]

    def _tell_committed(self, batch: list[Waiting[C]], began: float) -> None:
        if self._committed is not None and any(waiting.durable for waiting in batch):
            # Whoever waits for the commit must hear of it, whatever becomes of its measurement.
            with contextlib.suppress(Exception):
                self._committed(len(batch), self._clock() - began)


def _tellable(error: BaseException) -> Exception:
    """The error as a future can carry it: a StopIteration it refuses, a cancellation it would obey."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    told = StorageError(f"the operation raised {error!r}")
    told.__cause__ = error
    return told


def tell(
    loop: asyncio.AbstractEventLoop,
    answers: list[tuple[asyncio.Future[Any], Any, BaseException | None]],
    fail: Callable[[asyncio.Future[Any], BaseException], None] = asyncio.Future.set_exception,
) -> None:
    """Wake a loop once for all its answers. One that is closed has nobody left to tell."""

    def resolve() -> None:
        for future, result, error in answers:
            if future.done():  # its waiter was cancelled
                continue
            if error is None:
                future.set_result(result)
            else:
                fail(future, error)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(resolve)
