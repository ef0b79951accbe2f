"""The pages of the docs, taken apart: prose, programs, and what is shown to come out of them.

    <!-- file: docs/examples/translate.py -->   the next block is that file, word for word
    ```console                                  commands ($ …) that are run, and their real output
    ```http                                     a request, then its answer, made to the credits service
    ```sh, ```text, ```json                     not run

With UPDATE_DOCS=1 the tests write what is real into the pages instead of failing.
"""

import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
UPDATE = os.environ.get("UPDATE_DOCS") == "1"

PAGES = sorted(DOCS.rglob("*.md"))

_FILE = re.compile(r"<!-- file: (\S+) -->")
_STOP = re.compile(r"<!-- stop: (\S+) -->")
_FENCE = re.compile(r"```(\w*)\s*$")


@dataclass
class Block:
    """A fenced block.

    Attributes:
        file: The file that it shows, from the root of the repository.
        stops: The server that is stopped before it.
        line: Where its text begins, counted from 0; for `Page.replace`.
    """

    language: str
    text: str
    line: int
    file: str | None = None
    stops: str | None = None


class Page:
    """One page, and its blocks in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.read_text(encoding="utf-8").splitlines()
        self.blocks = self._parse()

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def _parse(self) -> list[Block]:
        blocks: list[Block] = []
        file = stops = None
        opened: Block | None = None
        for number, line in enumerate(self.lines):
            fence = _FENCE.match(line)
            if opened is not None:
                if line == "```":
                    opened.text = "".join(f"{shown}\n" for shown in self.lines[opened.line : number])
                    blocks.append(opened)
                    opened = None
            elif fence:
                opened = Block(fence[1], "", number + 1, file, stops)
                file = stops = None
            elif match := _FILE.search(line):
                file = match[1]
            elif match := _STOP.search(line):
                stops = match[1]
        assert opened is None, f"{self.path}: a block is not closed"
        return blocks

    def replace(self, block: Block, text: str) -> None:
        """Put other text into a block, and save the page."""
        count = block.text.count("\n")
        new = text.splitlines()
        self.lines[block.line : block.line + count] = new
        for other in self.blocks:
            if other.line > block.line:
                other.line += len(new) - count
        block.text = text
        self.path.write_text(self.text, encoding="utf-8")


def table(page: Page, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, cell by cell, without its head."""
    start = next(number for number, line in enumerate(page.lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line))
    rows = []
    for line in page.lines[start + 1 :]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows or line.startswith("#"):
            break
    assert len(rows) > 2, f"{page.path.name}: there is no table below {heading!r}"
    return rows[2:]


def code(cell: str) -> list[str]:
    """What stands between backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def assert_names_tests(cell: str) -> None:
    """It names tests as `file::function`, and they exist; the function may be a class's."""
    named = code(cell)
    assert named, cell
    for name in named:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in there, name


_PATTERNS = [
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?Z?"), "TIME"),
    (re.compile(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT"), "DATE"),
    (re.compile(r"\bin \d+\.\d+s\b"), "in SECONDS"),
]
_ID = re.compile(r"\b(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}|[0-9a-f]{16})\b")


class Normal:
    """Text without what differs from run to run; ids become numbers, by their order on the page."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        text = "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
        for pattern, word in _PATTERNS:
            text = pattern.sub(word, text)
        return _ID.sub(lambda match: self._known.setdefault(match[0], f"ID{len(self._known)}"), text)
