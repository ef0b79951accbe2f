"""The biller: whatever goes wrong, at whichever await, the credits add up afterwards."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from metered_billing.biller import JOURNAL_WITHIN_S, Charge
from metered_billing.charge import Declined, Event, Record, Reported, State, Unknown
from metered_billing.errors import BillingError, BillingMisconfigured, CreditsUnavailable, InsufficientCredits
from metered_billing.journal import JournalError
from metered_billing.names import SPAN_CHARGE, SPAN_DEDUCT, SPAN_REFUND
from metered_billing.outcomes import Paid
from metered_billing.settler import settled
from tests.fakes import (
    ANN,
    GRANTED,
    LOST,
    NOT_SENT,
    UNHEARD,
    UNREAD,
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


# Which points a request passes, by what comes of it.
PATHS: dict[str, tuple[Callable[[Bank], None], list[str]]] = {
    "some failed": (
        lambda bank: None,
        ["open", "deduct", "opened-deducted", "deducted-refunding", "refund", "refunding-settled"],
    ),
    # Its outcome is there before the confirmed deduction was on record, and goes there instead.
    "some failed at once": (
        lambda bank: bank.world.__dict__.update(at_once=True),
        ["open", "deduct", "deducted-refunding", "refund", "refunding-settled"],
    ),
    # On a journal whose charges another process can take over meanwhile.
    "on a lease": (
        lambda bank: bank.world.__dict__.update(exclusive=False),
        ["open", "deduct", "opened-deducted", "deducted-refunding", "refund", "refunding-settled"],
    ),
    "lost": (
        lambda bank: bank.faults.update(deduct=[LOST]),
        ["open", "deduct", "opened-voiding", "void", "voiding-voided"],
    ),
    "unheard": (
        lambda bank: bank.faults.update(deduct=[UNHEARD], void=[UNHEARD, LOST]),
        ["open", "deduct", "opened-voiding", "void", "voiding-voiding", "voiding-voided"],
    ),
    "not sent": (lambda bank: bank.faults.update(deduct=[NOT_SENT]), ["open", "deduct", "opened-abandoned"]),
    "declined": (lambda bank: bank.__dict__.update(balance=5), ["open", "deduct", "opened-declined"]),
    "no voids": (
        lambda bank: bank.__dict__.update(has_voids=False, faults={**bank.faults, "deduct": [UNHEARD]}),
        ["open", "deduct", "opened-voiding", "void", "voiding-refunding", "refund", "refunding-settled"],
    ),
    "refund unheard": (
        lambda bank: bank.faults.update(refund=[UNHEARD, LOST]),
        ["deducted-refunding", "refund", "refunding-refunding", "refunding-settled"],
    ),
}
KINDS_OF_CREDITS = ("cancel", "close", "kill", "raise")
KINDS_OF_JOURNAL = ("cancel", "close", "kill", "fail", "lose", "hang")
CREDITS = ("deduct", "refund", "void", "find")


def accidents() -> list[Any]:
    found = []
    for path, (_, points) in PATHS.items():
        for point in points:
            for kind in KINDS_OF_CREDITS if point in CREDITS else KINDS_OF_JOURNAL:
                for where in (f"{point}…", f"…{point}"):
                    if where.startswith("…") and kind in ("lose", "hang"):
                        continue
                    if point == "open" and kind == "lose":
                        continue
                    found.append(pytest.param(path, Accident(kind, where), id=f"{path}-{kind}-{where}"))
    return found


@pytest.mark.parametrize(("path", "accident"), accidents())
def test_accident_at_any_await_costs_nobody_anything(world: World, path: str, accident: Accident) -> None:
    """Whatever strikes where: afterwards the response's outcome, if it came on record, is what was paid for;
    otherwise nothing was. Nobody waits, and nothing is left behind."""
    prepare, _ = PATHS[path]
    prepare(world.bank)
    granted = world.bank.balance
    result: list[BaseException | None] = []

    async def first() -> None:
        await world.biller.start()
        world.request = asyncio.create_task(world.serve())
        struck = asyncio.create_task(world.struck.wait())
        await asyncio.wait({world.request, struck}, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(600):
            if world.struck.is_set() and accident.kind in ("close", "kill"):
                return
            await asyncio.sleep(0.05)
        struck.cancel()
        await asyncio.wait({world.request})
        assert world.struck.is_set() or accident.kind in ("fail", "lose", "hang")
        result.append(None if world.request.cancelled() else world.request.exception())
        await world.biller.drain(1.0)

    with striking(world, accident):
        world.run(first)
    assert accident.where in world.passed, world.passed
    if world.dead:
        world.bury()
        world.boot()
    for error in result:
        assert error is None or isinstance(error, BillingError), error

    async def recovering() -> None:
        await world.biller.start()
        await world.quiet()
        assert set(world.live) == set()
        names = {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}  # type: ignore[union-attr]
        assert names == {"metered-billing recovery"}
        await world.biller.drain(1.0)
        assert len(asyncio.all_tasks()) == 1

    world.run(recovering)
    world.holds(granted)


def test_copy_of_a_deduction_that_arrives_late_takes_nothing(world: World) -> None:
    """The first attempt was lost and voided: when it turns up after all, it is refused."""
    world.bank.faults["deduct"] = [LOST]

    async def main() -> None:
        with pytest.raises(CreditsUnavailable):
            await world.serve()
        await world.quiet()
        (charge_id,) = {key for _, key in world.bank.calls}
        late = Record(id=charge_id, account=ANN, amount_credits=10, units=10, opened_at=1.0)
        assert world.bank.take(late) == Unknown("charge-voided")
        await world.biller.drain(1.0)

    world.run(main)
    world.holds()


# What the client is told.


def refused(world: World, fault: Fault, error: type[BillingError]) -> BillingError:
    """What a request is answered when its deduction comes to this; its route must not run."""

    async def route(charge: Charge) -> None:
        raise AssertionError("it ran")

    async def main() -> BillingError:
        world.bank.faults["deduct"] = [fault]
        with pytest.raises(error) as caught:
            await world.serve(route=route)
        await world.quiet()
        await world.biller.drain(1.0)
        return caught.value

    answer = world.run(main)
    world.holds()
    return answer


def test_declined_is_402_with_the_shortfall(world: World) -> None:
    """Certain: nothing is sent after it."""
    error = refused(world, Fault(Declined(7)), InsufficientCredits)
    assert isinstance(error, InsufficientCredits)
    assert (error.required, error.balance, error.shortfall) == (10, 7, 3)
    assert [name for name, _ in world.bank.calls] == ["deduct"]


def test_declined_where_declines_are_forgotten_is_402_and_voided(world: World) -> None:
    """The client may know; a copy may yet arrive, so it is voided all the same."""
    refused(world, Fault(Declined(7, certain=False)), InsufficientCredits)
    assert [name for name, _ in world.bank.calls] == ["deduct", "void"]


def test_declined_after_an_unknown_attempt_is_503_and_voided(world: World) -> None:
    """The first copy may have taken the credits, so that the second was declined for want of them."""
    refused(world, Fault(Declined(0, after_unknown=True), done=True), CreditsUnavailable)
    assert [name for name, _ in world.bank.calls] == ["deduct", "void"]
    assert world.bank.balance == GRANTED


def test_service_that_does_not_understand_is_500(world: World) -> None:
    """Our side's bug: not 503, which would be tried again; voided."""
    error = refused(world, Fault(Unknown("422 nonsense", misconfigured=True)), BillingMisconfigured)
    assert "422 nonsense" in str(error)
    assert [name for name, _ in world.bank.calls] == ["deduct", "void"]


