"""The house: imports run downwards, the core needs little, and nothing global is touched."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metered_billing

SOURCE = Path(metered_billing.__file__).parent

FLOORS = [
    {"bounds", "charge", "runtime", "names", "presence"},
    {
        "commits",
        "errors",
        "outcomes",
        "explain",
        "reconcile",
        "choosing",
        "sqlite",
        "postgres",
        "schemas",
        "routes",
        "ssm",
    },
    {"sources"},
    {"telemetry", "ledger", "journal", "credits"},
    {"settings", "loops", "outage", "undoing", "settler", "recovery", "problems", "conformance"},
    {"biller"},
    {"middleware"},
    {"metered"},
    {"__init__"},
]
"""From the ground up: a room imports from its own floor and from those below."""

APART = {
    "service": {
        "bounds",
        "charge",
        "commits",
        "errors",
        "runtime",
        "schemas",
        "sqlite",
        "postgres",
        "ledger",
        "names",
        "service",
    }
}
"""The credits service knows nothing of the biller, nor of the middleware."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metered_billing"):
            names = [node.module or ""]
            if node.module == "metered_billing":
                names = [f"metered_billing.{alias.name}" for alias in node.names]
            found |= {room(name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.startswith("metered_billing")}
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_downwards(file: Path) -> None:
    """No room imports from a floor above its own."""
    here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    if here in ("cli", "testing"):
        return  # the roof
    if here in APART:
        assert imports(file) <= APART[here]
        return
    floor = next(number for number, rooms in enumerate(FLOORS) if here in rooms)
    allowed = set().union(*FLOORS[: floor + 1])
    assert imports(file) <= allowed


def test_pure_rooms_do_no_io() -> None:
    """The state machine and the readers import nothing that could."""
    banned = {"asyncio", "httpx", "starlette", "sqlite3", "os", "time", "random", "socket", "structlog"}
    for file in [SOURCE / "charge.py", *sorted((SOURCE / "outcomes").rglob("*.py"))]:
        tree = ast.parse(file.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not banned & {name.split(".")[0] for name in names}, file.name


def test_library_asserts_nothing() -> None:
    """`python -O` strips asserts: an invariant is a real exception."""
    for file in FILES:
        assert not [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)], file.name


def test_core_needs_neither_fastapi_nor_an_sdk() -> None:
    """What an app that only uses the middleware imports."""
    code = (
        "import sys, metered_billing\n"
        "heavy = {'structlog', 'fastapi', 'opentelemetry.sdk', 'typer', 'uvicorn', 'pytest', 'hypothesis'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_few() -> None:
    """What is public is kept for ever: 14 names at the most."""
    assert len(metered_billing.__all__) <= 14
    assert all(hasattr(metered_billing, name) for name in metered_billing.__all__)


@pytest.mark.xdist_group("house")
def test_tests_that_share_a_fixture_share_a_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist reads the groups: without a word it would start each demo and each browser once a worker."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("these tests do not run in groups: `make test` lets them")
    assert request.node.nodeid.endswith("@house")
