"""What all tests share."""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from metered_billing import cli
from tests import postgres
from tests.stand import Stand, stand

# A busy machine is no failure: what an example takes is not what it is tried for.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
# `make fuzz`: what is tried a hundred times each day, or fewer, a hundred times that.
hypothesis.settings.register_profile(
    "fuzz", hypothesis.settings.get_profile("patient"), max_examples=int(os.environ.get("EXAMPLES", "10000"))
)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio alone: the library is built on it."""
    return "asyncio"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Stand]:
    """Credits, a journal and telemetry to try an app on."""
    async with stand(tmp_path) as bench:
        yield bench


@pytest.fixture(scope="session")
def pg_server() -> Iterator[str]:
    """The URL of a real PostgreSQL server."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(postgres.running())
        except postgres.NoPostgres as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture
def pg_url(pg_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of the test's own."""
    with postgres.new_database(pg_server) as url:
        yield url


class Run:
    """The outcome of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command in this process, in an empty directory and environment."""
    for name in [name for name in os.environ if name.startswith("METERED_BILLING")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **environment: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["metered-billing", *arguments])
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(f"METERED_BILLING_{name}", value)
            with pytest.raises(SystemExit) as left:
                cli.main()
        captured = capsys.readouterr()
        return Run(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def pg_shared(pg_server: str) -> Iterator[str]:
    """The URL of a database for many tests, one after another."""
    with postgres.new_database(pg_server) as url:
        yield url


@pytest.fixture
def pg_clean(pg_shared: str) -> str:
    """The URL of a database without tables of ours; made faster than a new one."""
    postgres.no_tables(pg_shared)
    return pg_shared


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", type=Path, default=None, help="where the browser puts its pictures of the demo")


def pytest_collection_finish() -> None:
    """What all modules have brought along stays: the garbage collector need not look at it again and again. But for
    the levels of logging that the demo sets when it is imported: no test is to depend on who else is collected."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("metered_billing").setLevel(logging.NOTSET)
    gc.collect()
    gc.freeze()
    gc.collect()  # it counts what it has to look at only now, and goes by that: else it would let much pile up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
