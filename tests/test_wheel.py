"""What people install: the wheel, built as for a release, in an environment that has nothing else."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")

NO_REGISTRY = re.compile(r"error sending request|dns error|Connection refused|timed out|Network is unreachable", re.I)

pytestmark = pytest.mark.slow

FIRST_REQUEST = '''
"""A first metered request, with nothing installed but the package and what it needs."""

import asyncio
import importlib.util
import sys

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import metered_billing
from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered, settled

assert metered_billing.__file__.startswith(sys.prefix), metered_billing.__file__
unwanted = ["fastapi", "uvicorn", "typer", "pytest", "opentelemetry.sdk", "psycopg", "boto3", "httptools"]
found = [name for name in unwanted if importlib.util.find_spec(name)]
assert not found, found


@metered(cost=3)
async def work(request: Request) -> JSONResponse:
    return JSONResponse({"results": [{"status": "ok"}, {"status": "failed"}, {"status": "ok"}]})


async def main() -> None:
    ledger = SqlCredits("credits.db")
    await ledger.grant("acme", None, amount=10, reason="welcome", idempotency_key="g")
    app = Starlette(routes=[Route("/work", work, methods=["POST"])])
    app.add_middleware(
        MeteredBillingMiddleware, credits=ledger, journal="journal", account=lambda request: Account("acme")
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        answer = await client.post("/work")
    assert answer.status_code == 200, answer.text
    await settled()
    print(answer.headers["credits-deducted"], answer.headers["credits-refunded"], await ledger.balance("acme", None))
    await ledger.aclose()


asyncio.run(main())
'''


def uv(*arguments: str | Path) -> None:
    """Run uv; skip only where it reaches no registry."""
    command = [str(UV), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment())
    if done.returncode and NO_REGISTRY.search(done.stderr):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    """Without what points into this project."""
    hidden = ("PYTHON", "VIRTUAL_ENV", "METERED_BILLING", "OTEL_", "COVERAGE", "COV_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sdist lies, and the wheel that is made of it."""
    if not UV.exists():
        pytest.skip("no uv here, for pip could not fetch it")
    directory = tmp_path_factory.mktemp("built")
    uv("build", "--out-dir", directory, ROOT)
    return directory


def wheel(directory: Path) -> Path:
    (found,) = directory.glob("*.whl")
    return found


def contents(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    """Each file of it, typed, with the dashboard and the alerts; no tests, no demo, nothing of this machine."""
    held = contents(wheel(built))
    package = {name for name in held if ".dist-info/" not in name}
    source = ROOT / "src"
    expected = {
        str(file.relative_to(source))
        for file in source.rglob("*")
        if file.is_file() and file.suffix != ".pyc" and ".egg-info" not in str(file)
    }
    assert package == expected
    shipped = ("py.typed", "monitoring/alerts.yml", "monitoring/dashboard.json")
    assert {f"metered_billing/{name}" for name in shipped} <= package
    metadata = next(text for name, text in held.items() if name.endswith("METADATA")).decode()
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert "License-Expression: MIT" in metadata
    assert str(ROOT).encode() not in b"".join(held.values())
    lines = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and ";" not in line]
    extra = ("fastapi", "uvicorn", "typer", "pytest", "boto3", "psycopg")
    assert lines
    assert not [line for line in lines if line.split()[1].startswith(extra)]


def test_sdist_is_enough_to_build_the_same(built: Path, tmp_path: Path) -> None:
    """The wheel that is built of it is the one that is built here, file by file; and tests and docs are in it."""
    uv("build", "--wheel", "--out-dir", tmp_path, ROOT)
    assert contents(wheel(built)) == contents(wheel(tmp_path))
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"SECURITY.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "tests/test_wheel.py"} <= names
    assert not [name for name in names if re.search(r"\.pyc$|\.db$|^\.venv|^\.demo|__pycache__", name)]


def test_first_metered_request_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    """With what the core needs and no extra: charged, refunded; the command line says what it lacks."""
    venv = tmp_path / "venv"
    uv("venv", "--quiet", "--python", sys.executable, venv)
    install: list[str | Path] = [
        "pip",
        "install",
        "--quiet",
        "--python",
        venv / "bin" / "python",
        "-c",
        ROOT / "constraints.txt",
    ]
    uv(*install, wheel(built))

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        where = tmp_path / "empty"
        where.mkdir(exist_ok=True)
        return subprocess.run(
            [str(venv / "bin" / command[0]), *command[1:]],
            cwd=where,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    (tmp_path / "first.py").write_text(FIRST_REQUEST)
    done = run("python", "-W", "error", "-I", str(tmp_path / "first.py"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 1 8\n", "")

    lacking = run("metered-billing", "--help")
    assert lacking.returncode == 1
    assert "pip install 'metered-billing[service]'" in lacking.stderr
    assert "Traceback" not in lacking.stderr

    uv(*install, f"metered-billing[service] @ {wheel(built).as_uri()}")
    helped = run("metered-billing", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert {"serve", "token", "grant", "explain", "monitoring"} <= set(helped.stdout.split())
    assert run("metered-billing", "monitoring", "out").returncode == 0
    assert (tmp_path / "empty" / "out" / "alerts.yml").exists()
