"""`make demo`, from its first line to Ctrl-C, with real processes, real pictures and real kills."""

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

from examples.fastapi_app.run import prepare
from examples.fastapi_app.samples import BROKEN
from PIL import Image

from .running import Demo, alive, eventually

pytestmark = pytest.mark.slow

one_demo = pytest.mark.xdist_group("demo")
"""Tests that share a demo, and so a worker."""

STUB = {"METERED_BILLING_DEMO_CUTOUT": "stub"}

Start = Callable[..., Demo]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts demos, and sees that nothing is left of them."""
    demos: list[Demo] = []

    def start(**settings: str) -> Demo:
        demos.append(Demo(tmp_path, **settings))
        return demos[-1]

    yield start
    for demo in demos:
        demo.end()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """One that is up, cuts nothing out, and goes through several tests: they compare with what was before."""
    demo = Demo(tmp_path_factory.mktemp("demo"), **STUB)
    try:
        demo.up()
        demo.credits(
            "/v1/grants", {"tenant_id": "demo", "user_id": "alice", "amount": 10_000, "reason": "for the tests"}
        )
        yield demo
    finally:
        demo.end()


def ten_tiny_pictures() -> dict[str, object]:
    """A request that is quick to read, of ten pictures of which two are broken."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    png, text = (base64.b64encode(data).decode() for data in (file.getvalue(), b"not a picture"))
    images = [{"id": f"image-{number}", "data": text if number in (3, 7) else png} for number in range(10)]
    return {"product_groups": [{"name": "Cup", "images": images}]}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_demo_curl_lines_show_a_partial_refund_and_a_402(start: Start) -> None:
    """What is printed can be pasted: 10 pictures of which 2 broken leave 92, and who has 3 gets a 402."""
    demo = start()
    printed = demo.up()
    partial, declined = (
        subprocess.run(["sh", "-c", line], cwd=demo.folder, capture_output=True, text=True, check=True).stdout
        for line in printed.splitlines()
        if line.strip().startswith("curl")
    )

    head, _, body = partial.partition("\r\n\r\n" if "\r\n\r\n" in partial else "\n\n")
    headers = head.lower()
    assert "200 ok" in headers
    assert "credits-deducted: 10" in headers
    assert "credits-refunded: 2" in headers
    assert "credits-balance: 92" in headers
    images = [image for product in json.loads(body)["products"] for image in product["images"]]
    assert Counter(image["status"] for image in images) == {"succeeded": 8, "failed": 2}
    eventually(lambda: demo.balance() == 92, 10, "alice has 92")

    by_kind = {entry["kind"]: entry for entry in demo.transactions()}
    assert len(demo.transactions()) == 3
    assert (by_kind["deduction"]["amount"], by_kind["refund"]["amount"]) == (-10, 2)
    (refund,) = demo.credits(f"/v1/transactions/{by_kind['deduction']['id']}")["refunds"]
    assert sorted(refund["items"]) == sorted(BROKEN)

    assert "402" in declined.splitlines()[0]
    assert "urn:metered-billing:insufficient-credits" in declined
    assert demo.balance("poor") == 3

    for line in ("deducted   10", "refunded    2", "balance    92"):
        assert line in printed


@one_demo
def test_demo_pictures_and_account_are_served(demo: Demo) -> None:
    """What the page needs is there: the page, the sample request, the results, the account."""
    with httpx.Client(base_url=f"http://127.0.0.1:{demo.port}", trust_env=False, verify=False) as app:
        assert "Use the samples" in app.get("/").text
        assert app.get("/samples").json() == demo.sample()
        account = app.get("/me", headers={"Authorization": "Bearer tour"}).json()
        assert account["account"] == {"tenant_id": "demo", "user_id": "tour"}
        assert account["balance"] == demo.balance("tour")
        assert {entry["kind"] for entry in account["transactions"]} == {"deduction", "grant", "refund"}
        done = demo.post("/create-products", ten_tiny_pictures()).json()
        image = app.get(done["products"][0]["images"][0]["url"])
        assert image.headers["Content-Type"] == "image/png"
        assert Image.open(io.BytesIO(image.content)).mode == "RGBA"


