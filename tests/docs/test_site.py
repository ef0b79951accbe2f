"""The docs as a site: built strictly, each page in its menu, and nothing in it from another host."""

import contextlib
import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from playwright.sync_api import sync_playwright

from tests.browser.conftest import ARGUMENTS, CHROMIUM

from .pages import DOCS, PAGES, ROOT

pytestmark = pytest.mark.xdist_group("site")

CONFIGURATION = ROOT / "mkdocs.yml"


class Loader(yaml.SafeLoader):
    """Passes over what the site's builder looks up in Python."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(entry)


def test_every_page_is_in_the_menu() -> None:
    """Once. Strictness alone does not see to that: what is in no menu is built all the same."""
    configuration = yaml.load(CONFIGURATION.read_text(encoding="utf-8"), Loader)
    listed = list(leaves(configuration["nav"]))
    assert {str(path.relative_to(DOCS)) for path in PAGES} == set(listed), "a page is a line of `nav` in mkdocs.yml"
    assert len(listed) == len(set(listed))


def build(root: Path) -> "subprocess.CompletedProcess[str]":
    """As `make docs` does."""
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built of a copy: a tree that others read stays as it is."""
    root = tmp_path_factory.mktemp("docs")
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CONFIGURATION, root)
    (root / "src").symlink_to(ROOT / "src")
    done = build(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "site"


class Html(HTMLParser):
    """What a page fetches, where its links lead, and the names in it that a link can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names |= {found.get("id", ""), found.get("name", "")}
        # It would be drawn by a script that the theme fetches from far away, or not at all.
        assert not {"mermaid", "language-mermaid"} & set(found.get("class", "").split()), self.path
        if tag == "a":
            self.links.append(found.get("href", ""))
        elif tag == "link" and not {"canonical", "next", "prev"} & set(found.get("rel", "").split()):
            self.fetched.append(found["href"])
        elif tag != "link":
            self.fetched += [found[name] for name in ("src", "srcset", "poster", "data") if name in found]


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Html]:
    return {path: Html(path) for path in sorted(site.rglob("*.html"))}


@pytest.mark.slow
def test_site_has_every_page_and_no_program(site: Path, pages: dict[Path, Html]) -> None:
    """A file for each, where its links from the repository lead as well."""
    for page in PAGES:
        assert site / page.relative_to(DOCS).with_suffix(".html") in pages
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site: Path, pages: dict[Path, Html]) -> None:
    """Those of the menu, of pictures, and to what was made of docstrings as well: to a file, and a name in it."""
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # it stands anywhere, and links to the root of its host
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].names, f"{path.relative_to(site)}: {link}"


@pytest.mark.slow
def test_nothing_in_the_site_comes_from_another_host(site: Path, pages: dict[Path, Html]) -> None:
    """No script, style, font or picture."""
    fetched = [link for page in pages.values() for link in page.fetched]
    for style in site.rglob("*.css"):
        fetched += re.findall(r"url\(\s*[\"']?([^\"')]+)", style.read_text(encoding="utf-8"))
        fetched += re.findall(r"@import\s+[\"']([^\"']+)", style.read_text(encoding="utf-8"))
    assert len(fetched) > 100
    assert [link for link in fetched if urlsplit(link).netloc] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("[nowhere](nowhere.md), [no heading](index.md#nothing)", ["page does not exist", "anchor does not exist"]),
        ("::: metered_billing.nothing", ["metered_billing.nothing"]),
    ],
)
def test_broken_page_ends_the_build(tmp_path: Path, text: str, complaints: list[str]) -> None:
    """So that the tests above can fail."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n", encoding="utf-8")
    (tmp_path / "docs" / "site.css").touch()
    whole, _, _ = CONFIGURATION.read_text(encoding="utf-8").partition("nav:\n")
    (tmp_path / "mkdocs.yml").write_text(f"{whole}nav: [index.md]\n", encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode != 0
    assert all(complaint in done.stdout + done.stderr for complaint in complaints)


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """The directory over HTTP, on a port of its own; its address."""
    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.mark.slow
def test_site_is_searched_in_a_browser_that_asks_no_other_host(site: Path) -> None:
    """A word leads to its page; no script fails; nothing is looked for elsewhere, in the dark either."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here, and it could not be installed: apt-get install chromium")
    with served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        page = browser.new_page(color_scheme="dark")
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{address}/index.html")
        page.get_by_role("button", name="Search").click()
        page.keyboard.insert_text("tombstone")  # all at once: each letter would be looked for
        # Its results are in a closed shadow: what shows them is that there is a first one to go to.
        for _ in range(100):
            page.keyboard.press("Enter")
            page.wait_for_timeout(100)
            if page.url != f"{address}/index.html":
                break
        page.wait_for_load_state()
        found = page.inner_text("article")
        browser.close()
    assert "tombstone" in found.lower(), page.url
    assert faults == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
def test_what_is_copied_off_a_console_can_be_pasted_into_a_shell(site: Path) -> None:
    """Its commands alone, whole: no prompt, nothing of what they print. A program is copied as it is."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here, and it could not be installed: apt-get install chromium")
    with served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        page = browser.new_context(permissions=["clipboard-read", "clipboard-write"]).new_page()
        page.goto(f"{address}/tutorial.html")

        def copied(block: str) -> str:
            page.evaluate("navigator.clipboard.writeText('')")
            page.locator(".highlight", has_text=block).first.get_by_role("button").click()
            for _ in range(100):
                if text := page.evaluate("navigator.clipboard.readText()"):
                    return str(text)
                page.wait_for_timeout(50)
            raise AssertionError("nothing was copied")

        assert [line for line in copied("credits granted, 5 credits now").splitlines() if line] == [
            "export METERED_BILLING_CREDITS=sqlite:///credits.db",
            "metered-billing grant 5 --tenant acme --user ann --reason welcome",
        ]
        assert copied('"xyzzy"').splitlines() == [
            "curl -si localhost:8000/translate -H 'Authorization: Bearer ann' \\",
            """    -H 'Content-Type: application/json' -d '{"words": ["cat", "dog", "xyzzy"]}'""",
        ]
        assert copied("FRENCH") == (DOCS / "examples" / "translate.py").read_text(encoding="utf-8").rstrip()
        browser.close()
