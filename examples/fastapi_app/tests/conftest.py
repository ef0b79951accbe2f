"""What the app's tests share: an app that cuts nothing out, for they look at what it charges."""

import os
from pathlib import Path
from unittest import mock

import pytest

# Before it is imported: the model takes a while to load.
with mock.patch.dict(os.environ, METERED_BILLING_DEMO_CUTOUT="stub"):
    from examples.fastapi_app import app
from examples.fastapi_app.cutout import stub
from examples.fastapi_app.studio import Studio


@pytest.fixture(autouse=True)
def empty_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut out is thrown away after the test."""
    monkeypatch.setattr(app, "studio", Studio(tmp_path, stub))


@pytest.fixture
def anyio_backend() -> str:
    """asyncio alone: metered-billing is built on it."""
    return "asyncio"
