"""Settling inline: when a request is over nothing is under way, and what the freeze finds unfinished is not lost."""

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metered_billing import MeteredBillingMiddleware, metered
from metered_billing.biller import Biller
from metered_billing.charge import NotSent, Record, Reported, Unknown
from metered_billing.errors import BillingError
from metered_billing.journal import JournalError, PlaceLost
from metered_billing.names import METRIC_RECOVERY_ROUNDS
from metered_billing.settings import Settings
from tests.fakes import GRANTED, LOST, UNHEARD, Accident, VirtualLoop, World, striking
from tests.stand import Connection, Stand, lifespan

T = TypeVar("T")


class Frozen(World):
    """A world whose process may be frozen between requests: its event loop runs only while there is one."""

    def boot(self) -> None:
        super().boot()
        self.biller = Biller(self.bank, self.journal, runtime=self.runtime, telemetry=self.telemetry, inline=True)

    async def invoke(self, event: Any = None, *, within_s: float = 3.0) -> None:
        """One request, as the middleware conducts it, whatever becomes of it."""
        try:
            with contextlib.suppress(BillingError):
                await self.serve(event=event)
        finally:
            await self.biller.quiesce(within_s)

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self.struck = asyncio.Event()
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(self)) as runner:
            result = runner.run(main())
        assert not self.unhandled, self.unhandled
        return result

    async def pass_by(self, seconds: float) -> None:
        """Time in which nothing of ours may run."""
        at_rest()
        self.time += seconds


def at_rest() -> None:
    """Nothing of ours is left on the loop: neither tasks nor timers."""
    loop: Any = asyncio.get_running_loop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert [timer for timer in loop._scheduled if not timer.cancelled()] == []


@pytest.fixture
def world(tmp_path: Path) -> Frozen:
    return Frozen(tmp_path)


def on_record(world: World) -> list[str | None]:
    return [world.on_record(charge_id) for charge_id in world.bank.taken]


def test_refund_has_gone_out_when_the_request_is_over(world: Frozen) -> None:
    """And on record as such; nothing waits for a time, nothing runs."""

    async def main() -> None:
        await world.invoke()
        assert world.bank.balance == GRANTED - 8
        assert on_record(world) == ["settled"]
        await world.pass_by(3600.0)
        await world.invoke(Reported(10))
        assert on_record(world) == ["settled", "settled"]
        at_rest()

    world.run(main)
    world.holds()
    assert [name for name, _ in world.bank.calls] == ["deduct", "refund", "deduct"]


@pytest.mark.parametrize("fault", [LOST, UNHEARD])
def test_deduction_without_an_answer_is_undone_before_the_request_is_over(world: Frozen, fault: Any) -> None:
    """The client hears 503; nothing is left for later."""
    world.bank.faults["deduct"] = [fault]

    async def main() -> None:
        await world.invoke()
        assert [name for name, _ in world.bank.calls] == ["deduct", "void"]
        assert world.bank.balance == GRANTED
        at_rest()

    world.run(main)
    world.holds()


def test_request_that_is_cancelled_is_undone_before_it_is_over(world: Frozen) -> None:
    """Its deduction may be out."""

    async def main() -> None:
        with striking(world, Accident("cancel", "deduct…")):
            world.request = asyncio.ensure_future(world.invoke())
            with pytest.raises(asyncio.CancelledError):
                await world.request
        assert [name for name, _ in world.bank.calls] == ["deduct", "void"]
        at_rest()

    world.run(main)
    world.holds()


def test_refund_without_an_answer_is_taken_up_by_a_later_request(world: Frozen) -> None:
    """At the first that comes when it is due; recovery looks no more often than it would by itself."""
    world.bank.faults["refund"] = [LOST]

    async def main() -> None:
        await world.invoke()
        assert on_record(world) == ["refunding"]
        await world.pass_by(9.0)
        await world.invoke(Reported(10))
        assert on_record(world) == ["refunding", "settled"]
        await world.pass_by(1.0)
        await world.invoke(Reported(10))
        assert on_record(world) == ["settled", "settled", "settled"]
        await world.pass_by(-3600.0)  # clocks are set
        await world.invoke(Reported(10))

    world.run(main)
    world.holds()
    assert world.passed.count("due…") == 4  # three looks, each until it finds nothing


