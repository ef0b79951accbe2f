"""Credits over HTTP, against answers that are made up: what each means, and what is tried again, and when."""

import asyncio
import gzip
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from random import Random
from typing import Any

import httpx
import pytest
import respx
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import SecretStr

from metered_billing.charge import (
    Account,
    AlreadyVoided,
    Declined,
    Deducted,
    Found,
    NoLookup,
    NotFound,
    NotSent,
    NoVoid,
    Record,
    Refunded,
    Refused,
    State,
    Unanswered,
    Unknown,
    Voided,
)
from metered_billing.credits.connections import MAX_REPLY_BYTES
from metered_billing.credits.contract import Call, Contract, Page, Reply
from metered_billing.credits.http import MAX_PAGES, HttpCredits
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry

URL = "http://credits.test"
TOKEN = "s3cr3t-t0k3n"

DEDUCTION = {"transaction_id": "tx-1", "tenant_id": "acme", "user_id": "alice", "amount": 10, "balance": 90}
REFUND = {"refund_id": "re-1", "transaction_id": "tx-1", "amount": 2, "balance": 92}
VOID = {"status": "voided", "refunded": 10}

DEDUCTED = Deducted("tx-1", 90)


class Luck(Random):
    """Draws the given share of whatever it may draw."""

    share = 0.0

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self.share


class World:
    """Time that passes only in sleep, or when a test says so."""

    def __init__(self) -> None:
        self.monotonic = 5000.0
        self.now = 1_445_412_480.0  # Wed, 21 Oct 2015 07:28:00 GMT
        self.slept: list[float] = []
        self.luck = Luck()

    def pass_by(self, seconds: float) -> None:
        self.monotonic += seconds
        self.now += seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.pass_by(seconds)

    @property
    def runtime(self) -> Runtime:
        return Runtime(now=lambda: self.now, monotonic=lambda: self.monotonic, sleep=self.sleep, random=self.luck)


