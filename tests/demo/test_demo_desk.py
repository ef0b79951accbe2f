"""The desk of a running demo: real spans of real processes, real faults, a real kill, and the books after each."""

import contextlib
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

from examples.fastapi_app.desk.otlp import decode, unpack
from examples.fastapi_app.desk.story import CAME_BACK, COST, FAILED, LATER, RETRIED, WHOM, WHY

from .running import Demo, eventually
from .test_demo import ten_tiny_pictures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("desk")]


class Backend(ThreadingHTTPServer):
    """The user's own, to which the spans are passed on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.names: set[tuple[str, str]] = set()
        self.headers: set[str | None] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Backend

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        spans = decode(unpack(body, self.headers.get("Content-Encoding", "")))
        self.server.names |= {(span.service, span.name) for span in spans}
        self.server.headers.add(self.headers.get("api-key"))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        thread = threading.Thread(target=backend.serve_forever)
        thread.start()
        yield backend
        backend.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[Demo]:
    """One whose pictures take long enough to be killed at."""
    demo = Demo(
        tmp_path_factory.mktemp("desk"),
        METERED_BILLING_DEMO_CUTOUT="stub",
        METERED_BILLING_DEMO_DELAY_S="0.15",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://me:secret@127.0.0.1:{backend.server_port}",
        OTEL_EXPORTER_OTLP_HEADERS="api-key=s3cret",
    )
    try:
        demo.up()
        demo.credits(
            "/v1/grants", {"tenant_id": "demo", "user_id": "alice", "amount": 1_000, "reason": "for the tests"}
        )
        yield demo
    finally:
        demo.end()


@pytest.fixture(autouse=True)
def books_balance(demo: Demo) -> Iterator[None]:
    """Whatever a test does to the demo: afterwards nothing is open, and every credit is accounted for."""
    yield
    demo.breaks("none")

    def settled() -> bool:
        books = demo.desk("state")["books"]
        return books is not None and not books["unsettled"]

    eventually(settled, 30, "nothing unsettled")
    books = demo.desk("state")["books"]
    assert books["balanced"], books
    assert books["disputed"] == 0
    assert {user["user_id"]: user["balance"] for user in books["users"]}["alice"] == demo.balance()


def whole(demo: Demo, trace_id: str, *needed: str) -> Any:
    """A trace, when these spans of it have arrived."""
    found: list[Any] = []

    def arrived() -> bool:
        found[:] = [demo.trace(trace_id)]
        return bool(found[0]) and {span["name"] for span in found[0]["spans"]} >= set(needed)

    eventually(arrived, 20, f"the spans {needed}")
    return found[0]


def answers(trace: Any) -> dict[str, str]:
    return {told["question"]: told["answer"] for told in trace["story"]}


ALL = ("POST /create-products", "metered_billing.refund", "metered_billing.ledger.refund")


def test_trace_of_a_partial_refund_spans_both_processes(demo: Demo, backend: Backend) -> None:
    """One trace from the request to the ledger, a span a picture, and the story; the user's backend gets it too."""
    answer = demo.post("/create-products", ten_tiny_pictures())
    trace = whole(demo, answer.headers["X-Trace-Id"], *ALL)
    summary, spans = trace["summary"], trace["spans"]
    assert summary["services"] == ["app", "credits"]
    assert (summary["name"], summary["status"], summary["ended"]) == ("POST /create-products", 200, True)
    assert (summary["amount"], summary["kept"], summary["refunded"], summary["trouble"]) == (10, 8, 2, [])
    assert not any(span["orphan"] for span in spans)
    by_id = {span["span_id"]: span for span in spans}
    pictures = [span for span in spans if span["name"] == "cut out"]
    assert len(pictures) == 10
    assert {by_id[span["parent_id"]]["name"] for span in pictures} == {"fastapi.endpoint"}
    ledger = next(span for span in spans if span["name"] == "metered_billing.ledger.deduct")
    assert ledger["process"] == f"credits pid {demo.pid('credits')}"
    told = answers(trace)
    assert told[COST] == "8 credits: 10 deducted before the work began, 2 given back."
    assert told[FAILED] == "image-3 (not an image), image-7 (not an image)."
    assert told[CAME_BACK] == "2 credits, by a refund against the same transaction."
    assert told[WHOM].startswith("demo/alice; transaction ")
    wanted = {("app", "cut out"), ("credits", "metered_billing.ledger.refund")}
    eventually(lambda: backend.names >= wanted, 10, "the spans at the user's backend")
    assert backend.headers == {"s3cret"}
    assert demo.desk("state")["otlp"] == f"http://127.0.0.1:{backend.server_port}/v1/traces"


