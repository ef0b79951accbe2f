"""Broken on purpose: what the simulation must catch.

Each variant breaks one rule of the source, as somebody who does not know why it is there might. If the
simulation does not find one, it is the simulation that is too blind.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.types import Message

from metered_billing import biller, charge, settler
from metered_billing.biller import Biller, Charge
from metered_billing.charge import (
    Declined,
    DeductAnswer,
    Deducted,
    Event,
    FindAnswer,
    NoLookup,
    NotFound,
    NotSent,
    Record,
    Refunded,
    Refused,
    Reported,
    State,
    Unanswered,
    Unknown,
    Voided,
    step,
)
from metered_billing.credits import contract, http
from metered_billing.credits.contract import Contract, Reply
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.line import Line
from metered_billing.credits.sender import Sender, Silence
from metered_billing.errors import InsufficientCredits
from metered_billing.journal import lock, sqlite
from metered_billing.journal.rows import columns_of
from metered_billing.journal.slot import Slot
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger.grouped import GroupedBooks
from metered_billing.metered import Terms
from metered_billing.middleware import Exchange
from metered_billing.settler import Settler
from metered_billing.undoing import Undoing
from tests.simulation import world
from tests.simulation.world import replaced

Patch = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Variant:
    """A way to break the source.

    Attributes:
        name: For reading.
        breaks: The rule that it breaks.
        patch: Breaks it for a while.
    """

    name: str
    breaks: str
    patch: Patch


VARIANTS: list[Variant] = []

SEEDS: dict[str, int] = json.loads(Path(__file__).with_name("variants.json").read_text())
"""The first seed that found each variant when it was last looked for: tried first. A wrong one only costs time."""


def variant(patch: Callable[[], Iterator[None]]) -> Patch:
    """Declare the function, whose docstring says which rule is broken, to be a variant."""
    manager = contextlib.contextmanager(patch)
    VARIANTS.append(Variant(patch.__name__, " ".join((patch.__doc__ or "").split()), manager))
    return manager


# The client.


@variant
def new_key_per_retry() -> Iterator[None]:
    """All attempts at a deduction go under its one key."""
    attempt = Sender._attempt

    async def broken(self: Any, call: Any, timeout_s: float, operation: str, resend: int, *args: Any) -> Any:
        if operation == "deduct" and resend:
            call = replace(call, key=f"{call.key}-{resend}")
        return await attempt(self, call, timeout_s, operation, resend, *args)

    with replaced(Sender, "_attempt", broken):
        yield


@variant
def new_refund_key_per_try() -> Iterator[None]:
    """All attempts at a refund go under its one key."""
    with replaced(Record, "refund_key", property(lambda self: f"{self.id}:refund{self.tries}")):
        yield


@variant
def read_timeout_is_not_sent() -> Iterator[None]:
    """What was sent and got no answer may have happened."""
    with _silences(lambda silence: "Timeout" in silence.reason):
        yield


@variant
def reset_is_not_sent() -> Iterator[None]:
    """A connection that breaks after the request went out leaves unknown what happened."""
    with _silences(lambda silence: silence.reason in ("ReadError", "WriteError", "RemoteProtocolError")):
        yield


@contextlib.contextmanager
def _silences(not_sent: Callable[[Any], bool]) -> Iterator[None]:
    attempt = Sender._attempt

    async def broken(self: Any, *args: Any) -> Any:
        outcome = await attempt(self, *args)
        return replace(outcome, sent=False) if not isinstance(outcome, Reply) and not_sent(outcome) else outcome

    with replaced(Sender, "_attempt", broken):
        yield


@variant
def decline_after_unknown_is_final() -> Iterator[None]:
    """A decline after an attempt that is unknown is unknown: the first copy may yet arrive."""
    after_unknown = charge.after_unknown

    def broken(answer: DeductAnswer, reason: str) -> DeductAnswer:
        return answer if isinstance(answer, Declined) else after_unknown(answer, reason)

    with replaced(http, "after_unknown", broken):
        yield


@variant
def not_sent_after_unknown_is_final() -> Iterator[None]:
    """A refused connection after an attempt that is unknown is unknown."""
    after_unknown = charge.after_unknown

    def broken(answer: DeductAnswer, reason: str) -> DeductAnswer:
        return answer if isinstance(answer, NotSent) else after_unknown(answer, reason)

    with replaced(http, "after_unknown", broken):
        yield


@variant
def abandoned_after_an_answer() -> Iterator[None]:
    """Only what failed before its connection existed can be abandoned; a 5xx may come after the commit."""
    read = HttpCredits._read

    def broken(self: Any, record: Record, outcome: Any) -> Any:
        result = read(self, record, outcome)
        if isinstance(outcome, Reply) and isinstance(result.answer, Unknown):
            return replace(result, answer=NotSent(result.answer.reason))
        return result

    with replaced(HttpCredits, "_read", broken):
        yield


@variant
def stray_404_to_a_batch_is_not_sent() -> Iterator[None]:
    """A 404 to a batch may come from a proxy, after the service has done all of it."""
    shares = HttpCredits._shares

    def broken(self: Any, outcome: Any, size: int) -> Any:
        found = shares(self, outcome, size)
        return [Silence("no batches", sent=False) if isinstance(each, http._NoBatch) else each for each in found]

    with replaced(HttpCredits, "_shares", broken):
        yield


@variant
def answers_of_a_batch_are_mixed_up() -> Iterator[None]:
    """Each operation of a batch has the answer that stands in its place."""
    read = contract.Contract.read_batch

    def broken(self: Any, reply: Any, size: int) -> Any:
        replies = read(self, reply, size)
        return replies and replies[::-1]

    with replaced(contract.Contract, "read_batch", broken):
        yield


@variant
def place_in_line_is_kept() -> Iterator[None]:
    """Whoever has made its call leaves its place in the line to the next one."""
    with replaced(Line, "leave", lambda self: None):
        yield


@variant
def decline_is_kept_for_later_requests() -> Iterator[None]:
    """A decline is for its key alone: later requests, after a top-up say, are asked for anew."""
    deduct = HttpCredits.deduct

    async def broken(self: Any, record: Record) -> DeductAnswer:
        known = self.__dict__.setdefault("declined_accounts", {})
        answer = known.get(record.account) or await deduct(self, record)
        if isinstance(answer, Declined):
            known[record.account] = answer
        return answer

    with replaced(HttpCredits, "deduct", broken):
        yield


@variant
def outage_is_answered_402() -> Iterator[None]:
    """Who is told 402 goes and pays; an outage is a 503."""
    refusal = Biller._refusal

    def broken(self: Any, record: Record, answer: Any) -> Any:
        return (
            InsufficientCredits(record.amount_credits, None)
            if isinstance(answer, NotSent)
            else refusal(self, record, answer)
        )

    with replaced(Biller, "_refusal", broken):
        yield


@variant
def stray_404_refuses_a_refund() -> Iterator[None]:
    """Only the service itself refuses for good, in its own words; a proxy's 404 passes."""
    refused = contract._refused

    def broken(reply: Reply) -> Any:
        return Refused(str(reply)) if reply.status == 404 else refused(reply)

    with replaced(contract, "_refused", broken):
        yield


