"""A short rolling restart, as `make rolling` runs one at the manifest's own pace."""

import asyncio
from pathlib import Path

import pytest

from tests.deploy.nginx import NoNginx, program
from tests.rolling.__main__ import failures, roll
from tests.rolling.picture import Answer


@pytest.mark.slow
@pytest.mark.long
def test_nobody_notices_a_rolling_restart(pg_url: str, tmp_path: Path) -> None:
    """Every replica of app and service is replaced under load: no request fails, and reconcile prints zero."""
    try:
        program()
    except NoNginx as error:
        pytest.skip(str(error))
    picture = tmp_path / "rolling.svg"
    assert asyncio.run(roll(pg_url, clients=3, pace=0.1, seed=7, pause_s=0.15, to=picture))
    assert "app-4" in picture.read_text()


def test_request_that_fails_is_found() -> None:
    """And a replica that nothing was tried on: else a restart would prove nothing."""
    answers = [Answer(0, "app-1", 200), Answer(0, "app-2", 503), Answer(0, "", None), Answer(0, "", None)]
    assert failures(answers, ["app-1", "app-2", "app-3"]) == ["1 x 503", "2 x no answer", "app-3 answered nothing"]
    assert failures(answers[:1], ["app-1"]) == []
