"""One PostgreSQL database: group commit, rollbacks, and a server that goes away."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from metered_billing.postgres import PostgresDatabase
from metered_billing.runtime import Runtime


@pytest.fixture
async def database(pg_url: str) -> AsyncIterator[PostgresDatabase]:
    database = PostgresDatabase(pg_url, Runtime())
    await database.run(lambda c: c.execute("CREATE SCHEMA metered_billing") and c.execute("CREATE TABLE notes (n int)"))
    yield database
    await database.close()
    database.shutdown()


def note(n: int) -> Any:
    return lambda connection: connection.execute("INSERT INTO notes VALUES (%s)", (n,)).rowcount


async def notes(database: PostgresDatabase) -> list[int]:
    return await database.run(lambda c: [n for (n,) in c.execute("SELECT n FROM notes ORDER BY n").fetchall()])


async def test_operation_that_raises_is_rolled_back_alone(database: PostgresDatabase) -> None:
    """Its neighbours in the same commit go through."""

    def fail(connection: Any) -> None:
        note(99)(connection)
        raise ValueError("a bug")

    results = await asyncio.gather(
        database.run(note(1)), database.run(fail), database.run(note(2)), return_exceptions=True
    )
    assert [type(result) for result in results] == [int, ValueError, int]
    assert await notes(database) == [1, 2]
