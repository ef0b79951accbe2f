"""A token that changes: read behind whoever uses it, once at a time, and stale rather than none."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from metered_billing.credits.token import (
    MAX_REJECTED_RETRY_S,
    STALE_RETRY_S,
    TTL_S,
    RotatingToken,
    TokenUnreadable,
)
from metered_billing.journal import lock
from metered_billing.runtime import Runtime
from tests.fakes import Inline

from .test_http import Luck


class Later:
    """A thread that does nothing until it is told to."""

    def __init__(self) -> None:
        self.submitted: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[[], Any], /) -> None:
        self.submitted.append(fn)

    def shutdown(self, wait: bool = True) -> None:
        pass

    def go(self) -> None:
        self.submitted.pop(0)()


class Place:
    """Where the token is kept, and the world around."""

    def __init__(self, value: Any = "one") -> None:
        self.value = value
        self.reads = 0
        self.time = 1000.0
        self.luck = Luck()
        self.luck.share = 0.5  # neither earlier nor later
        self.thread = Later()

    def read(self) -> Any:
        self.reads += 1
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value

    def token(self, thread: Any = None, **options: Any) -> RotatingToken:
        runtime = Runtime(monotonic=lambda: self.time, random=self.luck, executor=lambda: thread or Inline())
        return RotatingToken(self.read, runtime=runtime, **{"held": SecretStr("one"), **options})


@pytest.fixture
def place() -> Place:
    return Place()


def secret(token: RotatingToken) -> str | None:
    held = token.held()
    return None if held is None else held.get_secret_value()


ONE, TWO = SecretStr("one"), SecretStr("two")


# While it is used.


def test_held_token_is_not_read_again_before_its_time(place: Place) -> None:
    """What was read at the start serves for five minutes; then it is read once more."""
    token = place.token()
    place.value = "two"
    for _ in range(100):
        place.time += TTL_S / 101
        assert secret(token) == "one"
    assert place.reads == 0
    place.time += TTL_S / 100
    token.held()
    assert secret(token) == "two"
    assert place.reads == 1


@pytest.mark.parametrize(("share", "after_s"), [(0.0, 270), (1.0, 330)])
def test_processes_that_started_together_do_not_ask_together(place: Place, share: float, after_s: float) -> None:
    """A tenth earlier or later."""
    place.luck.share = share
    token = place.token()
    place.time += after_s - 1
    token.held()
    assert place.reads == 0
    place.time += 2
    token.held()
    assert place.reads == 1


def test_nobody_waits_for_a_token_that_is_read_anew(place: Place) -> None:
    """The old one serves meanwhile, however long it takes, and nobody else reads."""
    token = place.token(place.thread)
    place.value = "two"
    place.time += 400
    assert [secret(token) for _ in range(100)] == ["one"] * 100
    assert len(place.thread.submitted) == 1
    place.thread.go()
    assert secret(token) == "two"
    assert place.reads == 1


def test_token_that_cannot_be_read_stays(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """For a day, if need be; it is tried again every half minute, and said once an outage."""
    caplog.set_level(logging.INFO)
    token = place.token()
    for _ in range(2):
        place.value = TokenUnreadable("no permission")
        place.time += 400
        for _ in range(100):
            assert secret(token) == "one"
            place.time += STALE_RETRY_S + 1
        place.value = "one"
        token.held()
    assert place.reads == 202
    said = 'credits.token_stale reason="no permission"'
    assert caplog.messages == [said, said]
    assert all(entry.levelno == logging.WARNING for entry in caplog.records)


@pytest.mark.parametrize("value", ["", "hunter2\n", "hunter 2", "hünter2", None, ValueError("hunter2"), SystemExit(2)])
def test_what_is_no_token_replaces_none(place: Place, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A line break would write headers. Nothing of it, and of no exception's text, is logged."""
    token = place.token()
    place.value = value
    place.time += 400
    token.held()
    assert secret(token) == "one"
    assert place.reads == 1
    assert "credits.token_stale" in caplog.text
    assert "hunter" not in caplog.text


