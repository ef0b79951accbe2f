"""A token that is rotated while the client runs: what was rejected goes once more, under its key, with the other."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import respx
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from metered_billing import names
from metered_billing.charge import Declined, Deducted, NotSent, Refunded, Unanswered, Unknown, Voided
from metered_billing.credits.http import HttpCredits
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry

from .test_batches import Service, charge, deduct_all, done, result
from .test_http import DEDUCTED, REFUND, URL, VOID, World, never, problem, record, stray, yes


class Tokens:
    """Where the client has its token from. `there` is what a look would find."""

    def __init__(self, held: str | None = "old", there: str | None = "new") -> None:
        self._held = held
        self.there = there
        self.looks = 0
        self.gate: asyncio.Event | None = None

    def held(self) -> SecretStr | None:
        return None if self._held is None else SecretStr(self._held)

    async def another_than(self, rejected: SecretStr | None) -> SecretStr | None:
        if self.held() == rejected:
            self.looks += 1
            if self.gate is not None:
                await self.gate.wait()
            self._held = self.there
        held = self.held()
        return None if held == rejected else held


Make = Callable[..., HttpCredits]


@pytest.fixture(params=[True, False], ids=["batching", "singly"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    made: list[HttpCredits] = []

    def make(tokens: Tokens, **options: Any) -> HttpCredits:
        options = {"runtime": World().runtime, "batching": request.param, **options}
        made.append(HttpCredits(URL, token=tokens, **options))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


@pytest.fixture
def router() -> Iterator[respx.MockRouter]:
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        yield router


def only(token: str, then: Callable[[], httpx.Response], otherwise: httpx.Response | None = None) -> Any:
    """A service that knows this token alone."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") == f"Bearer {token}":
            return then()
        return problem(401, "unauthorized") if otherwise is None else otherwise

    return answer


def sent(route: respx.Route) -> list[tuple[str, str, bytes]]:
    """Token, key and body of each call."""
    return [
        (call.request.headers["authorization"], call.request.headers["idempotency-key"], call.request.content)
        for call in route.calls
    ]


