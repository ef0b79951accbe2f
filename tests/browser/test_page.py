"""The demo's page: pictures go in, credits move, and whatever is broken, the books balance."""

import io
from collections.abc import Callable

import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, expect

from tests.demo.running import Demo, eventually

from .conftest import Open

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

SETTLED_MS = 45_000
"""Within it everything is final again: a restart, a round of recovery, and a busy machine."""

Shoot = Callable[..., None]


def lesson(page: Page, name: str, button: str = "run") -> Locator:
    """Start a lesson, and wait until all that it began is final; the lesson."""
    page.get_by_test_id(f"lesson-{name}-{button}").click()
    told = page.get_by_test_id(f"lesson-{name}")
    expect(told).to_have_attribute("data-phase", "settled", timeout=SETTLED_MS)
    expect(page.get_by_test_id("balanced")).to_have_text("they balance")
    return told


def costs(told: Locator) -> list[str | None]:
    """What each request of a lesson cost in the end, as the ledger's entries say."""
    return [movements.get_attribute("data-cost") for movements in told.get_by_test_id("movements").all()]


def test_samples_with_broken_pictures_cost_what_succeeded(open_page: Open, demo: Demo, picture: Shoot) -> None:
    """Ten are sent, two are broken: 10 deducted, 8 kept, 2 refunded; the bill before, and the statement after."""
    page = open_page("/", viewport={"width": 1280, "height": 1000})
    before = demo.balance("tour")
    page.get_by_test_id("samples").click()
    page.get_by_test_id("payer-tour").check(force=True)
    expect(page.get_by_test_id("quote-cost")).to_have_text("10")
    expect(page.get_by_test_id("quote-left")).to_have_text(str(before - 10))
    page.get_by_test_id("send").click()
    for name, value in (("deducted", "10"), ("kept", "8"), ("refunded", "2")):
        expect(page.get_by_test_id(f"receipt-{name}")).to_have_attribute("data-value", value, timeout=SETTLED_MS)
    expect(page.locator("[data-testid=picture][data-status=succeeded]")).to_have_count(8)
    expect(page.locator("[data-testid=picture][data-status=failed]")).to_have_count(2)
    assert demo.balance("tour") == before - 8
    expect(page.get_by_test_id("balance-tour")).to_contain_text(str(before - 8))
    refund = page.locator("[data-testid=entry][data-kind=refund]").first
    expect(refund).to_contain_text("cut-off")
    expect(refund).to_contain_text("shopping-list")
    page.evaluate("window.scrollTo(0, 0)")
    picture(page, "page")
    # Its trace is one click away.
    page.get_by_test_id("receipt").get_by_role("link").last.click()
    expect(page.get_by_test_id("story")).to_contain_text("8 credits: 10 deducted")


