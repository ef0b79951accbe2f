"""The settler: refunds and voids that get no answer, no void, no journal or no more time."""

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from metered_billing import settler as module
from metered_billing import undoing
from metered_billing.biller import Biller, Charge
from metered_billing.charge import (
    AlreadyVoided,
    Declined,
    NotSent,
    Record,
    Refunded,
    Refused,
    Reported,
    State,
    Unanswered,
    Unknown,
)
from metered_billing.errors import BillingError
from metered_billing.journal import JournalError
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.loops import LoopTasks
from metered_billing.names import ANOMALIES, METRIC_RECOVERY_ROUNDS, SPAN_DEDUCT, SPAN_RECOVER, SPAN_REFUND, SPAN_VOID
from metered_billing.outcomes import Paid
from metered_billing.settler import settled
from tests.fakes import (
    ANN,
    EPOCH,
    GRANTED,
    LOST,
    NOT_SENT,
    UNHEARD,
    Accident,
    Bank,
    Fault,
    VirtualLoop,
    World,
    striking,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def served(world: World, *, within_s: float = 86_400.0, kept: int = 8) -> None:
    """One request of 10, of which so many succeed, and quiet after it."""

    async def main() -> None:
        with contextlib.suppress(BillingError):
            await world.serve(event=Reported(kept))
        await world.quiet(within_s)
        assert not world.live
        await world.biller.drain(1.0)

    world.run(main)


def calls(world: World) -> list[str]:
    return [name for name, _ in world.bank.calls]


def final(world: World) -> list[tuple[str, str | None]]:
    """State and reason of what is on record, read by another journal."""

    async def main() -> list[tuple[str, str | None]]:
        journal = SqliteJournal(world.directory / "journal", runtime=world.runtime)
        await journal.start()
        found = await journal._place().run(
            lambda connection: connection.execute(
                "SELECT state, json_extract(body, '$.reason') FROM charges ORDER BY id"
            ).fetchall(),
            durable=False,
        )
        await journal.close()
        return found

    return world.run(main)


def call_times(world: World, name: str) -> list[float]:
    """When calls of this kind are made, from now on."""
    times: list[float] = []
    real = getattr(world.bank, name)

    async def timed(record: Record) -> Any:
        times.append(world.time)
        return await real(record)

    setattr(world.bank, name, timed)
    return times


def due_refunds(world: World, number: int, *, state: State = State.REFUNDING) -> None:
    """So many charges of one credit that a process left behind, all of it to be refunded."""
    world.bank.balance += number

    async def main() -> None:
        await world.inner.start()
        for n in range(number):
            record = Record(
                id=f"c{n:05}", account=ANN, amount_credits=1, units=1, opened_at=EPOCH, owner=world.inner.owner,
                due_at=EPOCH, state=state, transaction_id=f"tx-c{n:05}",
                refund_credits=1 if state is State.REFUNDING else 0,
            )  # fmt: skip
            world.bank.take(record)
            await world.inner.open(record)
        await world.inner.close()

    world.run(main)


# Answers to a refund.


@pytest.mark.parametrize(
    ("kept", "answer", "state"),
    [(0, AlreadyVoided(), "voided"), (8, AlreadyVoided(), "disputed"), (8, Refused("no such thing"), "disputed")],
)
def test_refund_that_is_not_to_be_had_ends(
    world: World, kept: int, answer: Any, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it voided already is the same thing; a part of it, or a refusal, is for a person to look at."""
    caplog.set_level("INFO", logger="metered_billing")
    world.bank.faults["refund"] = [Fault(answer)]
    served(world, kept=kept)
    ((found, _),) = final(world)
    assert found == state
    assert calls(world) == ["deduct", "refund"]
    assert ("credits.voided" if state == "voided" else "charge.disputed") in caplog.text
    assert ("refunded=0" in caplog.text) == (state == "voided")  # it went back before, not by this
    (span,) = world.spans(SPAN_REFUND)
    assert (span.attributes or {}).get("error.type") == (None if state == "voided" else "refused")


def test_refund_that_is_refused_for_its_items_goes_out_without(world: World) -> None:
    """Their names are for people; the credits go back all the same, under the same key."""
    real = world.bank.refund

    async def refund(record: Record) -> Any:
        world.bank.faults["refund"] = [Fault(Refused("HTTP 413 body-too-large"))] if record.refund_items else []
        return await real(record)

    world.bank.refund = refund  # type: ignore[method-assign]

    async def main() -> None:
        await world.serve()
        await settled()
        await world.biller.drain(1.0)

    world.run(main)
    ((found, _),) = final(world)
    assert found == "settled"
    assert calls(world) == ["deduct", "refund", "refund"]


def test_void_that_is_refused_is_disputed(world: World) -> None:
    """The service understood, and said no: nothing more is sent."""
    world.bank.faults.update(deduct=[LOST], void=[Fault(Refused("no"))])
    served(world)
    assert final(world) == [("disputed", "no")]


@pytest.mark.parametrize("hours", [4, pytest.param(24, marks=[pytest.mark.slow, pytest.mark.no_cover])])
def test_unanswered_refund_is_tried_again_for_a_day(world: World, hours: int, caplog: pytest.LogCaptureFixture) -> None:
    """From a second to five minutes, jittered, without end; and then it is made, once."""
    times = call_times(world, "refund")
    world.bank.always["refund"] = UNHEARD

    async def main() -> None:
        await world.serve()
        await asyncio.sleep(hours * 3_600)
        del world.bank.always["refund"]
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    for tries, gap in enumerate(gaps):
        highest = min(2.0**tries, 300.0)
        assert highest / 2 <= gap <= highest + 0.5, (tries, gap)
    assert len(gaps) > hours * 3_600 / 300
    assert len({round(gap, 3) for gap in gaps[-50:]}) > 40
    assert "credits.postponed" in caplog.text
    assert world.bank.balance == GRANTED - 8
    world.holds()


@pytest.mark.parametrize(("asked", "least", "most"), [(77.0, 77, 78), (1e9, 3600, 3601), (float("nan"), 0.5, 1.5)])
def test_retry_after_of_a_refund_is_respected(world: World, asked: float, least: float, most: float) -> None:
    """Up to an hour at a time: a proxy's nonsense must not put a refund off for years."""
    times = call_times(world, "refund")
    world.bank.faults["refund"] = [Fault(Unanswered("busy", retry_after_s=asked))]
    served(world)
    assert least <= times[1] - times[0] <= most


def test_first_waits_are_spread_below_a_second(world: World) -> None:
    """Charges that got no answer at the same moment are not all tried again at the same moment."""
    due_refunds(world, 20)
    times = call_times(world, "refund")
    world.bank.always["refund"] = LOST

    async def main() -> list[float]:
        await world.biller.start()
        await settled()
        records = await world.inner.due(1e12, besides=(), limit=99)
        assert {record.tries for record in records} == {1}
        world.bank.always.clear()
        await world.quiet()
        await world.biller.drain(1.0)
        return [record.due_at - EPOCH for record in records]

    waits = world.run(main)
    assert len(waits) == 20
    assert 0.5 <= min(waits) < 0.7
    assert 0.8 < max(waits) < 1.1
    assert times[20:] == pytest.approx(sorted(waits), abs=0.06)  # no sooner than a moment after the last look


def test_postponed_charges_stand_on_record_and_not_in_memory(world: World) -> None:
    """Tries and due time survive; no task waits for the next attempt."""
    world.bank.always["refund"] = LOST

    async def main() -> None:
        await world.serve()
        await settled()
        assert not world.live
        (record,) = await world.inner.due(1e12, besides=(), limit=9)
        assert record.tries == 1
        assert EPOCH + world.time < record.due_at <= EPOCH + world.time + 1.1
        assert len(asyncio.all_tasks()) == 2
        await world.biller.drain(1.0)

    world.run(main)


def test_refund_without_an_answer_says_so_in_its_span(world: World) -> None:
    """Each try is a span, with its number, why it is refunded, and what became of it."""
    world.bank.faults["refund"] = [LOST]
    served(world)
    first, second = (dict(span.attributes or {}) for span in world.spans(SPAN_REFUND))
    assert (first["metered_billing.tries"], second["metered_billing.tries"]) == (1, 2)
    assert first["metered_billing.reason"] == second["metered_billing.reason"] == "failed items"
    assert (first["error.type"], second.get("error.type")) == ("unanswered", None)
    (recover,) = world.spans(SPAN_RECOVER)
    assert dict(recover.attributes or {})["metered_billing.charge.state"] == "refunding"


def test_recovery_without_an_answer_says_so_in_its_span(world: World) -> None:
    """With the state that the charge was found in, and why it is there still."""
    world.bank.faults["refund"] = [LOST, NOT_SENT]
    served(world)
    first, second = world.spans(SPAN_RECOVER)
    assert dict(first.attributes or {})["error.type"] == "unanswered"
    assert first.status.description == "no connection"
    assert dict(second.attributes or {}).get("error.type") is None


def test_refund_span_names_the_first_failed_items(world: World) -> None:
    """Twenty of them, so that no span is as long as a request."""
    items = tuple(f"img-{n}" for n in range(30))

    async def main() -> None:
        await world.serve(50, Reported(20, items))
        await world.serve(50, Reported(20, ()))
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    named, unnamed = (dict(span.attributes or {}) for span in world.spans(SPAN_REFUND))
    assert named["metered_billing.items"] == items[:20]
    assert "metered_billing.items" not in unnamed


def test_rounds_of_recovery_are_counted_by_how_they_went(world: World) -> None:
    """So that a process whose recovery has stopped, or fails each time, can be seen."""

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(25)
        assert world.counted("metered_billing.recovery.rounds") == {"ok": 3}
        world.kill()
        await asyncio.sleep(10)
        assert world.counted("metered_billing.recovery.rounds") == {"ok": 3, "failed": 1}
        world.dead = False
        await world.biller.drain(1.0)

    world.run(main)


def test_counters_begin_at_zero(world: World) -> None:
    """Whoever scrapes them sees the first increase."""

    async def main() -> None:
        await world.biller.start()
        await world.biller.drain(1.0)

    world.run(main)
    assert set(world.metric("metered_billing.credits").values()) == {0}
    assert len(world.metric("metered_billing.anomalies")) == len(ANOMALIES)


def test_void_of_what_was_taken_is_counted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """What goes back by a void is seen like what goes back by a refund."""
    caplog.set_level("INFO", logger="metered_billing")
    world.bank.faults["deduct"] = [UNHEARD]
    served(world)
    assert world.counted("metered_billing.credits") == {"voided": 10}
    (void,) = world.spans(SPAN_VOID)
    assert dict(void.attributes or {})["metered_billing.refunded"] == 10
    (told,) = [record for record in caplog.records if record.getMessage().startswith("credits.voided")]
    assert 'refunded=10 reason="silence"' in told.getMessage()


@pytest.mark.parametrize(
    ("where", "silent"),
    [("opened-voiding…", "deduct"), ("refunding-refunding…", "refund"), ("refunding-settled…", None)],
)
def test_charge_that_another_has_taken_over_is_left_to_it(
    world: World, where: str, silent: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever loses the compare-and-set says so, and that the credits moved is for the other to say."""
    caplog.set_level("INFO", logger="metered_billing")
    if silent is not None:
        world.bank.faults[silent] = [LOST]

    async def main() -> None:
        with contextlib.suppress(BillingError):
            await world.serve()
        await settled()
        events = [record.getMessage().split()[0] for record in caplog.records if record.name == "metered_billing"]
        assert events[-1] == "charge.ownership_lost"
        assert not {"credits.refunded", "credits.voided", "credits.postponed"} & set(events)
        assert not world.live
        await world.quiet()
        await world.biller.drain(1.0)

    with striking(world, Accident("lose", where)):
        world.run(main)
    if where == "refunding-settled…":
        assert dict(world.spans(SPAN_REFUND)[0].attributes or {})["error.type"] == "ownership_lost"
    world.holds()


# Where there are no voids.


def without_voids(world: World, *faults: Fault, remembers: bool) -> None:
    world.bank.has_voids = False
    world.bank.remembers_declines = remembers
    world.bank.faults["deduct"] = list(faults)


def test_without_voids_a_transaction_that_turns_up_is_refunded(world: World) -> None:
    """The same deduction under the same key tells what became of it."""
    without_voids(world, UNHEARD, remembers=False)
    served(world)
    assert calls(world) == ["deduct", "void", "deduct", "refund"]
    assert world.bank.balance == GRANTED
    assert final(world)[0][0] == "settled"


def test_without_voids_a_lost_deduction_is_made_and_refunded(world: World) -> None:
    """Sending it again may well take the credits for the first time: they go back at once."""
    without_voids(world, LOST, remembers=True)
    served(world)
    assert calls(world) == ["deduct", "void", "deduct", "refund"]
    world.holds()


def test_without_voids_a_remembered_decline_is_the_end(world: World) -> None:
    """No copy can succeed any more."""
    without_voids(world, LOST, remembers=True)
    world.bank.balance = 5
    served(world)
    assert calls(world) == ["deduct", "void", "deduct"]
    assert final(world)[0][0] == "voided"


def test_without_voids_a_service_that_asks_for_time_is_given_it(world: World) -> None:
    """A resend that is put off is made no sooner than the service asked for."""
    without_voids(world, LOST, Fault(Unknown("busy", retry_after_s=77.0)), remembers=False)
    times = call_times(world, "deduct")
    served(world)
    assert 77 <= times[2] - times[1] < 79


@pytest.mark.parametrize("arrives", [False, True])
def test_without_voids_a_forgotten_decline_is_looked_up_five_minutes_later(
    world: World, arrives: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, without sending it: a copy that arrived meanwhile is found and refunded."""
    without_voids(world, LOST, remembers=False)
    world.bank.balance = 5
    times = call_times(world, "find")

    async def main() -> None:
        with pytest.raises(BillingError):
            await world.serve()
        await settled()
        if arrives:
            world.bank.balance += 100
            world.bank.take(Record(id=world.bank.calls[0][1], account=ANN, amount_credits=10, units=10, opened_at=0))
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert 300 <= times[0] < 302
    assert caplog.text.count('reason="declined; looking again later"') == 1
    assert calls(world) == ["deduct", "void", "deduct", "void", "find", *(["refund"] if arrives else [])]
    assert world.bank.balance == (105 if arrives else 5)


def test_without_voids_a_decline_that_is_said_to_be_forgotten_is_not_the_end(world: World) -> None:
    """A mapping's reader knows it of this one, whatever it says of others: a copy may yet arrive, and does."""
    without_voids(world, LOST, Fault(Declined(5, forgotten=True)), remembers=True)

    async def main() -> None:
        with pytest.raises(BillingError):
            await world.serve()
        await settled()
        world.bank.take(Record(id=world.bank.calls[0][1], account=ANN, amount_credits=10, units=10, opened_at=0))
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert calls(world) == ["deduct", "void", "deduct", "void", "find", "refund"]
    world.holds()


@pytest.mark.parametrize("after_s", [0.0, 299.5])
def test_without_voids_a_restart_does_not_bring_the_look_up_forward(
    world: World, after_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """What is adopted is due at once, but a copy of the deduction may be under way for as long as before."""
    without_voids(world, LOST, remembers=False)
    world.bank.balance = 5
    times = call_times(world, "find")

    async def main() -> None:
        with pytest.raises(BillingError):
            await world.serve()
        await settled()
        await asyncio.sleep(after_s)
        await world.biller.drain(1.0)
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert 299.9 < times[0] < 311
    assert caplog.text.count('reason="declined; looking again later"') == 2
    assert calls(world).count("deduct") == 2


def test_without_voids_a_decline_that_is_not_the_services_own_is_not_the_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy's 402 to the resend does not tell that the deduction did not happen."""
    without_voids(world, UNHEARD, Fault(Declined(5, certain=False)), remembers=True)
    served(world)
    assert calls(world) == ["deduct", *["void", "deduct"] * 2, "refund"]
    assert 'reason="declined, in doubt"' in caplog.text
    world.holds()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Declined(5, after_unknown=True), "declined, in doubt"),
        (Unknown("timed out"), "timed out"),
        (NotSent("no connection"), "no connection"),
        (Unknown("no", misconfigured=True), "no"),
    ],
)
def test_without_voids_a_resend_in_doubt_is_sent_again(
    world: World, answer: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer that does not count is asked for again, until one does; the log says why."""
    without_voids(world, LOST, Fault(answer), Fault(answer), remembers=False)
    served(world)
    assert caplog.text.count(f'reason="{reason}"') == 2
    assert calls(world) == ["deduct", *["void", "deduct"] * 3, "refund"]
    world.holds()


class TestNothingToLookIn:
    """No voids, no list of transactions, and declines are forgotten: the deduction is asked for once more."""

    def wait(self, world: World, *resends: Any, balance: int = 5, in_between: Any = None) -> list[float]:
        """An unheard-of deduction, its resend declined; then, five minutes later, these. When each was sent."""
        without_voids(world, LOST, remembers=False)
        world.bank.has_list, world.bank.balance = False, balance
        times = call_times(world, "deduct")

        async def main() -> None:
            with pytest.raises(BillingError):
                await world.serve()
            await settled()
            world.bank.faults["deduct"] = list(resends)
            if in_between is not None:
                in_between()
            await world.quiet()
            await world.biller.drain(1.0)

        world.run(main)
        return times

    def test_declined_again_is_the_end(self, world: World) -> None:
        """Nothing was taken in five minutes without a call, so nothing is under way."""
        times = self.wait(world)
        assert calls(world) == ["deduct", "void", "deduct", "void", "find", "deduct"]
        assert 300 <= times[2] - times[1] < 302
        assert (world.bank.balance, final(world)[0][0]) == (5, "voided")

    def test_what_arrived_in_between_is_refunded(self, world: World) -> None:
        """Its transaction comes back under its key."""

        def arrives() -> None:
            world.bank.balance += 100
            world.bank.take(Record(id=world.bank.calls[0][1], account=ANN, amount_credits=10, units=10, opened_at=0))

        self.wait(world, in_between=arrives)
        assert calls(world)[-3:] == ["find", "deduct", "refund"]
        assert (world.bank.balance, final(world)[0][0]) == (105, "settled")

    @pytest.mark.parametrize(
        "answer", [Unknown("timed out"), Declined(5, after_unknown=True), Declined(5, certain=False)]
    )
    def test_doubt_begins_anew(self, world: World, answer: Any) -> None:
        """A resend without an answer of the service's own may be under way itself: five quiet minutes more."""
        times = self.wait(world, Fault(answer))
        assert times[-1] - times[2] >= 300
        assert final(world)[0][0] == "voided"

    def test_process_that_dies_in_the_resend_begins_anew(self, world: World) -> None:
        """Before it is sent, it is on record that a copy may be under way."""
        begun: list[bool] = []
        write = world.journal.write

        def watched(before: Record, after: Record, *, durable: bool) -> Any:
            if before.declined_at is not None and after.declined_at is None:
                begun.append(durable and calls(world)[-1] == "find")
            return write(before, after, durable=durable)

        world.journal.write = watched  # type: ignore[method-assign]
        self.wait(world)
        assert begun == [True]

    def test_bug_in_the_resend_begins_anew(self, world: World) -> None:
        """A backend of the user's own may have sent it before it raised: a copy may be under way."""

        def breaks() -> None:
            deduct = world.bank.deduct
            answers: list[Exception] = [RuntimeError("a bug")]

            async def broken(record: Record) -> Any:
                answer = await deduct(record)
                if answers:
                    raise answers.pop()
                return answer

            world.bank.deduct = broken  # type: ignore[method-assign]

        times = self.wait(world, in_between=breaks)
        assert times[-1] - times[2] > 300
        assert final(world)[0][0] == "voided"

    def test_charge_that_another_has_taken_is_let_go(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        """It is not sent."""
        write = world.journal.write

        async def taken() -> bool:
            return False

        def watched(before: Record, after: Record, *, durable: bool) -> Any:
            if before.declined_at is not None and after.declined_at is None and not lost:
                lost.append(after.id)
                return taken()
            return write(before, after, durable=durable)

        lost: list[str] = []
        world.journal.write = watched  # type: ignore[method-assign]
        self.wait(world)
        assert calls(world) == ["deduct", "void", "deduct", "void", "find", "void", "find", "deduct"]
        assert 'reason="somebody else has it"' in caplog.text


def test_look_up_without_an_answer_is_repeated(world: World) -> None:
    """Still without sending the deduction again."""
    without_voids(world, LOST, Fault(Declined(5, certain=False)), remembers=False)
    world.bank.faults["find"] = [LOST, LOST]
    served(world)
    assert calls(world).count("deduct") == 2
    assert calls(world).count("find") == 3


def test_without_voids_an_unreachable_service_ends_the_round_too(world: World) -> None:
    """A resend that was not sent says that nothing can be: the other charges are not tried in vain."""
    due_refunds(world, 200, state=State.VOIDING)
    world.bank.has_voids = False
    world.bank.always["deduct"] = NOT_SENT

    async def main() -> None:
        await world.biller.start()
        await settled()
        assert calls(world).count("deduct") == module.AT_ONCE
        world.bank.always.clear()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    world.holds(GRANTED + 200)


# An unreachable service.


@pytest.mark.slow
@pytest.mark.no_cover
def test_unreachable_service_is_asked_seldom_whatever_is_due(world: World) -> None:
    """2,000 refunds due: a round stops early, rounds back off, a few are under way at a time, and none is lost."""
    due_refunds(world, 2_000)
    times = call_times(world, "refund")
    world.bank.always["refund"] = NOT_SENT
    sizes: list[int] = []

    async def main() -> None:
        await world.biller.start()
        for _ in range(600):
            await asyncio.sleep(1.0)
            sizes.append(len(world.live))
        assert 0 < len(times) < 8 * 75
        assert [sum(begin <= at < begin + 1 for at in times) for begin in range(0, 600)] < [9] * 600
        world.bank.always.clear()
        while await world.inner.unsettled(0):
            await asyncio.sleep(0.5)
            sizes.append(len(world.live))
        await world.biller.drain(1.0)

    world.run(main)
    assert max(sizes) <= module.ROUND
    assert world.bank.most_at_once <= module.AT_ONCE
    assert world.bank.balance == GRANTED + 2_000
    world.holds(GRANTED + 2_000)


def test_rounds_back_off_over_full_passes_too(world: World) -> None:
    """The pauses grow up to the length of a pass, and do not begin again with each."""
    due_refunds(world, 200)
    times = call_times(world, "refund")
    world.bank.always["refund"] = NOT_SENT

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(300)
        await world.biller.drain(1.0)

    world.run(main)
    rounds = sorted({round(at, 2) for at in times})
    gaps = [after - before for before, after in itertools.pairwise(rounds)]
    assert gaps[:4] == pytest.approx([2.0, 4.0, 8.0, 10.0], abs=0.05)
    assert all(gap >= 9.5 for gap in gaps[4:]), gaps


# Recovering.


def test_recovery_leaves_running_requests_alone(world: World) -> None:
    """A route that runs for an hour keeps its charge, and settles it as it reports."""

    async def an_hour(charge: Charge) -> None:
        await asyncio.sleep(3_600)
        assert await world.biller.recover() == 0
        assert world.on_record(charge.id) == "deducted"

    async def main() -> None:
        await world.serve(route=an_hour)
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert world.bank.balance == GRANTED - 8


def test_recovery_sweeps_what_a_request_left(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The request has ended, its outcome could not be written: this very process refunds all."""
    caplog.set_level("INFO", logger="metered_billing")
    with striking(world, Accident("fail", "deducted-refunding…")):
        served(world, within_s=30)
    assert world.bank.balance == GRANTED
    assert "charge.recovered" in caplog.text


def test_two_apps_on_one_journal_leave_each_others_requests_alone(world: World) -> None:
    """Two middlewares that were given the same journal: recovery of the one voids nothing that the other is at."""

    async def main() -> None:
        await world.biller.start()
        other = Biller(world.bank, world.biller._journal, runtime=world.runtime, telemetry=world.telemetry)
        charge = await world.biller.deduct(ANN, Paid(10))
        assert await other.recover() == 0
        await world.biller.conclude(charge, Reported(10))
        world.biller.release(charge, Reported(10))
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert calls(world) == ["deduct"]
    world.holds()


def test_app_that_shuts_down_leaves_the_journal_to_another(world: World) -> None:
    """Two middlewares that were given the same journal: the first to be drained neither closes it nor waits for the
    other's requests; the last one closes it.
    """

    async def main() -> None:
        await world.biller.start()
        other = Biller(world.bank, world.biller._journal, runtime=world.runtime, telemetry=world.telemetry)
        await other.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        before = world.time
        await other.drain(5.0)
        assert world.time == before
        await world.biller.conclude(charge, Reported(10))
        world.biller.release(charge, Reported(10))
        await world.serve(5, Reported(3))
        await world.quiet()
        assert world.inner.owner
        await world.biller.drain(1.0)
        assert not world.inner.owner

    world.run(main)
    assert calls(world) == ["deduct", "deduct", "refund"]
    world.holds()


def test_recovery_on_a_loop_that_was_not_started_postpones_too(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """There is nobody to wake for the next attempt, and it stands on record all the same."""
    due_refunds(world, 1)
    world.bank.faults["refund"] = [LOST]

    async def main() -> None:
        await world.inner.start()
        assert await world.biller.recover() == 1
        assert "credits.postponed" in caplog.text
        assert "journal.failed" not in caplog.text
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    world.holds(GRANTED + 1)


def test_recovery_of_what_another_has_taken_over_ends(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, and nothing is sent for the record as it was read."""
    due_refunds(world, 1, state=State.DEDUCTED)

    async def main() -> None:
        await world.biller.start()
        await settled()
        assert "charge.ownership_lost" in caplog.text
        assert calls(world) == []
        await world.quiet()
        await world.biller.drain(1.0)

    with striking(world, Accident("lose", "deducted-refunding…")):
        world.run(main)
    first, second = (dict(span.attributes or {}) for span in world.spans(SPAN_RECOVER))
    assert (first["error.type"], second.get("error.type")) == ("ownership_lost", None)
    world.holds(GRANTED + 1)


@pytest.mark.parametrize("state", [State.OPENED, State.DEDUCTED, State.REFUNDING, State.VOIDING])
def test_recovery_drives_each_state_to_its_end(world: World, state: State) -> None:
    """Within 30 seconds of a start."""
    due_refunds(world, 3, state=state)

    async def main() -> None:
        await world.biller.start()
        await world.quiet(30)
        await world.biller.drain(1.0)

    world.run(main)
    assert world.bank.balance == GRANTED + 3
    world.holds(GRANTED + 3)
    assert len(world.spans(SPAN_RECOVER)) == 3


def test_recovery_by_another_process_is_linked_to_the_deduction(world: World) -> None:
    """The refund's span, hours and a process later, leads to the request that it is for."""
    with striking(world, Accident("kill", "refund…")):

        async def main() -> None:
            await world.serve()
            await world.struck.wait()

        world.run(main)
    world.bury()
    world.boot()
    world.time += 7_200

    async def later() -> None:
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(later)
    (deduct,) = world.spans(SPAN_DEDUCT)
    assert deduct.context is not None
    refund = world.spans(SPAN_REFUND)[-1]
    (recover,) = world.spans(SPAN_RECOVER)
    for span in (refund, recover):
        assert [link.context.trace_id for link in span.links] == [deduct.context.trace_id]
        assert [link.context.span_id for link in span.links] == [deduct.context.span_id]
    world.holds()


def test_unsettled_charges_are_measured(world: World) -> None:
    """How many, and how old the oldest is; zero when there are none any more."""
    world.bank.always["refund"] = LOST

    async def main() -> None:
        await world.serve()
        await asyncio.sleep(100)
        await world.biller.recover()
        key = (("metered_billing.charge.state", "refunding"),)
        assert world.metric("metered_billing.unsettled")[key] == 1
        assert 90 < world.metric("metered_billing.unsettled.age")[key] <= 101
        world.bank.always.clear()
        await world.quiet()
        await world.biller.recover()
        assert world.metric("metered_billing.unsettled")[key] == 0
        await world.biller.drain(1.0)

    world.run(main)


def test_unusable_file_is_told_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Not every ten seconds; and the requests go on."""
    (world.directory / "journal").mkdir()
    (world.directory / "journal" / "charges-0.db").write_bytes(b"a letter" * 100)

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(100)
        await world.serve()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert caplog.text.count("not a database") == 1
    world.holds()


@pytest.mark.parametrize("answer", [Refunded("r1"), None, "nonsense"])
def test_backend_that_answers_nonsense_stands_in_nobodys_way(
    world: World, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The charge is put off, and tried again; the others are settled meanwhile, and somebody is told."""
    due_refunds(world, 20, state=State.VOIDING)
    real = world.bank.void

    async def void(record: Record) -> Any:
        return answer if record.id == "c00000" else await real(record)

    world.bank.void = void  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(20)
        assert await world.inner.unsettled(0) == {"voiding": (1, 0.0)}
        world.bank.void = real  # type: ignore[method-assign]
        await world.quiet(30)
        await world.biller.drain(1.0)

    world.run(main)
    world.holds(GRANTED + 20)
    error = "ImpossibleEvent" if isinstance(answer, Refunded) else "AttributeError"
    assert f'reason="{error} in the credits backend"' in caplog.text
    assert "billing.bug" in caplog.text
    assert "journal.failed" not in caplog.text


@pytest.mark.parametrize("kind", ["lose", "fail", "bug"])
@pytest.mark.parametrize("state", [State.OPENED, State.REFUNDING])
def test_record_that_cannot_be_written_stands_in_nobodys_way(world: World, kind: str, state: State) -> None:
    """It is not tried again and again in one pass; all others are settled."""
    due_refunds(world, 300, state=state)
    real = world.journal.write
    tried: list[float] = []

    def write(before: Record, after: Record, *, durable: bool) -> Any:
        async def refuse() -> bool:
            if kind == "lose":
                return False
            raise JournalError("disk full") if kind == "fail" else ZeroDivisionError

        if before.id == "c00000":
            tried.append(world.time)
            return refuse()
        return real(before, after, durable=durable)

    world.journal.write = write  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(60)
        assert await world.inner.unsettled(EPOCH) == {str(state): (1, 0.0)}
        assert len(tried) < 20
        world.journal.write = real  # type: ignore[method-assign]
        await world.quiet(30)
        await world.biller.drain(1.0)

    world.run(main)
    world.holds(GRANTED + 300)


@pytest.mark.parametrize(
    ("error", "event"), [(JournalError("input/output error"), "journal.failed"), (ZeroDivisionError(), "billing.bug")]
)
def test_journal_that_cannot_be_read_is_loud_and_tried_again(
    world: World, error: Exception, event: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery outlives it, is not taken to be under way afterwards, and calls only a bug a bug."""
    due_refunds(world, 1)

    async def due(*_: Any, **__: Any) -> Any:
        raise error

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "due", due)
            await world.biller.start()
            await asyncio.sleep(30)
            with pytest.raises(type(error)):
                await world.biller.recover()
        await world.quiet(30)
        await settled()
        await world.biller.drain(1.0)

    world.run(main)
    events = caplog.text.count("journal.failed") + caplog.text.count("billing.bug")
    assert caplog.text.count("recovery failed") == caplog.text.count(event) == events == 1
    assert "recovery.resumed" in caplog.text


def test_recovery_has_not_resumed_before_all_can_be_looked_through(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between it looks for what is due alone, which may well be readable."""
    due_refunds(world, 1)

    def fails(_: float) -> Any:
        raise JournalError("input/output error")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "adopt", fails)
            await world.biller.start()
            await asyncio.sleep(1)
            (here,) = world.biller._settler._loops.values()
            here.wake_in(0)
            await asyncio.sleep(5)
            assert world.counted(METRIC_RECOVERY_ROUNDS) == {"failed": 1, "ok": 1}
            assert "recovery.resumed" not in caplog.text
        await asyncio.sleep(30)
        assert "recovery.resumed" in caplog.text
        await world.biller.drain(1.0)

    world.run(main)


def test_unusable_file_is_told_where_nothing_can_be_read(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may well be the cause."""
    (world.directory / "journal").mkdir()
    (world.directory / "journal" / "charges-0.db").write_bytes(b"a letter" * 100)

    async def due(*_: Any, **__: Any) -> Any:
        raise JournalError("input/output error")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "due", due)
            await world.biller.start()
            await settled()
            assert "not a database" in caplog.text
        await world.biller.drain(1.0)

    world.run(main)


def test_wall_clock_that_stands_still_or_jumps_loses_nothing(world: World) -> None:
    """Due times are wall time: what falls due between two looks is seen by the next."""
    world.bank.faults["refund"] = [LOST] * 3
    jumps = iter([0.0, 0.0, 3600.0, -3600.0] * 50)
    clock = world.runtime.now
    object.__setattr__(world.runtime, "now", lambda: clock() + next(jumps, 0.0))
    served(world, within_s=3 * 3600)
    world.holds()


def test_figures_of_recovery_are_the_documented_ones() -> None:
    """What the documentation says of waits and of what is kept; nobody changes the one without the other."""
    assert module.RECOVER_EVERY_S == 10.0
    assert (module.FIRST_BACKOFF_S, module.MAX_BACKOFF_S, module.MAX_RETRY_AFTER_S) == (1.0, 300.0, 3_600.0)
    assert (module.AT_ONCE, module.ROUND, undoing.LOOK_AGAIN_AFTER_S) == (8, 200, 300.0)
    assert (module.KEEP_S, module.KEEP_AT_MOST) == (604_800.0, 100_000)


def adoptions(world: World) -> list[float]:
    """When the whole journal is looked through, from now on."""
    times: list[float] = []
    real = world.inner.adopt

    async def adopt(now: float) -> int:
        times.append(now - EPOCH)
        return await real(now)

    world.inner.adopt = adopt  # type: ignore[method-assign]
    return times


def test_journal_is_looked_through_every_ten_seconds(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """As long as nothing is due, that is all, and nothing goes wrong with it."""
    times = adoptions(world)

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(101)
        await world.biller.drain(1.0)

    world.run(main)
    assert times == pytest.approx([10.0 * n for n in range(11)], abs=0.01)
    assert caplog.text == ""


def test_refund_that_is_tried_every_few_seconds_neither_hurries_nor_hinders_the_look_through(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is due is asked for when it is due; the whole journal only after its ten seconds."""
    monkeypatch.setattr(module, "MAX_BACKOFF_S", 3.0)
    due_refunds(world, 1)
    times = adoptions(world)
    world.bank.always["refund"] = Fault(Unanswered("busy", retry_after_s=3.0))

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(100)
        world.bank.always.clear()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(gaps) >= 7
    assert all(10.0 <= gap < 13.5 for gap in gaps), gaps


def test_one_pass_tries_each_charge_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that cannot be written, and is still due after each round of the pass; that is told."""
    monkeypatch.setattr(module, "ROUND", 10)
    due_refunds(world, 35)
    real = world.journal.write

    def write(before: Record, after: Record, *, durable: bool) -> Any:
        async def refuse() -> bool:
            raise JournalError("disk full")

        return refuse() if before.id == "c00000" else real(before, after, durable=durable)

    async def main() -> None:
        await world.inner.start()
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "write", write, raising=False)
            assert await world.biller.recover() == 35
        (told,) = [record.getMessage() for record in caplog.records if record.name == "metered_billing"]
        assert told.startswith("journal.failed")
        assert "c00000" in told
        assert calls(world) == ["refund"] * 35
        assert await world.biller.recover() == 1
        await world.inner.close()

    world.run(main)
    world.holds(GRANTED + 35)


def test_two_passes_at_once_try_each_charge_once(world: World) -> None:
    """Both read the same charges as due; who is second to take one up leaves it to the first."""
    due_refunds(world, 20)

    async def main() -> None:
        await world.biller.start()
        tried = await asyncio.gather(world.biller.recover(), world.biller.recover())
        assert sum(tried) <= 20
        await settled()
        assert calls(world) == ["refund"] * 20
        await world.biller.drain(1.0)

    world.run(main)
    world.holds(GRANTED + 20)


@pytest.mark.parametrize(("at_once", "failing", "least", "most"), [(1, 99, 1, 1), (8, 99, 8, 15), (8, 7, 99, 99)])
def test_pass_ends_when_as_many_cannot_be_written_as_are_tried_at_once(
    world: World, at_once: int, failing: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that takes nothing is not asked for every charge; fewer stand in nobody's way."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    monkeypatch.setattr(module, "ROUND", 50)
    due_refunds(world, 99)
    real = world.journal.write
    refused = {f"c{n:05}" for n in range(failing)}

    def write(before: Record, after: Record, *, durable: bool) -> Any:
        async def refuse() -> bool:
            raise JournalError("disk full")

        return refuse() if before.id in refused else real(before, after, durable=durable)

    async def main() -> None:
        await world.inner.start()
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "write", write, raising=False)
            assert least <= await world.biller.recover() <= most
        await world.biller.recover()
        assert await world.inner.unsettled(EPOCH) == {}
        await world.inner.close()

    world.run(main)
    world.holds(GRANTED + 99)


def test_one_refund_that_cannot_be_sent_ends_the_pass_though_others_are_answered(world: World) -> None:
    """An answer that comes in after it does not make the service reachable again."""
    due_refunds(world, 200)
    world.bank.faults["refund"] = [NOT_SENT]

    async def main() -> None:
        await world.inner.start()
        assert module.AT_ONCE <= await world.biller.recover() <= 2 * module.AT_ONCE
        await world.inner.close()

    world.run(main)


def test_outcome_that_recovery_decides_is_synced_before_its_refund(world: World) -> None:
    """A power loss must not bring back a charge whose refund is out as one that is to be refunded otherwise."""
    due_refunds(world, 1, state=State.DEDUCTED)
    written: list[tuple[str, bool]] = []
    real = world.inner.write

    def write(before: Record, after: Record, *, durable: bool) -> Any:
        written.append((f"{before.state}-{after.state}", durable))
        return real(before, after, durable=durable)

    world.inner.write = write  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert written == [("deducted-refunding", True), ("refunding-settled", False)]


@pytest.mark.parametrize(("most", "days", "left"), [(9, 6.9, 3), (9, 7.1, 0), (2, 0.0, 2)])
def test_final_charges_are_forgotten_after_a_week_or_beyond_a_number(
    world: World, most: int, days: float, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then people can look at them."""
    monkeypatch.setattr(module, "KEEP_AT_MOST", most)
    due_refunds(world, 3)

    async def main() -> None:
        await world.inner.start()
        assert await world.biller.recover() == 3
        world.time += days * 86_400
        await world.biller.recover()
        await world.inner.close()

    world.run(main)
    assert len(final(world)) == left


# Starting, draining, starting again.


def test_drain_waits_for_requests_and_their_refunds(world: World) -> None:
    """What ends in time is settled; recovery takes up nothing new meanwhile."""

    async def three_seconds(charge: Charge) -> None:
        await asyncio.sleep(3)

    async def main() -> None:
        request = asyncio.create_task(world.serve(route=three_seconds))
        await asyncio.sleep(1.5)
        await world.biller.drain(5.0)
        assert 3 <= world.time < 3.1
        assert request.done()
        assert world.bank.balance == GRANTED - 8
        assert world.bank.started == 0
        with pytest.raises(JournalError, match="closed"):
            world.inner.open(Record(id="x", account=ANN, amount_credits=1, units=1, opened_at=1))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await world.biller.drain(5.0)

    world.run(main)


@pytest.mark.parametrize("also", ["nothing", "a refund that has not begun"])
def test_drain_that_runs_out_of_time_leaves_the_rest_to_the_next_start(world: World, also: str) -> None:
    """It cancels what is under way, a task that has not begun too, and the next start refunds."""

    async def main() -> None:
        with striking(world, Accident("hang", "refund…")):
            charge = await world.serve()
            await world.struck.wait()
            assert f"metered-billing {charge.id}" in {task.get_name() for task in asyncio.all_tasks()}
            began = world.time
            if also != "nothing":
                charge = await world.biller.deduct(ANN, Paid(10))
                asyncio.get_running_loop().call_later(2.0 - 1e-7, world.biller.release, charge, Reported(8))
            await world.biller.drain(2.0)
            assert 1.9 < world.time - began < 2.1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not world.live
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    world.holds()


def test_drain_lets_a_round_of_recovery_finish_what_it_has_begun(world: World) -> None:
    """And not the two hundred others."""
    due_refunds(world, 200)
    real = world.bank.refund

    async def slow(record: Record) -> Any:
        await asyncio.sleep(1)
        return await real(record)

    world.bank.refund = slow  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await asyncio.sleep(0.5)
        await world.biller.drain(5.0)
        assert world.time < 2
        assert len(world.bank.refunds) == module.AT_ONCE

    world.run(main)


def test_drain_that_is_cancelled_closes_all_the_same(world: World) -> None:
    """A second Ctrl-C: nothing is left running, and the lock is free."""

    async def main() -> None:
        await world.biller.start()
        await world.biller.deduct(ANN, Paid(10))
        drain = asyncio.create_task(world.biller.drain(100.0))
        await asyncio.sleep(1)
        drain.cancel()
        await asyncio.wait({drain})
        assert drain.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert world.inner.owner == ""

    world.run(main)


def test_drain_that_runs_out_of_time_lets_go_of_what_recovery_sees_to(world: World) -> None:
    """The next start of this very process refunds it."""
    due_refunds(world, 3)

    async def main() -> None:
        with striking(world, Accident("hang", "refund…")):
            await world.biller.start()
            await world.struck.wait()
            await world.biller.drain(2.0)
        assert not world.live
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await world.biller.start()
        await world.quiet(60)
        await world.biller.drain(1.0)

    world.run(main)
    world.holds(GRANTED + 3)


def test_credits_that_cannot_be_closed_do_not_keep_the_journal_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is free all the same, and the error is told."""

    async def aclose() -> None:
        raise OSError("not today")

    async def main() -> None:
        await world.biller.start()
        with monkeypatch.context() as patch:
            patch.setattr(world.bank, "aclose", aclose)
            with pytest.raises(OSError, match="not today"):
                await world.biller.drain(1.0)
        assert world.inner.owner == ""

    world.run(main)


def test_start_tells_the_journal_whose_credits_it_is_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that charges against one service are never refunded at another."""
    world.bank.realm = "https://credits.example"
    realms: list[str] = []
    real = world.inner.start

    async def start(realm: str) -> None:
        realms.append(realm)
        await real(realm)

    monkeypatch.setattr(world.inner, "start", start)

    async def main() -> None:
        await world.biller.start()
        await world.biller.drain(1.0)

    world.run(main)
    assert realms == ["https://credits.example"]


def test_two_drains_at_once_are_one(world: World) -> None:
    """A lifespan and a test that both close."""

    async def main() -> None:
        await world.serve()
        await asyncio.gather(world.biller.drain(1.0), world.biller.drain(1.0))
        assert world.bank.balance == GRANTED - 8

    world.run(main)


def test_start_again_starts_nothing_again(world: World) -> None:
    """Each request starts the biller, and the first alone does anything."""

    async def main() -> None:
        await world.biller.start()
        await world.biller.start()
        assert world.bank.started == 1
        await world.biller.drain(1.0)

    world.run(main)


def test_second_loop_leaves_alone_what_the_first_sees_to(world: World) -> None:
    """A loop that stands still for now is not closed: its request is nobody else's, and its refund goes out."""
    first, second = VirtualLoop(world), VirtualLoop(world)

    async def begin() -> Charge:
        await world.biller.start()
        return await world.biller.deduct(ANN, Paid(10))

    async def meanwhile() -> None:
        await world.biller.start()
        assert await world.biller.recover() == 0
        await world.biller.drain(1.0)

    async def end(charge: Charge) -> None:
        await world.biller.conclude(charge, Reported(8))
        world.biller.release(charge, Reported(8))
        await settled()
        assert calls(world) == ["deduct", "refund"]
        await world.biller.drain(1.0)

    charge = first.run_until_complete(begin())
    second.run_until_complete(meanwhile())
    first.run_until_complete(end(charge))
    first.close()
    second.close()
    assert world.bank.balance == GRANTED - 8
    world.holds()


def test_concurrent_first_requests_start_once(world: World) -> None:
    """One recovery, however many came first."""

    async def main() -> None:
        await asyncio.gather(*(world.serve(units=3) for _ in range(10)))
        await settled()
        assert [task.get_name() for task in asyncio.all_tasks()].count("metered-billing recovery") == 1
        await world.biller.drain(1.0)

    world.run(main)
    world.holds()


@pytest.mark.parametrize("culprit", ["bank", "journal"])
def test_start_that_fails_holds_nothing_and_can_be_repeated(
    world: World, culprit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the credits nor the journal's lock."""

    async def fail(*_: str) -> None:
        raise OSError("not today")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(getattr(world, culprit), "start", fail, raising=False)
            with pytest.raises(OSError, match="not today"):
                await world.biller.start()
        assert (world.bank.started, world.inner.owner) == (0, "")
        await world.serve()
        await world.quiet()
        await world.biller.drain(1.0)
        assert (world.bank.started, world.inner.owner) == (0, "")

    world.run(main)
    world.holds()


def test_start_that_fails_does_not_close_what_another_has_started(world: World) -> None:
    """Of two first requests at once one fails: the other is served, and so are those after it."""
    real = world.journal.inner.start
    starts = 0

    async def start(realm: str) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            await asyncio.sleep(1.0)
            raise OSError("not today")
        await real(realm)
        await asyncio.sleep(2.0)  # open already, and about to go on

    world.journal.start = start  # type: ignore[attr-defined]

    async def main() -> None:
        failed, served = await asyncio.gather(world.serve(), world.serve(), return_exceptions=True)
        assert isinstance(failed, OSError)
        assert isinstance(served, Charge)
        await world.serve()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert world.bank.balance == GRANTED - 16


def test_outcome_of_a_request_that_was_cancelled_is_synced_before_its_refund(world: World) -> None:
    """A power loss must not undo the record of a refund that is out; the other steps may be repeated."""
    written: list[tuple[str, bool]] = []
    real = world.inner.write

    def write(before: Record, after: Record, *, durable: bool) -> Any:
        written.append((f"{before.state}-{after.state}", durable))
        return real(before, after, durable=durable)

    world.inner.write = write  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        world.request = asyncio.create_task(world.serve())
        await asyncio.wait({world.request})
        assert world.request.cancelled()
        await world.quiet()
        await world.biller.drain(1.0)

    with striking(world, Accident("cancel", "…opened-deducted")):
        world.run(main)
    assert written == [("opened-deducted", False), ("deducted-refunding", True), ("refunding-settled", False)]


def test_next_loop_takes_up_what_a_closed_one_left(world: World) -> None:
    """What a test client without `with` does: a loop for each request, closed at once after it."""

    async def main() -> None:
        await world.serve()

    for _ in range(3):
        world.run(main)

    async def last() -> None:
        await world.biller.start()
        await settled()
        assert await world.inner.unsettled(0) == {}
        await world.biller.drain(1.0)

    world.run(last)
    assert world.bank.balance == GRANTED - 24
    world.holds()


@pytest.mark.parametrize("cleans_up_s", [0.0, 0.5])
def test_loop_that_ends_with_a_request_under_way_leaves_its_refund_to_the_next(
    world: World, cleans_up_s: float
) -> None:
    """What `asyncio.run` cancels at its end starts a refund; no task of it is left on the closed loop."""
    loops: list[asyncio.AbstractEventLoop] = []
    left: set[asyncio.Task[Any]] = set()

    async def for_ever(charge: Charge) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(cleans_up_s)

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        request = asyncio.create_task(world.serve(route=for_ever))
        await asyncio.sleep(1)
        left.update(asyncio.all_tasks() - {asyncio.current_task()})
        assert request in left

    with striking(world, Accident("hang", "refund…")):
        world.run(main)
    assert [task.cancelled() for task in left] == [True, True]  # the request and recovery
    assert asyncio.all_tasks(loops[0]) == set()

    async def later() -> None:
        await world.biller.start()
        await world.quiet()
        assert not world.live
        await world.biller.drain(1.0)

    world.run(later)
    assert world.bank.balance == GRANTED
    world.holds()


def test_loop_that_is_closed_without_a_word_is_taken_over(world: World) -> None:
    """Its tasks never learn of it; what it was seeing to is swept by the next loop, and memory forgets it."""
    closed: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        await world.biller.start()
        await world.biller.deduct(ANN, Paid(10))
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        left = world.biller._settler._loops[asyncio.get_running_loop()] = LoopTasks(lambda: 0.0)
        left.recovery = asyncio.create_task(asyncio.sleep(0))
        await left.recovery
        closed.append(weakref.ref(asyncio.get_running_loop()))

    world.run(main)
    assert len(world.live) == 1
    assert not world.biller._settler.busy

    async def later() -> None:
        await world.biller.start()
        gc.collect()
        assert closed[0]() is None
        await world.quiet()
        assert not world.live
        await world.biller.drain(1.0)

    world.run(later)
    assert world.bank.balance == GRANTED


@pytest.mark.slow
def test_two_loops_in_two_threads_serve_at_once(tmp_path: Path) -> None:
    """Each with its own recovery, on one journal; the credits add up."""
    bank = Bank(World(tmp_path / "unused"), balance=1_000)
    biller = Biller(bank, SqliteJournal(tmp_path / "journal"), recover_every_s=0.05)
    errors: list[BaseException] = []

    async def requests() -> None:
        await biller.start()
        for _ in range(10):
            charge = await biller.deduct(ANN, Paid(10))
            await biller.conclude(charge, Reported(7))
            biller.release(charge, Reported(7))
            await asyncio.sleep(0.01)
        await settled()
        await biller.drain(5.0)

    def thread() -> None:
        try:
            asyncio.run(requests())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert errors == []
    assert bank.balance == 1_000 - 3 * 10 * 7


def test_pass_that_ends_leaves_another_under_way_counted(world: World) -> None:
    """Two passes by hand: as long as one of them has a refund in flight, the settler is busy."""
    real = world.bank.refund

    async def slow(record: Record) -> Any:
        await asyncio.sleep(3)
        return await real(record)

    world.bank.refund = slow  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await settled()
        record = Record(
            id="c1", account=ANN, amount_credits=1, units=1, opened_at=EPOCH, owner=world.inner.owner, due_at=EPOCH,
            state=State.REFUNDING, transaction_id="tx-c1", refund_credits=1,
        )  # fmt: skip
        world.bank.take(record)
        await world.inner.open(record)
        first = asyncio.create_task(world.biller.recover())
        await asyncio.sleep(1)
        assert await world.biller.recover() == 0  # the first is seeing to it
        busy = [world.biller._settler.busy]
        assert await first == 1
        busy.append(world.biller._settler.busy)
        assert busy == [True, False]
        await world.biller.drain(1.0)

    world.run(main)


def test_settled_waits_for_what_is_in_flight_and_for_nothing_else(world: World) -> None:
    """A refund that waits for its next attempt does not count; a recovery that has not looked yet does."""
    times: list[float] = []

    async def main() -> None:
        await settled()
        world.bank.faults["refund"] = [LOST]
        await world.serve()
        assert world.biller._settler.busy
        await settled()
        times.append(world.time)
        assert calls(world) == ["deduct", "refund"]
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert times[0] < 0.5


def test_settled_waits_for_a_pass_that_somebody_asked_for(world: World) -> None:
    """Its refunds are in flight like any others, though recovery itself rests."""
    real = world.bank.refund

    async def slow(record: Record) -> Any:
        await asyncio.sleep(1)
        return await real(record)

    world.bank.refund = slow  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await settled()
        world.bank.balance += 1
        record = Record(
            id="c00000", account=ANN, amount_credits=1, units=1, opened_at=EPOCH, owner=world.inner.owner,
            due_at=EPOCH, state=State.REFUNDING, transaction_id="tx-c00000", refund_credits=1,
        )  # fmt: skip
        world.bank.take(record)
        await world.inner.open(record)
        asked = asyncio.create_task(world.biller.recover())
        await asyncio.sleep(0.1)
        await settled()
        assert calls(world) == ["refund"]
        assert await asked == 1
        await world.biller.drain(1.0)

    world.run(main)


def test_settled_waits_for_a_refund_of_a_request(world: World) -> None:
    """Though recovery rests meanwhile."""
    real = world.bank.refund

    async def slow(record: Record) -> Any:
        await asyncio.sleep(1)
        return await real(record)

    world.bank.refund = slow  # type: ignore[method-assign]

    async def main() -> None:
        await world.biller.start()
        await settled()
        await world.serve()
        await settled()
        assert calls(world) == ["deduct", "refund"]
        await world.biller.drain(1.0)

    world.run(main)


def test_journal_that_fails_in_the_background_is_no_bug(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is told as what it is, with the charge that it is about."""
    with striking(world, Accident("fail", "refunding-settled…")):
        served(world)
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("journal.failed")]
    assert world.bank.calls[0][1] in told
    assert "billing.bug" not in caplog.text
    world.holds()


def test_recovery_without_a_start_says_so(world: World) -> None:
    """There is no journal to look through; with one, what is due is tried, once."""
    due_refunds(world, 1)
    world.bank.always["refund"] = LOST

    async def main() -> None:
        with pytest.raises(JournalError, match="closed"):
            await world.biller.recover()
        await world.inner.start()
        assert await world.biller.recover() == 1
        assert await world.biller.recover() == 0
        await world.inner.close()

    world.run(main)


def test_void_span_hangs_on_the_deduction(world: World) -> None:
    """A void in the background is a span of its own, with a link."""
    world.bank.faults["deduct"] = [UNHEARD]
    served(world)
    (deduct,), (void,) = world.spans(SPAN_DEDUCT), world.spans(SPAN_VOID)
    assert deduct.context is not None
    assert [link.context.span_id for link in void.links] == [deduct.context.span_id]
    assert dict(void.attributes or {})["metered_billing.tries"] == 1
    assert world.counted("metered_billing.credits") == {"voided": 10}


def test_bug_in_the_background_is_told_and_recovered(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No task dies in silence, and none keeps recovery from its charge."""

    def write(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    world.bank.faults["deduct"] = [UNHEARD]

    async def main() -> None:
        await world.biller.start()
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "write", write, raising=False)
            with pytest.raises(BillingError):
                await world.serve()
            await settled()
        assert "ZeroDivisionError" in caplog.text
        assert not world.live
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    world.holds()
    assert world.bank.balance == GRANTED
