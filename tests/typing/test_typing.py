"""The public names, as a type checker sees them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import metered_billing

HERE = Path(__file__).parent


@pytest.mark.slow
def test_documented_uses_are_accepted_and_wrong_ones_refused() -> None:
    """`accepts.py` has no error; `refuses.py` has one on each line that ignores one."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={os.devnull}", "accepts.py", "refuses.py"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ignored = (HERE / "refuses.py").read_text(encoding="utf-8").count("# type: ignore[")
    assert ignored > 30


@pytest.mark.slow
def test_pyright_accepts_documented_uses(tmp_path: Path) -> None:
    """As editors show it: what `accepts.py` does is known in full, and the programs of the docs have no error."""
    root = HERE.parents[1]
    for path in [HERE / "accepts.py", *(root / "docs" / "examples").glob("*.py")]:
        mode = "strict" if path.parent == HERE else "standard"
        text = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(f"# pyright: {mode}\n{text}", encoding="utf-8")
    settings = {"extraPaths": [str(Path(metered_billing.__file__).parents[1])]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    told = json.loads(done.stdout)
    assert told["generalDiagnostics"] == []
    assert told["summary"]["filesAnalyzed"] > 10