def test_lost_reply_is_asked_for_twice_and_taken_once(demo: Demo) -> None:
    """The answer to a deduction is lost; the second, under the same key, is a replay."""
    before = demo.balance()
    demo.breaks("lost reply", "next")
    answer = demo.post("/create-products", ten_tiny_pictures())
    assert answer.status_code == 200
    assert demo.desk("state")["fault"] == {"kind": "none", "calls": "next", "struck": 1}
    told = answers(whole(demo, answer.headers["X-Trace-Id"], *ALL))
    assert told[RETRIED].startswith("Yes: 2 attempts at the deduction, under one key (1. answer lost")
    assert "asked for this deduct twice under the same key, and did it once" in told[RETRIED]
    eventually(lambda: demo.balance() == before - 8, 10, "8 are paid")


def test_same_call_twice_is_taken_once(demo: Demo) -> None:
    """A network that delivers twice is seen in the trace, and not in the books."""
    before = demo.balance()
    demo.breaks("twice", "next")
    answer = demo.post("/create-products", ten_tiny_pictures())
    trace = whole(demo, answer.headers["X-Trace-Id"], *ALL)
    assert sum(span["name"] == "metered_billing.ledger.deduct" for span in trace["spans"]) == 2
    assert "did it once" in answers(trace)[RETRIED]
    eventually(lambda: demo.balance() == before - 8, 10, "8 are paid")


def test_service_down_for_one_call_says_that_nothing_was_sent(demo: Demo) -> None:
    """503, and the trace knows why; the next call goes through, for the fault has struck once."""
    demo.breaks("down", "next")
    answer = demo.post("/create-products", ten_tiny_pictures())
    assert answer.status_code == 503
    trace = whole(demo, answer.headers["X-Trace-Id"], "POST /create-products")
    assert answers(trace)[CAME_BACK] == "Nothing: no attempt ever reached the service, so nothing had been taken."
    assert "not sent, ConnectError" in answers(trace)[WHY.format(503)]
    assert "not sent" in trace["summary"]["trouble"]
    eventually(lambda: demo.desk("state")["fault"]["kind"] == "none", 10, "the fault is over")
    assert demo.desk("state")["fault"]["struck"] > 0
    demo.calm(ten_tiny_pictures())


def test_too_few_credits_are_told_with_price_and_balance(demo: Demo) -> None:
    """402: what it costs and what the account held."""
    answer = demo.post("/create-products", ten_tiny_pictures(), token="poor")
    trace = whole(demo, answer.headers["X-Trace-Id"], "POST /create-products")
    assert answers(trace)[WHY.format(402)].startswith("It costs 10 credits, and the account held 3.")
    listed = demo.desk("traces", user="poor", outcome="not run")["traces"]
    assert trace["summary"]["trace_id"] in [one["trace_id"] for one in listed]


