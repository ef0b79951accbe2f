"""The line before the credits service: who goes when, with whom, and who is sent away."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from metered_billing.charge import Account
from metered_billing.credits.line import ALONE, MAX_WEIGHT, Line, Waiting

ACME, BETA, GAMMA = Account("acme"), Account("beta"), Account("gamma")


class Calls:
    """What a line sends; each call ends when a test says so."""

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []
        self.under_way: list[asyncio.Event] = []
        self.error: Exception | None = None

    async def send(self, group: Sequence[Waiting]) -> None:
        self.sent.append([waiting.asked for waiting in group])
        done = asyncio.Event()
        self.under_way.append(done)
        await done.wait()
        if self.error is not None:
            raise self.error
        for waiting in group[:-1] if self.sent[-1][-1] == "silent" else group:
            waiting.tell(f"{waiting.asked}!")


@pytest.fixture
def calls() -> Calls:
    return Calls()


def line_of(calls: Calls, **options: int) -> Line:
    return Line(calls.send, late="late", lost="lost", **{"at_once": 1, "group": 10, "waiting": 100, **options})


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def busy(line: Line) -> Waiting:
    """One that is alone under way."""
    waiting = line.join("busy", ACME, 1, 60)
    assert await waiting.told is ALONE
    return waiting


async def test_alone_at_once(calls: Calls) -> None:
    """Whoever is alone goes at the end of the very turn of the loop, and makes its own call."""
    line = line_of(calls)
    waiting = line.join("a", ACME, 1, 60)
    assert not waiting.told.done()
    await asyncio.sleep(0)
    assert waiting.told.done()
    assert await waiting.told is ALONE
    assert calls.sent == []


async def test_all_of_one_turn_go_together(calls: Calls) -> None:
    """Whom one commit has woken goes in one call, also when nothing is in flight."""
    line = line_of(calls, at_once=2)
    told = [line.join(name, ACME, 1, 60).told for name in "abc"]
    await turns()
    assert calls.sent == [["a", "b", "c"]]
    calls.under_way[0].set()
    assert await asyncio.gather(*told) == ["a!", "b!", "c!"]


async def test_task_factory_of_the_apps(calls: Calls) -> None:
    """One that was written before tasks could be given a context does."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(lambda loop, work: asyncio.Task(work, loop=loop))
    line = line_of(calls)
    told = [line.join(name, ACME, 1, 60).told for name in "ab"]
    await turns()
    assert calls.sent == [["a", "b"]]
    calls.under_way[0].set()
    assert [await each for each in told] == ["a!", "b!"]


async def test_together_when_one_comes_back(calls: Calls) -> None:
    """What is asked for while a call is in flight waits, and goes together."""
    line = line_of(calls)
    await busy(line)
    for name in "abc":
        line.join(name, ACME, 1, 60)
        await turns()
    assert calls.sent == []
    line.leave()
    await turns()
    assert calls.sent == [["a", "b", "c"]]


@pytest.mark.parametrize("at_once", [1, 2, 3])
async def test_no_more_than_so_many_at_once(calls: Calls, at_once: int) -> None:
    """The service is asked for no more at a time, and then for more as soon as one is done."""
    line = line_of(calls, at_once=at_once)
    for number in range(4):
        line.join(f"a{number}", ACME, 1, 60)
        line.join(f"b{number}", ACME, 1, 60)
        await turns()
    assert len(calls.sent) == at_once
    calls.under_way[0].set()
    await turns()
    assert len(calls.sent) == (at_once + 1)
    assert sum(len(sent) for sent in calls.sent) == 8


async def test_cancelled_in_line_is_never_sent(calls: Calls) -> None:
    """Whoever leaves the line is not asked for."""
    line = line_of(calls)
    await busy(line)
    first, second, third = (line.join(name, ACME, 1, 60) for name in "abc")
    first.told.cancel()
    line.leave()
    await turns()
    assert calls.sent == [["b", "c"]]
    second.told.cancel()
    calls.under_way[0].set()
    assert await third.told == "c!"


async def test_all_cancelled(calls: Calls) -> None:
    """A line that everybody has left asks for nothing, and still serves the next."""
    line = line_of(calls)
    await busy(line)
    line.join("a", ACME, 1, 60).told.cancel()
    line.leave()
    await turns()
    assert calls.sent == []
    assert await line.join("b", ACME, 1, 60).told is ALONE


async def test_accounts_take_turns(calls: Calls) -> None:
    """Where not all fit, an account that asks for much does not keep the others waiting."""
    line = line_of(calls, group=4)
    await busy(line)
    for number in range(6):
        line.join(f"a{number}", ACME, 1, 60)
    line.join("b0", BETA, 1, 60)
    line.join("c0", GAMMA, 1, 60)
    line.join("c1", GAMMA, 1, 60)
    line.leave()
    for number in range(2):
        await turns()
        calls.under_way[number].set()
    await turns()
    assert calls.sent == [["a0", "b0", "c0", "a1"], ["c1", "a2", "a3", "a4"]]  # and the last is alone


