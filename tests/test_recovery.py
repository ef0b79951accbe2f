"""Recovery by a schedule: it finishes what dead processes left, says what came of it, and leaves nothing open."""

import asyncio
from pathlib import Path

import pytest

from metered_billing.charge import Reported
from metered_billing.recovery import Recovered, recover
from metered_billing.settings import Settings
from tests.fakes import LOST, NOT_SENT, Accident, World, striking
from tests.stand import Stand


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def killed(world: World, at: str) -> None:
    """A process died here; another one can know it by now."""

    async def main() -> None:
        with striking(world, Accident("kill", at)):
            request = asyncio.ensure_future(world.serve())
            await world.struck.wait()
            request.cancel()
            await asyncio.wait({request})

    world.run(main)
    world.bury()
    world.boot()


def recovered(world: World, within_s: float = 45.0) -> Recovered:
    async def main() -> Recovered:
        return await recover(
            within_s, credits=world.bank, journal=world.journal, runtime=world.runtime, telemetry=world.telemetry
        )

    return world.run(main)


@pytest.mark.parametrize("at", ["deduct…", "…deduct", "deducted-refunding…", "refund…", "…refund"])
def test_what_a_killed_process_left_is_final(world: World, at: str) -> None:
    """Wherever it died. The next time nothing is left to do."""
    killed(world, at)
    assert recovered(world) == Recovered(tried=1, left=0)
    world.holds()
    assert recovered(world) == Recovered(tried=0, left=0)
    assert not world.bank.started
    assert world.inner.owner == ""


def test_refund_that_has_to_wait_is_waited_for_while_there_is_time(world: World) -> None:
    """It is tried again when it is due."""
    killed(world, "refund…")
    world.bank.faults["refund"] = [LOST, LOST]
    assert recovered(world) == Recovered(tried=3, left=0)
    assert 1.0 < world.time < 5.0
    world.holds()


def test_service_that_is_down_leaves_all_for_the_next_time(world: World) -> None:
    """It takes as long as it may, and no longer; what is left is counted, and lost to nobody."""
    killed(world, "refund…")
    world.bank.always["refund"] = NOT_SENT
    came_of_it = recovered(world, within_s=20.0)
    assert came_of_it.left == 1
    assert 3 <= came_of_it.tried <= 6
    assert world.time == pytest.approx(20.0, abs=0.1)
    world.bank.always.clear()
    world.time += 3600.0
    assert recovered(world).left == 0
    world.holds()


def test_what_a_living_process_has_is_left_to_it(world: World) -> None:
    """It may run beside the apps."""

    async def main() -> None:
        await world.biller.start()
        other = World(world.directory).inner
        came_of_it = await recover(
            10.0, credits=world.bank, journal=other, runtime=world.runtime, telemetry=world.telemetry
        )
        assert came_of_it == Recovered(tried=0, left=0)
        await world.serve(event=Reported(10))
        await world.biller.drain(1.0)

    world.run(main)
    world.holds()


async def test_what_is_not_given_comes_from_the_settings(bench: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the middleware."""
    monkeypatch.chdir(bench.directory)
    monkeypatch.setenv("METERED_BILLING_CREDITS", "sqlite:///credits.db")
    await bench.credits.aclose()
    assert await recover(settings=Settings(journal="elsewhere")) == Recovered(0, 0)
    assert (bench.directory / "elsewhere").is_dir()
    monkeypatch.delenv("METERED_BILLING_CREDITS")
    with pytest.raises(ValueError, match="does not know where credits are kept"):
        await recover()