def test_another_token_is_said_and_not_shown(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """So that whoever rotates it sees that it arrived."""
    caplog.set_level(logging.INFO)
    token = place.token()
    place.value = "two"
    place.time += 400
    token.held()
    assert secret(token) == "two"
    assert [message.strip() for message in caplog.messages] == ["credits.token_rotated"]


def test_process_that_ends_reads_no_more(place: Place) -> None:
    """A thread cannot be had any more: what is held stays."""
    ended = Inline()
    ended.shutdown()
    token = place.token(ended)
    place.time += 400
    assert [secret(token), secret(token)] == ["one", "one"]
    assert place.reads == 0


# When it is rejected.


async def test_hundred_rejections_read_it_once(place: Place) -> None:
    """And each of them has the other token."""
    token = place.token(place.thread)
    place.value = "two"
    waiting = [asyncio.create_task(token.another_than(ONE)) for _ in range(100)]
    await asyncio.sleep(0)
    place.thread.go()
    assert await asyncio.gather(*waiting) == [TWO] * 100
    assert place.reads == 1
    assert await token.another_than(ONE) == TWO
    assert place.reads == 1


async def test_rejected_token_that_is_still_the_one_there_is_read_seldom(place: Place) -> None:
    """After 5 s, 10 s, … a minute: all requests are rejected now, in all processes."""
    token = place.token()
    reads: list[float] = []
    for _ in range(400):
        assert await token.another_than(ONE) is None
        if place.reads > len(reads):
            reads.append(place.time - 1000.0)
        place.time += 1
    assert reads == [0, 5, 15, 35, 75, 135, 195, 255, 315, 375]
    assert MAX_REJECTED_RETRY_S == 60
    place.value = "two"
    place.time += 60
    assert await token.another_than(ONE) == TWO
    for after_s, reads_more in ((0, 1), (4, 0), (1, 1)):  # and for the other one it begins anew
        place.time += after_s
        before = place.reads
        assert await token.another_than(TWO) is None
        assert place.reads - before == reads_more


async def test_each_token_is_read_for_at_once(place: Place) -> None:
    """Two rotations in a row: the second does not wait for the first one's patience."""
    token = place.token()
    place.value = "two"
    assert await token.another_than(ONE) == TWO
    place.value = "three"
    assert await token.another_than(TWO) == SecretStr("three")
    assert place.reads == 2


async def test_reading_that_began_before_the_rotation_is_followed_by_another(place: Place) -> None:
    """It brings the old token, which was rejected meanwhile."""
    token = place.token(place.thread)
    place.time += 400
    token.held()
    waiting = asyncio.create_task(token.another_than(ONE))
    await asyncio.sleep(0)
    place.thread.go()
    place.value = "two"
    await asyncio.sleep(0.01)
    place.thread.go()
    assert await waiting == TWO
    assert place.reads == 2


async def test_rejection_while_it_cannot_be_read(place: Place) -> None:
    """There is no other, and nobody waits for ever."""
    token = place.token()
    place.value = OSError("hunter2")
    assert await token.another_than(ONE) is None
    assert secret(token) == "one"


async def test_who_waits_and_is_cancelled_cancels_only_the_wait(place: Place) -> None:
    """The others have their token."""
    token = place.token(place.thread)
    place.value = "two"
    leaving, staying = (asyncio.create_task(token.another_than(ONE)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    place.thread.go()
    assert await staying == TWO
    assert leaving.cancelled()


def test_many_loops_read_it_once() -> None:
    """Several event loops in threads share one token; a real thread reads it."""
    loops = 4
    place = Place("two")
    together = threading.Barrier(loops + 1)

    def read() -> Any:
        together.wait(10)
        return place.read()

    token = RotatingToken(read, held=ONE)
    found: list[Any] = []

    def loop() -> None:
        async def main() -> None:
            waiting = asyncio.create_task(token.another_than(ONE))
            await asyncio.sleep(0)
            together.wait(10)
            found.append(await waiting)

        asyncio.run(main())

    threads = [threading.Thread(target=loop) for _ in range(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [TWO] * loops
    assert place.reads == 1


async def test_forked_child_reads_it_in_a_thread_of_its_own(place: Place) -> None:
    """Its parent's has not come along; what that was reading, nobody here brings."""
    threads: list[Any] = [place.thread, Inline()]
    runtime = Runtime(monotonic=lambda: place.time, random=place.luck, executor=lambda: threads.pop(0))
    token = RotatingToken(place.read, held=ONE, runtime=runtime)
    place.time += 400
    assert secret(token) == "one"  # the parent reads
    token._lock.acquire()
    lock._forked()
    place.value = "two"
    assert await asyncio.wait_for(token.another_than(ONE), 5) == TWO


# When there is none yet.


async def test_first_token_is_read_when_it_is_needed(place: Place) -> None:
    """Not before."""
    token = place.token(place.thread, held=None)
    assert place.thread.submitted == []
    assert token.held() is None
    waiting = asyncio.create_task(token.another_than(None))
    await asyncio.sleep(0)
    place.thread.go()
    assert await waiting == ONE
    assert place.reads == 1
