"""The demo in a real browser: Chromium against the real processes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.demo.running import Demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--force-color-profile=srgb",
)

WAITS_MS = 30_000
"""How long a page may take for what is expected of it: the machine may be busy."""

Open = Callable[..., Page]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One Chromium for all."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here, and it could not be installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A demo for all of these tests, one after another; its pictures are cut out by flood fill, slowly.

    For the docs' pictures by the model, as its users see it.
    """
    cutout = "flood" if request.config.getoption("--pictures") is None else ""
    demo = Demo(
        tmp_path_factory.mktemp("demo"), METERED_BILLING_DEMO_CUTOUT=cutout, METERED_BILLING_DEMO_DELAY_S="0.15"
    )
    demo.up()
    yield demo
    demo.end()


@pytest.fixture
def open_page(browser: Browser, demo: Demo) -> Iterator[Open]:
    """Opens pages of the demo; sees that they log no error and ask no other host.

    A request that fails because the app is down is no fault of the page's: `expect_outage=True`.
    """
    faults: list[str] = []
    contexts = []

    def open_page(path: str = "/", *, expect_outage: bool = False, **options: Any) -> Page:
        context = browser.new_context(base_url=f"http://localhost:{demo.port}", reduced_motion="reduce", **options)
        context.set_default_timeout(WAITS_MS)
        contexts.append(context)
        page = context.new_page()

        def heard(kind: str, text: str) -> None:
            # Chromium itself writes these two for an answer that is no 2xx, and for none: they are what is shown.
            if kind == "error" and "Failed to load resource" in text and (expect_outage or "status of" in text):
                return
            if kind in ("error", "warning"):
                faults.append(f"{kind}: {text}")

        page.on("console", lambda message: heard(message.type, message.text))
        page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if urlsplit(request.url).hostname in ("localhost", None)  # None: data and blob URLs
                else faults.append(f"asks another host: {request.url}")
            ),
        )
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def picture(request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    """Takes a page's picture for the docs, where `--pictures DIRECTORY` asks for it."""
    directory: Path | None = request.config.getoption("--pictures")

    def take(page: Page, name: str, **options: Any) -> None:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=directory / f"{name}.png", **options)

    return take
