"""The page of promises: each has tests, and the tests exist."""

import ast
import re

from .pages import DOCS, ROOT, Page, code, table

PAGE = DOCS / "explanation" / "promises.md"


def test_promises_name_tests_that_exist() -> None:
    """All eight of them, by file and function."""
    rows = table(Page(PAGE), "What is promised, and the tests that hold us to it")
    assert [re.match(r"\*\*(\d)\.", row[0])[1] for row in rows] == list("12345678")  # type: ignore[index]
    for row in rows:
        named = code(row[1])
        assert named, row[0]
        for name in named:
            file, _, function = name.partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert function in there, name
