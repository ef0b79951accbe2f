"""The pytest plugin of metered-billing: fixtures for tests of metered routes. See docs/how-to/test-your-routes.md.

pytest imports this in every run of an environment that it is installed in, so it imports nothing: what a fixture
needs comes with the first test that asks for it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from metered_billing.testing import Billing


@pytest.fixture
def billing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Billing]":
    """A credits service in memory; every metered app of this process is billed there."""
    yield from _opened("open_in_memory", request, tmp_path_factory)


@pytest.fixture
def billing_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Billing]":
    """The reference credits service in process: as `billing`, with the real service's own checks."""
    yield from _opened("open_in_process", request, tmp_path_factory)


@pytest.fixture
def billing_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Billing]":
    """The reference credits service on a socket: also for apps in other processes."""
    yield from _opened("open_on_a_socket", request, tmp_path_factory)


def _opened(name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Billing]":
    from metered_billing.testing import opening

    plugins = request.config.pluginmanager
    if not plugins.has_plugin(_Failures.NAME):
        plugins.register(_Failures(), _Failures.NAME)
    # Not in the test's own directory: what a test finds there is its own.
    with getattr(opening, name)(tmp_path_factory.mktemp("metered-billing")) as billing:
        yield billing
        if not request.node.stash.get(_FAILED, False):
            billing.assert_all_met()


_FAILED = pytest.StashKey[bool]()


class _Failures:
    """Notes which tests have failed: those need not be told besides that something did not go wrong as planned."""

    NAME = "metered_billing_failures"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: "pytest.CallInfo[Any]") -> Any:
        report = yield
        if report.when == "call" and not report.passed:
            item.stash[_FAILED] = True
        return report
