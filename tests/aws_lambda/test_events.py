"""An app under Mangum: each shape of event is charged for right, and an answer leaves nothing under way."""

import asyncio
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from mangum import Mangum
from mangum.protocols import LifespanCycle

from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered
from tests.aws_lambda.events import REQUEST_ID, SHAPES, Context, body_of, headers_of, json_of

GRANTED = 100


class Instance:
    """One instance of the function: its event loop runs only while it is called."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        self._loop: Any = loop
        self.credits = SqlCredits(directory / "credits.db")
        loop.run_until_complete(
            self.credits.grant("acme", "ann", amount=GRANTED, reason="test", idempotency_key="grant")
        )
        app = FastAPI()
        app.add_middleware(
            MeteredBillingMiddleware,
            credits=self.credits,
            journal=directory / "journal",
            account=lambda request: Account("acme", request.cookies.get("user", "ann")),
            settle="inline",
        )

        @app.post("/pictures/{name}")
        @metered(cost=lambda good, bad: good + bad)
        async def pictures(name: str, request: Request, good: int = 0, bad: int = 0) -> dict[str, Any]:
            return {
                "name": name,
                "tags": request.query_params.getlist("tag"),
                "size": len(await request.body()),
                "results": [{"status": "ok"}] * good + [{"status": "failed"}] * bad,
            }

        @app.post("/bytes")
        @metered(cost=3)
        async def some_bytes(request: Request) -> Response:
            return Response((await request.body())[::-1], media_type="image/png")

        @app.post("/lines")
        @metered(cost=3)
        async def lines() -> StreamingResponse:
            async def each() -> Any:
                for status in ("ok", "failed", "ok"):
                    yield json.dumps({"status": status}) + "\n"

            return StreamingResponse(each(), media_type="application/x-ndjson")

        @app.post("/breaks")
        @metered(cost=3)
        async def breaks() -> None:
            raise RuntimeError("the route")

        self.app = app
        self.handler = Mangum(app, **{"lifespan": "off", **options})
        self._others = set(asyncio.all_tasks(loop))

    def started(self) -> "Instance":
        """As the example does it: the lifespan begins once."""
        LifespanCycle(self.app, "on").__enter__()
        self._others = {task for task in asyncio.all_tasks(self._loop) if "metered" not in task.get_name()}
        self.rests()
        return self

    def __call__(self, event: dict[str, Any]) -> dict[str, Any]:
        answer = self.handler(event, Context())  # type: ignore[arg-type]
        self.rests()
        return json.loads(json.dumps(answer))  # type: ignore[no-any-return]

    def rests(self) -> None:
        """Nothing of ours is left on the loop; and a turn of it would bring nothing about."""
        assert asyncio.all_tasks(self._loop) <= self._others
        assert [timer for timer in self._loop._scheduled if not timer.cancelled()] == []

    def ledger(self, user: str = "ann") -> list[tuple[str, int]]:
        page = self._loop.run_until_complete(self.credits.transactions("acme", user, limit=100))
        return [(entry["kind"], entry["amount"]) for entry in reversed(page.items) if entry["kind"] != "grant"]

    def close(self) -> None:
        self._loop.run_until_complete(self.credits.aclose())


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The one that Mangum runs things on."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
        loop.run_until_complete(asyncio.wait({task}))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def instance(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Instance]:
    instance = Instance(tmp_path, loop)
    yield instance
    instance.close()


def test_event_that_is_no_request_raises_and_moves_nothing(instance: Instance) -> None:
    """A ping that keeps an instance warm; a body that is not what its event says."""
    with pytest.raises(RuntimeError, match="unable to infer a handler"):
        instance({"warmer": True})
    event = SHAPES["http-api"]("POST", "/lines", "", b"{}", content_type="application/json")
    with pytest.raises(binascii.Error):
        instance({**event, "body": "{}x", "isBase64Encoded": True})
    assert instance.ledger() == []


@pytest.mark.parametrize("shape", SHAPES)
def test_event_is_charged_for_and_what_failed_is_back_when_the_answer_is_returned(
    instance: Instance, shape: str
) -> None:
    """Paths, parameters, cookies and bodies arrive; headers and refunds go back."""
    event = SHAPES[shape]
    query = "good=8&bad=2&tag=a%20b" + ("&tag=c" if shape != "load-balancer" else "")
    answer = instance(
        event("POST", "/pictures/cup", query, b'{"a": 1}', content_type="application/json", cookie="user=ann; x=y")
    )
    assert answer["statusCode"] == 200
    headers = headers_of(answer)
    assert (headers["credits-deducted"], headers["credits-refunded"], headers["credits-balance"]) == ("10", "2", "92")
    told = json_of(answer)
    assert (told["name"], told["tags"][0], told["size"]) == ("cup", "a b", 8)
    assert len(told["tags"]) == query.count("tag=")
    assert instance.ledger() == [("deduction", -10), ("refund", 2)]

    picture = bytes(range(256))
    answer = instance(event("POST", "/bytes", "", picture, binary=True, content_type="image/png"))
    assert answer["isBase64Encoded"] is True
    assert body_of(answer) == picture[::-1]
    assert instance.ledger()[2:] == [("deduction", -3)]

    answer = instance(event("POST", "/lines"))
    assert body_of(answer).count(b"\n") == 3
    assert instance.ledger()[3:] == [("deduction", -3), ("refund", 1)]

    answer = instance(event("POST", "/breaks"))
    assert answer["statusCode"] == 500
    assert instance.ledger()[5:] == [("deduction", -3), ("refund", 3)]

    answer = instance(event("POST", "/pictures/cup", "good=1000"))
    assert answer["statusCode"] == 402
    assert headers_of(answer)["content-type"] == "application/problem+json"
    assert json_of(answer)["required"] == 1000
    assert len(instance.ledger()) == 7


def test_charge_has_the_invocations_id(instance: Instance, caplog: pytest.LogCaptureFixture) -> None:
    """By which CloudWatch finds all lines of a request."""
    caplog.set_level("INFO", "metered_billing")
    instance(SHAPES["http-api"]("POST", "/pictures/cup", "good=1"))
    assert [record.message for record in caplog.records if f'request_id="{REQUEST_ID}"' in record.getMessage()]


def test_lifespan_that_began_with_the_instance_leaves_nothing_under_way(instance: Instance) -> None:
    """Lambda may freeze an instance before its first request."""
    instance.started()
    for number in (1, 2):
        instance(SHAPES["http-api"]("POST", "/pictures/cup", "good=8&bad=2"))
        assert instance.ledger() == [("deduction", -10), ("refund", 2)] * number


def test_lifespan_of_each_request_is_charged_right_too(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """Mangum's default: the journal is opened and closed each time, which only takes longer."""
    instance = Instance(tmp_path, loop, lifespan="auto")
    for number in (1, 2):
        instance(SHAPES["http-api"]("POST", "/pictures/cup", "good=8&bad=2"))
        assert instance.ledger() == [("deduction", -10), ("refund", 2)] * number
    instance.close()
