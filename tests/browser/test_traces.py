"""The traces page: from it alone one can answer what a request cost, and why."""

import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.demo.running import Demo

from .conftest import Open

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

Picture = Callable[..., None]


def fault(demo: Demo, kind: str, calls: str = "next") -> None:
    """Turn one of the demo's switches."""
    answer = httpx.post(
        f"http://localhost:{demo.port}/desk/fault",
        json={"kind": kind, "calls": calls},
        headers={"X-Demo": "1"},
        trust_env=False,
        verify=False,
    )
    assert answer.status_code == 200


def send(demo: Demo, token: str = "demo") -> httpx.Response:
    """The samples, under a request id of their own."""
    return demo.post("/create-products", demo.sample(), token)


def opened(page: Page, trace_id: str) -> Locator:
    """A trace's story, once it is there."""
    page.goto(f"/traces#{trace_id}")
    told = page.get_by_test_id("story")
    expect(told).to_contain_text("Whom was it charged to?")
    return told


def test_trace_of_a_partial_refund_is_opened_and_read(open_page: Open, demo: Demo, picture: Picture) -> None:
    """What it cost, what failed, what came back and whom it was charged to; each span's numbers are there."""
    answer = send(demo)
    assert answer.headers["credits-refunded"] == "2"
    page = open_page("/traces", viewport={"width": 1440, "height": 1060})
    row = page.get_by_test_id("trace-row").filter(has_text="POST /create-products").first
    expect(row).to_contain_text("200")
    row.get_by_role("link").click()
    told = page.get_by_test_id("story")
    expect(told).to_contain_text("8 credits: 10 deducted before the work began, 2 given back")
    expect(told).to_contain_text("cut-off")
    expect(told).to_contain_text("demo/alice")

    waterfall = page.get_by_role("treegrid", name="Spans")
    refund = waterfall.get_by_role("row").filter(has_text="metered_billing.refund")
    refund.click()
    attributes = page.get_by_test_id("attributes")
    expect(attributes.first).to_contain_text(answer.headers["credits-transaction-id"])
    links = page.get_by_test_id("links")
    expect(links).to_contain_text("refund of the deduction")
    page.get_by_test_id("trace").evaluate("element => element.scrollTo(0, 0)")
    picture(page, "trace")
    # And back: the deduction says what came of it.
    links.get_by_role("link").click()
    expect(page.get_by_test_id("panel")).to_contain_text("metered_billing.deduct")
    expect(page.get_by_test_id("links")).to_contain_text("metered_billing.refund")


def test_reasons_for_402_and_503_are_told(open_page: Open, demo: Demo) -> None:
    """The balance and the price; the attempts and what became of each."""
    declined = send(demo, "poor")
    fault(demo, "down", "every")
    unavailable = send(demo)
    fault(demo, "none")
    assert (declined.status_code, unavailable.status_code) == (402, 503)
    page = open_page("/traces")
    rows = page.get_by_test_id("trace-row")
    rows.filter(has_text="503").first.get_by_role("link").click()
    expect(page.get_by_test_id("story")).to_contain_text("Why did it get 503?")
    expect(page.get_by_test_id("story")).to_contain_text("not sent")
    page.goto("/traces?status=402")
    rows.filter(has_text="402").first.get_by_role("link").click()
    expect(page.get_by_test_id("story")).to_contain_text("costs 10 credits, and the account held 3")


def test_lost_reply_is_told_as_a_retry_under_one_key(open_page: Open, demo: Demo) -> None:
    """Two attempts, the second a replay; the credits were taken once."""
    fault(demo, "lost reply")
    answer = send(demo)
    assert answer.status_code == 200
    page = open_page("/traces")
    told = opened(page, answer.headers["x-trace-id"])
    expect(told).to_contain_text("2 attempts at the deduction, under one key")
    expect(told).to_contain_text("answer lost")
    expect(page.get_by_test_id("span-row").filter(has_text="metered_billing.ledger.deduct")).to_have_count(2)


def test_charge_of_a_killed_app_is_followed_to_where_it_was_settled(
    open_page: Open, demo: Demo, picture: Picture
) -> None:
    """The trace of the request says by which process; the link leads to the recovery, and back."""
    pid = demo.pid("app")
    again = "the app process is up again"
    times = demo.output.read_text().count(again) + 1
    httpx.post(
        f"http://localhost:{demo.port}/desk/kill",
        json={"process": "app", "after_ms": 700},
        headers={"X-Demo": "1"},
        trust_env=False,
        verify=False,
    ).raise_for_status()
    with pytest.raises(httpx.TransportError):
        send(demo)
    demo.says(again, times=times)
    page = open_page("/traces", expect_outage=True, viewport={"width": 1440, "height": 800}, color_scheme="dark")
    killed = page.get_by_test_id("trace-row").filter(has_text="process died").first
    killed.get_by_role("link").click()
    told = page.get_by_test_id("story")
    expect(told).to_contain_text(f"app pid {pid} died before the answer")
    expect(told).to_contain_text("Yes: by app pid")
    expect(page.get_by_test_id("orphans")).to_be_visible()
    picture(page, "trace-killed")
    page.get_by_test_id("related").get_by_role("link").first.click()
    expect(page.get_by_test_id("waterfall")).to_contain_text("metered_billing.recover")
    page.go_back()
    expect(page.get_by_test_id("orphans")).to_be_visible()


def test_filters_stand_in_the_address(open_page: Open, demo: Demo) -> None:
    """What is filtered can be sent as a link."""
    send(demo, "poor")
    page = open_page("/traces")
    page.get_by_label("status").select_option("402")
    expect(page).to_have_url(re.compile(r"status=402"))
    again = open_page(page.url.removeprefix(f"http://localhost:{demo.port}"))
    rows = again.get_by_test_id("trace-row")
    expect(rows.first).to_contain_text("402")
    assert rows.filter(has_text="200").count() == 0


def test_list_is_live(open_page: Open, demo: Demo) -> None:
    """A request that comes while the page is open appears by itself."""
    page = open_page("/traces")
    expect(page.get_by_test_id("live")).to_contain_text("live")
    answer = send(demo)
    expect(page.locator(f"[data-trace='{answer.headers['x-trace-id']}']")).to_be_visible()


def test_trace_is_read_by_keyboard_alone(open_page: Open, demo: Demo) -> None:
    """Tab to a request, Enter opens it, arrows walk through the spans, Enter shows one."""
    send(demo)
    page = open_page("/traces")
    first = page.get_by_test_id("trace-row").first.get_by_role("link")
    first.wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if first.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.get_by_test_id("span-row").first.wait_for()
    for _ in range(40):
        if page.evaluate("document.activeElement.dataset.testid === 'span-row'"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("panel")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_traces_fit_a_phone(open_page: Open, demo: Demo, scheme: str) -> None:
    """Nothing is wider than the screen, in the list and in a trace."""
    answer = send(demo)
    page = open_page("/traces", viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page.get_by_test_id("trace-row").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    opened(page, answer.headers["x-trace-id"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