def test_app_killed_at_work_is_settled_by_the_next_process(demo: Demo) -> None:
    """The dead request's trace is kept, says what died, and is linked with the recovery's, both ways."""
    trace_id = uuid.uuid4().hex
    before, first = demo.balance(), demo.pid("app")
    lost: list[Exception] = []

    def ask() -> None:
        try:
            httpx.post(
                f"http://127.0.0.1:{demo.port}/create-products",
                json=ten_tiny_pictures(),
                headers={"Authorization": "Bearer demo", "traceparent": f"00-{trace_id}-{'b7' * 8}-01"},
                timeout=60,
                trust_env=False,
                verify=False,
            )
        except httpx.TransportError as error:
            lost.append(error)

    again = demo.output.read_text().count("the app process is up again") + 1
    asking = threading.Thread(target=ask)
    asking.start()
    whole(demo, trace_id, "metered_billing.deduct", "cut out")
    with contextlib.suppress(httpx.TransportError):  # on a busy machine its answer may go down with the app
        demo.desk("kill", {"process": "app"})
    asking.join()
    assert lost
    demo.says("the app process is up again", times=again)
    eventually(lambda: demo.balance() == before, 30, "all came back")
    eventually(lambda: bool(demo.trace(trace_id)["summary"]["linked"]), 20, "the recovery's trace")
    trace = demo.trace(trace_id)
    summary, told = trace["summary"], answers(trace)
    assert (summary["name"], summary["ended"], summary["trouble"]) == ("POST /create-products", False, ["process died"])
    assert all(span["orphan"] or span["depth"] for span in trace["spans"])
    assert told[FAILED].startswith(f"Its process: app pid {first} died before the answer")
    assert told[LATER].startswith(f"Yes: by app pid {demo.pid('app')}, ")
    # On a busy machine a first try may have had no answer in time: each is a trace of its own.
    for recovery_id in summary["linked"]:
        told_of = demo.trace(recovery_id)["summary"]
        assert (told_of["name"], told_of["linked"]) == ("recovery", [trace_id])
    recovery = whole(demo, recovery_id, "metered_billing.recover", "metered_billing.refund")
    links = [link for span in recovery["spans"] for link in span["links_to"]]
    assert {(link["trace_id"], link["name"]) for link in links} == {(trace_id, "metered_billing.deduct")}
    app, _ = demo.desk("state")["processes"]
    assert (app["up"], app["ended"]) == (True, "was killed by SIGKILL")
    assert app["restarts"] >= 1


def test_polls_leave_no_traces_and_metrics_are_shown(demo: Demo) -> None:
    """Pages, files, accounts, metrics and the desk itself are asked for all the time: only work is traced."""
    with httpx.Client(base_url=f"http://127.0.0.1:{demo.port}", trust_env=False, verify=False) as app:
        for path in ("/", "/traces", "/pages/style.css", "/samples", "/images/none.png", "/desk/traces", "/desk/state"):
            assert "X-Trace-Id" not in app.get(path).headers
        assert "X-Trace-Id" not in app.get("/me", headers={"Authorization": "Bearer demo"}).headers
        assert "metered_billing_operation_duration_seconds" in app.get("/metrics").text
        of_service = app.get(f"http://127.0.0.1:{demo.metrics_port}/metrics").text
        assert "metered_billing_ledger_operation_duration_seconds" in of_service
        assert "X-Trace-Id" in app.post("/batch", json={}).headers
    eventually(lambda: bool(demo.desk("traces", q="POST /batch")["traces"]), 10, "the one that was traced")
    names = {trace["name"] for trace in demo.desk("traces", limit=1000)["traces"]}
    assert not {name for name in names if name.startswith("GET ")}


def test_desk_is_for_this_page_alone(demo: Demo) -> None:
    """No other site can press a switch, or read what the desk knows."""
    with httpx.Client(base_url=f"http://127.0.0.1:{demo.port}", trust_env=False, verify=False) as app:
        assert app.post("/desk/kill", json={"process": "app"}).status_code == 403
        assert app.get("/desk/state", headers={"Host": "evil.example"}).status_code == 421
        assert app.post("/desk/fault", content=b"x" * 100_000, headers={"X-Demo": "1"}).status_code == 413
        assert app.get("/desk/../v1/traces").status_code == 404
        assert app.get("/desk/%2e%2e/v1/traces").status_code == 404
        for path in ("/pages/..%2fapp.py", "/pages/.hidden.js", "/pages/none.js", "/pages/style.CSS"):
            assert app.get(path).status_code == 404
        policy = app.get("/traces").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy


def test_statement_and_news_of_traces(demo: Demo) -> None:
    """The statement is the ledger's, whole; and who waits for news is answered as soon as there is some."""
    demo.post("/create-products", ten_tiny_pictures())
    eventually(lambda: not demo.desk("state")["books"]["unsettled"], 20, "it is settled")
    statement = demo.desk("statement", user_id="alice")
    assert statement["entries"] == demo.transactions()
    assert statement["balance"] == demo.balance()
    version = demo.desk("traces", limit=0)["version"]
    waiting: list[int] = []
    asking = threading.Thread(target=lambda: waiting.append(demo.desk("traces", limit=0, since=version)["version"]))
    asking.start()
    demo.post("/create-products", ten_tiny_pictures(), token="poor")
    asking.join()
    assert waiting[0] > version
