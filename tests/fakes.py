"""A world to try the biller in: credits in memory, a journal that fails where it is told to, virtual time.

Everything happens on one thread: a `World` runs event loops whose clock jumps to the next timer when nothing
else is left to do, so that hours of backoff take no time. Credits and journal pass *points*, one before and
one after each effect; an `Accident` strikes at one of them.
"""

import asyncio
import contextlib
import gc
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from metered_billing.biller import Biller, Charge
from metered_billing.charge import (
    Account,
    AlreadyVoided,
    Declined,
    DeductAnswer,
    Deducted,
    Event,
    FindAnswer,
    Found,
    NoLookup,
    NotFound,
    NotSent,
    NoVoid,
    Record,
    RefundAnswer,
    Refunded,
    Refused,
    Reported,
    State,
    Unanswered,
    Unknown,
    Unread,
    VoidAnswer,
    Voided,
)
from metered_billing.journal import Journal, JournalError
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.outcomes import Paid
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry

T = TypeVar("T")

ANN = Account("acme", "ann")
GRANTED = 100
EPOCH = 1_700_000_000.0


class Inline:
    """An executor that does everything at once, in the caller's thread; `then` runs after each thing."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.open = True
        self._then = then

    def submit(self, fn: Callable[[], Any], /) -> None:
        if not self.open:
            raise RuntimeError("cannot schedule new futures after shutdown")
        fn()
        self._then()

    def shutdown(self, wait: bool = True) -> None:
        self.open = False


class Deadlock(Exception):
    """Nothing is left that could ever happen."""


class _Clock(selectors.DefaultSelector):
    """Instead of waiting, it lets the time pass."""

    world: "World"

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock
            self.world.time += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in a world's time."""

    def __init__(self, world: "World") -> None:
        clock = _Clock()
        clock.world = world
        self._world = world
        super().__init__(clock)
        self._clock_resolution = 1e-6
        self.set_exception_handler(lambda _, context: world.unhandled.append(context))

    def time(self) -> float:
        return self._world.time


@dataclass(frozen=True)
class Accident:
    """What happens, where, and which time that it comes by there.

    Kinds: `cancel` the request; `close` the event loop; `kill` the process; `raise` something unexpected
    (credits); `fail` and `lose` (journal: an error, or a compare-and-set that says False); `hang`.
    """

    kind: str
    where: str
    at: int = 1


@dataclass
class Fault:
    """What a call to the credits service comes to, instead of its answer.

    Args:
        answer: What is said.
        done: Whether it happens all the same.
    """

    answer: Any
    done: bool = False


LOST = Fault("silence")
UNHEARD = Fault("silence", done=True)
NOT_SENT = Fault("not sent")


@dataclass
class Bank:
    """Credits in memory, kept as the credits API says, with faults and late copies."""

    world: "World"
    remembers_declines: bool = True
    realm: str = ""
    has_voids: bool = True
    has_list: bool = True
    balance: int = GRANTED
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    back: dict[str, list[int]] = field(default_factory=dict)
    voided: set[str] = field(default_factory=set)
    declined: set[str] = field(default_factory=set)
    refunds: dict[str, int] = field(default_factory=dict)
    started: int = 0
    most_at_once: int = 0
    _under_way: int = 0

    async def start(self) -> None:
        self.started += 1

    async def aclose(self) -> None:
        self.started = 0

    async def deduct(self, record: Record) -> DeductAnswer:
        answer: DeductAnswer = await self._call(
            "deduct", record, self.take, lambda: Unknown("silence"), lambda: NotSent("no connection")
        )
        return answer

    async def refund(self, record: Record) -> RefundAnswer:
        answer: RefundAnswer = await self._call("refund", record, self._refund)
        return answer

    async def void(self, record: Record) -> VoidAnswer:
        answer: VoidAnswer = await self._call("void", record, self._void)
        return answer

    async def find(self, record: Record) -> FindAnswer:
        answer: FindAnswer = await self._call("find", record, self._find)
        return answer

    async def _call(
        self,
        name: str,
        record: Record,
        act: Callable[[Record], Any],
        silence: Callable[[], Any] = lambda: Unanswered("silence"),
        not_sent: Callable[[], Any] = lambda: Unanswered("no connection", sent=False),
    ) -> Any:
        self.calls.append((name, record.id))
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await self.world.point(f"{name}…")
            queue = self.faults.get(name)
            fault = queue.pop(0) if queue else self.always.get(name)
            answer = act(record) if fault is None or fault.done else None
            await self.world.point(f"…{name}")
            if fault is None:
                return answer
            return (
                {"silence": silence, "not sent": not_sent}[fault.answer]()
                if isinstance(fault.answer, str)
                else fault.answer
            )
        finally:
            self._under_way -= 1

    # What happens. Any copy of a deduction may arrive at any time: call `take` again.

    def take(self, record: Record) -> DeductAnswer:
        if record.id in self.taken:  # a replay is looked for before a void is
            return Deducted(f"tx-{record.id}", self.balance)
        if record.id in self.voided:
            return Unknown("charge-voided")
        if record.id in self.declined or record.amount_credits > self.balance:
            if self.remembers_declines:
                self.declined.add(record.id)
            return Declined(self.balance, forgotten=not self.remembers_declines)
        self.balance -= record.amount_credits
        self.taken[record.id] = record.amount_credits
        return Deducted(f"tx-{record.id}", self.balance)

    def _give(self, charge_id: str, amount: int) -> None:
        self.balance += amount
        self.back.setdefault(charge_id, []).append(amount)
        assert sum(self.back[charge_id]) <= self.taken[charge_id]

    def _refund(self, record: Record) -> RefundAnswer:
        if record.transaction_id != f"tx-{record.id}" or record.id not in self.taken:
            return Refused("no such transaction")
        if record.refund_key in self.refunds:
            if self.refunds[record.refund_key] != record.refund_credits:
                return Refused("idempotency-key-reused")
        elif record.id in self.voided:
            return AlreadyVoided()
        else:
            self.refunds[record.refund_key] = record.refund_credits
            self._give(record.id, record.refund_credits)
        return Refunded(f"re-{record.id}", self.balance)

    def _void(self, record: Record) -> VoidAnswer:
        if not self.has_voids:
            return NoVoid()
        left = self.taken.get(record.id, 0) - sum(self.back.get(record.id, ()))
        if left and record.id not in self.voided:
            self._give(record.id, left)
        self.voided.add(record.id)
        return Voided(left)

    def _find(self, record: Record) -> FindAnswer:
        if not self.has_list:
            return NoLookup()
        return Found(f"tx-{record.id}") if record.id in self.taken else NotFound()

    def kept(self, charge_id: str) -> int:
        return self.taken.get(charge_id, 0) - sum(self.back.get(charge_id, ()))


