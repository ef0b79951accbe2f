"""The runbook has a page for every alert, and what the pages tell people to type exists."""

import re
import shlex
import sys
from typing import Any

import pytest

from tests.monitoring.shipped import rules

from .pages import DOCS, ROOT, UPDATE, Page, code, table
from .test_pages import commands
from .test_reference import command_named

sys.path.insert(0, str(DOCS))
import make_monitoring

RUNBOOK = DOCS / "how-to" / "runbook"
PAGES = sorted(path for path in RUNBOOK.glob("*.md") if path.name != "index.md")
EVERYWHERE = [*sorted(RUNBOOK.glob("*.md")), DOCS / "how-to" / "watch.md"]


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    """Where its `runbook_url` says."""
    linked = {ROOT / rule["annotations"]["runbook_url"]: rule["alert"] for rule in rules()}
    assert set(linked) == set(PAGES)
    assert all(Page(path).lines[0] == f"# {alert}" for path, alert in linked.items())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_shows_what_prometheus_asks(path: Any) -> None:
    """The rule's expression, word for word, and the three answers: the money, where to look, what to do."""
    text = path.read_text(encoding="utf-8")
    made = make_monitoring.page(path.name, text)
    if UPDATE:
        path.write_text(made, encoding="utf-8")
        text = made
    assert text == made
    exprs = [rule["expr"] for rule in rules() if rule["annotations"]["runbook_url"].endswith(f"/{path.name}")]
    shown = [block.text for block in Page(path).blocks if block.language == "promql"]
    assert exprs
    assert all(expr in shown for expr in exprs)
    assert re.findall(r"^## (.*)$", text, re.M) == ["For customers' money", "Look", "Do"]


def test_index_has_them_in_the_order_of_the_rules_with_their_severities() -> None:
    """Money first."""
    page = Page(RUNBOOK / "index.md")
    rows = [row for heading in ("Money", "Service", "Cost") for row in table(page, heading)]
    links = [re.findall(r"\[(\w+)\]\((\S+)\)", row[0])[0] for row in rows]
    order: dict[str, str] = {}
    severities: dict[str, set[str]] = {}
    for rule in rules():
        name = rule["alert"].removeprefix("MeteredBilling")
        order[name] = rule["annotations"]["runbook_url"].rpartition("/")[2]
        severities.setdefault(name, set()).add(rule["labels"]["severity"])
    assert links == list(order.items())
    assert {name: set(re.findall("critical|warning", row[1])) for (name, _), row in zip(links, rows, strict=True)} == (
        severities
    )


def typed(page: Page) -> set[str]:
    """Every command of ours on a page, in blocks and in sentences."""
    found = set()
    for block in page.blocks:
        if block.language in ("sh", "console"):
            lines = commands(block.text) if block.language == "console" else block.text.splitlines()
            found |= {line for line in lines if "metered-billing " in line}
    found |= {words for line in page.lines for words in code(line) if words.startswith("metered-billing ")}
    return {line[line.index("metered-billing ") :] for line in found}


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: path.stem)
def test_commands_on_the_pages_exist(path: Any) -> None:
    """Each with the options that it is given; at night nobody looks them up."""
    for line in typed(Page(path)):
        words = [word.rstrip(";") for word in shlex.split(line.partition(";")[0])][1:]
        name = " ".join(words[:2]) if words[0] == "charges" else words[0]
        options = {option for parameter in command_named(name).params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_pages_tell_whom_to_ask_with_a_command() -> None:
    """Each names at least one."""
    for path in PAGES:
        page = Page(path)
        asks = [block for block in page.blocks if block.language in ("sh", "promql")]
        assert typed(page) or len(asks) > 1, path.name
