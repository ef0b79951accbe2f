"""The public names, as a type checker sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
