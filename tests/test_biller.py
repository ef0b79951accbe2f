"""The biller: whatever goes wrong, at whichever await, the credits add up afterwards."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metered_billing.errors import BillingError
from tests.fakes import LOST, NOT_SENT, UNHEARD, Accident, Bank, World, striking


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# Which points a request passes, by what comes of it.
PATHS: dict[str, tuple[Callable[[Bank], None], list[str]]] = {
    "some failed": (
        lambda bank: None,
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
    "declined": (lambda bank: setattr(bank, "balance", 5), ["open", "deduct", "opened-declined"]),
    "no voids": (
        lambda bank: (setattr(bank, "has_voids", False), bank.faults.update(deduct=[UNHEARD]))[0],
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
        # Copies that were under way all the time change nothing any more.
        await world.biller.drain(1.0)
        assert len(asyncio.all_tasks()) == 1

    world.run(recovering)
    world.holds(granted)