async def test_heavy_ones_are_spread(calls: Calls) -> None:
    """No call is larger than the service reads; one that is by itself goes all the same."""
    line = line_of(calls)
    await busy(line)
    for name, weight in (("a", 1), ("b", MAX_WEIGHT - 1), ("c", 1), ("d", MAX_WEIGHT), ("e", MAX_WEIGHT)):
        line.join(name, ACME, weight, 60)
    line.leave()
    await turns()
    assert calls.sent == [["a", "b"]]
    calls.under_way[0].set()
    await turns()
    assert calls.sent == [["a", "b"]]  # c is alone, and so will the others be


async def test_room(calls: Calls) -> None:
    """A full line takes nobody more, and a crowded one nobody of whom half of it is already."""
    line = line_of(calls, waiting=8)
    await busy(line)
    for number in range(4):
        assert line.has_room(ACME)
        line.join(number, ACME, 1, 60)
    assert not line.has_room(ACME)
    for number in range(4):
        assert line.has_room(BETA)
        line.join(number, BETA if number % 2 else GAMMA, 1, 60)
    assert not line.has_room(BETA)
    line.leave()
    await turns()
    assert line.has_room(ACME)


async def test_room_is_counted_on(calls: Calls) -> None:
    """Who has half of a crowded line only since it is crowded may take no more; once it has moved on, they may."""
    line = line_of(calls, waiting=8)
    await busy(line)
    for account in (ACME, BETA, BETA, BETA):
        line.join("early", account, 1, 60)
    assert line.has_room(BETA)
    line.join("late", BETA, 1, 60)
    assert not line.has_room(BETA)
    assert line.has_room(ACME)
    line.leave()
    await turns()
    for account in (ACME, ACME, BETA, BETA):
        line.join("later", account, 1, 60)
    assert line.has_room(BETA)
    await line.aclose()


async def test_room_for_one(calls: Calls) -> None:
    """Where only one may wait, one may."""
    line = line_of(calls, waiting=1)
    assert line.has_room(ACME)
    line.join("a", ACME, 1, 60)
    assert not line.has_room(ACME)
    assert not line.has_room(BETA)
    await line.aclose()


async def test_waits_no_longer_than_it_can(calls: Calls) -> None:
    """Each that has waited too long hears so, in time, and is not sent; the others wait on."""
    line = line_of(calls)
    await busy(line)
    long, short, shorter = (line.join(name, ACME, 1, wait_s) for name, wait_s in (("a", 60), ("b", 0.02), ("c", 0.01)))
    assert await shorter.told == "late"
    assert not short.told.done()
    assert await short.told == "late"
    assert not long.told.done()
    line.join("d", ACME, 1, 60)
    line.leave()
    await turns()
    assert calls.sent == [["a", "d"]]


async def test_word_for_everybody(calls: Calls) -> None:
    """Whoever a call has no word for hears that it is lost, not nothing."""
    line = line_of(calls)
    told = [line.join(name, ACME, 1, 60).told for name in ("a", "silent")]
    await turns()
    calls.under_way[0].set()
    assert await asyncio.gather(*told) == ["a!", "lost"]


async def test_call_that_raises(calls: Calls) -> None:
    """A bug in the call is everybody's answer; the next call goes out."""
    line = line_of(calls)
    calls.error = ZeroDivisionError()
    told = [line.join(name, ACME, 1, 60).told for name in "ab"]
    await turns()
    calls.under_way[0].set()
    got = await asyncio.gather(*told, return_exceptions=True)
    assert [type(each) for each in got] == [ZeroDivisionError] * 2
    assert await line.join("c", ACME, 1, 60).told is ALONE


async def test_closing(calls: Calls) -> None:
    """Who waits hears that nothing was sent, who is under way that it may have been."""
    line = line_of(calls)
    sent = [line.join(name, ACME, 1, 60).told for name in "ab"]
    await turns()
    waiting = line.join("c", ACME, 1, 60)
    await line.aclose()
    assert await waiting.told == "late"
    assert await asyncio.gather(*sent) == ["lost"] * 2
    await turns()
    assert calls.sent == [["a", "b"]]


def test_leaving_with_a_loop_that_is_closed(calls: Calls) -> None:
    """A request that is collected with its loop lets nobody go: those behind it are gone, too."""
    loop = asyncio.new_event_loop()

    async def begin() -> tuple[Line, Waiting]:
        line = line_of(calls)
        await busy(line)
        behind = line.join("a", ACME, 1, 60)
        behind.told.add_done_callback(lambda told: None)
        return line, behind

    line, behind = loop.run_until_complete(begin())
    loop.close()
    line.leave()
    assert not behind.told.done()


async def test_empty_line_has_no_timer(calls: Calls) -> None:
    """A process may be frozen between requests: it is not to wake up for this."""
    line = line_of(calls)
    await busy(line)
    second = line.join("b", ACME, 1, 60)
    timers = [line._timer]
    line.leave()
    timers.append(line._timer)
    assert [timer is None for timer in timers] == [False, True]
    assert await second.told is ALONE
    third = line.join("c", ACME, 1, 0.01)
    assert await third.told == "late"
