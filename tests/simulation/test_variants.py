"""The simulation is not blind: it finds whatever of the source is broken on purpose."""

import pytest

from tests.simulation.variants import VARIANTS, Variant
from tests.simulation.world import run

WITHIN_SEEDS = 1000


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_broken_variant_is_found(variant: Variant) -> None:
    """A source that breaks one rule breaks a promise within 1,000 seeds, and keeps it where it is whole."""
    with variant.patch():
        found = next((seed for seed in range(WITHIN_SEEDS) if run(seed).problems), None)
    assert found is not None, f"nobody notices that it is broken: {variant.breaks}"
    assert not run(found).problems
