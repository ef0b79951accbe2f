"""The page of promises: each has tests, and the tests exist."""

import ast
import re

from .pages import DOCS, ROOT, Page, assert_names_tests, code, table

PAGE = DOCS / "explanation" / "promises.md"


def test_promises_name_tests_that_exist() -> None:
    """All eight of them, by file and function."""
    rows = table(Page(PAGE), "What is promised, and the tests that hold us to it")
    assert [re.match(r"\*\*(\d)\.", row[0])[1] for row in rows] == list("12345678")  # type: ignore[index]
    for row in rows:
        assert_names_tests(row[1])


def test_broken_rules_that_are_told_of_are_variants() -> None:
    """Each row of the table names one that the simulation must find."""
    tree = ast.parse((ROOT / "tests" / "simulation" / "variants.py").read_text(encoding="utf-8"))
    variants = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "variant" in {ast.unparse(each) for each in node.decorator_list}
    }
    page = Page(DOCS / "explanation" / "why-the-journal-comes-first.md")
    named = [code(row[1])[0] for row in table(page, "What happens when a rule is broken")]
    assert len(named) == len(set(named))
    assert set(named) <= variants
    command = re.search(r"--broken (\w+)", page.text)
    assert command is not None
    assert command[1] in named