async def test_rejected_deduction_goes_again_with_the_other_token(
    make: Make, router: respx.MockRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """The same operation under the same key; and nobody is woken up for it."""
    deductions = router.post("/v1/deductions").mock(side_effect=only("new", yes))
    assert await make(Tokens()).deduct(record()) == DEDUCTED
    (first, key, body), again = sent(deductions)
    assert first == "Bearer old"
    assert again == ("Bearer new", key, body)
    assert names.LOG_REJECTED not in caplog.text


@pytest.mark.parametrize(("there", "calls"), [("old", 1), ("new", 2)])
async def test_token_that_stays_rejected_is_loud_and_looked_for_once(
    make: Make, router: respx.MockRouter, caplog: pytest.LogCaptureFixture, there: str, calls: int
) -> None:
    """Without another, as if it were fixed; where the other is rejected too, there is no third call. One line tells."""
    deductions = router.post("/v1/deductions").mock(side_effect=only("newer", yes))
    tokens = Tokens(there=there)
    assert await make(tokens).deduct(record()) == Unknown("HTTP 401 unauthorized")
    assert deductions.call_count == calls
    assert tokens.looks == 1
    assert [entry.levelno for entry in caplog.records] == [logging.CRITICAL]


async def test_403_looks_for_no_other_token(make: Make, router: respx.MockRouter) -> None:
    """The service knows this one; it may not do that."""
    router.post("/v1/deductions").mock(return_value=problem(403, "forbidden"))
    tokens = Tokens()
    assert await make(tokens).deduct(record()) == Unknown("HTTP 403 forbidden")
    assert tokens.looks == 0


@pytest.mark.parametrize(
    ("second", "after_a_proxy", "after_the_service"),
    [
        (
            problem(402, "insufficient-credits", balance=7),
            Declined(7, after_unknown=True),
            Declined(7),
        ),
        (yes(), DEDUCTED, DEDUCTED),
    ],
    ids=["declined", "deducted"],
)
async def test_answer_after_a_401(
    make: Make, router: respx.MockRouter, second: httpx.Response, after_a_proxy: Any, after_the_service: Any
) -> None:
    """A proxy's 401 does not prove that nothing came of the first copy; the service's own does."""
    for first, expected in (
        (stray(401), after_a_proxy),
        (problem(401, "unauthorized"), after_the_service),
    ):
        router.post("/v1/deductions").mock(side_effect=[first, second])
        assert await make(Tokens()).deduct(record()) == expected


async def test_connect_error_after_a_401(make: Make, router: respx.MockRouter) -> None:
    """Likewise: it may have been sent, or it was not."""
    for first, expected in (
        (stray(401), Unknown("HTTP 401; then ConnectError")),
        (problem(401, "unauthorized"), NotSent("ConnectError")),
    ):
        router.post("/v1/deductions").mock(side_effect=[first, httpx.ConnectError("refused")])
        assert await make(Tokens(), attempts=1).deduct(record()) == expected


async def test_wait_for_the_other_token_ends_with_the_attempt(make: Make, router: respx.MockRouter) -> None:
    """A request does not hang on the place where tokens are kept."""
    router.post("/v1/deductions").mock(return_value=problem(401, "unauthorized"))
    tokens = Tokens()
    tokens.gate = asyncio.Event()
    credits_ = make(tokens, attempt_timeout_s=0.05, runtime=Runtime())
    assert await credits_.deduct(record()) == Unknown("HTTP 401 unauthorized")


async def test_token_that_comes_too_late_is_not_used(make: Make, router: respx.MockRouter) -> None:
    """The attempt's time is over: nothing is sent that nobody waits for."""
    deductions = router.post("/v1/deductions").mock(side_effect=only("new", yes))
    world = World()

    class Slow(Tokens):
        async def another_than(self, rejected: SecretStr | None) -> SecretStr | None:
            world.pass_by(3)
            return await super().another_than(rejected)

    assert await make(Slow(), runtime=world.runtime).deduct(record()) == Unknown("HTTP 401 unauthorized")
    assert deductions.call_count == 1
    late = make(Slow(held=None), runtime=world.runtime, attempts=1)
    assert await late.deduct(record()) == NotSent("the token cannot be read")
    assert deductions.call_count == 1


async def test_second_call_is_told_from_the_first(make: Make, router: respx.MockRouter) -> None:
    """In traces."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    router.post("/v1/deductions").mock(side_effect=only("new", yes))
    await make(Tokens(), telemetry=Telemetry(tracer_provider=provider)).deduct(record())
    calls = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    assert [(call.get(names.HTTP_STATUS_CODE), call.get(names.HTTP_RESEND_COUNT)) for call in calls] == [
        (401, None),
        (201, 1),
    ]


async def test_deduction_that_is_cancelled_meanwhile_is_not_sent_again(make: Make, router: respx.MockRouter) -> None:
    """As ever: the biller voids it."""
    deductions = router.post("/v1/deductions").mock(return_value=problem(401, "unauthorized"))
    tokens = Tokens()
    tokens.gate = asyncio.Event()
    task = asyncio.create_task(make(tokens).deduct(record()))
    while not tokens.looks:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tokens.gate.set()
    await asyncio.sleep(0.01)
    assert deductions.call_count == 1


async def test_refund_and_void_go_again_too(make: Make, router: respx.MockRouter) -> None:
    """Those in the background have the other token at once."""
    router.post("/v1/deductions/tx-1/refunds").mock(
        side_effect=only("new", lambda: httpx.Response(201, json=REFUND), stray(401))
    )
    router.post("/v1/voids").mock(side_effect=only("newer", lambda: httpx.Response(200, json=VOID), stray(401)))
    tokens = Tokens()
    assert await make(tokens).refund(record()) == Refunded("re-1", 92)
    tokens.there = "newer"
    assert await make(tokens).void(record()) == Voided(10)
    tokens.there = None
    router.post("/v1/voids").mock(side_effect=only("newest", lambda: httpx.Response(200, json=VOID), stray(401)))
    assert await make(tokens).void(record()) == Unanswered("HTTP 401")


async def test_nothing_is_sent_without_a_token(make: Make, router: respx.MockRouter) -> None:
    """None has been read, and none can be: no charge, and the service is not blamed for it."""
    tokens = Tokens(held=None, there=None)
    credits_ = make(tokens, breaker_failures=1)
    assert await credits_.deduct(record()) == NotSent("the token cannot be read")
    assert not router.calls
    tokens.there = "new"
    router.post("/v1/deductions").mock(side_effect=only("new", yes))
    assert await credits_.deduct(record()) == DEDUCTED


async def test_slow_first_token_leaves_what_is_left_of_the_attempt(make: Make, router: respx.MockRouter) -> None:
    """Waiting for it counts."""
    router.post("/v1/deductions").mock(side_effect=never)
    tokens = Tokens(held=None)
    tokens.gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, tokens.gate.set)
    credits_ = make(tokens, timeout_s=0.2, attempt_timeout_s=0.2, attempts=1, runtime=Runtime())
    async with asyncio.timeout(1):
        assert await credits_.deduct(record()) == Unknown("TimeoutError")


# In groups.


@pytest.fixture
def service() -> Iterator[Service]:
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        yield Service(router)


@pytest.fixture
async def batching() -> AsyncIterator[Make]:
    made: list[HttpCredits] = []

    def make(tokens: Tokens) -> HttpCredits:
        made.append(HttpCredits(URL, token=tokens, runtime=World().runtime))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


@pytest.mark.parametrize("rejection", [problem(401, "unauthorized"), stray(401)], ids=["service", "proxy"])
async def test_rejected_batch_goes_again_whole(batching: Make, service: Service, rejection: httpx.Response) -> None:
    """In one call, as it was, and no retry budget runs out."""
    service.instead = [rejection]
    keys = range(100)
    assert await deduct_all(batching(Tokens()), *keys) == [Deducted(f"tx-{key}", 90) for key in keys]
    assert service.keys == [[str(key) for key in keys]] * 2
    assert service.singles == []
    assert [request.headers["authorization"] for request in service.requests] == ["Bearer old", "Bearer new"]


async def test_decline_in_a_batch_after_a_proxys_401_is_in_doubt(batching: Make, service: Service) -> None:
    """As it is alone."""
    for rejection, doubt in ((stray(401), True), (problem(401, "unauthorized"), False)):
        service.instead = [rejection]
        service.result = lambda _: {"status": 402, "body": {"type": "urn:metered-billing:insufficient-credits"}}
        assert await deduct_all(batching(Tokens()), 1, 2) == [Declined(None, after_unknown=doubt)] * 2


async def test_one_of_a_batch_that_is_rejected_goes_again_alone(batching: Make, service: Service) -> None:
    """Its neighbours have their answers."""
    rejected = ["2", "2"]

    def answer(operation: dict[str, Any]) -> dict[str, Any]:
        key = operation["idempotency_key"]
        if key in rejected:
            rejected.remove(key)
            return result(401)
        return done(operation)

    service.result = answer
    assert await deduct_all(batching(Tokens()), 1, 2, 3) == [Deducted(f"tx-{key}", 90) for key in (1, 2, 3)]
    assert service.singles == ["2", "2"]


async def test_refund_that_is_rejected_in_a_batch_goes_again_alone(batching: Make, service: Service) -> None:
    """Refunds as well."""
    rejected = ["2:refund"]

    def answer(operation: dict[str, Any]) -> dict[str, Any]:
        key = operation["idempotency_key"]
        if key in rejected:
            rejected.remove(key)
            return result(401)
        return done(operation)

    service.result = answer
    credits_ = batching(Tokens())
    answers = await asyncio.gather(*(credits_.refund(charge(key)) for key in (1, 2, 3)))
    assert answers == [Refunded("re-1", 92)] * 3
    assert service.singles[-1] == "2:refund"
