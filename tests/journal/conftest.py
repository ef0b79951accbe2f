"""Each journal in turn."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from metered_billing.journal import Journal
from tests import postgres
from tests.journal.engines import Engine, Postgres, engine


@pytest.fixture(scope="session")
def one_url(pg_server: str) -> Iterator[str]:
    """One database for all of these tests: to make one takes half a second."""
    with postgres.new_database(pg_server) as url:
        yield url


@pytest.fixture
def clean_url(one_url: str) -> str:
    """The same without tables."""
    with psycopg.connect(one_url, autocommit=True) as connection:
        connection.execute("SET client_min_messages = error; DROP SCHEMA IF EXISTS metered_billing CASCADE")
    return one_url


@pytest.fixture(params=["sqlite", "postgres"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    """Where journals are kept, by each engine."""
    url = request.getfixturevalue("clean_url") if request.param == "postgres" else ""
    async with engine(request.param, tmp_path, url) as made:
        yield made


@pytest.fixture
async def ours(place: Engine) -> Journal:
    """A journal in its place."""
    journal = place.journal()
    await journal.start("")
    return journal


@pytest.fixture
async def shared(clean_url: str) -> AsyncIterator[Postgres]:
    """PostgreSQL alone."""
    async with engine("postgres", Path(), clean_url) as made:
        assert isinstance(made, Postgres)
        yield made