class Shaky:
    """A journal around another, which passes points, and remembers which outcomes came on record."""

    def __init__(self, world: "World", inner: SqliteJournal) -> None:
        self.world = world
        self.inner = inner
        self.outcomes: dict[str, Record] = {}
        self.queued: list[Record] = []

    def committed(self) -> None:
        """Remember which of the outcomes that were queued are on record now."""
        for after in [after for after in self.queued if self.world.on_record(after.id) == after.state]:
            self.queued.remove(after)
            self.outcomes.setdefault(after.id, after)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def owner(self) -> str:
        return self.inner.owner

    @property
    def unusable(self) -> Mapping[str, str]:
        return self.inner.unusable

    def open(self, record: Record) -> Awaitable[None]:
        return self._pass("open", lambda: self.inner.open(record))

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        def begin() -> Awaitable[bool]:
            written = self.inner.write(before, after, durable=durable)
            if before.state is State.DEDUCTED:
                self.queued.append(after)
                self.committed()
            return written

        written = self._pass(f"{before.state}-{after.state}", begin)
        if self.world.exclusive:
            # As SQLite's: a future, which no loop has to come back to.
            written = asyncio.ensure_future(written)
            self.world.kept.add(written)
            written.add_done_callback(self.world.kept.discard)
        return written

    def holds(self, record: Record) -> bool:
        return self.world.exclusive and self.inner.holds(record)

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        self.world.alive()
        await self.world.point("due…")
        return await self.inner.due(now, besides=besides, limit=limit)

    def _pass(self, name: str, begin: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Queue the write at once, as a journal does; then let come what comes."""
        self.world.alive()
        accident = self.world.comes_by(f"{name}…")
        if accident is not None and accident.kind in ("fail", "lose", "hang", "kill"):
            return self._unwritten(accident.kind)
        writing = asyncio.ensure_future(begin())
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._written(name, accident, writing)

    async def _written(self, name: str, accident: Accident | None, writing: "asyncio.Future[T]") -> T:
        if accident is not None:
            await self.world.strike(accident)
        result = await asyncio.shield(writing)
        after = self.world.comes_by(f"…{name}")
        if after is not None:
            if after.kind == "fail":
                raise JournalError("a lie: it is written")
            await self.world.strike(after)
        return result

    async def _unwritten(self, kind: str) -> Any:
        if kind == "fail":
            raise JournalError("disk full")
        if kind == "lose":
            return False
        if kind == "kill":
            self.world.kill()
        return await asyncio.Event().wait()


class World:
    """One machine: time, credits, a directory, and one process at a time with its biller."""

    def __init__(self, directory: Path, *, seed: int = 1) -> None:
        self.directory = directory
        self.time = 0.0
        self.unhandled: list[dict[str, Any]] = []
        self.random = Random(seed)
        self.points: Counter[str] = Counter()
        self.passed: list[str] = []
        self.accident: Accident | None = None
        self.struck = asyncio.Event()
        self.dead = False
        self.request: asyncio.Task[Any] | None = None
        self.exclusive = True  # whether the journal is, as on SQLite
        self.kept: set[Any] = set()
        self.at_once = False  # whether the route is over in the turn of the loop in which it began
        self.exporter = InMemorySpanExporter()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.metrics = InMemoryMetricReader()
        self.telemetry = Telemetry(tracers, MeterProvider([self.metrics]), clock=lambda: self.time)
        self.bank = Bank(self)
        self._ids = 0
        self.outcomes: dict[str, Record] = {}
        self.boot()

    def _new_id(self) -> str:
        self._ids += 1
        return f"id-{self._ids:06}"

    def boot(self) -> None:
        """A new process."""
        self.dead = False
        self.runtime = Runtime(
            now=lambda: EPOCH + self.time,
            monotonic=lambda: self.time,
            random=self.random,
            new_id=self._new_id,
            executor=lambda: Inline(lambda: self.journal.committed()),
        )
        self.inner = SqliteJournal(self.directory / "journal", runtime=self.runtime, telemetry=self.telemetry)
        self.journal = Shaky(self, self.inner)
        self.journal.outcomes = self.outcomes
        checked: Journal = self.journal
        self.biller = Biller(self.bank, checked, runtime=self.runtime, telemetry=self.telemetry)

    # Accidents.

    def comes_by(self, where: str) -> Accident | None:
        """The accident that is to happen now and here."""
        self.points[where] += 1
        self.passed.append(where)
        accident = self.accident
        if accident is not None and (accident.where, accident.at) == (where, self.points[where]):
            return accident
        return None

    async def point(self, where: str) -> None:
        self.alive()
        accident = self.comes_by(where)
        if accident is not None:
            await self.strike(accident)
        else:
            await asyncio.sleep(0)

    async def strike(self, accident: Accident) -> None:
        self.struck.set()
        if accident.kind == "cancel":
            if self.request is not None:
                self.request.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return
        if accident.kind == "raise":
            raise RuntimeError("a bug in a backend")
        if accident.kind == "kill":
            self.kill()
        await asyncio.Event().wait()

    def kill(self) -> None:
        """From here on nothing that this process does has any effect."""
        self.dead = True
        self.struck.set()

    def alive(self) -> None:
        if self.dead:
            raise JournalError("dead")

    def bury(self) -> None:
        """The locks of a killed process are free; its files stay as they were."""
        for slot in self.inner._slots():
            slot.lock.release()
            slot.file._disconnect()

    def on_record(self, charge_id: str) -> str | None:
        """The state that the journal has it in."""
        for slot in self.inner._slots():
            connection = slot.file._connection
            row = connection and connection.execute("SELECT state FROM charges WHERE id = ?", (charge_id,)).fetchone()
            if row:
                state: str = row[0]
                return state
        return None

    # Running.

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run it on an event loop of its own, and end that as `asyncio.run` does: cancel what is left."""
        # What there is already is spared the collection at the end, which is to find what dies unnoticed.
        gc.freeze()
        self.struck = asyncio.Event()
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(self)) as runner:
            result = runner.run(main())
        gc.collect()
        assert not self.unhandled, self.unhandled
        return result

    async def quiet(self, within_s: float = 86_400.0) -> None:
        """Let time pass until the journal has nothing left to do."""
        end = self.time + within_s
        while await self.inner.unsettled(EPOCH + self.time):
            assert self.time < end, await self.inner.unsettled(EPOCH + self.time)
            await asyncio.sleep(1.0)
        await asyncio.sleep(0.1)

    async def serve(
        self,
        units: int = 10,
        event: Event | None = None,
        *,
        route: Callable[[Charge], Awaitable[None]] | None = None,
    ) -> Charge:
        """One request, as the middleware and the decorator conduct it. By default 8 of 10 succeed."""
        event = event or Reported(units - 2, ("img-3", "img-7"))
        await self.biller.start()
        charge = await self.biller.deduct(ANN, Paid(units), request_id="req-1", metadata={"endpoint": "cut"})
        over = False
        try:
            if route is not None:
                await route(charge)
            elif not self.at_once:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            await self.biller.conclude(charge, event)
            await asyncio.sleep(0)  # the last byte
            over = True
            self.biller.release(charge, event)
        finally:
            if not over:
                self.biller.release(charge, Reported(0, (), "cancelled"))
        return charge

    # Looking.

    @property
    def live(self) -> dict[str, Any]:
        return self.biller._settler._live

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def metric(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """The points of a metric, by their attributes."""
        data = self.metrics.get_metrics_data()
        if data is None:
            return {}
        return {
            tuple(sorted((point.attributes or {}).items())): getattr(point, "value", point)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }

    def counted(self, name: str) -> dict[Any, Any]:
        """What a counter has counted, by the value of its one attribute."""
        return {attributes[0][1]: value for attributes, value in self.metric(name).items() if value}

    def holds(self, granted: int = GRANTED) -> None:
        """The promises about money, exactly."""
        kept = 0
        for charge_id, amount in self.bank.taken.items():
            back = self.bank.back.get(charge_id, [])
            on_record = self.outcomes.get(charge_id)
            due = 0 if on_record is None else on_record.kept_credits
            assert self.bank.kept(charge_id) == due, (charge_id, amount, back, on_record)
            assert len(back) <= 1
            kept += due
        assert self.bank.balance == granted - kept


@contextlib.contextmanager
def striking(world: World, accident: Accident) -> Any:
    """Let the accident happen meanwhile."""
    world.points.clear()
    world.accident = accident
    try:
        yield
    finally:
        world.accident = None


UNREAD = Unread("the reader raised")