def test_refund_that_hangs_holds_the_request_up_for_so_long_and_no_longer(world: Frozen) -> None:
    """It is broken off; later it is tried again under its key."""

    async def main() -> None:
        with striking(world, Accident("hang", "…refund")):
            await world.invoke(within_s=3.0)
        assert world.time == pytest.approx(3.0)
        assert on_record(world) == ["refunding"]
        assert world.live == {}
        await world.pass_by(10.0)
        await world.invoke(Reported(10))
        assert on_record(world) == ["settled", "settled"]
        at_rest()

    world.run(main)
    world.holds()


def test_request_that_is_cancelled_while_it_settles_leaves_nothing_under_way(world: Frozen) -> None:
    """As by a timeout around the app: nobody waits any more, and the process may be frozen next."""

    async def main() -> None:
        with striking(world, Accident("hang", "…refund")), pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await world.invoke(within_s=3.0)
        assert world.time == pytest.approx(1.0)
        at_rest()
        assert on_record(world) == ["refunding"]
        await world.pass_by(10.0)
        await world.invoke(Reported(10))
        assert on_record(world) == ["settled", "settled"]
        at_rest()

    world.run(main)
    world.holds()


def test_request_that_is_cancelled_while_it_settles_takes_nobody_else_along(world: Frozen) -> None:
    """What another request waits for goes on."""

    async def main() -> None:
        with striking(world, Accident("hang", "…refund")):
            first = asyncio.ensure_future(world.invoke(within_s=5.0))
            await asyncio.sleep(1.0)
            second = asyncio.ensure_future(world.invoke(Reported(10), within_s=3.0))
            await asyncio.sleep(1.0)
            first.cancel()
            await asyncio.wait({first})
            assert world.live != {}
            await second
        assert world.time == pytest.approx(4.0)
        at_rest()

    world.run(main)
    world.holds()


def test_outcome_that_hangs_is_left_to_recovery(world: Frozen) -> None:
    """The response was held up for five seconds by then; what is on record decides."""

    async def main() -> None:
        with striking(world, Accident("hang", "deducted-refunding…")):
            await world.invoke()
        assert world.time == pytest.approx(8.0)
        world.time += 10.0
        await world.invoke(Reported(10))
        assert on_record(world) == ["settled", "settled"]

    world.run(main)
    world.holds()


@pytest.mark.slow
def test_whatever_strikes_is_made_good_by_the_next_request_or_instance(tmp_path: Path) -> None:
    """At each point that a request passes: killed there, cancelled there, told a lie there."""

    def world_at(name: str, number: int) -> Frozen:
        directory = tmp_path / f"{number}-{name}"
        directory.mkdir()
        return Frozen(directory)

    sound = world_at("sound", 0)
    sound.run(sound.invoke)
    strikes = [(kind, point) for kind in ("kill", "cancel", "fail", "lose", "hang") for point in sound.passed]
    struck = 0
    for number, (kind, point) in enumerate(strikes, 1):
        if kind in ("fail", "lose") and ("-" not in point or (kind, point[:1]) == ("lose", "…")):
            continue  # only a journal does, of what it writes
        if kind == "hang" and "deduct" in point and "-" not in point:
            continue  # a deduction has a deadline of its own
        world = world_at(kind, number)
        struck += _strike(world, Accident(kind, point))
    assert struck > 30


