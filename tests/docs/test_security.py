"""SECURITY.md: each defence in its table has tests, and the tests exist."""

import re

from .pages import ROOT, Page, assert_names_tests, table

PAGE = ROOT / "SECURITY.md"


def rows() -> list[list[str]]:
    """Of the table of threats: the second below its heading."""
    page = Page(PAGE)
    start = next(number for number, line in enumerate(page.lines) if line.startswith("| threat |"))
    page.lines = ["## Threats", *page.lines[start:]]
    return table(page, "Threats")


def test_threats_name_tests_that_exist() -> None:
    """By file and function, also where the function is a class's."""
    found = rows()
    assert len(found) > 10
    for row in found:
        assert_names_tests(row[2])


def test_links_lead_somewhere() -> None:
    """To files of this repository, and headings in them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGE.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not anchor or re.search(rf"^#+ {anchor}$", text, flags=re.M), link
