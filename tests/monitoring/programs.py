"""Prometheus' own programs, where they are to be had."""

import shutil
import sys
from pathlib import Path

import pytest


def program(name: str) -> str:
    """Where `prometheus` or `promtool` is: of `make test`, else the machine's. Skips the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.prefix) / "prometheus" / "usr" / "bin")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: `make test` fetches it from Debian's packages where it can")
    return found