def test_connection_that_never_was_is_503_and_nothing_is_voided(world: World) -> None:
    """Nothing was sent, so nothing needs undoing."""
    refused(world, NOT_SENT, CreditsUnavailable)
    assert [name for name, _ in world.bank.calls] == ["deduct"]
    assert world.on_record("id-000003") is None


@pytest.mark.parametrize(
    ("wait_s", "header"),
    [(None, "1"), (0.2, "1"), (7.1, "8"), (float("inf"), "3600"), (1e300, "3600")],
)
def test_retry_after_is_what_the_service_asked_for_in_bounds(world: World, wait_s: float | None, header: str) -> None:
    """Whole seconds, rounded up, an hour at most."""
    error = refused(world, Fault(Unknown("down", retry_after_s=wait_s)), CreditsUnavailable)
    assert error.headers == {"Retry-After": header}


def test_void_goes_out_while_the_503_is_already_raised(world: World) -> None:
    """A client does not wait for what is undone behind it."""
    world.bank.faults["deduct"] = [UNHEARD]

    async def main() -> None:
        with pytest.raises(CreditsUnavailable):
            await world.serve()
        assert world.bank.balance == GRANTED - 10
        assert [name for name, _ in world.bank.calls] == ["deduct"]
        await settled()
        assert [name for name, _ in world.bank.calls] == ["deduct", "void"]
        assert world.bank.balance == GRANTED
        await world.biller.drain(1.0)

    world.run(main)