def test_demo_kept_files_go_on_and_a_stop_leaves_nothing_behind(start: Start) -> None:
    """With KEEP=1 the accounts are as they were left; SIGTERM and Ctrl-C both stop everything, quietly."""
    demo = start(**STUB)
    demo.up()
    demo.post("/create-products", ten_tiny_pictures())
    eventually(lambda: demo.balance() == 92, 10, "alice has 92")
    stops_and_leaves_nothing(demo, signal.SIGTERM)
    demo.settings["KEEP"] = "1"
    demo.start()
    demo.up()
    assert demo.balance() == 92
    stops_and_leaves_nothing(demo, signal.SIGINT)


def stops_and_leaves_nothing(demo: Demo, number: int) -> None:
    """Exit code 0, no process, no traceback, and free ports."""
    pids = [demo.pid("app"), demo.pid("credits")]
    assert all(alive(pid) for pid in pids)
    assert demo.stop(number) == 0
    assert not any(alive(pid) for pid in pids)
    for text in (demo.output, demo.folder / ".demo" / "app.log", demo.folder / ".demo" / "credits.log"):
        assert "Traceback" not in text.read_text()
    for port in (demo.port, demo.credits_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def test_demo_stopped_while_starting_leaves_nothing_behind(start: Start) -> None:
    """Whoever changes their mind at once is not answered with a traceback or an orphan."""
    demo = start(**STUB)
    demo.says("starting")
    eventually(lambda: (demo.folder / ".demo" / "app.pid").exists(), 10, "the app's pid file")
    pids = [demo.pid("app"), demo.pid("credits")]
    assert demo.stop(signal.SIGINT) == 0
    assert not any(alive(pid) for pid in pids)
    assert "Traceback" not in demo.output.read_text()


def test_demo_killed_at_work_gives_all_back(start: Start) -> None:
    """kill -9 of the app while it works on 10 pictures: the balance is where it was within 30 s.

    And kill -9 of the demo itself leaves no orphans.
    """
    demo = start(**STUB, METERED_BILLING_DEMO_DELAY_S="0.4")
    demo.up()
    lost: list[Exception] = []

    def ask() -> None:
        try:
            demo.post("/create-products", ten_tiny_pictures())
        except httpx.TransportError as error:
            lost.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: demo.balance() == 90, 10, "the deduction")
    demo.starts_again("app")
    asking.join()
    assert lost
    eventually(lambda: demo.balance() == 100, 30, "alice has 100 again")
    assert sorted(entry["amount"] for entry in demo.transactions()) == [-10, 10, 100]
    pids = [demo.pid("app"), demo.pid("credits")]
    demo.process.kill()
    demo.process.wait()
    eventually(lambda: not any(alive(pid) for pid in pids), 20, "its processes are gone")


@one_demo
def test_demo_credits_service_killed_comes_back_with_its_books(demo: Demo) -> None:
    """kill -9 of the credits service: started again, it goes on where it was."""
    demo.calm(ten_tiny_pictures())
    before = demo.balance()
    assert demo.post("/create-products", ten_tiny_pictures()).status_code == 200
    demo.starts_again("credits")
    eventually(lambda: demo.balance() == before - 8, 30, "8 are paid")
    eventually(lambda: demo.post("/create-products", ten_tiny_pictures()).status_code == 200, 30, "it works again")
    eventually(lambda: demo.balance() == before - 16, 30, "8 more are paid")


@one_demo
def test_demo_credits_service_gone_is_503_and_then_at_once(demo: Demo) -> None:
    """Without the service: 503 with Retry-After within 6 s; once the circuit is open, within 50 ms."""
    demo.calm(ten_tiny_pictures())
    before = demo.balance()
    demo.breaks("down")
    took_s = [1.0]
    with httpx.Client(trust_env=False, timeout=60, verify=False) as http:
        while min(took_s) > 0.05:
            begun = time.monotonic()
            answer = http.post(
                f"http://127.0.0.1:{demo.port}/create-products",
                json=ten_tiny_pictures(),
                headers={"Authorization": "Bearer demo"},
            )
            took_s.append(time.monotonic() - begun)
            assert answer.status_code == 503
            assert answer.json()["type"] == "urn:metered-billing:credits-unavailable"
            assert int(answer.headers["Retry-After"]) > 0
            assert len(took_s) < 20, took_s
    assert max(took_s) < 6
    demo.breaks("none")
    eventually(lambda: demo.post("/create-products", ten_tiny_pictures()).status_code == 200, 30, "it works again")
    eventually(lambda: demo.balance() == before - 8, 30, "only what was answered with 200 is paid for")


