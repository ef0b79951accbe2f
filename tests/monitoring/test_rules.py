"""The alert rules, held by promtool against what Prometheus may have scraped."""

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from metered_billing import names

from .cases import CASES
from .programs import program
from .shipped import ALERTS, rules

pytestmark = pytest.mark.slow


def test_promtool_finds_nothing_wrong() -> None:
    """Neither with the file, nor with an expression or a template in it."""
    done = subprocess.run([program("promtool"), "check", "rules", ALERTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_in_its_case_and_no_other_does(tmp_path: Path) -> None:
    """Exactly the alerts that a case names fire, at its time."""
    document = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "name": case.name,
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname, severity) (ALERTS{alertstate="firing"})',
                        "eval_time": case.at,
                        "exp_samples": [
                            {"labels": f'{{alertname="MeteredBilling{name}", severity="{severity}"}}', "value": 1}
                            for name, severity in sorted(case.fires)
                        ],
                    }
                ],
            }
            for case in CASES
        ],
    }
    file = tmp_path / "cases.yml"
    file.write_text(json.dumps(document))
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    """With its severity: a rule that nobody has seen firing may never fire."""
    fired: set[tuple[str, str]] = set().union(*(case.fires for case in CASES))
    assert fired == {(rule["alert"].removeprefix("MeteredBilling"), rule["labels"]["severity"]) for rule in rules()}
    assert max(Counter(case.name for case in CASES).values()) == 1


def asked_by(rule: dict[str, Any], event: str) -> bool:
    return event in rule["expr"]


@pytest.mark.parametrize("event", names.ANOMALIES)
def test_every_event_that_is_counted_is_watched(event: str) -> None:
    """It is counted because somebody should look at it."""
    assert any(asked_by(rule, event) for rule in rules())
