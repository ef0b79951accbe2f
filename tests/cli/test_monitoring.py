"""`monitoring`: the files that come with the package, in a directory of the user's."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.shipped import ALERTS, DASHBOARD


def test_both_files_are_written_as_they_are(run: Any) -> None:
    """Into a directory that is made; once more changes nothing."""
    for _ in range(2):
        done = run("monitoring", "some/where")
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines()[1].startswith("some/where/alerts.yml: for Prometheus")
    assert (Path("some/where") / ALERTS.name).read_bytes() == ALERTS.read_bytes()
    assert (Path("some/where") / DASHBOARD.name).read_bytes() == DASHBOARD.read_bytes()


def test_alerts_link_to_the_users_own_runbook(run: Any) -> None:
    """Every one of them."""
    assert run("monitoring", ".", "--runbook", "https://wiki.example.com/runbook/").code == 0
    rules = [rule for group in yaml.safe_load(Path("alerts.yml").read_text())["groups"] for rule in group["rules"]]
    links = {rule["annotations"]["runbook_url"] for rule in rules}
    assert "https://wiki.example.com/runbook/drift.md" in links
    assert all(link.startswith("https://wiki.example.com/runbook/") for link in links)


@pytest.mark.parametrize("url", ["", "https://x/ y", "x: {{ y }}", "https://x/#y", "a\nb"])
def test_runbook_that_would_break_the_file_is_refused(run: Any, url: str) -> None:
    """It stands in YAML, and in Prometheus' templates."""
    done = run("monitoring", ".", "--runbook", url)
    assert (done.code, done.out) == (2, "")
    assert not Path("alerts.yml").exists()


def test_directory_that_cannot_be_made_is_a_sentence(run: Any) -> None:
    """With its name."""
    Path("file").write_text("")
    done = run("monitoring", "file")
    assert (done.code, done.err) == (1, "metered-billing: file: File exists.\n")