@pytest.mark.parametrize("where", ["open…", "opened-deducted…"])
def test_journal_that_hangs_before_the_route_is_503_in_time(world: World, where: str) -> None:
    """A database that does not answer must not hang every request."""
    world.exclusive = False

    async def main() -> None:
        await world.biller.start()
        began = world.time
        with pytest.raises(CreditsUnavailable):
            await world.serve()
        assert world.time - began < 6
        await world.biller.drain(1.0)

    with striking(world, Accident("hang", where)):
        world.run(main)


def test_disk_that_hangs_before_the_route_is_503_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal on disk gives a bare future, which has its time limit without a task of its own."""

    async def main() -> None:
        await world.biller.start()
        monkeypatch.setattr(world.journal, "open", lambda record: asyncio.get_running_loop().create_future())
        began = world.time
        with pytest.raises(CreditsUnavailable):
            await world.serve()
        assert JOURNAL_WITHIN_S <= world.time - began < JOURNAL_WITHIN_S + 1
        await world.biller.drain(1.0)

    world.run(main)
    assert not world.bank.calls


def test_cancelled_request_whose_charge_never_came_on_record_has_lost_it_to_nobody(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full, say: nothing was sent, nothing is left to do, and no other process is blamed."""

    async def main() -> None:
        await world.biller.start()
        monkeypatch.setattr(world.journal, "open", lambda record: asyncio.sleep(1.0))
        request = asyncio.ensure_future(world.serve())
        await asyncio.sleep(0.5)
        request.cancel()
        await asyncio.wait([request])
        await settled()
        assert not world.live
        await world.biller.drain(1.0)

    world.run(main)
    assert "charge.ownership_lost" not in caplog.text
    assert not world.bank.calls


