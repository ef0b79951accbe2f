"""The simulation is not blind: it finds whatever of the source is broken on purpose."""

import re

import pytest

from tests.simulation.runner import main
from tests.simulation.variants import SEEDS, VARIANTS, Variant
from tests.simulation.world import run

WITHIN_SEEDS = 1000

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


@pytest.mark.no_cover
def test_broken_rule_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    """For a reader of the docs: the rule, and who loses what without it."""
    assert main(["20", "--broken", "deduction_is_sent_before_it_is_on_record"]) == 0
    said = capsys.readouterr().out
    assert "`opened` is on record before the first send." in said
    assert re.search(r"\d+ deducted, 0 back: nothing is on record", said)
    assert main(["20", "--broken", "gravity"]) == 2
