"""The plugin in a run of its own, as its users have it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

APP = Path(__file__).with_name("shop.py").read_text(encoding="utf-8")

TESTS = """
import threading

import httpx
import pytest
from fastapi.testclient import TestClient
from shop import TEN, app


@pytest.fixture
def anyio_backend():
    return "asyncio"


def test_synchronous(billing):
    billing.grant("acme", 100)
    billing.fail_next("deduct", "lost reply")
    TestClient(app).post("/work", json=TEN)
    billing.assert_charged("acme", kept=8, refunded=2)


@pytest.mark.anyio
async def test_asynchronous(billing_service):
    billing_service.grant("acme", 100)
    async with billing_service.client(app) as client:
        await client.post("/work", json=TEN)
    billing_service.assert_charged("acme", kept=8, refunded=2)


def test_with_a_server(billing_server):
    billing_server.grant("acme", 100)
    with TestClient(app) as client:
        client.post("/work", json=TEN)
    billing_server.assert_balanced()


def test_in_vain(billing):
    billing.fail_next("refund", "503")


def test_that_fails_is_not_told_besides(billing):
    billing.fail_next("refund", "503")
    assert TEN is None


def test_both(billing, billing_server):
    pass


def test_nothing_is_left_of_those_before():
    import os

    assert "METERED_BILLING_CREDITS" not in os.environ
    assert [thread.name for thread in threading.enumerate() if "test service" in thread.name] == []
"""


ONLY = ("-p", "anyio", "-p", "pytest_metered_billing")


@pytest.fixture
def bare(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A run with this plugin and anyio's, and no other that happens to be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return pytester


def test_fixtures_in_a_run_of_their_own(bare: pytest.Pytester) -> None:
    """What nobody met is an error at the end of a test that passed, and of no other; two services are one too many."""
    bare.makepyfile(shop=APP, test_shop=TESTS)
    result = bare.runpytest_inprocess(*ONLY, "-W", "ignore::DeprecationWarning")
    result.assert_outcomes(passed=5, failed=1, errors=2)
    text = result.stdout.str()
    # With its margin: on a CI pytest says it once more, in the summary.
    assert text.count("E               AssertionError: nobody met what was to go wrong:") == 1
    assert "ERROR at teardown of test_in_vain" in text
    assert "refund: '503', 1 x, happened 0 x" in text
    assert "RuntimeError: one of billing, billing_service and billing_server at a time" in text


def test_plugin_that_is_blocked(pytester: pytest.Pytester) -> None:
    """Installed, its fixtures are there without a word; with `-p no:metered_billing` they are not."""
    entry = pytester.mkdir("metered_billing_test-0.dist-info")
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: metered-billing-test\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[pytest11]\npytest_metered_billing = pytest_metered_billing\n")
    pytester.syspathinsert()
    pytester.makepyfile("def test_one():\n    pass\n\n\ndef test_two(billing):\n    pass\n")
    pytester.runpytest_inprocess().assert_outcomes(passed=2)
    result = pytester.runpytest_inprocess("-p", "no:metered_billing")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'billing' not found*"])


def test_plugin_is_found_by_its_module_name() -> None:
    """So that `-p no:metered_billing` blocks it, and `-p pytest_metered_billing` loads it just once."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"pytest_metered_billing": "pytest_metered_billing"}


@pytest.mark.slow
def test_what_nobody_asks_for_is_not_imported() -> None:
    """pytest imports the plugin in every run, and that imports nothing; to name the kit's types is cheap, too."""
    code = (
        "import sys, pytest; before = set(sys.modules); import pytest_metered_billing;"
        " print(sorted(set(sys.modules) - before));"
        " import metered_billing.testing;"
        " print(sorted({'respx', 'fastapi', 'uvicorn', 'hypothesis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['pytest_metered_billing']", "[]"]


@pytest.mark.parametrize(
    ("missing", "module", "says"),
    [
        ("respx", "router", r"pip install 'metered-billing\[testing\]'"),
        ("fastapi", "service", r"pip install 'metered-billing\[service\]'"),
        ("uvicorn", "server", r"pip install 'metered-billing\[service\]'"),
        ("hypothesis", "strategies", "pip install hypothesis"),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, module: str, says: str) -> None:
    """With the command that installs it."""
    for name in [name for name in sys.modules if name.startswith("metered_billing.service")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"metered_billing.testing.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=says):
        __import__(f"metered_billing.testing.{module}")
