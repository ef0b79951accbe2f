"""The demo's pages as files: what their strict policy asks of them, and that they fit together."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "fastapi_app" / "pages"
FILES = sorted(FOLDER.iterdir())
PAGES = [file for file in FILES if file.suffix == ".html"]
SCRIPTS = [file for file in FILES if file.suffix == ".js"]

ROUTES = {"/", "/traces", "/docs"}

MADE = {id_ for script in SCRIPTS for id_ in re.findall(r"\bid: \"([^\"]+)\"", script.read_text(encoding="utf-8"))}
"""The ids of elements that scripts make."""


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


class Elements(HTMLParser):
    """A page's elements, the ids of them, and the text inside scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.inline = ""
        self._inside = ""
        self.feed(page.read_text(encoding="utf-8"))

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.found if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.inline += data.strip()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_pages_nothing_stands_inline(page: Path) -> None:
    """No script, style or handler stands in the page itself: its policy would not let it run."""
    elements = Elements(page)
    assert elements.inline == ""
    assert "style" not in [tag for tag, _ in elements.found]
    attributes = [name for _, found in elements.found for name in found]
    assert [name for name in attributes if name == "style" or name.startswith("on")] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_pages_refer_only_to_what_is_there(page: Path) -> None:
    """Each script, style sheet, link and label leads to a file, a route or an element of ours."""
    elements = Elements(page)
    for _, attributes in elements.found:
        for target in filter(None, (attributes.get(name) for name in ("src", "href"))):
            path, _, fragment = target.partition("#")
            if path.startswith("/pages/"):
                assert (FOLDER / path.removeprefix("/pages/")).is_file(), target
            elif path not in ("", "data:,"):
                assert path in ROUTES, target
            assert not fragment or fragment in elements.ids, target
        for name in ("for", "aria-labelledby", "aria-controls", "list"):
            for target in attributes.get(name, "").split():
                assert target in {*elements.ids, *MADE}, f"{name}={target}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_pages_ids_stand_once(page: Path) -> None:
    """No two elements of a page share an id."""
    ids = Elements(page).ids
    assert sorted(ids) == sorted(set(ids))


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_files_name_no_other_host(file: Path) -> None:
    """Nothing is fetched from elsewhere: no address of another host stands in any file."""
    text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert re.findall(r"https?://[^\s`'\"]*|[\"'(]//\w[^\s`'\"]*|@import|url\((?!#)[^)]*\)", text) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_import_what_is_there(script: Path) -> None:
    """Each import is of a file beside it, and of names that this file exports."""
    text = script.read_text(encoding="utf-8")
    imports = re.findall(r"^import\s+(.*?)\s+from\s+\"([^\"]+)\"", text, re.M | re.S)
    assert len(imports) == len(re.findall(r"^import\b", text, re.M))
    for what, source in imports:
        exported = exports((FOLDER / source).read_text(encoding="utf-8"))
        if what.startswith("{"):
            wanted = {name.split(" as ")[0].strip() for name in what.strip("{}").split(",")} - {""}
            assert wanted <= exported, f"{source}: {wanted - exported}"


def exports(text: str) -> set[str]:
    """The names that a module exports."""
    declared = re.findall(r"^export\s+(?:async\s+)?(?:function\*?|class|const|let)\s+(\w+)", text, re.M)
    for listed in re.findall(r"^export\s*\{([^}]*)\}", text, re.M):
        declared += [name.split(" as ")[-1].strip() for name in listed.split(",") if name.strip()]
    return set(declared)


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_make_no_html_of_text(script: Path) -> None:
    """What the app answers is shown as text: no script makes HTML, or code, of a string."""
    made = r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function|setHTMLUnsafe|srcdoc)\b"
    assert re.findall(made, script.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_look_for_elements_that_are_there(script: Path) -> None:
    """Each id that a script looks for is an element's of one of the pages."""
    known = {one for page in PAGES for one in Elements(page).ids}
    looked_for = set(re.findall(r"\b(?:byId|getElementById)\(\"([^\"]+)\"\)", script.read_text(encoding="utf-8")))
    assert looked_for <= known | MADE


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_files_stay_short(file: Path) -> None:
    """Each file has one concern, and fits into 500 lines."""
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500
