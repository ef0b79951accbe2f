"""What waits on an event loop: one timer ends it all."""

import asyncio
from pathlib import Path
from typing import Any

from metered_billing.loops import Deadlines
from tests.fakes import World


def test_what_is_late_is_ended_each_at_its_time(tmp_path: Path) -> None:
    """By one timer, whatever became of those in front of it."""
    world = World(tmp_path)
    late: list[tuple[float, str]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop)
        waiting: dict[str, asyncio.Future[Any]] = {}

        def tell(future: asyncio.Future[Any]) -> None:
            late.append((round(world.time, 3), next(name for name, one in waiting.items() if one is future)))
            future.set_result(None)

        for name in ("done", "first", "cancelled", "second", "in time"):
            waiting[name] = loop.create_future()
            deadlines.watch(waiting[name], 5.0, tell)
            await asyncio.sleep(0.5)
        waiting["done"].set_result(None)
        waiting["cancelled"].cancel()
        waiting["in time"].set_result(None)
        await asyncio.sleep(20.0)
        waiting["later"] = loop.create_future()
        deadlines.watch(waiting["later"], 5.0, tell)
        assert len(deadlines._watched) == 1
        await waiting["later"]

    world.run(main)
    assert late == [(5.5, "first"), (6.5, "second"), (27.5, "later")]


def test_what_is_over_is_not_kept(tmp_path: Path) -> None:
    """Thousands a second would be held for as long as one may take."""
    world = World(tmp_path)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop)
        for _ in range(100):
            future = loop.create_future()
            deadlines.watch(future, 5.0, lambda future: None)
            future.set_result(None)
        assert len(deadlines._watched) == 1

    world.run(main)


def test_where_nobody_waits_there_is_no_timer(tmp_path: Path) -> None:
    """A process may be frozen then. Where somebody waits it stays, and ends that at its time."""
    world = World(tmp_path)

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        deadlines = Deadlines(loop)
        deadlines.let_go()
        first, second = loop.create_future(), loop.create_future()
        for future in (first, second):
            deadlines.watch(future, 5.0, lambda future: future.set_result("late"))
        first.set_result(None)
        deadlines.let_go()
        assert await second == "late"
        third = loop.create_future()
        deadlines.watch(third, 5.0, lambda future: future.set_result("late"))
        third.set_result(None)
        deadlines.let_go()
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
        deadlines.watch(fourth := loop.create_future(), 5.0, lambda future: future.set_result("late"))
        assert await fourth == "late"

    world.run(main)
