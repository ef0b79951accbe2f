"""The files that come with the package, read."""

import json
from pathlib import Path
from typing import Any

import yaml

import metered_billing

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(metered_billing.__file__).parent / "monitoring"
ALERTS = DIRECTORY / "alerts.yml"
DASHBOARD = DIRECTORY / "dashboard.json"


def rules() -> list[dict[str, Any]]:
    """Every alert rule, in order."""
    document = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Every panel of the dashboard, rows too, in order."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def queries() -> dict[str, str]:
    """Each query of the dashboard, by panel and letter."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel.get("targets", ())
    }
