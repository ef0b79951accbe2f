"""The app that is billed, and the requests to it: each knows what it will be answered, so what has to be paid."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from metered_billing import Account, current_charge, metered
from metered_billing.charge import State
from tests.simulation.loop import PROCESS

if TYPE_CHECKING:
    from tests.simulation.processes import Process
    from tests.simulation.world import World

ACCOUNTS = (Account("acme", "ann"), Account("acme", "bob"), Account("acme"), Account("zeta", "ann"))

PRICE = 3


@dataclass
class Story:
    """One request: what is asked, what its route will do, and then what was seen of it.

    Attributes:
        kind: Which route.
        succeeded: Of each unit or item, whether it will.
        takes_s: How long the route works, streams in all.
        on_disconnect: What was agreed for a client that leaves.
        may_keep: What the charge may keep in the end, in credits; None while nothing narrower is known.
    """

    id: str
    kind: str
    account: Account
    succeeded: tuple[bool, ...]
    takes_s: float
    starts_at: float
    spec_version: str
    send_s: float

    process: "Process | None" = None
    task: "asyncio.Task[Any] | None" = None
    left: asyncio.Event = field(default_factory=asyncio.Event)
    left_at: float | None = None
    cancelled_at: float | None = None
    killed_at: float | None = None
    began_at: float | None = None
    ran: int = 0
    charge_id: str | None = None
    returned_at: float | None = None
    lines: int = 0
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    last_at: float | None = None
    completed: bool = False
    ended_at: float | None = None

    @property
    def units(self) -> int:
        return len(self.succeeded)

    @property
    def amount(self) -> int:
        return self.units * (PRICE if self.kind == "priced" else 1)

    @property
    def on_disconnect(self) -> str:
        return "keep" if self.kind == "kept" else "refund"

    @property
    def streams(self) -> bool:
        return self.kind in ("stream", "events", "broken stream")

    def earns(self) -> int:
        """What its whole response reports as succeeded, in credits."""
        if self.kind in ("raises", "refuses", "error"):
            return 0
        if self.kind == "unread":
            return self.amount
        good = sum(self.succeeded)
        if self.kind == "said":  # the first failure is said, and not reported
            return good
        if self.kind == "broken stream":
            return self.earns_by(self.units // 2)
        return good * (PRICE if self.kind == "priced" else 1)

    def earns_by(self, lines: int) -> int:
        """What the first so many lines of its stream report as succeeded."""
        return sum(self.succeeded[:lines])

    def state(self) -> State | None:
        """Where a charge of it must end, if that is not just anywhere."""
        return State.DISPUTED if self.kind == "unread" else None

    def expected_body(self) -> bytes | None:
        """What the client has to see, where the route has answered."""
        if self.streams or self.kind in ("raises", "refuses", "error"):
            return None
        return json.dumps(_report(self), separators=(",", ":")).encode()


KINDS = (
    "number",
    "number",
    "priced",
    "mapping",
    "said",
    "function",
    "kept",
    "long",
    "stream",
    "events",
    "broken stream",
    "raises",
    "refuses",
    "error",
    "unread",
)


def make_story(number: int, random: Random, within_s: float) -> Story:
    kind = random.choice(KINDS)
    units = random.choice((1, 2, 5, 10))
    failing = random.choice((0.0, 0.3, 1.0))
    takes_s = random.choice((0.0, 0.0, 0.01, 1.0, 10.0))
    if kind == "long":
        takes_s = random.uniform(20.0, 90.0)
    return Story(
        id=f"req-{number:03}",
        kind=kind,
        account=random.choice(ACCOUNTS),
        succeeded=tuple(random.random() >= failing for _ in range(units)),
        takes_s=takes_s,
        starts_at=random.uniform(0.0, within_s),
        spec_version=random.choice(("2.3", "2.4")),
        send_s=random.choice((0.0, 0.0, 0.001, 0.5)),
    )


# The app.


def _world() -> "World":
    process = PROCESS.get()
    if process is None:
        raise LookupError("no process")
    return process.world


def story_of(request: Request) -> Story:
    return _world().stories[request.headers["x-request-id"]]


def account_of(request: Request) -> Account:
    return story_of(request).account


def units_of(request: Request) -> int:
    return story_of(request).units


def items_of(request: Request) -> dict[str, int]:
    return {f"item-{number}": 1 for number in range(story_of(request).units)}


def _report(story: Story) -> Any:
    said = story.kind == "said"
    return {
        "results": [
            {"id": f"item-{number}", "status": "succeeded" if good or said else "failed"}
            for number, good in enumerate(story.succeeded)
        ]
    }


async def _work(request: Request) -> Story:
    """What every route does: say that it runs, and work."""
    story = story_of(request)
    _world().route_runs(story, current_charge())
    await asyncio.sleep(story.takes_s)
    return story


def _done(story: Story) -> Story:
    story.returned_at = _world().loop.time()
    return story


async def _answer(request: Request) -> Response:
    return JSONResponse(_report(_done(await _work(request))))


@metered(cost=units_of)
async def number(request: Request) -> Response:
    return await _answer(request)


@metered(cost=units_of)
async def long(request: Request) -> Response:
    return await _answer(request)


@metered(cost=units_of, price=PRICE, outcomes="$.results[*].status")
async def priced(request: Request) -> Response:
    return await _answer(request)


@metered(cost=items_of, outcomes="$.results[*]")
async def mapping(request: Request) -> Response:
    return await _answer(request)


@metered(cost=units_of, on_disconnect="keep")
async def kept(request: Request) -> Response:
    return await _answer(request)


@metered(cost=units_of)
async def said(request: Request) -> Response:
    story = await _work(request)
    current_charge().fail(units=story.succeeded.count(False))
    return JSONResponse(_report(_done(story)))


def _delivered(returned: Any, request: Request) -> int:
    return sum(story_of(request).succeeded)


def _unread(returned: Any) -> int:
    raise RuntimeError("a bug in the app's own function")


@metered(cost=units_of, outcomes=_delivered)
async def function(request: Request) -> Response:
    return await _answer(request)


@metered(cost=units_of, outcomes=_unread)
async def unread(request: Request) -> Response:
    return await _answer(request)


@metered(cost=units_of)
async def raises(request: Request) -> Response:
    _done(await _work(request))
    raise RuntimeError("a bug in the app")


@metered(cost=units_of)
async def refuses(request: Request) -> Response:
    _done(await _work(request))
    raise HTTPException(422, "not like this")


@metered(cost=units_of)
async def error(request: Request) -> Response:
    _done(await _work(request))
    return JSONResponse({"results": [{"status": "succeeded"}]}, 500)


async def _lines(story: Story, form: str) -> AsyncIterator[str]:
    for number, good in enumerate(story.succeeded):
        await asyncio.sleep(story.takes_s / story.units)
        if story.kind == "broken stream" and number == story.units // 2:
            _done(story)
            raise RuntimeError("the model has crashed")
        yield form.format(json.dumps({"id": number, "status": "ok" if good else "error"}))
    _done(story)


@metered(cost=units_of)
async def stream(request: Request) -> Response:
    story = story_of(request)
    _world().route_runs(story, current_charge())
    return StreamingResponse(_lines(story, "{}\n"), media_type="application/x-ndjson")


@metered(cost=units_of, outcomes="$.status")
async def events(request: Request) -> Response:
    story = story_of(request)
    _world().route_runs(story, current_charge())
    return StreamingResponse(_lines(story, "data: {}\n\n"), media_type="text/event-stream")


ROUTES = [
    Route(f"/{name.replace(' ', '-')}", endpoint, methods=["POST"])
    for name, endpoint in {
        "number": number,
        "long": long,
        "priced": priced,
        "mapping": mapping,
        "kept": kept,
        "said": said,
        "function": function,
        "unread": unread,
        "raises": raises,
        "refuses": refuses,
        "error": error,
        "stream": stream,
        "broken stream": stream,
        "events": events,
    }.items()
]