@variant
def stray_402_is_a_certain_decline() -> Iterator[None]:
    """A 402 that is not in the service's words may come from a proxy, with the deduction done behind it."""
    read = Contract.read_deduction

    def broken(self: Any, record: Record, reply: Reply) -> Any:
        answer = read(self, record, reply)
        return replace(answer, certain=True) if isinstance(answer, Declined) else answer

    with replaced(Contract, "read_deduction", broken):
        yield


@variant
def any_reply_of_200_is_a_yes() -> Iterator[None]:
    """A reply that does not say what was agreed is no answer: a captive portal says 200 too."""
    read = Contract.read_deduction

    def broken(self: Any, record: Record, reply: Reply) -> Any:
        return Deducted(f"tx-{record.id}") if reply.status == 200 else read(self, record, reply)

    with replaced(Contract, "read_deduction", broken):
        yield


@variant
def forgotten_decline_is_final() -> Iterator[None]:
    """Where declines are forgotten under their key, a copy that comes after the top-up succeeds."""
    with replaced(world.Forgetful, "remembers_declines", True):
        yield


# The service.


@variant
def no_tombstone() -> Iterator[None]:
    """A void of what never came leaves a tombstone, so that it is refused when it comes."""
    mark = GroupedBooks.mark_voided

    def broken(self: Any, tenant_id: str, key: str, what: Any, at: str) -> None:
        if what.refunded:
            mark(self, tenant_id, key, what, at)

    with replaced(GroupedBooks, "mark_voided", broken):
        yield


@variant
def keys_are_forgotten() -> Iterator[None]:
    """The same key again is the same operation."""
    remember = GroupedBooks.remember

    def broken(self: Any, tenant_id: str, key: str, what: Any) -> None:
        if what.kind != "deduction" and what.kind != "deduct":
            remember(self, tenant_id, key, what)

    with replaced(GroupedBooks, "remember", broken):
        yield


