"""A short storm on each engine, as `make chaos` runs long ones."""

import asyncio

import pytest

from tests import postgres
from tests.chaos.__main__ import storm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def test_books_balance_after_a_storm(engine: str) -> None:
    """Real processes, killed about every second: each request costs what its client saw, and reconcile prints zero."""
    if engine == "postgres":
        try:
            postgres.binaries()
        except postgres.NoPostgres as error:
            pytest.skip(str(error))
    assert asyncio.run(storm(engine, seconds=4, seed=7))
