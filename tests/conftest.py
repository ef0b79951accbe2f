"""What all tests share."""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio alone: the library is built on it."""
    return "asyncio"
