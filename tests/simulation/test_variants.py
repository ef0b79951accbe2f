"""The simulation is not blind: it finds whatever of the source is broken on purpose."""

import json
import re
from pathlib import Path

import pytest

from tests.simulation.variants import VARIANTS, Variant
from tests.simulation.world import run

WITHIN_SEEDS = 1000

SEEDS: dict[str, int] = json.loads(Path(__file__).with_name("variants.json").read_text())
"""The first seed that found each variant when it was last looked for: tried first. A wrong one only costs time."""

_SLIPS = re.compile("TypeError|AttributeError|NameError|KeyError")
"""What a patch comes to that no longer fits the source."""


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_broken_variant_is_found(variant: Variant) -> None:
    """A source that breaks one rule breaks a promise within 1,000 seeds, and keeps it where it is whole."""
    seeds = [seed for seed in [SEEDS.get(variant.name, 0)] if seed < WITHIN_SEEDS]
    with variant.patch():
        found = next((world for world in map(run, [*seeds, *range(WITHIN_SEEDS)]) if world.problems), None)
    assert found is not None, f"nobody notices that it is broken: {variant.breaks}"
    assert not _SLIPS.search(str(found.problems)), "it is the variant that is broken"
    assert not run(found.seed).problems
