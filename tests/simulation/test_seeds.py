"""The promises under every fault, over the everyday seeds; `make simulate` runs many more."""

import os
import subprocess
import sys

import pytest

from tests.simulation.runner import blind_to, run_all, trace_of
from tests.simulation.world import run

EVERYDAY = [*range(120), 274]
"""The last is one of the few in which a refund of a part meets a void of support's."""


@pytest.mark.no_cover
def test_everyday_seeds_keep_every_promise_and_leave_nothing_untried() -> None:
    """Every promise holds in each run; every fault has struck, and every row of the table of states has happened."""
    failed, coverage = run_all(EVERYDAY, 2)
    assert not failed, f"the trace of seed N: make simulate SEEDS=seed:N; {failed}"
    assert not blind_to(coverage)


_DIGEST = """
import hashlib
from tests.simulation.runner import trace_of
from tests.simulation.world import run
worlds = [run(seed) for seed in (7, 120, 156)]
print(hashlib.sha256("".join(line for world in worlds for line in trace_of(world)).encode()).hexdigest())
"""


def test_seed_run_twice_is_the_same_run() -> None:
    """A seed's trace is the same again, in the same process."""
    assert list(trace_of(run(7))) == list(trace_of(run(7)))


@pytest.mark.slow
def test_seed_run_elsewhere_is_the_same_run() -> None:
    """A seed's trace does not depend on the process that runs it, nor on how it hashes."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "random")
    }
    assert len(digests) == 1


@pytest.mark.no_cover
def test_apps_that_settle_inline_keep_every_promise() -> None:
    """And rest whenever no request is under way."""
    failed = [(seed, world.problems) for seed in range(12) if (world := run(seed, inline=True)).problems]
    assert not failed
