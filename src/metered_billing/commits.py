"""Group commit: one thread, one connection, and one transaction for whatever is waiting.

Operations are functions of the connection. Those that arrive while a commit is under way share the next
one: a sync to disk, or a round trip to a server, is nearly all the cost, whether for one operation or for
sixty. A thread of our own, because two coroutines on one connection get into each other's transactions.
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
        self._scheduled = False
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
            schedule = not self._scheduled
            self._scheduled = True
        if schedule:
            try:
                self._executor.submit(self._drain)
            except RuntimeError as error:  # the executor, or the whole interpreter, is shutting down
                self._refuse(StorageError(f"{self._name}: {error}"))

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
            try:
                if first is not None:
                    first()
                self._disconnect()
            finally:
                if then is not None:
                    then()
                tell(loop, [(closed, None, None)])

        try:
            self._executor.submit(close)
        except RuntimeError:  # no thread any more, so nothing is under way in it either
            close()
        return closed

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

    def _drain(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._scheduled = False
                    return
            self._answer(batch, self._commit(batch))

    def _refuse(self, error: StorageError) -> None:
        with self._lock:
            batch, self._waiting, self._scheduled = self._waiting, [], False
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