# The conductor.


@variant
def refund_before_the_outcome_is_recorded() -> Iterator[None]:
    """The outcome is on record before its refund goes out."""
    conclude = Biller.conclude

    async def broken(self: Any, of: Charge, event: Event) -> None:
        if of._record is not None and of._written is None:
            after = step(of._record, event, now=self._runtime.now())
            if after.state is State.REFUNDING:
                await self._credits.refund(after)
        await conclude(self, of, event)

    with replaced(Biller, "conclude", broken):
        yield


@variant
def released_before_it_is_concluded() -> Iterator[None]:
    """The last byte goes out once the outcome is on record."""
    last = Exchange._last

    async def broken(self: Any, message: Message, of: Charge) -> None:
        sent = self._send

        async def nothing(_: Message) -> None:
            pass

        await self._out(*self._opening(of, None), message)
        self._send = nothing
        try:
            await last(self, message, of)
        finally:
            self._send = sent

    with replaced(Exchange, "_last", broken):
        yield


@variant
def route_runs_on_a_file_that_may_be_lost() -> Iterator[None]:
    """The route waits for its confirmed deduction to be on record where somebody else can have moved the charge."""
    with replaced(lock.FileLock, "removed", lambda self: False):
        yield


@variant
def route_runs_on_a_lease_that_may_be_lost() -> Iterator[None]:
    """Likewise where the journal is not held by a lock."""
    with replaced(world.WatchedJournal, "holds", SqliteJournal.holds):
        yield


@variant
def outcome_waits_for_what_was_never_put_on_record() -> Iterator[None]:
    """An outcome replaces a charge that stands on record as opened, too."""
    with replaced(sqlite, "states_of", lambda before: (str(before.state), str(before.state))):
        yield


@variant
def cancellation_overwrites_the_outcome() -> Iterator[None]:
    """An outcome on record decides, whatever becomes of the response afterwards."""
    release = Biller.release

    def broken(self: Any, of: Charge, event: Event) -> None:
        outcome = of._outcome
        struck = isinstance(event, Reported) and event.kept_credits == 0
        if outcome is not None and not of._closed and struck and outcome.kept_credits:
            lost = step(of._record, event, now=self._runtime.now())  # type: ignore[arg-type]
            of._outcome = lost
            of._written = asyncio.ensure_future(self._journal.write(outcome, lost, durable=True))
        release(self, of, event)

    with replaced(Biller, "release", broken):
        yield


@variant
def settling_is_not_shielded() -> Iterator[None]:
    """What settles a charge is not cancelled with its request."""
    spawn = Settler.spawn

    def broken(self: Any, record: Record, work: Any) -> None:
        request = asyncio.current_task()
        if request is None or not request.cancelling():
            spawn(self, record, work)
        else:
            work.close()

    with replaced(Settler, "spawn", broken):
        yield


@variant
def cancelled_deduction_is_dropped() -> Iterator[None]:
    """A deduction that is cancelled under way is unknown, and has to be voided."""
    follow = Settler.follow

    async def broken(self: Any, record: Record, event: Event) -> None:
        if isinstance(event, Unknown) and event.reason.startswith("CancelledError"):
            event = NotSent("cancelled")
        await follow(self, record, event)

    with replaced(Settler, "follow", broken):
        yield


@variant
def unknown_is_abandoned() -> Iterator[None]:
    """What is unknown has to be voided, not forgotten."""
    broken = dict(charge.TRANSITIONS) | {
        State.OPENED: dict(charge.TRANSITIONS[State.OPENED]) | {"unknown": State.ABANDONED}
    }
    with replaced(charge, "TRANSITIONS", broken):
        yield


@variant
def doubtful_decline_is_final() -> Iterator[None]:
    """A decline in doubt has to be voided."""
    broken = dict(charge.TRANSITIONS) | {
        State.OPENED: dict(charge.TRANSITIONS[State.OPENED]) | {"declined, in doubt": State.DECLINED}
    }
    with replaced(charge, "TRANSITIONS", broken):
        yield


@variant
def all_goes_back_for_one_that_failed() -> Iterator[None]:
    """Only what failed goes back."""
    changes = Reported.changes

    def broken(self: Reported, record: Record) -> dict[str, Any]:
        changed = changes(self, record)
        return changed | {"refund_credits": record.amount_credits} if changed else changed

    with replaced(Reported, "changes", broken):
        yield


