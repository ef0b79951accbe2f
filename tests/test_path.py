"""What one request costs, counted: a lost factor shows here, whatever machine this is.

Nothing but the app's path is run: credits and journal answer from memory, one turn of the event loop later. Where
one of these numbers falls, write down the new one.
"""

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Awaitable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metered_billing import Account, MeteredBillingMiddleware, metered, settled
from metered_billing.biller import Biller
from metered_billing.charge import Deducted, Record, Refunded, Reported
from metered_billing.errors import CreditsUnavailable
from metered_billing.journal import JournalError
from metered_billing.outcomes import Paid
from metered_billing.telemetry import Telemetry
from tests.fakes import ANN, World

from .stand import Connection, Message


class Prompt:
    """A journal and a credits service in one: whatever it is asked is answered in the next turn of the event loop."""

    realm = ""
    remembers_declines = True
    owner = "here"
    exclusive = True
    unusable: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.hanging: set[str] = set()

    def _answer(self, name: str, answer: Any) -> "asyncio.Future[Any]":
        self.asked[name] += 1
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def tell() -> None:
            if not future.done():
                future.set_result(answer)

        if name not in self.hanging:
            loop.call_soon(tell)
        return future

    async def start(self, realm: str = "") -> None:
        pass

    async def aclose(self) -> None:
        pass

    close = pause = aclose

    def resume(self) -> None:
        pass

    async def deduct(self, record: Record) -> Deducted:
        answer: Deducted = await self._answer("deduct", Deducted("tx-1", 90))
        return answer

    async def refund(self, record: Record) -> Refunded:
        answer: Refunded = await self._answer("refund", Refunded("re-1", 92))
        return answer

    async def void(self, record: Record) -> Any:
        raise AssertionError

    find = void

    def open(self, record: Record) -> Awaitable[None]:
        return self._answer("open", None)

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        return self._answer(f"{before.state}-{after.state}", True)

    def holds(self, record: Record) -> bool:
        return self.exclusive

    async def adopt(self, now: float) -> int:
        return 0

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        return []

    async def next_due(self, now: float) -> float | None:
        return None

    async def unsettled(self, now: float) -> Mapping[str, tuple[int, float]]:
        return {}

    async def forget(self, closed_before: float, *, keep: int) -> int:
        return 0


class Counting(asyncio.SelectorEventLoop):
    """An event loop that counts what it is given to do."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0
        self.timers = 0
        self.tasks = 0
        self.set_task_factory(self._make_task)

    def _make_task(self, loop: Any, work: Any, **options: Any) -> "asyncio.Task[Any]":
        self.tasks += 1
        return asyncio.Task(work, loop=loop, **options)

    def call_soon(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        self.turns += 1
        return super().call_soon(*args, **options)

    def call_at(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        self.timers += 1
        return super().call_at(*args, **options)


async def work(request: Request) -> Response:
    failed = int(request.query_params.get("failed", "0"))
    statuses = ["failed"] * failed + ["ok"] * (10 - failed)
    return JSONResponse({"results": [{"id": str(n), "status": status} for n, status in enumerate(statuses)]})


class AsUvicorn(Connection):
    """Its `receive` is a queue's, which need not be asked."""

    def __init__(self, app: Any, path: str, query: str = "") -> None:
        super().__init__(app, path)
        self.scope["query_string"] = query.encode()
        self.queue: asyncio.Queue[Message] = asyncio.Queue()
        self.receive = self.queue.get  # type: ignore[method-assign]


def run(failed: int, telemetry: Telemetry, number: int = 10) -> tuple[dict[str, float], Prompt]:
    """So many requests one after the other, after one that warms up."""
    prompt = Prompt()
    app = Starlette(
        routes=[Route("/work", metered(cost=10, outcomes="$.results[*]")(work)), Route("/free", work)],
        middleware=[
            Middleware(
                MeteredBillingMiddleware,
                credits=prompt,
                journal=prompt,
                account=lambda: Account("acme", "ann"),
                telemetry=telemetry,
            )
        ],
    )

    async def main() -> dict[str, float]:
        async def one(path: str) -> None:
            connection = AsUvicorn(app, path, f"failed={failed}")
            connection.scope["method"] = "GET"
            await connection.run()
            assert connection.sent[0]["status"] == 200

        await one("/work")
        await settled()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Counting)
        counted: dict[str, float] = {}
        for path in ("/free", "/work"):
            loop.turns = loop.timers = loop.tasks = 0
            for _ in range(number):
                await one(path)
                while loop.tasks and any(task.get_name() != "metered-billing recovery" for task in others()):
                    await asyncio.sleep(0)
                    loop.turns -= 1
            for what in ("turns", "timers", "tasks"):
                counted[f"{path} {what}"] = getattr(loop, what) / number
        return counted

    def others() -> set["asyncio.Task[Any]"]:
        return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}

    with asyncio.Runner(loop_factory=Counting) as runner:
        return runner.run(main()), prompt


