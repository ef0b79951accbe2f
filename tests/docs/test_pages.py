"""What the pages show is what is there: programs, commands and their output, links."""

import re
from pathlib import Path
from typing import Any

import pytest

from .pages import DOCS, EXAMPLES, PAGES, ROOT, UPDATE, Block, Normal, Page
from .sandbox import Sandbox


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_program_on_a_page_is_its_file(path: Path) -> None:
    """Word for word; and what looks like a program is one."""
    page = Page(path)
    for block in page.blocks:
        if block.file is None:
            assert block.language != "python", f"{path.name}, line {block.line}: a program without a file"
            continue
        shown = (ROOT / block.file).read_text(encoding="utf-8")
        if UPDATE and block.text != shown:
            page.replace(block, shown)
        assert block.text == shown, f"{block.file} is another; UPDATE_DOCS=1 puts it into the page"


def test_every_example_is_on_a_page() -> None:
    """Nobody keeps an example up to date that nobody reads."""
    shown = {block.file for path in PAGES for block in Page(path).blocks}
    assert {f"docs/examples/{file.name}" for file in EXAMPLES.glob("*.py")} <= shown


def pages_with_commands() -> list[Any]:
    found = []
    for path in PAGES:
        text = "".join(block.text for block in Page(path).blocks if block.language == "console")
        starts_processes = re.search(r"^\$ (python|pytest) ", text, flags=re.M)
        if text:
            marks = [pytest.mark.slow] if starts_processes else []
            found.append(pytest.param(path, id=str(path.relative_to(ROOT)), marks=marks))
    return found


@pytest.mark.parametrize("path", pages_with_commands())
def test_commands_on_a_page_print_what_it_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first to the last, in one directory; ids and times aside."""
    page = Page(path)
    sandbox = Sandbox(tmp_path, monkeypatch, capsys)
    as_shown, as_run = Normal(), Normal()
    try:
        for block in page.blocks:
            if block.stops is not None:
                sandbox.stop(block.stops)
            if block.language == "console":
                real = run(sandbox, block)
                same = as_shown(block.text) == as_run(real)
                if UPDATE and not same:
                    page.replace(block, real)
                elif not same:
                    assert real == block.text
    finally:
        sandbox.close()


def run(sandbox: Sandbox, block: Block) -> str:
    """The block, with what its commands really print."""
    real = []
    for command in commands(block.text):
        real.append("$ " + command)
        output = sandbox.run(command.replace("\\\n", " "))
        if output.strip():
            real.append("\n".join(line.rstrip() for line in output.strip("\n").split("\n")))
    return "\n".join(real) + "\n"


def commands(text: str) -> list[str]:
    """What stands after each `$ `, over as many lines as end in a backslash."""
    found: list[str] = []
    going_on = False
    for line in text.splitlines():
        if going_on:
            found[-1] += "\n" + line
        elif line.startswith("$ "):
            found.append(line.removeprefix("$ "))
        else:
            continue
        going_on = line.endswith("\\")
    return found


_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(path: Path) -> None:
    """To a file that is there, and a heading that is in it."""
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in _LINK.findall(prose):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path.name}: {link}"


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_on_the_map() -> None:
    """`index.md` leads to all of them; to those of a folder in a room, that folder's own does, and it to that."""
    for path in PAGES:
        of_folder = path.parent / "index.md"
        own = of_folder.exists() and len(path.relative_to(DOCS).parts) > 2 and path != of_folder
        index = of_folder if own else DOCS / "index.md"
        if own or path.name != "index.md" or len(path.relative_to(DOCS).parts) > 2:
            link = f"({path.relative_to(index.parent)})"
            assert link in index.read_text(encoding="utf-8"), path.name