@variant
def refused_refund_counts_as_settled() -> Iterator[None]:
    """A refund that is refused for good is for a person to look at."""
    broken = dict(charge.TRANSITIONS) | {
        State.REFUNDING: dict(charge.TRANSITIONS[State.REFUNDING]) | {"refused": State.SETTLED}
    }
    with replaced(charge, "TRANSITIONS", broken):
        yield


@variant
def answers_wait_for_the_disk() -> Iterator[None]:
    """A disk that hangs does not hold up a response for ever."""
    with replaced(biller, "JOURNAL_WITHIN_S", 3600.0):
        yield


@variant
def failing_journal_withholds_the_answer() -> Iterator[None]:
    """Work that is done is not withheld because the journal fails."""

    async def broken(self: Any, of: Charge, event: Event) -> None:
        self._begin_outcome(of, event)
        if of._written is not None:
            async with asyncio.timeout(5.0):
                await asyncio.shield(of._written)

    with replaced(Biller, "conclude", broken):
        yield


@variant
def somebody_else_pays() -> Iterator[None]:
    """Who pays is asked at each request."""
    priced = Terms._priced

    async def broken(self: Any, *args: Any) -> Any:
        paid, payer = await priced(self, *args)
        return paid, _PAYERS.setdefault("first_payer", payer)

    _PAYERS.clear()
    with replaced(Terms, "_priced", broken):
        yield


_PAYERS: dict[str, Any] = {}


# Recovery.


@variant
def lost_outcome_is_kept() -> Iterator[None]:
    """Where no outcome came on record, everything goes back."""

    def broken(record: Record) -> Event | None:
        if record.state is State.DEDUCTED:
            return Reported(record.amount_credits)
        return charge.orphaned(record)

    with replaced(settler, "orphaned", broken):
        yield


@variant
def opened_is_taken_for_not_sent() -> Iterator[None]:
    """An `opened` record found after a crash may have been sent in the instant before."""

    def broken(record: Record) -> Event | None:
        return NotSent("found") if record.state is State.OPENED else charge.orphaned(record)

    with replaced(settler, "orphaned", broken):
        yield


@variant
def recovery_deducts_under_a_new_key() -> Iterator[None]:
    """Where there are no voids, the very same deduction is sent again, under the very same key."""
    undo = Undoing._without_void

    async def broken(self: Any, record: Record) -> Any:
        return await undo(self, replace(record, id=f"{record.id}-again"))

    with replaced(Undoing, "_without_void", broken):
        yield


@variant
def no_void_is_taken_for_voided() -> Iterator[None]:
    """A service without voids has undone nothing."""

    async def broken(self: Any, record: Record) -> Event | Unanswered:
        return Voided()

    with replaced(Undoing, "_without_void", broken):
        yield


@variant
def decline_without_void_is_the_end() -> Iterator[None]:
    """Where there are no voids, and declines are forgotten, one looks once more when no copy can be left."""
    undo = Undoing._without_void

    async def broken(self: Any, record: Record) -> Event | Unanswered:
        answer: Event | Unanswered = await undo(self, record)
        return Voided() if isinstance(answer, Unanswered) and answer.declined else answer

    with replaced(Undoing, "_without_void", broken):
        yield


@variant
def nothing_to_look_in_is_taken_for_nothing_found() -> Iterator[None]:
    """Where there is no list to look in either, the deduction is asked for once more."""

    async def broken(self: Any, record: Record) -> FindAnswer:
        answer = await find(self, record)
        return NotFound() if isinstance(answer, NoLookup) else answer

    find = HttpCredits.find
    with replaced(HttpCredits, "find", broken):
        yield


@variant
def unanswered_refund_is_taken_as_done() -> Iterator[None]:
    """A refund is done when the service says so."""
    refund = Undoing._refund

    async def broken(self: Any, record: Record) -> Any:
        answer = await refund(self, record)
        return Refunded() if isinstance(answer, Unanswered) and record.tries else answer

    with replaced(Undoing, "_refund", broken):
        yield


@variant
def refund_is_given_up() -> Iterator[None]:
    """A refund that gets no answer is tried again, for ever."""
    postpone = Settler._postpone

    async def broken(self: Any, record: Record, answer: Unanswered) -> None:
        if record.state is not State.REFUNDING:
            await postpone(self, record, answer)
        else:
            await self._journal.write(record, replace(record, due_at=record.due_at + 10**9), durable=False)

    with replaced(Settler, "_postpone", broken):
        yield


@variant
def own_records_are_never_swept() -> Iterator[None]:
    """Recovery takes this process's own records too, whose request has ended."""
    due = SqliteJournal.due

    async def broken(self: Any, now: float, **options: Any) -> list[Record]:
        return [record for record in await due(self, now, **options) if record.owner != self.owner]

    with replaced(SqliteJournal, "due", broken):
        yield


