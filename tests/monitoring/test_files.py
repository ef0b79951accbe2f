"""The dashboard and the alert rules that come with the package: made by a script, complete, and in order."""

import re
import sys
from typing import Any

import pytest

from metered_billing import names
from metered_billing.cli import textfile
from tests.docs.pages import DOCS, UPDATE

from .shipped import DIRECTORY, panels, queries, rules

sys.path.insert(0, str(DOCS))
import make_monitoring
from monitoring.hurry import Pace

UNITS = {names.METRIC_UNSETTLED_AGE: "_seconds", names.METRIC_DURATION: "_seconds"}


@pytest.mark.parametrize("name", ["alerts.yml", "dashboard.json"])
def test_files_are_what_the_script_makes(name: str) -> None:
    """`python docs/make_monitoring.py` would change nothing."""
    made = make_monitoring.files()[name]
    if UPDATE:
        (DIRECTORY / name).write_text(made, encoding="utf-8")
    assert (DIRECTORY / name).read_text(encoding="utf-8") == made


def test_hurried_rules_differ_in_nothing_but_time() -> None:
    """Every window, delay and age is divided, so that a test of them is one of the rules themselves."""
    timed = re.compile(r"\b\d+(ms|[smhd])\b|> [\d.]+$", re.M)

    def without_times(text: str) -> str:
        return timed.sub("TIME", text)

    real, hurried = make_monitoring.files()["alerts.yml"], make_monitoring.files(100)["alerts.yml"]
    assert without_times(hurried) == without_times(real)
    assert "[3000ms]" in hurried
    assert (Pace(100)("5m"), Pace(100).seconds("5m"), Pace(100)("1m")) == ("3000ms", "3", "600ms")


def test_money_comes_first_in_both() -> None:
    """Then the service, then cost."""
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert rows == ["Money", "Service", "Cost"]
    order = [rule["alert"] for rule in rules()]
    first = [order.index(f"MeteredBilling{name}") for name in ("RefundsOverdue", "Drift", "CreditsUnavailable")]
    assert first == sorted(first)
    assert order[0] == "MeteredBillingRefundsOverdue"
    assert order[-1] == "MeteredBillingRefundShareHigh"


def test_every_panel_says_what_it_means() -> None:
    """And has a place and a number of its own."""
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    assert all(panel["description"] for panel in found if panel["type"] != "row")
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in found)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_every_rule_speaks_to_people(rule: dict[str, Any]) -> None:
    """A severity, a sentence, what it means, and the way to its page."""
    assert rule["labels"]["severity"] in ("critical", "warning")
    said = rule["annotations"]
    assert len(said["summary"]) < 120
    assert re.search(r"customer|buy|charged|nobody", said["description"], re.I)
    assert said["runbook_url"].startswith("docs/how-to/runbook/")


def in_prometheus(name: str) -> set[str]:
    """What the exporter may make of one of our metrics."""
    plain = name.replace(".", "_")
    return {f"{plain}{unit}{kind}" for unit in ("", "_seconds") for kind in ("", "_total", "_bucket", "_sum", "_count")}


KNOWN = set(textfile.HELP).union(
    *(in_prometheus(value) for key, value in vars(names).items() if key.startswith("METRIC_"))
)
LABELS = {
    value.replace(".", "_")
    for value in (names.OPERATION, names.OUTCOME, names.KIND, names.EVENT, names.CHARGE_STATE, names.BREAKER_STATE)
} | {names.STORE.replace(".", "_"), textfile.JOURNAL}


def test_every_name_that_is_asked_for_is_emitted() -> None:
    """No query waits for a metric or a label that nobody sends."""
    asked = [*queries().values(), *(rule["expr"] for rule in rules())]
    used = {name for expr in asked for name in re.findall(r"\bmetered_billing_\w+", expr)}
    assert used <= KNOWN | LABELS


def test_every_metric_is_on_the_dashboard() -> None:
    """What nobody can see need not be measured."""
    asked = " ".join(queries().values())
    for key, value in vars(names).items():
        if key.startswith("METRIC_"):
            assert any(name in asked for name in in_prometheus(value)), value