def test_own_picture_in_a_group_of_its_own(open_page: Open) -> None:
    """A file is chosen, its group renamed, the request sent; before and after are shown."""
    page = open_page("/")
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    chair: FilePayload = {"name": "chair.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.get_by_test_id("files").set_input_files([chair])
    page.get_by_test_id("group-name").first.fill("Chairs")
    page.get_by_test_id("group-name").first.press("Enter")
    expect(page.get_by_test_id("quote-cost")).to_have_text("1")
    page.get_by_test_id("send").click()
    expect(page.get_by_test_id("receipt-kept")).to_have_attribute("data-value", "1", timeout=SETTLED_MS)
    expect(page.get_by_test_id("picture").get_by_role("img")).to_have_count(2)


def test_almost_empty_account_is_402(open_page: Open, demo: Demo) -> None:
    """The client gets the price, the balance and what is missing; the balance stays."""
    told = lesson(open_page("/"), "empty")
    answer = told.get_by_test_id("lesson-empty-answer")
    expect(answer).to_have_attribute("data-status", "402")
    expect(answer).to_contain_text("This request costs 10 credits and the account has 3")
    assert costs(told) == ["0"]
    assert demo.balance("poor") == 3


def test_service_that_is_down_is_503_until_it_is_back(open_page: Open) -> None:
    """503 and when to try again, nothing taken; switched off, the next request is served."""
    page = open_page("/")
    told = lesson(page, "down", "every")
    answer = told.get_by_test_id("lesson-down-answer")
    expect(answer).to_have_attribute("data-status", "503")
    expect(answer).to_contain_text("Retry-After", ignore_case=True)
    assert costs(told) == ["0"]
    page.get_by_test_id("lesson-down-off").click()
    expect(page.get_by_test_id("fault")).to_be_hidden()
    told = lesson(page, "twice", "next")
    expect(told.get_by_test_id("lesson-twice-answer")).to_have_attribute("data-status", "200")


def test_lost_replies_and_500s_take_the_credits_once(open_page: Open) -> None:
    """Asked again under the same key: one deduction, whatever the network said."""
    page = open_page("/")
    for name in ("lost", "500"):
        told = lesson(page, name, "next")
        expect(told.get_by_test_id(f"lesson-{name}-answer")).to_have_attribute("data-status", "200")
        assert told.locator("[data-kind=deduction]").count() <= 1


def test_app_killed_at_work_gives_everything_back(open_page: Open, demo: Demo, picture: Shoot) -> None:
    """The client gets no answer; the app is up again by itself, and the ten credits are back."""
    page = open_page("/", expect_outage=True, viewport={"width": 1280, "height": 900})
    pid = demo.pid("app")
    told = lesson(page, "kill-app")
    expect(told.get_by_test_id("lesson-kill-app-answer")).not_to_have_attribute("data-status", "200")
    assert costs(told) == ["0"]
    assert demo.pid("app") != pid
    expect(page.get_by_test_id("process-app")).to_have_attribute("data-up", "true")
    expect(page.get_by_test_id("unsettled")).to_have_attribute("data-count", "0")
    page.get_by_test_id("books").evaluate("element => element.scrollIntoView()")
    picture(page, "lessons")


def test_same_request_twice_is_two_charges(open_page: Open) -> None:
    """Two requests, two transactions, each paid once."""
    told = lesson(open_page("/"), "same")
    answers = told.get_by_test_id("lesson-same-answer")
    expect(answers).to_have_count(2)
    assert len(costs(told)) == 2
    assert len(set(costs(told))) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(open_page: Open, scheme: str) -> None:
    """Nothing is wider than the screen, before and after a run."""
    page = open_page("/", viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_test_id("samples").click()
    expect(page.get_by_test_id("picture")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_page_is_used_by_keyboard_alone(open_page: Open, demo: Demo) -> None:
    """Tab and Space: the samples, who pays, send; and the answer is there."""
    page = open_page("/")
    expect(page.get_by_test_id("balance-poor")).to_contain_text("3")

    def walk_to(test_id: str) -> None:
        for _ in range(60):
            if page.evaluate("document.activeElement.dataset.testid") == test_id:
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab never comes to {test_id}")

    walk_to("samples")
    page.keyboard.press("Space")
    expect(page.get_by_test_id("picture")).to_have_count(10)
    walk_to("payer-alice")
    page.keyboard.press("ArrowUp")  # round the corner, to the last one
    expect(page.get_by_test_id("payer-poor")).to_be_checked()
    walk_to("send")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("says")).to_contain_text("This request costs 10 credits and the account has 3")


def test_page_lives_through_a_restart_of_the_app(open_page: Open, demo: Demo) -> None:
    """It says that the app is down, and goes on when it is back, without being loaded anew."""
    page = open_page("/", expect_outage=True)
    expect(page.get_by_test_id("process-app")).to_have_attribute("data-up", "true")
    demo.starts_again("app")
    expect(page.get_by_test_id("process-app")).to_contain_text(str(demo.pid("app")))
    expect(page.get_by_test_id("banner")).to_be_hidden()
    eventually(lambda: page.get_by_test_id("balanced").inner_text() == "they balance", 20, "the books")
