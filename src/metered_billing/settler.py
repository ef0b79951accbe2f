"""Settling and recovering: what happens to a charge when no request waits for it any more.

Refunds and voids go out in tasks of our own, which nobody's cancellation reaches. What gets no answer is
written down with the time of its next attempt, and left to recovery: memory holds only what is in flight.
Recovery looks through the journal at start and every few seconds; it cannot tell, and need not, whether a
process died or a task was cancelled.
"""

import asyncio
import contextlib
import math
import threading
import weakref
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from opentelemetry.trace import Span

from metered_billing import names
from metered_billing.charge import (
    Event,
    Lost,
    Record,
    Refunded,
    State,
    Unanswered,
    Voided,
    orphaned,
    step,
)
from metered_billing.credits import Credits
from metered_billing.journal import Journal, JournalError
from metered_billing.loops import LoopTasks
from metered_billing.outage import Outage
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry, shown_items
from metered_billing.undoing import Undoing

RECOVER_EVERY_S = 10.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 300.0
MAX_RETRY_AFTER_S = 3_600.0
"""The longest that a service can put us off for, at a time: a proxy's nonsense must not lose a refund."""

PAUSE_WITHIN_S = 1.0
"""How long the end of a request waits for its journal to have nothing under way, where nothing may go on after it."""

AT_ONCE = 8
"""Refunds and voids that one round of recovery has under way at the same time."""

ROUND = 200
"""Charges that one round of recovery reads from the journal at a time: its memory is bounded by it."""

KEEP_S = 7 * 86_400.0
KEEP_AT_MOST = 100_000
"""How long, and how many, final charges stay in the journal, for people to look at."""

_LAST_EVENTS = {
    State.SETTLED: names.LOG_SETTLED,
    State.DISPUTED: names.LOG_DISPUTED,
    State.ABANDONED: names.LOG_ABANDONED,
}
"""What is logged of a charge that has become final; of the others it was before."""