@pytest.mark.parametrize(("kind", "back"), [("fail", "voided"), ("hang", "voided"), ("cancel", "refunded")])
def test_deduction_that_cannot_be_put_on_record_is_said_and_counted(
    world: World, kind: str, back: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its credits have moved, and are seen to come back: whoever adds up what is said of them comes to nothing."""
    world.exclusive = False
    caplog.set_level("INFO", logger="metered_billing")

    async def main() -> None:
        await world.biller.start()
        with contextlib.suppress(CreditsUnavailable, asyncio.CancelledError):
            await asyncio.ensure_future(struck())
        await world.quiet()
        await world.biller.drain(1.0)

    async def struck() -> None:
        world.request = asyncio.current_task()
        await world.serve()

    with striking(world, Accident(kind, "opened-deducted…")):
        world.run(main)
    assert caplog.text.count("credits.deducted") == 1
    assert world.counted("metered_billing.credits") == {"deducted": 10, back: 10}
    world.holds()


# The outcome.


def outcome(world: World, *steps: Callable[[Charge], Awaitable[None]]) -> Charge:
    """A charge, through these steps, then quiet."""

    async def main() -> Charge:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        for each in steps:
            await each(charge)
        await world.quiet()
        assert not world.live
        await world.biller.drain(1.0)
        return charge

    charge = world.run(main)
    world.holds()
    return charge


def conclude(world: World, event: Event) -> Callable[[Charge], Awaitable[None]]:
    return lambda charge: world.biller.conclude(charge, event)


def release(world: World, event: Event) -> Callable[[Charge], Awaitable[None]]:
    async def step(charge: Charge) -> None:
        world.biller.release(charge, event)

    return step


def after_a_while(world: World) -> None:
    """A charge of a route that is at work for a second; 8 of its 10 succeed."""
    event = Reported(8, ("a", "b"))
    outcome(world, lambda charge: asyncio.sleep(1), conclude(world, event), release(world, event))


def test_first_conclusion_counts(world: World) -> None:
    """Concluded twice and released twice: the first outcome is refunded, once."""
    outcome(
        world,
        conclude(world, Reported(8, ("a", "b"))),
        conclude(world, Reported(0)),
        release(world, Reported(5)),
        release(world, Reported(1)),
        conclude(world, Reported(2)),
    )
    assert world.bank.balance == GRANTED - 8
    assert [name for name, _ in world.bank.calls] == ["deduct", "refund"]


@pytest.mark.parametrize("strike", ["", "fail", "lose"])
def test_release_before_the_outcome_is_written_waits_for_it(
    world: World, strike: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the request is cancelled meanwhile. The refund follows at once, below the charge's span; and where the
    write fails, or is somebody else's to make, that is said."""
    caplog.set_level("INFO", logger="metered_billing")
    world.accident = Accident(strike, "deducted-refunding…") if strike else None

    async def slowly(write: Awaitable[bool]) -> bool:
        await asyncio.sleep(0.5)
        return await write

    async def main() -> None:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        write = world.journal.write
        monkeypatch.setattr(world.journal, "write", lambda *args, **options: slowly(write(*args, **options)))
        world.biller.release(charge, Reported(8, ("a", "b")))
        await settled()

    world.run(main)
    (whole,) = world.spans(SPAN_CHARGE)
    events = [record.getMessage().split()[0] for record in caplog.records if record.name == "metered_billing"]
    if strike:
        event, told = {"fail": ("journal.failed", "journal"), "lose": ("charge.ownership_lost", "ownership_lost")}[
            strike
        ]
        assert (events, (whole.attributes or {})["metered_billing.outcome"]) == (["credits.deducted", event], told)
        return
    assert events == ["credits.deducted", "credits.refunded"]
    (refund,) = world.spans(SPAN_REFUND)
    assert refund.parent == whole.context
    world.holds()


def test_telemetry_that_raises_at_the_end_changes_no_response(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug, or a meter's: it is said, and recovery goes by what is on record."""
    bug = RuntimeError("a bug in a meter")

    def moved(kind: str, amount: int) -> None:
        if kind == "kept":
            raise bug

    monkeypatch.setattr(world.telemetry, "moved", moved)
    outcome(world, conclude(world, Reported(8)), release(world, Reported(8)))
    (told,) = [record for record in caplog.records if record.getMessage().startswith("billing.bug")]
    assert told.exc_info is not None
    assert told.exc_info[1] is bug
    assert world.bank.balance == GRANTED - 8


def test_started_says_whether_it_is(world: World) -> None:
    """On this loop, until it is drained: each request asks."""

    async def main() -> list[bool]:
        told = [world.biller.started]
        await world.biller.start()
        told.append(world.biller.started)
        await world.biller.drain(1.0)
        return [*told, world.biller.started]

    assert world.run(main) == [False, True, False]


def test_deduction_that_is_collected_with_its_loop_is_left_to_the_journal(world: World) -> None:
    """Nothing runs any more that could see to it."""
    world.accident = Accident("close", "deduct…")
    loop = VirtualLoop(world)

    async def begin() -> Any:
        await world.biller.start()
        world.request = asyncio.create_task(world.biller.deduct(ANN, Paid(10)))
        await world.struck.wait()
        return world.request.get_coro()

    deduction = loop.run_until_complete(begin())
    loop.close()
    assert world.live
    deduction.close()
    assert not world.live


def test_loops_that_are_over_are_not_kept(world: World) -> None:
    """Under a test client without a lifespan, each request has one of its own."""
    for _ in range(3):
        outcome(world, conclude(world, Reported(10)), release(world, Reported(10)))
    assert len(world.biller._deadlines) == 1


def test_release_without_a_conclusion_puts_its_own_on_record(world: World) -> None:
    """A response that never was complete."""
    outcome(world, release(world, Reported(3)))
    assert world.bank.balance == GRANTED - 3


def test_all_succeeded_sends_nothing_more(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Settled with the one write, and said so under the request's trace."""
    caplog.set_level("DEBUG", logger="metered_billing")
    outcome(world, conclude(world, Reported(10)), release(world, Reported(10)))
    (whole,) = world.spans(SPAN_CHARGE)
    assert whole.context is not None
    assert not dict(whole.attributes or {}).keys() & {"metered_billing.reason", "metered_billing.items"}
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []  # no empty attribute
    (told,) = [record for record in caplog.records if record.getMessage().startswith("charge.settled")]
    assert f'"{whole.context.trace_id:032x}"' in told.getMessage()
    assert [name for name, _ in world.bank.calls] == ["deduct"]
    assert world.bank.balance == GRANTED - 10


def test_reader_that_raised_keeps_all_for_a_person(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Disputed: nothing is sent, somebody is told."""
    charge = outcome(world, conclude(world, UNREAD), release(world, UNREAD))
    assert world.bank.balance == GRANTED - 10
    assert [name for name, _ in world.bank.calls] == ["deduct"]
    assert "charge.disputed" in caplog.text
    assert world.outcomes[charge.id].reason == "the reader raised"


@pytest.mark.parametrize("event", [Reported(11), Reported(-1)])
def test_outcome_that_cannot_be_refunds_all(world: World, event: Event, caplog: pytest.LogCaptureFixture) -> None:
    """More kept than paid, or less than nothing: a bug of ours is loud, and not the customer's."""
    outcome(world, conclude(world, event), release(world, event))
    assert world.bank.balance == GRANTED
    assert caplog.text.count("journal.failed") == 1
    (whole,) = world.spans(SPAN_CHARGE)
    assert dict(whole.attributes or {})["metered_billing.outcome"] == "journal"


@pytest.mark.parametrize("kind", ["fail", "lose", "hang"])
def test_outcome_that_cannot_be_written_does_not_touch_the_response(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The response goes out within seconds, the log is loud, and later all is refunded."""

    async def main() -> None:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        began = world.time
        await world.biller.conclude(charge, Reported(8))
        assert world.time - began < 6
        world.biller.release(charge, Reported(8))
        await asyncio.sleep(0.1)
        await world.biller.drain(1.0)

    async def later() -> None:
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    with striking(world, Accident(kind, "deducted-refunding…")):
        world.run(main)
    assert ("charge.ownership_lost" if kind == "lose" else "journal.failed") in caplog.text
    assert "billing.bug" not in caplog.text
    if kind != "hang":
        (whole,) = world.spans(SPAN_CHARGE)
        found = dict(whole.attributes or {})
        assert found["metered_billing.outcome"] == ("ownership_lost" if kind == "lose" else "journal")
        assert (found["metered_billing.kept"], found["metered_billing.refunded"]) == (0, 0)
    world.run(later)
    assert world.bank.balance == GRANTED
    world.holds()


def test_outcome_after_the_drain_refunds_all_later(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The journal is closed: the response goes out all the same."""

    async def main() -> None:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        began = world.time
        await world.biller.drain(3.0)
        assert 2.9 < world.time - began < 4.0
        await world.biller.conclude(charge, Reported(8))
        world.biller.release(charge, Reported(8))
        assert not world.live
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert "journal.failed" in caplog.text
    assert world.bank.balance == GRANTED


def test_outcome_that_fails_to_be_written_after_the_drain_is_nobodys_surprise(world: World) -> None:
    """Nobody waits for it any more: no event loop complains of an error that was never looked at."""

    async def main() -> None:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        await world.biller.drain(0.1)
        world.biller.release(charge, Reported(8))
        await asyncio.sleep(1.0)

    async def later() -> None:
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    with striking(world, Accident("fail", "deducted-refunding…")):
        world.run(main)
    world.run(later)
    assert world.bank.balance == GRANTED


@pytest.mark.parametrize(
    ("exclusive", "turns", "written_first"),
    [
        (True, 0, [("deducted-refunding", True)]),
        (True, 1, [("opened-deducted", False), ("deducted-refunding", True)]),
        (False, 0, [("opened-deducted", False), ("deducted-refunding", True)]),
    ],
)
def test_outcome_is_synced_before_the_last_byte_and_nothing_else_is(
    world: World, exclusive: bool, turns: int, written_first: list[tuple[str, bool]]
) -> None:
    """A power loss must not undo it: the client has the response. All other steps may be repeated. What is confirmed
    is on record behind the first turn of the loop that the route takes, if nobody else can have moved the charge."""
    world.exclusive = exclusive
    written: list[tuple[str, bool]] = []
    real = world.inner.write

    def write(before: Record, after: Record, *, durable: bool) -> Any:
        written.append((f"{before.state}-{after.state}", durable))
        return real(before, after, durable=durable)

    world.inner.write = write  # type: ignore[method-assign]
    world.bank.faults["refund"] = [LOST]
    route = [lambda charge: asyncio.sleep(0)] * turns
    outcome(world, *route, conclude(world, Reported(8)), release(world, Reported(8)))
    assert written == [
        *written_first,
        ("refunding-refunding", False),
        ("refunding-settled", False),
    ]


def test_outcome_said_after_the_response_is_over_changes_nothing(world: World) -> None:
    """Where none came on record in time, all is refunded, whatever is concluded later."""
    outcome(world, release(world, Reported(11)), conclude(world, Reported(8)))
    assert world.bank.balance == GRANTED


@pytest.mark.parametrize("where", ["opened-deducted…", "…opened-deducted"])
def test_confirmed_deduction_that_could_not_be_put_on_record_costs_nobody_anything(
    world: World, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The route runs already; it is loud, and the outcome comes on record all the same."""
    with striking(world, Accident("fail", where)):
        after_a_while(world)
    assert "journal.failed" in caplog.text
    assert world.bank.balance == GRANTED - 8


def test_confirmed_deduction_for_which_the_journal_has_no_room_costs_nobody_anything(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue is full: that is said, and the outcome comes on record as soon as there is room."""
    write = world.journal.write

    def full(before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        if after.state is State.DEDUCTED:
            raise JournalError("10000 operations are waiting already")
        return write(before, after, durable=durable)

    monkeypatch.setattr(world.journal, "write", full)
    after_a_while(world)
    assert "operations are waiting" in caplog.text
    assert world.bank.balance == GRANTED - 8


@pytest.mark.parametrize("full_until", ["concluded", "released", "refunded"])
def test_journal_without_room_is_said_once_a_charge(
    world: World, full_until: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of its writes find none: the deduction, the outcome, the outcome tried again, the refund."""
    write = world.journal.write
    full = True

    def refuse(before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        if full or (full_until == "refunded" and after.state is State.SETTLED):
            raise JournalError("10000 operations are waiting already")
        return write(before, after, durable=durable)

    async def main() -> None:
        nonlocal full
        await world.biller.start()
        monkeypatch.setattr(world.journal, "write", refuse)
        for _ in range(2):
            full = True
            charge = await world.biller.deduct(ANN, Paid(10))
            await asyncio.sleep(1)
            full = full_until == "released"
            await world.biller.conclude(charge, Reported(8))
            world.biller.release(charge, Reported(8))
            await asyncio.sleep(1)
        monkeypatch.undo()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("journal.failed")]
    assert len(said) == 2
    assert world.bank.balance == GRANTED - (0 if full_until == "released" else 16)
    world.holds()


def test_journal_without_room_is_said_of_each_charge(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are under way at the same time too; afterwards nobody remembers of which it was said."""
    full = True
    write = world.journal.write

    def refuse(before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        if full:
            raise JournalError("10000 operations are waiting already")
        return write(before, after, durable=durable)

    async def main() -> None:
        nonlocal full
        await world.biller.start()
        monkeypatch.setattr(world.journal, "write", refuse)
        charges = [await world.biller.deduct(ANN, Paid(10)) for _ in range(2)]
        await asyncio.sleep(1)
        for charge in charges:
            await world.biller.conclude(charge, Reported(8))
        full = False
        for charge in charges:
            world.biller.release(charge, Reported(8))
            await asyncio.sleep(1)
        assert not world.biller._settler._complained
        await world.quiet()
        await world.biller.drain(1.0)
        said = [text for text in caplog.messages if text.startswith("journal.failed")]
        assert [charge.id for charge in charges if charge.id in "".join(said)] == [charge.id for charge in charges]
        assert len(said) == 2

    world.run(main)


def test_refund_that_cannot_be_written_down_says_why(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The credits are back; recovery asks for them again, under the same key."""
    with striking(world, Accident("fail", "refunding-settled…")):
        outcome(world, conclude(world, Reported(8)), release(world, Reported(8)))
    (said,) = [record for record in caplog.records if record.getMessage().startswith("journal.failed")]
    assert 'reason="disk full"' in said.getMessage()
    assert said.exc_info is None
    assert world.bank.balance == GRANTED - 8


def test_outcome_that_takes_long_and_fails_then_is_said_once(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the charge that it is."""

    async def slow() -> bool:
        await asyncio.sleep(30)
        raise JournalError("disk full")

    write = world.journal.write

    def slowly(before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        return slow() if durable else write(before, after, durable=durable)

    async def main() -> None:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        with monkeypatch.context() as patch:
            patch.setattr(world.journal, "write", slowly)
            await world.biller.conclude(charge, Reported(8))
        world.biller.release(charge, Reported(8))
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("journal.failed")]
    assert "no outcome in 5.0 s" in said
    assert world.bank.balance == GRANTED


def test_free_request_touches_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Neither journal nor credits; all calls for a charge do nothing, and nothing is said or run."""
    caplog.set_level("DEBUG", logger="metered_billing")

    async def main() -> None:
        await world.biller.start()
        before = asyncio.all_tasks()
        charge = world.biller.free(Paid(0), None)
        await world.biller.conclude(charge, Reported(0))
        world.biller.release(charge, Reported(0))
        world.biller.release(charge, Reported(0))
        assert (charge.amount_credits, charge.transaction_id, charge.record) == (0, None, None)
        with pytest.raises(LookupError):
            _ = charge.account
        charge.note("attribute", "text")
        assert world.biller.free(Paid(0), ANN).account == ANN
        assert asyncio.all_tasks() == before
        assert not world.live
        await world.biller.drain(1.0)

    world.run(main)
    assert world.bank.calls == []
    assert not {"open", "deducted-settled…"} & set(world.passed)
    assert caplog.text == ""


def test_charge_says_what_failed_until_its_outcome_is_on_record(world: World) -> None:
    """Afterwards it raises: it would be too late."""

    async def say(charge: Charge) -> None:
        charge.fail(units=2)
        assert charge.said.units == 2
        assert charge.account == ANN
        assert charge.transaction_id == f"tx-{charge.id}"
        await world.biller.conclude(charge, Reported(8))
        with pytest.raises(RuntimeError, match="complete"):
            charge.fail(units=1)
        world.biller.release(charge, Reported(8))
        with pytest.raises(RuntimeError, match="complete"):
            charge.fail(units=1)

    outcome(world, say)


@pytest.mark.parametrize("broken", ["nothing", "an error of its own"])
def test_bug_before_the_route_is_recovered(world: World, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that returns nonsense, a journal with an error of its own: raised, and undone later."""
    world.exclusive = False

    def write(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    async def main() -> None:
        await world.biller.start()
        with monkeypatch.context() as patch:
            if broken == "nothing":
                world.bank.faults["deduct"] = [Fault(None, done=True)]
            else:
                patch.setattr(world.journal, "write", write, raising=False)
            with pytest.raises((AttributeError, ZeroDivisionError)):
                await world.serve()
            assert not world.live
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(main)
    assert world.bank.balance == GRANTED


# The whole of it, in spans, metrics and logs.


def test_operations_are_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One refunded request: its spans, what they hang on, and the credits counted."""
    caplog.set_level("DEBUG", logger="metered_billing")

    async def note(charge: Charge) -> None:
        charge.note("metered_billing.outcomes_mismatch", "9 of 10")

    charge = outcome(world, note, conclude(world, Reported(8, ("a",))), release(world, Reported(8)))
    (whole,), (deduct,), (refund,) = (world.spans(name) for name in (SPAN_CHARGE, SPAN_DEDUCT, SPAN_REFUND))
    assert whole.context is not None
    assert deduct.context is not None
    assert deduct.parent is not None
    assert deduct.parent.span_id == whole.context.span_id
    assert refund.parent is not None
    assert refund.parent.span_id == whole.context.span_id
    assert [link.context.span_id for link in refund.links] == [deduct.context.span_id]
    assert dict(whole.attributes or {}).items() >= {
        ("metered_billing.charge.id", charge.id),
        ("metered_billing.kept", 8),
        ("metered_billing.refunded", 2),
        ("metered_billing.outcome", "refunding"),
        ("metered_billing.outcomes_mismatch", "9 of 10"),
        ("metered_billing.transaction.id", charge.transaction_id),
        ("metered_billing.reason", "failed items"),
        ("metered_billing.items", ("a",)),
    }
    assert dict(deduct.attributes or {})["metered_billing.balance"] == GRANTED - 10
    assert world.counted("metered_billing.credits") == {"deducted": 10, "kept": 8, "refunded": 2}
    events = [record.getMessage().split()[0] for record in caplog.records if record.name == "metered_billing"]
    assert events == ["credits.cost_computed", "credits.deducted", "credits.refunded", "charge.settled"]


@pytest.mark.parametrize(
    ("fault", "events", "outcome", "reason"),
    [
        (LOST, ["credits.unavailable", "credits.voided"], "CreditsUnavailable", "silence"),
        (NOT_SENT, ["credits.unavailable", "charge.abandoned"], "CreditsUnavailable", "no connection"),
        (Fault(Declined(3)), ["credits.declined"], "InsufficientCredits", "insufficient credits"),
    ],
)
def test_refusals_are_told(
    world: World, fault: Fault, events: list[str], outcome: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each way not to run has its events, and a span with its error's type and what is known of why."""
    caplog.set_level("DEBUG", logger="metered_billing")
    refused(world, fault, BillingError)
    found = [record.getMessage().split()[0] for record in caplog.records if record.name == "metered_billing"]
    assert found == ["credits.cost_computed", *events]
    (whole,), (deduct,) = world.spans(SPAN_CHARGE), world.spans(SPAN_DEDUCT)
    assert dict(whole.attributes or {})["error.type"] == outcome
    attributes = dict(deduct.attributes or {})
    assert attributes["metered_billing.reason"] == deduct.status.description == reason
    assert attributes.get("metered_billing.balance") == (3 if outcome == "InsufficientCredits" else None)


@pytest.mark.parametrize(
    ("accident", "error_type", "reason"),
    [
        (Accident("fail", "open…"), "journal", "journal: "),
        (Accident("fail", "opened-deducted…"), "journal", "journal: "),
        (Accident("lose", "opened-deducted…"), "ownership_lost", "another process has moved the charge"),
        (Accident("raise", "deduct…"), "unknown", "RuntimeError while it was under way"),
    ],
)
def test_trace_says_why_it_was_503(world: World, accident: Accident, error_type: str, reason: str) -> None:
    """The deduction's span has the kind and the words."""
    world.exclusive = False

    async def main() -> None:
        with pytest.raises(CreditsUnavailable):
            await world.serve()
        await world.quiet()
        await world.biller.drain(1.0)

    with striking(world, accident):
        world.run(main)
    (deduct,) = world.spans(SPAN_DEDUCT)
    attributes = dict(deduct.attributes or {})
    assert attributes["error.type"] == error_type
    assert str(attributes["metered_billing.reason"]).startswith(reason)
    assert deduct.status.description == attributes["metered_billing.reason"]
    world.holds()


def test_untraced_charge_is_settled_too(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A charge without a span, and one whose request ends where no event loop runs any more."""

    async def main() -> Charge:
        await world.biller.start()
        charge = await world.biller.deduct(ANN, Paid(10))
        charge._span = None
        charge.note("attribute", "text")
        await world.biller.conclude(charge, Reported(8))
        world.biller.release(charge, Reported(8))
        await settled()
        return await world.biller.deduct(ANN, Paid(10))

    charge = world.run(main)
    assert "billing.bug" not in caplog.text
    world.biller.release(charge, Reported(8))
    assert not world.live

    async def later() -> None:
        await world.biller.start()
        await world.quiet()
        await world.biller.drain(1.0)

    world.run(later)
    world.holds()
    assert world.bank.balance == GRANTED - 8