def _strike(world: Frozen, accident: Accident) -> bool:
    async def first() -> bool:
        with striking(world, accident):
            world.request = asyncio.ensure_future(world.invoke())
            dying = asyncio.ensure_future(world.struck.wait())
            await asyncio.wait({world.request, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not world.dead:
                await asyncio.wait({world.request})
            dying.cancel()
        return world.struck.is_set()

    async def then() -> None:
        for _ in range(2):
            world.time += 3600.0
            await world.invoke(Reported(10))
        at_rest()

    struck = world.run(first)
    if world.dead:
        world.bury()
        world.boot()
    world.run(then)
    world.holds()
    assert set(on_record(world)) <= {"settled", "voided", None}, accident
    return struck


def test_requests_at_the_same_time_do_not_put_each_other_to_rest(world: Frozen) -> None:
    """It goes on until the last of them is over."""
    go_on = asyncio.Event()

    async def main() -> None:
        async def wait(_: Any) -> None:
            await go_on.wait()

        slow = asyncio.ensure_future(world.serve(route=wait))
        while not world.bank.taken:
            await asyncio.sleep(0)
        await world.invoke()
        started = [world.biller.started]
        go_on.set()
        await slow
        await world.biller.quiesce(3.0)
        assert [*started, world.biller.started] == [True, False]
        at_rest()

    world.run(main)
    world.holds()


def test_journal_of_two_apps_rests_when_both_do(world: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them has under way needs its lease."""
    told: list[str] = []

    async def pause() -> None:
        told.append("pause")

    monkeypatch.setattr(world.inner, "pause", pause)
    monkeypatch.setattr(world.inner, "resume", lambda: told.append("resume"))
    other = Biller(world.bank, world.journal, runtime=world.runtime, telemetry=world.telemetry, inline=True)

    async def main() -> None:
        await other.start()
        await world.invoke()
        assert told == ["resume", "resume"]
        told.clear()
        await other.quiesce(3.0)
        await other.quiesce(3.0)
        assert told == ["pause", "pause"]
        await world.biller.start()
        await world.biller.start()
        assert told == ["pause", "pause", "resume"]
        for biller in (other, world.biller):
            await biller.drain(1.0)

    world.run(main)


def test_work_that_does_not_end_when_it_is_told_to_holds_a_request_up_for_another_second(world: Frozen) -> None:
    """A journal on a disk that hangs may have to see to something first. It does not rest then."""

    async def adopt(_: float) -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600.0)
        await asyncio.sleep(10.0)
        return 0

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(world.inner, "adopt", adopt)
            await world.invoke()
            assert world.time == pytest.approx(4.0)
            assert world.biller.started
            await asyncio.sleep(10.0)
        await world.invoke()
        at_rest()

    world.run(main)
    world.holds()


def test_journal_that_rests_is_woken_on_every_event_loop(world: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of its own for each request: none of them may lose its place while it runs."""
    resting: list[bool] = [False]

    async def pause() -> None:
        resting[0] = True

    def resume() -> None:
        resting[0] = False

    monkeypatch.setattr(world.inner, "pause", pause)
    monkeypatch.setattr(world.inner, "resume", resume)
    while_it_ran: list[bool] = []

    async def look(_: Any) -> None:
        while_it_ran.append(resting[0])

    async def main() -> None:
        await world.serve(route=look)
        await world.biller.quiesce(3.0)

    for _ in range(2):
        world.run(main)
        assert resting == [True]
    assert while_it_ran == [False, False]
    world.holds()


def test_journal_is_woken_again_where_another_loop_began_while_it_was_put_to_rest(
    world: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread: its request may run for longer than the lease lasts."""
    resting: list[bool] = [False]
    other = Biller(world.bank, world.journal, runtime=world.runtime, telemetry=world.telemetry, inline=True)

    async def pause() -> None:
        await other.start()  # which finds it awake
        resting[0] = True

    def resume() -> None:
        resting[0] = False

    monkeypatch.setattr(world.inner, "pause", pause)
    monkeypatch.setattr(world.inner, "resume", resume)

    async def main() -> None:
        await world.invoke()
        assert resting == [False]
        await other.drain(1.0)

    world.run(main)


def test_journal_that_hangs_holds_the_end_of_a_request_up_for_a_second(
    world: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's outcome is in what it has under way."""
    monkeypatch.setattr(world.inner, "pause", asyncio.Event().wait)

    async def main() -> None:
        await world.invoke()
        assert world.time == pytest.approx(1.0)
        assert not world.biller.started

    world.run(main)


def test_recovery_that_fails_is_said_and_tried_again(world: Frozen, caplog: pytest.LogCaptureFixture) -> None:
    """Ten seconds later, and it costs no request its answer."""
    errors: list[Exception] = [JournalError("disk full"), RuntimeError("a bug")]

    async def due(*_: Any, **__: Any) -> Any:
        raise errors[0]

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(world.inner, "due", due)
            for _ in range(2):
                await world.invoke(Reported(10))
                errors.reverse()
                await world.pass_by(10.0)
        await world.invoke(Reported(10))

    world.run(main)
    said = [record.message for record in caplog.records if "recovery failed" in record.getMessage()]
    assert len(said) == 2
    assert "recovery.resumed" in caplog.text
    assert world.counted(METRIC_RECOVERY_ROUNDS) == {"failed": 2, "ok": 1}


def test_nothing_to_put_to_rest_is_no_trouble(world: Frozen) -> None:
    """A request that never got as far, or an app that is shut down already."""

    async def main() -> None:
        await world.biller.quiesce(3.0)
        await world.invoke()
        await world.biller.drain(1.0)
        await world.biller.quiesce(3.0)
        assert not world.biller.started
        await world.invoke()
        at_rest()

    world.run(main)
    world.holds()


def test_charge_whose_place_was_given_to_others_is_opened_in_the_new_one(world: Frozen) -> None:
    """A process that was frozen for long answers its first request, and its charge is its own to the end."""
    opened: list[str] = []
    real = world.inner.open

    async def lost() -> None:
        world.inner._own.owner = "new"  # type: ignore[union-attr]
        raise PlaceLost("taken for dead")

    def open_(record: Record) -> Awaitable[None]:
        opened.append(record.owner)
        return lost() if len(opened) == 1 else real(record)

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(world.inner, "open", open_)
            await world.invoke()
        assert on_record(world) == ["settled"]

    world.run(main)
    world.holds()
    assert opened[0] != opened[1] == "new"


# In an app.


def app_of(bench: Stand, endpoint: Callable[..., Any], **options: Any) -> Starlette:
    return Starlette(
        routes=[Route("/work", metered(cost=10)(endpoint), methods=["POST"]), Route("/free", endpoint)],
        middleware=[Middleware(MeteredBillingMiddleware, **bench.options(settle="inline", **options))],
    )


async def eight(request: Request) -> Response:
    return JSONResponse({"results": [{"status": "ok"}] * 8 + [{"status": "failed"}] * 2})


async def fails(request: Request) -> Response:
    raise RuntimeError("the route")


async def invoke(app: Any) -> Connection:
    connection = Connection(app, "/work")
    with contextlib.suppress(RuntimeError):
        await connection.run()
    return connection


async def rests(app: Starlette) -> None:
    tasks = {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("metered-billing")}
    assert tasks == set()
    loop: Any = asyncio.get_running_loop()
    assert [timer for timer in loop._scheduled if not timer.cancelled() and "metered" in repr(timer)] == []


@pytest.mark.parametrize(("endpoint", "kept", "status"), [(eight, 8, 200), (fails, 0, 500)])
async def test_app_settles_before_it_is_done_with_the_request(
    bench: Stand, endpoint: Any, kept: int, status: int
) -> None:
    """Whatever came of it."""
    app = app_of(bench, endpoint)
    for number in (1, 2):
        connection = await invoke(app)
        assert connection.status == status
        assert await bench.credits.balance("acme", "ann") == GRANTED - number * kept
        await rests(app)


@pytest.mark.parametrize("answer", [Unknown("no answer"), NotSent("no connection")])
async def test_app_that_answers_503_has_undone_the_deduction(
    bench: Stand, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is done with the request."""
    asked: list[str] = []
    void = bench.credits.void

    async def deduct(record: Record) -> Any:
        await asyncio.sleep(0)
        return answer

    async def watched(record: Record) -> Any:
        asked.append(record.id)
        return await void(record)

    monkeypatch.setattr(bench.credits, "deduct", deduct)
    monkeypatch.setattr(bench.credits, "void", watched)
    app = app_of(bench, eight)
    assert (await invoke(app)).status == 503
    assert len(asked) == isinstance(answer, Unknown)
    await rests(app)


async def test_app_rests_between_its_start_and_the_first_request(bench: Stand) -> None:
    """An instance may be frozen then; and what a dead one left is looked for in the start itself."""
    app = app_of(bench, eight)
    async with lifespan(app):
        await rests(app)
        assert (await invoke(app)).status == 200
        await rests(app)
    assert await bench.credits.balance("acme", "ann") == GRANTED - 8


async def test_free_request_is_held_up_by_nothing(bench: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free is free."""
    app = app_of(bench, eight)
    monkeypatch.setattr(Biller, "quiesce", None)
    connection = Connection(app, "/free")
    connection.scope["method"] = "GET"
    await connection.run()
    assert connection.status == 200


async def test_bug_in_a_backend_does_not_change_the_response(
    bench: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is loud."""

    async def quiesce(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Biller, "quiesce", quiesce)
    assert (await invoke(app_of(bench, eight))).status == 200
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.CRITICAL]


async def test_request_that_is_closed_waits_for_nothing(bench: Stand) -> None:
    """A coroutine that is told to go must not wait."""
    running = asyncio.Event()

    async def hangs(request: Request) -> Response:
        running.set()
        await asyncio.Event().wait()
        return Response()

    connection = Connection(app_of(bench, hangs), "/work")
    request, context = connection.run(), contextvars.copy_context()
    task = asyncio.get_running_loop().create_task(request, context=context)
    await running.wait()
    context.run(request.close)
    task.cancel()
    with contextlib.suppress(BaseException):
        await task
    assert await bench.balance() == GRANTED


def test_settling_is_said_in_code_or_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code goes before; a word that is none is refused."""
    plain = Starlette()
    options: dict[str, Any] = {"credits": "sqlite:///credits.db", "journal": tmp_path}
    assert MeteredBillingMiddleware(plain, **options).settle == "background"
    monkeypatch.setenv("METERED_BILLING_SETTLE", "inline")
    assert MeteredBillingMiddleware(plain, **options).settle == "inline"
    assert MeteredBillingMiddleware(plain, **options, settle="background").settle == "background"
    given = Settings(settle="background")
    assert MeteredBillingMiddleware(plain, **options, settings=given).settle == "background"
    with pytest.raises(ValueError, match="settle must be one of 'background', 'inline'"):
        MeteredBillingMiddleware(plain, **{**options, "settle": "later"})


async def test_invocation_stands_for_the_callers_request_id(bench: Stand) -> None:
    """On AWS Lambda, whose own log lines have it; the caller's own goes before."""
    app = app_of(bench, eight)

    class Context:
        aws_request_id: Any = "8f5d1c1e-0000-4000-8000-000000000001"

    for context, headers in ((Context(), []), (Context(), [(b"x-request-id", b"mine")]), (object(), [])):
        connection = Connection(app, "/work")
        connection.scope["aws.context"] = context
        connection.scope["headers"] += headers
        await connection.run()
    charges = [span.attributes or {} for span in bench.spans if span.name == "metered_billing.charge"]
    found = [charge.get("metered_billing.request.id") for charge in charges]
    assert found == [Context.aws_request_id, "mine", None]