@pytest.mark.parametrize(
    ("failed", "turns", "tasks", "writes", "spans", "lines"),
    [
        # Three answers to wait for, each told by the loop and then heard by the request; one more that hears both, and
        # one that finds that the outcome is there already.
        (0, 8, 0, ["open", "deducted-settled"], 2, 1),
        (2, 14, 1, ["open", "deducted-refunding", "refunding-settled"], 3, 2),
    ],
)
def test_a_metered_request_does_no_more_than_it_must(
    failed: int,
    turns: int,
    tasks: int,
    writes: list[str],
    spans: int,
    lines: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Turns of the event loop, tasks, timers, writes, spans and log lines for a request, exactly."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    caplog.set_level(logging.INFO, "metered_billing")
    counted, prompt = run(failed, Telemetry(provider))
    assert counted["/work turns"] <= turns
    assert counted["/work tasks"] <= tasks
    assert counted["/work timers"] == 0
    written = {name: number for name, number in prompt.asked.items() if name not in ("deduct", "refund")}
    assert written == dict.fromkeys(writes, 11)
    assert (prompt.asked["deduct"], prompt.asked["refund"]) == (11, 11 if failed else 0)
    assert len(exporter.get_finished_spans()) == 11 * spans
    assert len([record for record in caplog.records if record.name == "metered_billing"]) == 11 * lines


def test_a_free_request_takes_no_turn_of_the_loop() -> None:
    """Free is free."""
    counted, _ = run(0, Telemetry())
    assert {counted[f"/free {what}"] for what in ("turns", "timers", "tasks")} == {0}


def test_what_is_not_sampled_is_not_put_together() -> None:
    """A span that nobody will see gets no attribute after its start."""
    provider = TracerProvider(sampler=ALWAYS_OFF)
    telemetry = Telemetry(provider)
    with telemetry.operation("metered_billing.deduct", None) as operation:
        operation.note("a", 1)
        assert operation.span.get_span_context().is_valid
    assert not operation.span.is_recording()


def test_a_request_leaves_nothing_for_the_garbage_collector() -> None:
    """What refers to itself waits for a collection, and each of those holds up every request."""
    run(0, Telemetry(), 1)
    gc.collect()
    run(2, Telemetry(), 1)
    left = gc.collect()
    run(2, Telemetry(), 50)
    assert gc.collect() - left < 50


# A journal that answers by futures need not be waited for in a task; it may hang all the same.


@pytest.mark.parametrize("hanging", ["open", "opened-deducted", "deducted-settled"])
def test_journal_that_hangs_holds_no_request_up_for_longer_than_five_seconds(tmp_path: Path, hanging: str) -> None:
    """Before the route runs that is a 503; after it the response goes out."""
    world = World(tmp_path)
    prompt = Prompt()
    prompt.exclusive = hanging == "deducted-settled"
    prompt.hanging.add(hanging)
    biller = Biller(prompt, prompt, runtime=world.runtime, telemetry=world.telemetry)

    async def main() -> float:
        await biller.start()
        began = world.time
        if hanging == "deducted-settled":
            charge = await biller.deduct(ANN, Paid(10))
            await biller.conclude(charge, Reported(10))
            biller.release(charge, Reported(10))
        else:
            with pytest.raises(CreditsUnavailable) as caught:
                await biller.deduct(ANN, Paid(10))
            assert isinstance(caught.value.__cause__, JournalError)
        return world.time - began

    assert world.run(main) == pytest.approx(5.0)


@pytest.mark.parametrize("where", ["open", "opened-deducted", "deducted-settled"])
def test_request_cancelled_while_its_journal_writes_by_futures(tmp_path: Path, where: str) -> None:
    """The write goes on, and its end is seen to."""
    world = World(tmp_path)
    prompt = Prompt()
    prompt.exclusive = where == "deducted-settled"
    biller = Biller(prompt, prompt, runtime=world.runtime, telemetry=world.telemetry)

    async def request() -> None:
        charge = await biller.deduct(ANN, Paid(10))
        try:
            await biller.conclude(charge, Reported(10))
        finally:
            biller.release(charge, Reported(0))

    async def main() -> None:
        await biller.start()
        task = asyncio.create_task(request())
        while not prompt.asked[where]:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await settled()
        assert not biller._settler._live

    world.run(main)
    then = {"open": "opened-abandoned", "opened-deducted": "deducted-refunding"}
    assert prompt.asked[then.get(where, where)] == 1
    assert prompt.asked["deducted-refunding"] == (where == "opened-deducted")