Client = Callable[..., HttpCredits]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=[True, False], ids=["batching", "singly"])
async def client(world: World, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """Makes clients, and closes them. One operation at a time goes the same way, whether they may go in batches."""
    made: list[HttpCredits] = []

    def make(url: str = URL, **options: Any) -> HttpCredits:
        made.append(HttpCredits(url, **{"runtime": world.runtime, "batching": request.param, **options}))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


@pytest.fixture
def service() -> Iterator[respx.MockRouter]:
    """Whatever is sent goes here; a call that no test expects fails it."""
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        yield router


@pytest.fixture
def deductions(service: respx.MockRouter) -> respx.Route:
    return service.post("/v1/deductions")


@pytest.fixture
def refunds(service: respx.MockRouter) -> respx.Route:
    return service.post("/v1/deductions/tx-1/refunds")


@pytest.fixture
def voids(service: respx.MockRouter) -> respx.Route:
    return service.post("/v1/voids")


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(exporter: InMemorySpanExporter) -> Telemetry:
    """Its spans end in `exporter`."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Telemetry(tracer_provider=provider)


def record(**changes: Any) -> Record:
    """A charge of 10 credits, of which 2 are to go back."""
    fields: dict[str, Any] = {
        "id": "charge-1",
        "account": Account("acme", "alice"),
        "amount_credits": 10,
        "units": 10,
        "opened_at": 0.0,
        "state": State.REFUNDING,
        "transaction_id": "tx-1",
        "refund_credits": 2,
    }
    return Record(**{**fields, **changes})


def yes() -> httpx.Response:
    return httpx.Response(201, json=DEDUCTION)


def problem(status: int, name: str, **more: Any) -> httpx.Response:
    """A problem of ours."""
    headers = {"content-type": "application/problem+json"}
    return httpx.Response(status, headers=headers, json={"type": f"urn:metered-billing:{name}", **more})


def stray(status: int, **headers: str) -> httpx.Response:
    """What a proxy says."""
    return httpx.Response(status, headers=headers, html="<h1>It works!</h1>")


NOT_SENT = [httpx.ConnectError("refused"), httpx.ConnectTimeout("late"), httpx.PoolTimeout("busy")]
UNKNOWN = [
    httpx.ReadTimeout("late"),
    httpx.ReadError("reset"),
    httpx.WriteTimeout("late"),
    httpx.WriteError("broken pipe"),
    httpx.RemoteProtocolError("Server disconnected without sending a response."),
    httpx.LocalProtocolError("?"),
    httpx.CloseError("?"),
    httpx.ProxyError("?"),
    httpx.UnsupportedProtocol("?"),
    httpx.DecodingError("?"),
    TimeoutError("late"),
    OSError("?"),
    RuntimeError("?"),
]


async def never(request: httpx.Request) -> httpx.Response:
    """No answer. (Of a call that ends like this, respx keeps no count.)"""
    await asyncio.sleep(3600)
    raise AssertionError


def kind(error: Exception) -> str:
    return type(error).__name__


class TestDeductAnswers:
    """The table of answers, column "to a deduction"."""

    @pytest.mark.parametrize("status", [200, 201])
    async def test_confirmed(self, client: Client, deductions: respx.Route, status: int) -> None:
        """200 and 201 are yes, at the first attempt."""
        deductions.respond(status, json=DEDUCTION)

        assert await client().deduct(record()) == DEDUCTED
        assert deductions.call_count == 1

    async def test_declined(self, client: Client, deductions: respx.Route) -> None:
        """402 is no, and is not asked again."""
        deductions.mock(return_value=problem(402, "insufficient-credits", required=10, balance=7))

        assert await client().deduct(record()) == Declined(7)
        assert deductions.call_count == 1

    async def test_voided(self, client: Client, deductions: respx.Route) -> None:
        """409 `charge-voided` goes on to the void, and is not asked again."""
        deductions.mock(return_value=problem(409, "charge-voided"))

        assert await client().deduct(record()) == Unknown("it was voided before it arrived")
        assert deductions.call_count == 1

    async def test_stray_conflict_is_retried(self, client: Client, deductions: respx.Route) -> None:
        """A 409 that is not ours says nothing."""
        deductions.mock(side_effect=[stray(409), yes()])

        assert await client().deduct(record()) == DEDUCTED

    @pytest.mark.parametrize("status", [301, 307, 400, 404, 405, 413, 415, 422])
    async def test_our_bug(self, client: Client, deductions: respx.Route, status: int) -> None:
        """Asking again does not put right what we asked wrongly; a redirect is not followed with a token."""
        deductions.mock(return_value=stray(status, location="https://elsewhere.test/"))

        assert await client().deduct(record()) == Unknown(f"HTTP {status}", misconfigured=True)
        assert deductions.call_count == 1

    @pytest.mark.parametrize("status", [401, 403])
    async def test_token_rejected(
        self, client: Client, deductions: respx.Route, caplog: pytest.LogCaptureFixture, status: int
    ) -> None:
        """A rejected token is loud, and not our bug to the customer; it is not asked again."""
        deductions.mock(return_value=problem(status, "unauthorized"))

        assert await client(token=TOKEN).deduct(record()) == Unknown(f"HTTP {status} unauthorized")
        assert deductions.call_count == 1
        loud = [entry for entry in caplog.records if entry.levelno == logging.CRITICAL]
        assert [entry.getMessage() for entry in loud] == [
            f'credits.token_rejected status={status} server="credits.test"'
        ]

    @pytest.mark.parametrize("status", [202, 204, 408, 425, 429, 500, 501, 502, 503, 504])
    async def test_no_answer(self, client: Client, deductions: respx.Route, status: int) -> None:
        """What asks for patience and what is broken is tried three times, and is unknown then."""
        deductions.mock(return_value=stray(status))

        assert await client().deduct(record()) == Unknown(f"HTTP {status}")
        assert deductions.call_count == 3

    @pytest.mark.parametrize("error", UNKNOWN, ids=kind)
    async def test_no_reply(self, client: Client, deductions: respx.Route, error: Exception) -> None:
        """Once a connection existed it may have been sent, whatever the error is called."""
        deductions.mock(side_effect=error)

        assert await client().deduct(record()) == Unknown(kind(error))
        assert deductions.call_count == 3

    @pytest.mark.parametrize("error", NOT_SENT, ids=kind)
    async def test_no_connection(self, client: Client, deductions: respx.Route, error: Exception) -> None:
        """Where no connection ever existed nothing was sent; it is tried again all the same."""
        deductions.mock(side_effect=error)

        assert await client().deduct(record()) == NotSent(kind(error))
        assert deductions.call_count == 3

    @pytest.mark.parametrize(
        "reply",
        [
            httpx.Response(200, html="<h1>Log in to the Wi-Fi</h1>"),
            httpx.Response(200, content=b'{"transaction_id": "tx-1", "amou'),
            httpx.Response(200, content=b""),
            httpx.Response(200, json={**DEDUCTION, "amount": 9}),
            httpx.Response(200, json={**DEDUCTION, "amount": True}),
            httpx.Response(200, json={**DEDUCTION, "amount": "10"}),
            httpx.Response(200, json={**DEDUCTION, "transaction_id": None}),
            httpx.Response(200, json=[DEDUCTION]),
            httpx.Response(200, content=b'{"amount": ' + b"9" * 10_000 + b"}"),
            httpx.Response(200, content=b"[" * 200_000),
            httpx.Response(200, json={**DEDUCTION, "more": "x" * (MAX_REPLY_BYTES + 1)}),
            httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip")),
        ],
        ids=["html", "truncated", "empty", "amount", "bool", "text", "null", "list", "huge", "deep", "5 MB", "gzip"],
    )
    async def test_broken_reply(self, client: Client, deductions: respx.Route, reply: httpx.Response) -> None:
        """A reply that cannot be believed is retried under the same key: the next may be whole."""
        deductions.mock(side_effect=[reply, yes()])

        assert await client().deduct(record()) == DEDUCTED

        deductions.mock(side_effect=None, return_value=reply)
        assert isinstance(await client().deduct(record()), Unknown)


class TestRefundAnswers:
    """The table of answers, column "to a refund or void"."""

    @pytest.mark.parametrize("status", [200, 201])
    async def test_confirmed(self, client: Client, refunds: respx.Route, status: int) -> None:
        """200 and 201 are yes."""
        refunds.respond(status, json=REFUND)

        assert await client().refund(record()) == Refunded("re-1", 92)

    async def test_voided(self, client: Client, refunds: respx.Route) -> None:
        """409 `charge-voided`: it was all undone before."""
        refunds.mock(return_value=problem(409, "charge-voided"))

        assert await client().refund(record()) == AlreadyVoided()

    @pytest.mark.parametrize("status", [400, 404, 413, 422])
    async def test_refused(self, client: Client, refunds: respx.Route, status: int) -> None:
        """Only a problem of ours refuses; the same status from a proxy is no answer."""
        refunds.mock(side_effect=[problem(status, "not-found"), stray(status)])

        assert await client().refund(record()) == Refused(f"HTTP {status} not-found")
        assert await client().refund(record()) == Unanswered(f"HTTP {status}")

    @pytest.mark.parametrize("status", [401, 403])
    async def test_token_rejected(
        self, client: Client, refunds: respx.Route, caplog: pytest.LogCaptureFixture, status: int
    ) -> None:
        """A rotated token is no dispute: it is loud, and tried again."""
        refunds.mock(return_value=problem(status, "unauthorized"))

        assert await client().refund(record()) == Unanswered(f"HTTP {status} unauthorized")
        assert [entry.levelno for entry in caplog.records if entry.name == "metered_billing"] == [logging.CRITICAL]

    @pytest.mark.parametrize("status", [202, 302, 402, 405, 408, 425, 429, 500, 502, 503, 504])
    async def test_no_answer(self, client: Client, refunds: respx.Route, status: int) -> None:
        """No answer: one attempt a call, for whoever calls comes back."""
        refunds.mock(return_value=stray(status))

        assert await client().refund(record()) == Unanswered(f"HTTP {status}")
        assert refunds.call_count == 1

    @pytest.mark.parametrize("status", [408, 425, 429, 503])
    async def test_retry_after_is_handed_on(self, client: Client, refunds: respx.Route, status: int) -> None:
        """Whoever schedules the next attempt learns when the service wants it."""
        refunds.mock(return_value=stray(status, **{"retry-after": "17"}))

        assert await client().refund(record()) == Unanswered(f"HTTP {status}", retry_after_s=17.0)

    @pytest.mark.parametrize("error", UNKNOWN, ids=kind)
    async def test_no_reply(self, client: Client, refunds: respx.Route, error: Exception) -> None:
        """It may have arrived."""
        refunds.mock(side_effect=error)

        assert await client().refund(record()) == Unanswered(kind(error))

    @pytest.mark.parametrize("error", NOT_SENT, ids=kind)
    async def test_no_connection(self, client: Client, refunds: respx.Route, error: Exception) -> None:
        """It did not arrive, and nor would the next."""
        refunds.mock(side_effect=error)

        assert await client().refund(record()) == Unanswered(kind(error), sent=False)

    async def test_goes_under_its_own_key(self, client: Client, refunds: respx.Route) -> None:
        """However often it is called, a refund goes out as the same request under the same key."""
        refunds.respond(500)
        for tries in range(3):
            await client().refund(record(tries=tries, refund_items=("img-1", "img-2")))

        assert {call.request.headers["idempotency-key"] for call in refunds.calls} == {"charge-1:refund"}
        assert {call.request.content for call in refunds.calls} == {
            b'{"amount":2,"reason":"failed items","items":["img-1","img-2"]}'
        }

    @pytest.mark.parametrize("transaction_id", ["a/b", "a?b#c", "100%", "%2F", "ä ☃", "..", "."])
    async def test_any_transaction_id_is_one_segment(
        self, client: Client, service: respx.MockRouter, transaction_id: str
    ) -> None:
        """Whatever the service calls a transaction, the refund goes to that transaction."""
        refunds = service.post(url__regex=r".*").respond(201, json={**REFUND, "transaction_id": transaction_id})

        assert isinstance(await client().refund(record(transaction_id=transaction_id)), Refunded)

        path = refunds.calls.last.request.url.raw_path.decode()
        assert path.startswith("/v1/deductions/")
        assert path.endswith("/refunds")
        assert path.count("/") == 4
        assert httpx.URL(f"https://h/?{path.split('/')[3]}").query == path.split("/")[3].encode()


class TestVoidAnswers:
    async def test_confirmed(self, client: Client, voids: respx.Route) -> None:
        """A void is sent without a key of its own."""
        voids.respond(200, json=VOID)

        assert await client().void(record()) == Voided(10)
        assert "idempotency-key" not in voids.calls.last.request.headers
        assert json.loads(voids.calls.last.request.content)["idempotency_key"] == "charge-1"

    @pytest.mark.parametrize("status", [404, 405, 501])
    async def test_no_void_here(self, client: Client, voids: respx.Route, status: int) -> None:
        """An unknown address, without a problem of ours: this service has no voids."""
        voids.mock(side_effect=[stray(status), problem(status, "not-found")])

        assert await client().void(record()) == NoVoid()
        assert isinstance(await client().void(record()), Refused)

    @pytest.mark.parametrize("status", [400, 413, 422])
    async def test_refused(self, client: Client, voids: respx.Route, status: int) -> None:
        """Only a problem of ours refuses."""
        voids.mock(side_effect=[problem(status, "invalid-request"), stray(status)])

        assert await client().void(record()) == Refused(f"HTTP {status} invalid-request")
        assert await client().void(record()) == Unanswered(f"HTTP {status}")

    @pytest.mark.parametrize("status", [401, 403, 408, 425, 429, 500, 502, 503, 504])
    async def test_no_answer(self, client: Client, voids: respx.Route, status: int) -> None:
        """No answer: one attempt a call, with the service's wish for the next."""
        voids.mock(return_value=stray(status, **{"retry-after": "17"}))

        assert await client().void(record()) == Unanswered(f"HTTP {status}", retry_after_s=17.0)
        assert voids.call_count == 1

    @pytest.mark.parametrize("error", [*UNKNOWN, *NOT_SENT], ids=kind)
    async def test_no_reply(self, client: Client, voids: respx.Route, error: Exception) -> None:
        """Whether it may have been sent is told."""
        voids.mock(side_effect=error)

        assert await client().void(record()) == Unanswered(kind(error), sent=error in UNKNOWN)

    async def test_service_known_to_have_none(self, client: Client) -> None:
        """A contract without voids asks for none."""

        class Voidless(Contract):
            def void(self, record: Record) -> Call | None:
                return None

        assert await client(contract=Voidless()).void(record()) == NoVoid()


class TestFind:
    ENTRY: Mapping[str, str] = {"kind": "deduction", "idempotency_key": "charge-1", "transaction_id": "tx-1"}

    async def test_on_a_later_page(self, client: Client, service: respx.MockRouter) -> None:
        """Pages are followed until it is found, and no further."""
        pages = service.get("/v1/transactions").mock(
            side_effect=[
                httpx.Response(200, json={"items": [{"kind": "grant"}], "next_cursor": "a&b=c"}),
                httpx.Response(200, json={"items": [], "next_cursor": "d"}),
                httpx.Response(200, json={"items": [self.ENTRY], "next_cursor": "e"}),
            ]
        )

        assert await client().find(record()) == Found("tx-1")
        asked = [dict(call.request.url.params) for call in pages.calls]
        assert [each.pop("cursor", None) for each in asked] == [None, "a&b=c", "d"]
        assert asked == [{"tenant_id": "acme", "user_id": "alice", "limit": "200"}] * 3

    async def test_on_no_page(self, client: Client, service: respx.MockRouter) -> None:
        """Only a list that was read to its end shows that there is none."""
        service.get("/v1/transactions").mock(
            side_effect=[
                httpx.Response(200, json={"items": [], "next_cursor": "a"}),
                httpx.Response(200, json={"items": [], "next_cursor": None}),
            ]
        )

        assert await client().find(record()) == NotFound()

    async def test_in_circles(self, client: Client, service: respx.MockRouter) -> None:
        """A list that comes back to where it was has not been read."""
        page = service.get("/v1/transactions").respond(200, json={"items": [], "next_cursor": "a"})

        assert await client().find(record()) == Unanswered("the list of transactions has no end")
        assert page.call_count == 2

    async def test_without_end(
        self, client: Client, service: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A list that goes on and on does not hold up recovery for ever."""
        assert MAX_PAGES >= 1_000
        monkeypatch.setattr("metered_billing.credits.http.MAX_PAGES", 7)
        page = service.get("/v1/transactions")
        page.mock(side_effect=lambda _: httpx.Response(200, json={"items": [], "next_cursor": str(page.call_count)}))

        assert await client().find(record()) == Unanswered("the list of transactions has no end")
        assert page.call_count == 7

    @pytest.mark.parametrize(
        "broken",
        [
            stray(200),
            stray(404, **{"retry-after": "17"}),
            stray(500),
            httpx.Response(200, json={"items": [7]}),
            httpx.Response(200, json={"items": [{"kind": "deduction", "idempotency_key": "charge-1"}]}),
            httpx.ReadTimeout("late"),
            httpx.ConnectError("refused"),
        ],
    )
    async def test_broken(self, client: Client, service: respx.MockRouter, broken: httpx.Response | Exception) -> None:
        """One page that cannot be read, and nothing is known: least of all that there is none."""
        first = httpx.Response(200, json={"items": [], "next_cursor": "a"})
        service.get("/v1/transactions").mock(side_effect=[first, broken])

        got = await client().find(record())

        assert isinstance(got, Unanswered)
        assert got.sent is not isinstance(broken, httpx.ConnectError)
        assert got.retry_after_s == (17.0 if "404" in got.reason else None)


class TestRetrying:
    async def test_same_request_under_the_same_key(self, client: Client, deductions: respx.Route) -> None:
        """All attempts are one request: the same key, the same body."""
        deductions.mock(side_effect=[stray(500), httpx.ReadTimeout("late"), yes()])

        assert await client(token=TOKEN).deduct(record(metadata={"route": "/x"})) == DEDUCTED

        requests = [call.request for call in deductions.calls]
        assert [request.headers["idempotency-key"] for request in requests] == ["charge-1"] * 3
        assert {request.content for request in requests} == {
            b'{"tenant_id":"acme","user_id":"alice","amount":10,"metadata":{"route":"/x"}}'
        }
        assert {request.headers["content-type"] for request in requests} == {"application/json"}
        assert {request.headers["authorization"] for request in requests} == {f"Bearer {TOKEN}"}

    async def test_same_key_again_is_confirmed(self, client: Client, deductions: respx.Route) -> None:
        """A deduction whose first answer was lost is confirmed by the replay."""
        replay = httpx.Response(200, json=DEDUCTION, headers={"Idempotent-Replayed": "true"})
        deductions.mock(side_effect=[httpx.RemoteProtocolError("closed"), replay])

        assert await client().deduct(record()) == DEDUCTED

    @pytest.mark.parametrize("last", [problem(402, "insufficient-credits", balance=7), httpx.ConnectError("refused")])
    @pytest.mark.parametrize("first", [httpx.ReadTimeout("late"), stray(500), stray(200)])
    async def test_doubt_remains(
        self,
        client: Client,
        deductions: respx.Route,
        first: httpx.Response | Exception,
        last: httpx.Response | Exception,
    ) -> None:
        """After an attempt that may still arrive, neither "declined" nor "not sent" is the last word."""
        deductions.mock(side_effect=[first, last, last])

        got = await client().deduct(record())

        if isinstance(last, httpx.Response):
            assert got == Declined(7, after_unknown=True)
        else:
            assert isinstance(got, Unknown)
            assert got.reason.endswith("; then ConnectError")

    async def test_no_doubt_where_nothing_was_sent(self, client: Client, deductions: respx.Route) -> None:
        """A decline after attempts that found no connection is certain."""
        deductions.mock(side_effect=[httpx.ConnectError("refused"), problem(402, "insufficient-credits", balance=7)])

        assert await client().deduct(record()) == Declined(7)

    async def test_doubt_in_the_middle(self, client: Client, deductions: respx.Route) -> None:
        """One attempt that may have arrived is enough, wherever it stands among others."""
        refused = httpx.ConnectError("refused")
        deductions.mock(side_effect=[refused, httpx.ReadError("reset"), refused])

        assert await client().deduct(record()) == Unknown("ReadError; then ConnectError")

    @pytest.mark.parametrize(("share", "slept"), [(0.0, [0, 0]), (0.5, [0.05, 0.1]), (1.0, [0.1, 0.2])])
    async def test_full_jitter(
        self, client: Client, world: World, deductions: respx.Route, share: float, slept: list[float]
    ) -> None:
        """Waits are drawn from nought up to a bound that doubles, so that clients do not come back in step."""
        deductions.respond(500)
        world.luck.share = share

        await client().deduct(record())

        assert world.slept == slept

    async def test_backoff_is_bounded(self, client: Client, world: World, deductions: respx.Route) -> None:
        """However many attempts, no wait is above a second."""
        deductions.respond(500)
        world.luck.share = 1.0

        await client(attempts=8, timeout_s=60, breaker_failures=100).deduct(record())

        assert world.slept == [0.1, 0.2, 0.4, 0.8, 1, 1, 1]

    @pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
    @pytest.mark.parametrize("value", ["2", "Wed, 21 Oct 2015 07:28:02 GMT"])
    async def test_retry_after_is_obeyed(
        self, client: Client, world: World, deductions: respx.Route, status: int, value: str
    ) -> None:
        """The service's wait counts where it is the longer one, in seconds or as a date."""
        deductions.mock(side_effect=[stray(status, **{"retry-after": value}), yes()])
        world.luck.share = 1.0

        assert await client().deduct(record()) == DEDUCTED
        assert world.slept == [2.0]

    async def test_retry_after_is_no_shorter_than_our_own(
        self, client: Client, world: World, deductions: respx.Route
    ) -> None:
        """A service that says "at once" still gets our jitter."""
        deductions.mock(side_effect=[stray(429, **{"retry-after": "0"}), yes()])
        world.luck.share = 1.0

        assert await client().deduct(record()) == DEDUCTED
        assert world.slept == [0.1]

    @pytest.mark.parametrize("value", ["5", "30", "Wed, 21 Oct 2015 07:29:00 GMT"])
    async def test_retry_after_beyond_the_deadline(
        self, client: Client, world: World, deductions: respx.Route, value: str
    ) -> None:
        """A wait that does not fit ends it at once, and the client is told how long."""
        deductions.mock(return_value=stray(503, **{"retry-after": value}))

        got = await client(timeout_s=5).deduct(record())

        assert isinstance(got, Unknown)
        assert got.retry_after_s == (5.0 if value == "5" else 30.0 if value == "30" else 60.0)
        assert deductions.call_count == 1
        assert world.slept == []

    async def test_deadline_in_all(self, client: Client, world: World, deductions: respx.Route) -> None:
        """Attempts and waits together stay within the deadline."""

        def slow(request: httpx.Request) -> httpx.Response:
            world.pass_by(1.9)
            return stray(500)

        deductions.mock(side_effect=slow)
        world.luck.share = 1.0
        began = world.monotonic

        await client(attempts=100, timeout_s=5).deduct(record())

        assert deductions.call_count == 3
        assert world.monotonic - began < 5 + 1.9

    async def test_overslept(self, client: Client, world: World, deductions: respx.Route) -> None:
        """Where the deadline passed in our sleep nothing more is sent, nor is the service blamed for it."""
        deductions.mock(side_effect=httpx.ConnectError("refused"))

        async def oversleep(seconds: float) -> None:
            world.pass_by(60)

        runtime = Runtime(monotonic=lambda: world.monotonic, sleep=oversleep, random=world.luck)
        got = await client(runtime=runtime, breaker_failures=2).deduct(record())

        assert got == NotSent("out of time")
        assert deductions.call_count == 1

    async def test_attempts(self, client: Client, deductions: respx.Route) -> None:
        """`attempts` counts all of them: 1 never retries."""
        deductions.respond(500)

        await client(attempts=1).deduct(record())

        assert deductions.call_count == 1

    async def test_concurrent_calls_do_not_share_their_retries(self, client: Client, service: respx.MockRouter) -> None:
        """Each deduction has its own attempts, however many run at once; none that succeeded runs twice."""
        seen: dict[str, int] = {}

        async def answer(request: httpx.Request) -> httpx.Response:
            key = request.headers["idempotency-key"]
            seen[key] = seen.get(key, 0) + 1
            await asyncio.sleep(0)
            return yes() if int(key) % 2 or seen[key] == 2 else stray(429)

        service.post("/v1/deductions").mock(side_effect=answer)
        credits_ = client(batching=False)

        got = await asyncio.gather(*(credits_.deduct(record(id=str(number))) for number in range(20)))

        assert got == [DEDUCTED] * 20
        assert seen == {str(number): 2 - number % 2 for number in range(20)}

    async def test_budget_stops_a_storm(self, client: Client, deductions: respx.Route) -> None:
        """When everything fails, retries stay near a tenth of the calls instead of tripling them."""
        deductions.respond(429)
        credits_ = client()

        for number in range(200):
            await credits_.deduct(record(id=str(number)))

        assert 200 < deductions.call_count <= 200 + 20 + 20

    async def test_out_of_budget_keeps_the_answer(self, client: Client, deductions: respx.Route) -> None:
        """A call that may not be retried answers what its one attempt gave."""
        deductions.respond(429)
        credits_ = client()
        while deductions.call_count < 60:
            await credits_.deduct(record())
        deductions.mock(side_effect=[httpx.ConnectError("refused")])

        assert await credits_.deduct(record()) == NotSent("ConnectError")


class TestBreaker:
    async def trip(self, credits_: HttpCredits, route: respx.Route) -> None:
        """Open the circuit by refunds that fail, five at most; no wait is involved."""
        route.mock(return_value=stray(500))
        for _ in range(5):
            await credits_.refund(record())

    async def test_open_answers_at_once(
        self, client: Client, world: World, refunds: respx.Route, deductions: respx.Route, voids: respx.Route
    ) -> None:
        """While the circuit is open nothing is sent and nothing waits, and everyone learns when it is over."""
        credits_ = client()
        await self.trip(credits_, refunds)
        world.pass_by(4)

        assert await credits_.deduct(record()) == NotSent("circuit open", retry_after_s=6.0)
        assert await credits_.refund(record()) == Unanswered("circuit open", 6.0, sent=False)
        assert await credits_.void(record()) == Unanswered("circuit open", 6.0, sent=False)
        assert await credits_.find(record()) == Unanswered("circuit open", 6.0, sent=False)
        assert (deductions.call_count, voids.call_count, world.slept) == (0, 0, [])

    async def test_half_open_admits_one(
        self, client: Client, world: World, refunds: respx.Route, deductions: respx.Route
    ) -> None:
        """When the time is over one call is sent; the others are answered at once, without being sent."""
        credits_ = client()
        await self.trip(credits_, refunds)
        world.pass_by(10)
        answered = asyncio.Event()

        async def answer(request: httpx.Request) -> httpx.Response:
            await answered.wait()
            return yes()

        deductions.mock(side_effect=answer)
        probe = asyncio.create_task(credits_.deduct(record()))
        await asyncio.sleep(0.01)

        others = await asyncio.gather(*(credits_.deduct(record(id=str(number))) for number in range(50)))
        assert others == [NotSent("circuit open", retry_after_s=1.0)] * 50

        answered.set()
        assert await probe == DEDUCTED
        assert await credits_.deduct(record(id="after")) == DEDUCTED
        assert deductions.call_count == 2

    async def test_cancelled_probe_lets_the_next_one_through(
        self, client: Client, world: World, refunds: respx.Route, deductions: respx.Route
    ) -> None:
        """Cancelling the probe neither closes the circuit nor shuts everybody out."""
        credits_ = client()
        await self.trip(credits_, refunds)
        world.pass_by(10)
        deductions.mock(side_effect=never)
        probe = asyncio.create_task(credits_.deduct(record()))
        await asyncio.sleep(0.01)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        deductions.mock(side_effect=[stray(500)])

        assert await credits_.deduct(record()) == Unknown("HTTP 500", retry_after_s=10.0)

    async def test_cancelled_calls_are_no_failures(self, client: Client, deductions: respx.Route) -> None:
        """However many clients leave, the service is not to blame."""
        credits_ = client(breaker_failures=1, batching=False)
        deductions.mock(side_effect=never)
        tasks = [asyncio.create_task(credits_.deduct(record(id=str(number)))) for number in range(20)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(got, asyncio.CancelledError) for got in await asyncio.gather(*tasks, return_exceptions=True)
        )
        deductions.mock(side_effect=[yes()])

        assert await credits_.deduct(record()) == DEDUCTED

    async def test_tripping_call_keeps_its_own_answer(
        self, client: Client, world: World, deductions: respx.Route
    ) -> None:
        """The call that opens the circuit may have been charged: it is unknown, not "circuit open"."""
        deductions.mock(side_effect=httpx.ReadTimeout("late"))

        got = await client(breaker_failures=1).deduct(record())

        assert got == Unknown("ReadTimeout", retry_after_s=10.0)
        assert deductions.call_count == 1
        assert world.slept == []

    async def test_opened_by_others_while_we_wait(
        self, client: Client, world: World, refunds: respx.Route, deductions: respx.Route
    ) -> None:
        """A retry that finds the circuit open is not sent, and what came before stays in doubt."""

        async def sleep(seconds: float) -> None:
            await self.trip(credits_, refunds)

        runtime = Runtime(monotonic=lambda: world.monotonic, sleep=sleep, random=world.luck)
        credits_ = client(runtime=runtime)
        deductions.mock(side_effect=[httpx.ReadTimeout("late")])

        assert await credits_.deduct(record()) == Unknown("ReadTimeout; then circuit open", retry_after_s=10.0)

    @pytest.mark.parametrize("status", [200, 401, 402, 404, 409, 422, 429, 501])
    async def test_answers_are_no_failures(self, client: Client, refunds: respx.Route, status: int) -> None:
        """A service that answers is there, whatever it answers: a poor customer does not shut out others."""
        credits_ = client(breaker_failures=2)
        refunds.mock(return_value=problem(status, "x"))
        for _ in range(10):
            await credits_.refund(record())

        assert refunds.call_count == 10

    async def test_our_own_crowd_is_no_failure(self, client: Client, refunds: respx.Route) -> None:
        """That we have no connection free says nothing about the service."""
        credits_ = client(breaker_failures=2)
        refunds.mock(side_effect=httpx.PoolTimeout("busy"))
        for _ in range(10):
            await credits_.refund(record())

        assert refunds.call_count == 10

    async def test_late_results_do_not_extend_it(
        self, client: Client, world: World, refunds: respx.Route, deductions: respx.Route
    ) -> None:
        """Calls that were under way when the circuit opened do not keep it open by failing later."""
        credits_ = client(attempts=1)
        answered = asyncio.Event()

        async def fail(request: httpx.Request) -> httpx.Response:
            await answered.wait()
            return stray(500)

        deductions.mock(side_effect=fail)
        late = [asyncio.create_task(credits_.deduct(record(id=str(number)))) for number in range(10)]
        await asyncio.sleep(0.01)
        await self.trip(credits_, refunds)
        world.pass_by(9)
        answered.set()
        await asyncio.gather(*late)

        assert await credits_.deduct(record()) == NotSent("circuit open", retry_after_s=1.0)


class TestCancelling:
    async def test_under_way(self, client: Client, world: World, deductions: respx.Route) -> None:
        """A cancelled call raises, and is not tried again."""
        deductions.mock(side_effect=never)
        task = asyncio.create_task(client().deduct(record()))
        await asyncio.sleep(0.01)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.slept == []

    async def test_between_attempts(self, client: Client, world: World, deductions: respx.Route) -> None:
        """A cancellation in the wait for the next attempt is not swallowed either."""
        deductions.respond(500)
        runtime = Runtime(monotonic=lambda: world.monotonic, sleep=lambda _: asyncio.sleep(3600), random=world.luck)
        task = asyncio.create_task(client(runtime=runtime).deduct(record()))
        await asyncio.sleep(0.01)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert deductions.call_count == 1

    async def test_while_waiting_for_a_connection(self, client: Client, deductions: respx.Route) -> None:
        """Whoever leaves the line leaves no gap in it: the next one gets the connection."""
        deductions.mock(side_effect=never)
        credits_ = client(max_connections=1)
        first = asyncio.create_task(credits_.deduct(record(id="1")))
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(credits_.deduct(record(id=str(number)))) for number in range(2, 10)]
        await asyncio.sleep(0.01)
        for task in [*waiting[:-1], first]:
            task.cancel()
        deductions.mock(side_effect=[yes()])

        assert await waiting[-1] == DEDUCTED
        await asyncio.gather(first, *waiting, return_exceptions=True)

    async def test_own_timeout_is_not_a_cancellation(
        self, client: Client, world: World, deductions: respx.Route
    ) -> None:
        """An attempt that takes too long is unknown, and tried again; nobody is cancelled."""
        deductions.mock(side_effect=never)

        assert await client(attempt_timeout_s=0.01).deduct(record()) == Unknown("TimeoutError")
        assert len(world.slept) == 2


class TestTelling:
    """Spans, logs, and what is never in them."""

    def spans(self, exporter: InMemorySpanExporter) -> list[ReadableSpan]:
        return list(exporter.get_finished_spans())

    async def test_a_span_for_each_attempt(
        self, client: Client, telemetry: Telemetry, exporter: InMemorySpanExporter, deductions: respx.Route
    ) -> None:
        """Each attempt is a client span that says how it ended and which attempt it was."""
        deductions.mock(side_effect=[stray(503), httpx.ReadTimeout("late"), yes()])

        await client(telemetry=telemetry).deduct(record())

        spans = self.spans(exporter)
        assert [span.kind for span in spans] == [SpanKind.CLIENT] * 3
        seen = [dict(span.attributes or {}) for span in spans]
        assert [each.get("http.request.resend_count") for each in seen] == [None, 1, 2]
        assert [each.get("http.response.status_code") for each in seen] == [503, None, 201]
        assert [each.get("error.type") for each in seen] == ["503", "ReadTimeout", None]
        assert [span.status.status_code for span in spans] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
        for each in seen:
            assert each["http.request.method"] == "POST"
            assert each["server.address"] == "credits.test"
            assert each["server.port"] == 80

    async def test_port_that_goes_without_saying(
        self, client: Client, telemetry: Telemetry, exporter: InMemorySpanExporter
    ) -> None:
        """A span names the port, given or not."""
        for url in ("https://h.test", "http://h.test", "http://h.test:8080"):
            with respx.mock() as service:
                service.post(url__regex=".*").respond(201, json=DEDUCTION)
                await client(url, telemetry=telemetry).deduct(record())

        assert [(span.attributes or {})["server.port"] for span in self.spans(exporter)] == [443, 80, 8080]

    async def test_traceparent_is_the_attempts(
        self, client: Client, telemetry: Telemetry, exporter: InMemorySpanExporter, deductions: respx.Route
    ) -> None:
        """What the service does hangs below the very attempt that asked for it."""
        deductions.mock(side_effect=[stray(503), yes()])

        await client(telemetry=telemetry).deduct(record())

        expected = [f"{span.context.trace_id:032x}-{span.context.span_id:016x}" for span in self.spans(exporter)]
        assert [call.request.headers["traceparent"][3:-3] for call in deductions.calls] == expected

    async def test_nothing_is_traced_without_a_provider(self, client: Client, deductions: respx.Route) -> None:
        """Where nobody traces there is no `traceparent`."""
        deductions.mock(side_effect=[yes()])

        await client().deduct(record())

        assert "traceparent" not in deductions.calls.last.request.headers

    async def test_cancelled_attempt_says_so(
        self, client: Client, telemetry: Telemetry, exporter: InMemorySpanExporter, deductions: respx.Route
    ) -> None:
        """A cancelled attempt's span is ended, and marked as such."""
        deductions.mock(side_effect=never)
        task = asyncio.create_task(client(telemetry=telemetry).deduct(record()))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        (span,) = self.spans(exporter)
        assert (span.attributes or {})["error.type"] == "cancelled"
        assert span.status.status_code is StatusCode.ERROR

    async def test_later_refund_is_a_resend(
        self, client: Client, telemetry: Telemetry, exporter: InMemorySpanExporter, refunds: respx.Route
    ) -> None:
        """A refund's span counts the tries of its charge, of whichever process they were."""
        refunds.respond(201, json=REFUND)

        await client(telemetry=telemetry).refund(record(tries=4))

        (span,) = self.spans(exporter)
        assert (span.attributes or {})["http.request.resend_count"] == 4

    async def test_open_circuit_has_no_attempt(
        self, client: Client, telemetry: Telemetry, exporter: InMemorySpanExporter, refunds: respx.Route
    ) -> None:
        """Nothing sent, no span."""
        refunds.respond(500)
        credits_ = client(telemetry=telemetry, breaker_failures=1)
        await credits_.refund(record())
        await credits_.refund(record())

        assert len(self.spans(exporter)) == 1

    async def test_token_is_nowhere(
        self,
        client: Client,
        telemetry: Telemetry,
        exporter: InMemorySpanExporter,
        deductions: respx.Route,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Neither logs nor spans nor answers nor the client's own looks show the token."""
        caplog.set_level(logging.DEBUG)
        failures: list[httpx.Response | Exception] = [
            stray(401),
            stray(500),
            httpx.ReadTimeout("late"),
            RuntimeError("?"),
            yes(),
        ]
        deductions.mock(side_effect=failures)
        credits_ = client(telemetry=telemetry, token=TOKEN, attempts=1)

        said: list[object] = [await credits_.deduct(record()) for _ in failures]

        assert {call.request.headers["authorization"] for call in deductions.calls} == {f"Bearer {TOKEN}"}
        said += [credits_, str(credits_), vars(credits_), caplog.text]
        said += [span.to_json() for span in self.spans(exporter)]
        said += [vars(entry) for entry in caplog.records]
        assert TOKEN not in repr(said)
        assert caplog.records

    @pytest.mark.parametrize(
        "token", ["", " ", "a b", "s3cr3t\n", "s3cr3t\r\nX-Admin: 1", "s3cr3t\x00", "schlüssel", "\ud800"]
    )
    @pytest.mark.parametrize("wrap", [str, SecretStr])
    def test_token_that_cannot_be_sent_is_refused(self, token: str, wrap: Callable[[str], str | SecretStr]) -> None:
        """A token with a line break would be another header: it is refused, and not shown."""
        with pytest.raises(ValueError, match="visible ASCII") as refusal:
            HttpCredits(URL, token=wrap(token))

        assert "s3cr3t" not in repr(refusal.value)

    async def test_no_token(self, client: Client, deductions: respx.Route) -> None:
        """Without a token nothing is claimed."""
        deductions.mock(side_effect=[yes()])

        await client().deduct(record())

        assert "authorization" not in deductions.calls.last.request.headers

    async def test_cookies_are_not_kept(self, client: Client, deductions: respx.Route) -> None:
        """What came with one customer's answer does not go out with the next one's request."""
        deductions.mock(side_effect=[httpx.Response(201, json=DEDUCTION, headers={"set-cookie": "a=b"}), yes()])
        credits_ = client()

        await credits_.deduct(record(id="1"))
        await credits_.deduct(record(id="2"))

        assert "cookie" not in deductions.calls.last.request.headers


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("https://h.test", "https://h.test/v1/deductions"),
            ("https://h.test/", "https://h.test/v1/deductions"),
            ("https://h.test/base", "https://h.test/base/v1/deductions"),
            ("https://h.test/base/", "https://h.test/base/v1/deductions"),
            ("https://h.test/a%2Fb/c d", "https://h.test/a%2Fb/c%20d/v1/deductions"),
            ("http://h.test:8080/x", "http://h.test:8080/x/v1/deductions"),
            ("http://[::1]:8080", "http://[::1]:8080/v1/deductions"),
            ("HTTPS://H.test", "https://h.test/v1/deductions"),
        ],
    )
    async def test_prefix(self, client: Client, url: str, expected: str) -> None:
        """What stands in the URL's path goes in front of `/v1`."""
        with respx.mock() as service:
            service.post(url__regex=".*").respond(201, json=DEDUCTION)

            assert await client(url).deduct(record()) == DEDUCTED
            assert str(service.calls.last.request.url) == expected

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "credits.internal",
            "credits.internal:8080",
            "ftp://h",
            "https://",
            "https:///v1",
            "http://h:x",
            "https://h\n",
            "https://h?",
            "https://h?tenant=a",
            "https://h/x#y",
            "https://user:s3cr3t@h",
            None,
            7,
        ],
    )
    def test_not_an_address(self, url: Any) -> None:
        """What no credits service can be found at is refused at once, and a password in it is not shown."""
        with pytest.raises(ValueError, match="the credits URL") as refusal:
            HttpCredits(url)

        assert "s3cr3t" not in str(refusal.value)

    def test_lean_without_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It says what to install."""
        monkeypatch.setitem(sys.modules, "metered_billing.credits.lean", None)
        with pytest.raises(ImportError, match=r"pip install 'metered-billing\[lean\]'"):
            HttpCredits(URL, lean=True)

    async def test_start_needs_no_service(self, client: Client) -> None:
        """A service that is down does not keep the app from starting."""
        await client().start()


class TestContractsOfOthers:
    """A contract is a page of a user's own code: it may have bugs."""

    async def test_says_what_it_remembers(self, client: Client) -> None:
        """Whether declines are remembered is for the contract to say."""

        class Forgetful(Contract):
            remembers_declines = False

        assert client().remembers_declines
        assert not client(contract=Forgetful()).remembers_declines

    async def test_forgotten_decline_is_undone(self, client: Client, service: respx.MockRouter) -> None:
        """Whatever the contract's reader says of a decline, a service that forgets it may take a late copy."""

        class Forgetful(Contract):
            remembers_declines = False

            def read_deduction(self, record: Record, reply: Reply) -> Any:
                return Declined(3)

        service.route().respond(409)
        got = await client(contract=Forgetful()).deduct(record())
        assert got == Declined(3, forgotten=True)
        assert got.occasion_for(record()) == "declined, in doubt"

    @pytest.mark.parametrize(
        ("read", "answer"),
        [
            (Deducted(7), Unknown("TypeError in the credits client", misconfigured=True)),  # type: ignore[arg-type]
            (Deducted(""), Unknown("TypeError in the credits client", misconfigured=True)),
            (None, Unknown("TypeError in the credits client", misconfigured=True)),
            (Deducted("tx-1", "90"), Deducted("tx-1")),  # type: ignore[arg-type]
            (Declined(3.5), Declined(None)),  # type: ignore[arg-type]
        ],
    )
    async def test_reader_that_is_careless(
        self, client: Client, service: respx.MockRouter, read: Any, answer: Any
    ) -> None:
        """What cannot be put on record is no answer; a balance that is no whole number is left out."""

        class Careless(Contract):
            def read_deduction(self, record: Record, reply: Reply) -> Any:
                return read

        service.route().respond(200)
        assert await client(contract=Careless()).deduct(record()) == answer

    @pytest.mark.parametrize("operation", ["refund", "void", "find"])
    async def test_reader_of_what_is_undone_that_is_careless(
        self, client: Client, service: respx.MockRouter, operation: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is asked again, and the log names the mapping: nobody looks for a bug of the library's."""

        class Careless(Contract):
            def read_refund(self, record: Record, reply: Reply) -> Any:
                return None

            def read_void(self, record: Record, reply: Reply) -> Any:
                return True

            def read_transactions(self, reply: Reply) -> Page | None:
                return Page([], None)

            def find(self, record: Record, page: Page) -> Any:
                return Found(7)  # type: ignore[arg-type]

        service.route().respond(200)
        asked = record(transaction_id="tx-1", refund_credits=2, reason="failed items")
        got = await getattr(client(contract=Careless()), operation)(asked)
        assert got == Unanswered("TypeError in the credits client")
        (logged,) = [each for each in caplog.records if each.getMessage().startswith("billing.misconfigured")]
        assert logged.exc_info is not None
        assert f"{'find' if operation == 'find' else f'read_{operation}'} returned" in str(logged.exc_info[1])

    async def test_token_and_key_in_other_headers(self, client: Client, service: respx.MockRouter) -> None:
        """And in none that the service does not know."""

        class Keyed(Contract):
            auth_header, auth_scheme = "X-API-Key", ""

            def deduction(self, record: Record) -> Call:
                return Call("POST", "/deduct", {}, headers={"X-Request-Key": record.id})

        route = service.post(f"{URL}/deduct").respond(500)
        await client(contract=Keyed(), token=TOKEN, attempts=1).deduct(record())
        sent = route.calls[0].request.headers
        assert (sent["x-api-key"], sent["x-request-key"]) == (TOKEN, record().id)
        assert not {"authorization", "idempotency-key"} & set(sent)

    @pytest.mark.parametrize(("header", "scheme"), [("X API Key", ""), ("", ""), ("X-Key", "two words"), ("X-K\n", "")])
    async def test_header_that_cannot_be_sent(self, client: Client, header: str, scheme: str) -> None:
        """It is said when the client is made."""

        class Keyed(Contract):
            auth_header, auth_scheme = header, scheme

        with pytest.raises(ValueError, match="auth_header"):
            client(contract=Keyed())

    @pytest.mark.parametrize(
        ("contract", "given"),
        [(Contract, "the class Contract"), ("own:Own", "'own:Own'"), (object, "the class object")],
    )
    def test_contract_that_is_none(self, contract: Any, given: str) -> None:
        """Its class, most often: each request would be answered 500."""
        with pytest.raises(TypeError, match=given):
            HttpCredits(URL, contract=contract)

    async def test_without_a_list_nothing_is_looked_for(self, client: Client, service: respx.MockRouter) -> None:
        """No call is made."""

        class Listless(Contract):
            def transactions(self, *_: Any) -> None:
                return None

        assert await client(contract=Listless()).find(record()) == NoLookup()
        assert not service.calls

    async def test_bug_in_reading(
        self, client: Client, service: respx.MockRouter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A reader that raises is loud; nothing is confirmed by it, and it is not asked again."""

        class Broken(Contract):
            def read_deduction(self, record: Record, reply: Reply) -> Any:
                raise KeyError("transactionId")

            read_refund = read_void = read_deduction

            def read_transactions(self, reply: Reply) -> Any:
                raise KeyError("entries")

        route = service.route().respond(200, json={})
        credits_ = client(contract=Broken(), token=TOKEN)

        assert await credits_.deduct(record()) == Unknown("KeyError in the credits client", misconfigured=True)
        assert await credits_.refund(record()) == Unanswered("KeyError in the credits client")
        assert await credits_.void(record()) == Unanswered("KeyError in the credits client")
        assert await credits_.find(record()) == Unanswered("KeyError in the credits client")
        assert route.call_count == 4
        assert [entry.getMessage().split()[0] for entry in caplog.records if entry.name == "metered_billing"] == [
            "billing.misconfigured"
        ] * 4

    @pytest.mark.parametrize(
        "call",
        [
            Call("POST", "/ä"),
            Call("POST", "/x", {"amount": object()}),
            Call("POST", "/x", {}, key="ä\n"),
        ],
    )
    async def test_bug_in_asking(self, client: Client, call: Call) -> None:
        """A request that cannot be made is an answer too: nobody is told by an exception."""

        class Broken(Contract):
            def deduction(self, record: Record) -> Call:
                return call

            refund = void = deduction

        credits_ = client(contract=Broken())

        assert isinstance(await credits_.deduct(record()), Unknown)
        assert isinstance(await credits_.refund(record()), Unanswered)
        assert isinstance(await credits_.void(record()), Unanswered)

    async def test_no_traceback_holds_the_token(
        self, client: Client, caplog: pytest.LogCaptureFixture, deductions: respx.Route
    ) -> None:
        """Loggers that show local variables (structlog's do) find no token in the frames of an error."""

        class Broken(Contract):
            def deduction(self, record: Record) -> Call:
                return Call("POST", "/x", {"amount": object()}, key="charge-1")

        await client(contract=Broken(), token=TOKEN).deduct(record())

        (entry,) = [entry for entry in caplog.records if entry.exc_info]
        assert entry.exc_info
        traceback = entry.exc_info[2]
        frames = 0
        while traceback is not None:
            frames += 1
            assert TOKEN not in repr(traceback.tb_frame.f_locals)
            traceback = traceback.tb_next
        assert frames > 3

    async def test_text_that_is_no_unicode(self, client: Client, deductions: respx.Route) -> None:
        """What the service may refuse is for the service to refuse: it is sent, and gets its answer."""
        deductions.mock(side_effect=[problem(422, "invalid-request")])

        got = await client().deduct(record(request_id="\ud800"))

        assert got == Unknown("HTTP 422 invalid-request", misconfigured=True)
        assert json.loads(deductions.calls.last.request.content)["request_id"] == "\ud800"


async def test_compressed_reply_is_not_unpacked() -> None:
    """A few bytes may stand for gigabytes; we ask for none, and take a reply that is for a broken one."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["accept-encoding"])
        packed = gzip.compress(b'{"transaction_id": "tx-1", "amount": 10, "balance": 90}')
        return httpx.Response(201, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(packed))

    credits_ = HttpCredits("http://credits.test", transport=httpx.MockTransport(answer), attempts=1)
    outcome = await credits_.deduct(
        Record(id="c1", account=Account("acme"), amount_credits=10, units=10, opened_at=1.0)
    )
    assert isinstance(outcome, Unknown)
    assert asked == ["identity"]
    await credits_.aclose()