@variant
def running_requests_are_recovered() -> Iterator[None]:
    """Recovery leaves alone what a running request sees to."""
    due = SqliteJournal.due

    async def broken(self: Any, now: float, *, besides: Any, limit: int) -> list[Record]:
        return await due(self, now, besides=frozenset(), limit=limit)

    with replaced(SqliteJournal, "due", broken), replaced(Settler, "_claim", lambda self, records, loop: records):
        yield


@variant
def dead_processes_files_are_left() -> Iterator[None]:
    """What a dead process left is adopted."""

    async def broken(self: Any, now: float) -> int:
        return 0

    with replaced(SqliteJournal, "adopt", broken):
        yield


@variant
def adoption_ignores_locks() -> Iterator[None]:
    """A file whose lock is held is a living process's."""
    take = lock.FileLock.__dict__["take"].__func__
    numbers = iter(range(10**9))

    def broken(cls: Any, path: Path) -> Any:
        return take(cls, path) or take(cls, path.with_suffix(f".lock{next(numbers)}"))

    with replaced(lock.FileLock, "take", classmethod(broken)):
        yield


# The journal.


@variant
def no_fence() -> Iterator[None]:
    """Every write is one compare-and-set on the owner and the state."""
    with _fence("id = ?1"):
        yield


@variant
def fence_on_the_owner_alone() -> Iterator[None]:
    """Every write is one compare-and-set on the state too."""
    with _fence("id = ?1 AND owner = ?2"):
        yield


@variant
def fence_on_the_outcome_alone() -> Iterator[None]:
    """Every write is one compare-and-set, also the one before the route runs."""
    with _fence("id = ?1", lambda before: before.state is State.OPENED):
        yield


@contextlib.contextmanager
def _fence(condition: str, where: Callable[[Record], bool] = lambda before: True) -> Iterator[None]:
    write = SqliteJournal.write

    def broken(self: Any, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        if not where(before):
            return write(self, before, after, durable=durable)
        slot = self._adopted.get(before.owner) or self._place()
        _, _, state, _, tries, due_at, closed_at, body = columns_of(after)

        def update(connection: Any) -> bool:
            cursor = connection.execute(
                "UPDATE charges SET state = ?3, tries = ?4, due_at = ?5, closed_at = ?6, body = ?7"
                f" WHERE {condition} AND ?1 = ?1 AND ?2 = ?2",
                (before.id, before.owner, state, tries, due_at, closed_at, body),
            )
            return bool(cursor.rowcount == 1)

        return slot.run(update, durable=durable)  # type: ignore[no-any-return]

    with replaced(SqliteJournal, "write", broken):
        yield


@variant
def opened_is_not_synced() -> Iterator[None]:
    """`opened` is synced to disk before the first send."""
    open_it, run = SqliteJournal.open, Slot.run

    def unsynced(self: Any, operation: Any, *, durable: bool, **options: Any) -> Any:
        return run(self, operation, durable=False, **options)

    def broken(self: Any, record: Record) -> Awaitable[None]:
        with replaced(Slot, "run", unsynced):
            return open_it(self, record)

    with replaced(SqliteJournal, "open", broken):
        yield


@variant
def outcome_is_not_synced() -> Iterator[None]:
    """The outcome is synced to disk before the last byte."""
    write = SqliteJournal.write

    def broken(self: Any, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        return write(self, before, after, durable=False)

    with replaced(SqliteJournal, "write", broken):
        yield


@variant
def amount_and_state_in_two_transactions() -> Iterator[None]:
    """What is to go back, and that it is to go back, are written as one."""
    write = SqliteJournal.write

    async def second(self: Any, won: Awaitable[bool], half: Record, after: Record, durable: bool) -> bool:
        return await won and await write(self, half, after, durable=durable)

    def broken(self: Any, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        if not after.refund_credits or after.state is before.state:
            return write(self, before, after, durable=durable)
        half = replace(before, state=after.state, closed_at=after.closed_at)
        return second(self, write(self, before, half, durable=durable), half, after, durable)

    with replaced(SqliteJournal, "write", broken):
        yield


@variant
def deduction_is_sent_before_it_is_on_record() -> Iterator[None]:
    """`opened` is on record before the first send."""
    open_it = SqliteJournal.open

    def broken(self: Any, record: Record) -> Awaitable[None]:
        asyncio.ensure_future(open_it(self, record)).add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )
        nothing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        nothing.set_result(None)
        return nothing

    with replaced(SqliteJournal, "open", broken):
        yield