class Settler:
    """Drives charges to their end, for one biller.

    Args:
        credits: Who moves the credits.
        journal: Where unsettled charges are on record.
        recover_every_s: How often the journal is looked through.
        inline: Whether there may be nothing under way between requests, as the process may be frozen there: then
            whoever serves them calls `quiesce` at the end of each, and recovery looks only while there is one.
    """

    def __init__(
        self,
        credits: Credits,  # noqa: A002 - the field's word
        journal: Journal,
        runtime: Runtime,
        telemetry: Telemetry,
        recover_every_s: float = RECOVER_EVERY_S,
        *,
        inline: bool = False,
    ) -> None:
        self._credits = credits
        self._journal = journal
        self._runtime = runtime
        self._telemetry = telemetry
        self._undoing = Undoing(credits, journal, runtime, telemetry)
        self._recover_every_s = recover_every_s
        self._inline = inline
        # Charges that somebody here is seeing to, and on which loop; recovery leaves them alone (see `_together`).
        self._live: dict[str, asyncio.AbstractEventLoop] = {}
        self._lock = threading.Lock()
        self._starting = 0
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopTasks] = weakref.WeakKeyDictionary()
        self._reported: dict[str, str] = {}
        # Of those that are being seen to, the ones of which it is said that the journal failed.
        self._complained: set[str] = set()
        self._outage = Outage(telemetry, runtime.monotonic)
        with _TOGETHER:
            _SETTLERS.add(self)

    # Starting and stopping.

    async def start(self) -> None:
        """Open the journal, and recover from now on, on this event loop. May be called again; ends `quiesce`.

        Raises:
            JournalError: The journal cannot be had.
            Exception: The credits backend cannot be had; its own kind.
        """
        loop = asyncio.get_running_loop()
        if (known := self._loops.get(loop)) is not None:
            if known.quiet:
                known.quiet = False
                self._journal.resume()
                self._look_while_here(known)
            return
        with self._lock:
            self._starting += 1
        try:
            await self._credits.start()
            await self._journal.start(self._credits.realm)
        except BaseException:
            self._started()
            await self._close()
            raise
        self._started()
        self._telemetry.start()
        if loop in self._loops:  # a concurrent first request was faster
            return
        for other in [other for other in list(self._loops) if other.is_closed()]:
            del self._loops[other]
        # What a closed loop was seeing to, nobody is.
        for settler in self._together():
            for charge_id in [charge_id for charge_id, at in list(settler._live.items()) if at.is_closed()]:
                settler._gone(charge_id)
        here = self._loops[loop] = LoopTasks(self._runtime.monotonic)
        self._journal.resume()  # it may have been put to rest on another loop, or by another app
        if self._inline:
            here.resting = True
            self._look_while_here(here)
            return
        here.recovery = loop.create_task(self._recover_for_ever(here), name="metered-billing recovery")

    @property
    def started(self) -> bool:
        """Whether it is, on this event loop, and not quiet."""
        here = self._loops.get(asyncio.get_running_loop())
        return here is not None and not here.quiet

    async def quiesce(self, within_s: float) -> None:
        """Let what settles on this event loop come to its end, then do nothing before the next `start`.

        From then on the process may be frozen. What is not done in time is broken off: it stays in the journal, and
        is taken up later, here or elsewhere. While charges of other requests are under way here, it goes on.
        """
        here = self._loops.get(asyncio.get_running_loop())
        if here is None:
            return
        late, waited = set(here.tasks), False
        here.waiting += 1
        try:
            if late:
                _, late = await asyncio.wait(late, timeout=within_s)
            waited = True
        finally:
            here.waiting -= 1
            # Whoever is told to go meanwhile breaks it off at once, unless others wait for it.
            if waited or not here.waiting:
                await self._rest(here, late)

    async def _rest(self, here: LoopTasks, late: set[asyncio.Task[None]]) -> None:
        """Break off what is late; then do nothing before the next `start`, if nothing else is under way."""
        loop = asyncio.get_running_loop()
        for task in late:
            task.cancel()
        if late:  # a journal may see to something of its own first, on a disk that hangs
            await asyncio.wait(late, timeout=PAUSE_WITHIN_S)
        if here.tasks or any(at is loop for at in list(self._live.values())):
            return
        here.quiet = True
        if not any(other._awake for other in self._together()):
            # A database that hangs is no reason to wait: what it has under way is nobody's outcome.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_WITHIN_S):
                    await self._journal.pause()
            if any(other._awake for other in self._together()):  # on another loop a request has begun meanwhile
                self._journal.resume()

    @property
    def _awake(self) -> bool:
        return any(not here.quiet for loop, here in list(self._loops.items()) if not loop.is_closed())

    async def drain(self, timeout_s: float) -> None:
        """Let requests and refunds under way come to their end, then stop, and close everything.

        What is not settled by then stays in the journal, and is settled after the next start.
        """
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            return
        here.stop()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while any(at is loop for at in list(self._live.values())):
                        await self._runtime.sleep(0.01)
        finally:
            # First of all, so that what ends now is left to the journal.
            self._loops.pop(loop, None)
            await here.end()
            await self._close()

    def _started(self) -> None:
        with self._lock:
            self._starting -= 1

    async def _close(self) -> None:
        try:
            await self._credits.aclose()
        finally:
            # Whoever is starting counts on the journal that it has just found open; so does another app that has it.
            if not any(other._uses_journal for other in self._together()):
                await self._journal.close()

    def _together(self) -> list["Settler"]:
        """All that were given the same journal: two apps of one process may have been."""
        with _TOGETHER:
            return [other for other in _SETTLERS if other._journal is self._journal]

    @property
    def _uses_journal(self) -> bool:
        return self._starting > 0 or not all(loop.is_closed() for loop in list(self._loops))

    @property
    def busy(self) -> bool:
        """Whether a refund or void is in flight on a loop that still runs."""
        return any(
            here.tasks or here.recovering or not here.resting
            for loop, here in list(self._loops.items())
            if not loop.is_closed()
        )

    # Tasks.

    def attend(self, record: Record) -> None:
        """Somebody on this loop sees to the charge from now on: recovery must leave it alone."""
        self._live[record.id] = asyncio.get_running_loop()

    def leave(self, record: Record) -> None:
        """Nobody here sees to the charge any more: recovery goes by what is on record."""
        self._gone(record.id)

    def _gone(self, charge_id: str) -> None:
        self._live.pop(charge_id, None)
        self._complained.discard(charge_id)

    def complain(
        self, record: Record, error: BaseException | None = None, *, span: Span | None = None, **fields: str
    ) -> None:
        """Say that the journal failed at a charge: once while it is seen to, however many of its writes fail."""
        if record.id in self._complained:
            return
        self._complained |= {record.id} & self._live.keys()
        if isinstance(error, JournalError):
            # A disk that is full is a line: where it stands in our code helps nobody.
            fields["reason"], error = str(error), None
        self._telemetry.log(names.LOG_JOURNAL_FAILED, record, span=span, exc_info=error, **fields)

    def spawn(self, record: Record, work: Coroutine[Any, Any, object]) -> None:
        """Run `work` in a task of our own, which nobody's cancellation reaches but the drain's."""

        def over(task: Any = None) -> None:
            work.close()  # it may have been cancelled before it began
            self._gone(record.id)
            if here is not None:
                here.tasks.discard(task)

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a request that is collected with its closed loop
            here = None
        else:
            here = self._loops.get(loop)
        if here is None:
            # Drained already, or the loop is about to close: it stays in the journal.
            over()
            return

        async def run() -> None:
            try:
                await work
            except JournalError as error:
                self.complain(record, error)
            except Exception as error:
                # A bug of ours: recovery goes by what is on record.
                self._telemetry.log(names.LOG_BUG, record, exc_info=error)

        task = loop.create_task(run(), name=f"metered-billing {record.id}")
        here.tasks.add(task)
        task.add_done_callback(over)

    # Settling, in the background.

    async def follow(self, record: Record, event: Event, *, opened: bool = True) -> None:
        """Put an event on record, then do what is due.

        Args:
            opened: Whether the charge itself has come on record: if it may not have, nobody else need have moved it.
        """
        # An outcome has to be on disk before its refund goes out; all else may be found again.
        after = step(record, event, now=self._runtime.now())
        if not await self._journal.write(record, after, durable=isinstance(event, Lost)):
            if opened:
                self._telemetry.log(names.LOG_OWNERSHIP_LOST, record)
        elif after.final:
            self.say_final(after, None)
        else:
            await self.drive(after, None)

    async def drive(self, record: Record, span: Span | None) -> Unanswered | None:
        """Do what is due until the charge is final, or has to wait: then say why.

        Each step is on record before the next; the service's keys make a repeated one the same one.
        """
        while not record.final:
            name = names.SPAN_REFUND if record.state is State.REFUNDING else names.SPAN_VOID
            with self._telemetry.operation(name, record, parent=span, linked=True) as operation:
                operation.note(names.TRIES, record.tries + 1)
                operation.note(names.REASON, record.reason or "")
                if record.refund_items:
                    operation.note(names.ITEMS, shown_items(record))
                answer = await self._undoing.ask(record)
                if isinstance(answer, Unanswered):
                    operation.failed("unanswered", answer.reason)
                    await self._postpone(record, answer)
                    return answer
                event, after = answer
                if isinstance(event, Voided):
                    operation.note(names.REFUNDED, event.refunded_credits)
                if not await self._journal.write(record, after, durable=False):
                    operation.failed("ownership_lost")
                    self._telemetry.log(names.LOG_OWNERSHIP_LOST, record)
                    return None
                if after.state is State.DISPUTED:
                    operation.failed("refused", after.reason)
                self._say_moved(after, event)
            record = after
        return None

    async def _postpone(self, record: Record, answer: Unanswered) -> None:
        """Put on record when to try again; recovery does."""
        now = self._runtime.now()
        highest_s = min(FIRST_BACKOFF_S * 2 ** min(record.tries, 16), MAX_BACKOFF_S)
        # Half of it is certain, so that a service that is down is not asked without pause.
        wait_s = highest_s * self._runtime.random.uniform(0.5, 1.0)
        wait_s = max(wait_s, min(answer.retry_after_s or 0.0, MAX_RETRY_AFTER_S))
        later = replace(
            record,
            tries=record.tries + 1,
            due_at=now + wait_s,
            declined_at=record.declined_at if answer.declined is None else now if answer.declined else None,
        )
        won = await self._journal.write(record, later, durable=False)
        self._telemetry.log(
            names.LOG_POSTPONED if won else names.LOG_OWNERSHIP_LOST,
            record,
            state=str(record.state),
            reason=answer.reason,
            tries=later.tries,
            wait_s=round(wait_s, 1),
        )
        here = self._loops.get(asyncio.get_running_loop())
        if here is not None:
            here.wake_in(wait_s)

    def _say_moved(self, after: Record, answer: Event) -> None:
        if isinstance(answer, Refunded):
            self._telemetry.moved("refunded", after.refund_credits)
            self._telemetry.log(
                names.LOG_REFUNDED,
                after,
                refunded=after.refund_credits,
                items=shown_items(after),
                reason=after.reason,
                refund_id=answer.refund_id,
            )
        elif isinstance(answer, Voided):
            self._telemetry.moved("voided", answer.refunded_credits)
        if after.state is State.VOIDED:
            refunded = answer.refunded_credits if isinstance(answer, Voided) else 0
            self._telemetry.log(names.LOG_VOIDED, after, refunded=refunded, reason=after.reason)
        if after.final:
            self.say_final(after, None)

    def say_final(self, record: Record, span: Span | None) -> None:
        event = _LAST_EVENTS.get(record.state)
        if event is not None:
            self._telemetry.log(
                event,
                record,
                span=span,
                kept=record.kept_credits,
                refunded=record.refund_credits,
                reason=record.reason,
            )

    # Recovering.

    async def recover(self) -> int:
        """Adopt what dead processes left, and drive what is due to its end. Returns how many were tried.

        Raises:
            JournalError: The journal cannot be read.
        """
        tried, _ = await self._look_through(self._runtime.now())
        return tried

    async def _look_through(self, now: float) -> tuple[int, bool]:
        await self._journal.adopt(now)
        try:
            tried, reachable = await self._recover_due(now)
        finally:
            for name, why in list(self._journal.unusable.items()):
                if self._reported.get(name) != why:
                    self._reported[name] = why
                    self._telemetry.log(names.LOG_JOURNAL_FAILED, unusable=name, reason=why)
        await self._journal.forget(now - KEEP_S, keep=KEEP_AT_MOST)
        self._telemetry.unsettled(await self._journal.unsettled(now))
        return tried, reachable

    async def _recover_due(self, now: float) -> tuple[int, bool]:
        """Drive what is due. Returns how many were tried, and whether the service could be reached."""
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop) or LoopTasks(self._runtime.monotonic)
        tried = 0
        stuck: set[str] = set()
        before: set[str] = set()
        here.recovering += 1
        try:
            while not here.stopping:
                besides = stuck.union(*[list(other._live) for other in self._together()])
                found = await self._journal.due(now, besides=besides, limit=ROUND)
                # What is due still, though it was just tried, could not even be postponed: not again in this pass.
                stuck |= before & {record.id for record in found}
                records = self._claim([record for record in found if record.id not in stuck], loop)
                if not found:
                    break
                before = {record.id for record in records}
                count, reachable = await self._recover_round(records, here)
                tried += count
                if not reachable:
                    return tried, False
            return tried, True
        finally:
            here.recovering -= 1

    def _claim(self, records: list[Record], loop: asyncio.AbstractEventLoop) -> list[Record]:
        """See to those that nobody has taken up since they were read, here or on another loop."""
        taken = [other._live for other in self._together()]
        with _TOGETHER:
            mine = [record for record in records if not any(record.id in live for live in taken)]
            self._live.update((record.id, loop) for record in mine)
        return mine

    async def _recover_round(self, records: list[Record], here: LoopTasks) -> tuple[int, bool]:
        """Recover these, a few at a time; no more as soon as the service cannot be reached."""
        waiting = iter(records)
        tried, failed, reachable = 0, 0, True

        async def worker() -> None:
            nonlocal tried, failed, reachable
            for record in waiting:
                if here.stopping or not reachable or failed >= AT_ONCE:
                    return
                tried += 1
                try:
                    answer = await self._recover_one(record)
                except Exception as error:
                    # The journal; or a bug. One record's stands in nobody's way; so many end the round.
                    failed += 1
                    self._outage.stuck(error, record)
                else:
                    reachable = reachable and (answer is None or answer.sent)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(AT_ONCE, len(records))):
                    group.create_task(worker())
        finally:
            for record in records:
                self.leave(record)
        return tried, reachable and failed < AT_ONCE

    async def _recover_one(self, record: Record) -> Unanswered | None:
        with self._telemetry.operation(names.SPAN_RECOVER, record, linked=True) as operation:
            operation.note(names.CHARGE_STATE, str(record.state))
            event = orphaned(record)
            if event is not None:
                after = step(record, event, now=self._runtime.now())
                if not await self._journal.write(record, after, durable=True):
                    operation.failed("ownership_lost")
                    self._telemetry.log(names.LOG_OWNERSHIP_LOST, record)
                    return None
                self._telemetry.log(names.LOG_RECOVERED, after, found=str(record.state), state=str(after.state))
                record = after
            answer = await self.drive(record, None)
            if answer is not None:
                operation.failed("unanswered", answer.reason)
            return answer

    def _look_while_here(self, here: LoopTasks) -> None:
        """Recover while a request is under way, now and then: for where nothing may run after it."""
        now = self._runtime.now()  # the other clock may have been frozen, too
        if abs(now - here.looked_at) < self._recover_every_s:
            return
        here.looked_at = now
        looking = asyncio.get_running_loop().create_task(self._look_once(now), name="metered-billing recovery")
        here.tasks.add(looking)
        looking.add_done_callback(here.tasks.discard)

    async def _look_once(self, now: float) -> None:
        try:
            await self._look_through(now)
            self._telemetry.recovered("ok")
            self._outage.looked()
        except Exception as error:
            self._outage.failed(error)

    async def _recover_for_ever(self, here: LoopTasks) -> None:
        looked_at = -math.inf
        outages = 0
        try:
            while not here.stopping:
                wait_s, reachable = self._recover_every_s, True
                now = self._runtime.now()
                try:
                    whole = self._runtime.monotonic() - looked_at >= self._recover_every_s
                    looked_at = self._runtime.monotonic() if whole else looked_at
                    _, reachable = await (self._look_through(now) if whole else self._recover_due(now))
                    due = await self._journal.next_due(now)
                    if due is not None:
                        wait_s = min(due - self._runtime.now(), wait_s)
                    self._telemetry.recovered("ok")
                    if whole:
                        self._outage.looked()
                except Exception as error:
                    self._outage.failed(error)
                outages = 0 if reachable else outages + 1
                # However many are due, a service that cannot be reached is asked ever more seldom.
                pause_s = min(FIRST_BACKOFF_S * 2 ** min(outages, 16), self._recover_every_s) if outages else 0.05
                await here.rest(wait_s, pause_s)
        except asyncio.CancelledError:
            # The loop is about to close, or is drained. What ends now is left to the journal, so that no task
            # of ours outlives the loop.
            self._loops.pop(asyncio.get_running_loop(), None)
            await here.end()
            raise


_SETTLERS: "weakref.WeakSet[Settler]" = weakref.WeakSet()

_TOGETHER = threading.Lock()
"""For what those of one journal, each on loops of its own, do not do at the same time."""


async def settled() -> None:
    """Return when no refund or void of this process is in flight; for tests and scripts.

    One that waits for its next attempt is not in flight.
    """
    # Asked now and then, because they may be on other event loops than this one.
    while any(settler.busy for settler in list(_SETTLERS)):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