@one_demo
def test_demo_credits_service_hung_takes_nothing(demo: Demo) -> None:
    """A service that takes the call and never answers: 503 within 6 s, and whatever it did is undone later."""
    demo.calm(ten_tiny_pictures())
    before = demo.balance()
    service = demo.pid("credits")
    os.kill(service, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answer = demo.post("/create-products", ten_tiny_pictures())
        assert time.monotonic() - begun < 6
        assert answer.status_code == 503
    finally:
        os.kill(service, signal.SIGCONT)
    # Awake, it may find the deduction in its socket and carry it out: then it is voided.
    app_log = demo.folder / ".demo" / "app.log"
    eventually(lambda: "credits.voided" in app_log.read_text(), 30, "the void")
    assert demo.balance() == before


def test_prepare_files_of_the_last_run_are_gone_unless_kept(tmp_path: Path) -> None:
    """The demo begins anew each time; only its lock and what it writes itself stay."""
    (tmp_path / "lock").touch()
    (tmp_path / "credits.db").touch()
    (tmp_path / "images" / "deep").mkdir(parents=True)
    prepare(tmp_path, keep=True)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "credits.db", "images", "request.json"}
    prepare(tmp_path, keep=False)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "request.json"}


def test_demo_taken_port_is_a_clear_sentence(start: Start) -> None:
    """It names the setting that moves the port, touches nothing, and ends with 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = start(CREDITS_PORT=str(taken.getsockname()[1]))
        assert demo.process.wait(30) == 1
    printed = demo.output.read_text()
    assert "CREDITS_PORT=" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_demo_impossible_port_is_a_clear_sentence(start: Start, port: str) -> None:
    """As for a port that is taken."""
    demo = start(PORT=port)
    assert demo.process.wait(30) == 1
    assert f"PORT={port} is not a port" in demo.output.read_text()


@one_demo
def test_demo_second_one_in_the_same_directory_is_refused(demo: Demo) -> None:
    """It would delete the first one's files."""
    second = Demo(demo.folder, **STUB)
    assert second.process.wait(30) == 1
    assert "Another demo is running" in second.output.read_text()
    assert demo.balance("poor") == 3


@one_demo
def test_demo_500_requests_at_64_leave_books_that_add_up(demo: Demo) -> None:
    """deducted = kept + refunded, to the credit, and as the responses said."""
    demo.calm(ten_tiny_pictures())
    balance, before = demo.balance(), Counter(demo.movements())
    kept = asyncio.run(_load(demo, requests=500, at_once=64))
    assert kept == 500 * 8
    eventually(lambda: demo.balance() == balance - kept, 60, "the refunds have arrived")
    assert Counter(demo.movements()) - before == {("deduction", -10): 500, ("refund", 2): 500}


async def _load(demo: Demo, *, requests: int, at_once: int) -> int:
    """Send requests; how many pictures their answers say have succeeded."""
    body = json.dumps(ten_tiny_pictures()).encode()
    headers = {"Authorization": "Bearer demo", "Content-Type": "application/json"}
    left = iter(range(requests))
    kept = 0

    async def client() -> None:
        nonlocal kept
        # A client each: one shared pool of 64 connections costs more than the app does.
        async with httpx.AsyncClient(trust_env=False, timeout=60, verify=False) as http:
            for _ in left:
                answer = await http.post(f"http://127.0.0.1:{demo.port}/create-products", content=body, headers=headers)
                assert answer.status_code == 200, answer.text
                for product in answer.json()["products"]:
                    kept += sum(image["status"] == "succeeded" for image in product["images"])

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(client())
    return kept
