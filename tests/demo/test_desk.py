"""The desk's routes: who may ask, what is refused, and what the answers look like."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from examples.fastapi_app.desk.desk import MAX_KILLS, Desk
from examples.fastapi_app.desk.guard import refusal
from examples.fastapi_app.desk.otlp import MAX_BODY_BYTES
from examples.fastapi_app.desk.routes import create_app
from examples.fastapi_app.desk.sockets import bound, listening
from examples.fastapi_app.supervisor import Process

from metered_billing import names

from .spans import Scene, prefixed, trace_id

pytestmark = pytest.mark.anyio

PRESS = {"X-Demo": "1"}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """One whose processes have not been started."""
    app, service = (Process(name, ["true"], {}, 1, "/", tmp_path) for name in ("app", "credits"))
    address, holder = listening(), bound()
    yield Desk(app, service, address, holder, "secret", tmp_path / "journal", {})
    address.close()
    holder.close()


@pytest.fixture
async def http(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(desk))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await desk.proxy.stop()
    await desk.books.close()


@pytest.mark.parametrize(
    ("host", "method", "header", "status"),
    [
        ("localhost:8000", "GET", None, None),
        ("127.0.0.1", "POST", "1", None),
        ("[::1]:8000", "POST", "1", None),
        ("localhost", "POST", None, 403),
        ("localhost", "DELETE", "0", 403),
        ("evil.example", "GET", None, 421),
        ("localhost.evil.example", "POST", "1", 421),
        ("evil.example:localhost", "GET", None, 421),
        ("localhost@evil.example", "GET", None, 421),
        ("[", "GET", None, 421),
        ("", "GET", None, 421),
    ],
)
def test_refusal_of_other_sites(host: str, method: str, header: str | None, status: int | None) -> None:
    """A name that only points here is another site; and another site cannot send our header without asking."""
    headers = [(b"host", host.encode())] + ([(b"x-demo", header.encode())] if header is not None else [])
    refused = refusal(method, headers)
    assert (refused.status_code if refused else None) == status


async def test_traces_are_listed_filtered_and_shown(desk: Desk, http: httpx.AsyncClient) -> None:
    """What an exporter sends is found by who, outcome, status, duration, trouble and any word; the latest first."""
    scene = Scene()
    desk.collector = desk.reading._collector = scene.collector
    for number, (user, status) in enumerate((("alice", 200), ("poor", 402), ("alice", 503))):
        request = scene.request(1000 * number)
        told = {"tenant.id": "demo", "user.id": user, "outcome": "not run" if status > 200 else "settled"}
        scene.span(names.SPAN_CHARGE, request, 1000 * number, attributes=prefixed(told))
        scene.end(request, 1000 * number + 10 ** (number + 1), status=status)
    scene.send()

    async def statuses(**given: str | int) -> list[int]:
        answer = await http.get("/desk/traces", params=given)
        return [trace["status"] for trace in answer.raise_for_status().json()["traces"]]

    assert await statuses() == [503, 402, 200]
    assert await statuses(user="alice") == [503, 200]
    assert await statuses(tenant="nobody") == []
    assert await statuses(outcome="settled") == [200]
    assert await statuses(slow_ms=50) == [503, 402]
    assert await statuses(trouble=1) == [503]
    assert await statuses(status=402) == [402]
    assert await statuses(status="5xx") == [503]
    assert await statuses(status="none") == []
    assert await statuses(q="POOR") == [402]
    assert await statuses(limit=1) == [503]
    assert await statuses(q=trace_id(request)) == [503]
    listed = (await http.get("/desk/traces")).json()
    assert (listed["kept"], listed["dropped"], listed["version"]) == (3, 0, desk.collector.version)
    whole = (await http.get(f"/desk/traces/{trace_id(request)}")).json()
    assert whole.keys() == {"summary", "story", "spans"}
    assert whole["summary"] == listed["traces"][0]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/desk/traces/unknown", None, 404),
        ("GET", "/desk/nothing", None, 404),
        ("GET", "/desk/traces?limit=-1", None, 422),
        ("GET", "/desk/traces?slow_ms=nan", None, 422),
        ("GET", "/desk/traces?since=99999999999999999999", None, 422),
        ("GET", "/desk/statement?user_id=alice", None, 503),
        ("GET", "/desk/fault", None, 405),
        ("POST", "/desk/fault", b"[]", 400),
        ("POST", "/desk/fault", b"{", 400),
        ("POST", "/desk/fault", b"[" * 4000, 400),
        ("POST", "/desk/fault", b" " * 5000, 413),
        ("POST", "/desk/fault", b'{"kind": "fire"}', 422),
        ("POST", "/desk/fault", b'{"kind": ["down"]}', 422),
        ("POST", "/desk/fault", b'{"kind": "down", "calls": "some"}', 422),
        ("POST", "/desk/kill", b'{"process": "init"}', 422),
        ("POST", "/desk/kill", b'{"process": "app", "after_ms": -1}', 422),
        ("POST", "/desk/kill", b'{"process": "app", "after_ms": true}', 422),
        ("POST", "/desk/kill", b'{"process": "app", "after_ms": 60001}', 422),
    ],
)
async def test_what_makes_no_sense_is_a_problem(
    http: httpx.AsyncClient, method: str, path: str, body: bytes | None, status: int
) -> None:
    """Each refusal is a problem document, and nothing happens."""
    answer = await http.request(method, path, content=body, headers=PRESS)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert (await http.get("/desk/state")).json()["fault"] == {"kind": "none", "calls": "every", "struck": 0}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {"Content-Type": "application/json"}, 415),
        (b"", {}, 415),
        (b"rubbish", {"Content-Type": "application/x-protobuf"}, 400),
        (b"x", {"Content-Type": "application/x-protobuf", "Content-Encoding": "br"}, 400),
        (b"x" * (MAX_BODY_BYTES + 1), {"Content-Type": "application/x-protobuf"}, 413),
    ],
)
async def test_ingest_refuses_what_is_no_otlp(
    http: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int
) -> None:
    """A web page cannot send spans: their content type makes a browser ask first. Nor can anybody send too much."""
    assert (await http.post("/v1/traces", content=body, headers=headers)).status_code == status


async def test_state_without_processes_says_so(http: httpx.AsyncClient) -> None:
    """No books while the service is not running."""
    state = (await http.get("/desk/state")).json()
    assert state["books"] is None
    assert state["otlp"] is None
    assert [(process["name"], process["up"]) for process in state["processes"]] == [("app", False), ("credits", False)]


async def test_kill_no_more_than_a_few_wait(desk: Desk, http: httpx.AsyncClient) -> None:
    """Nobody can fill the memory with kills to come."""
    body = {"process": "app", "after_ms": 60_000}
    answers = [(await http.post("/desk/kill", json=body, headers=PRESS)).status_code for _ in range(MAX_KILLS + 1)]
    assert answers == [202] * MAX_KILLS + [429]
    for task in desk._kills:
        task.cancel()
