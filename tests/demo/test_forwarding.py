"""Spans are passed on to the backend that the user named, and to nobody else."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from examples.fastapi_app.desk import forwarding
from examples.fastapi_app.desk.forwarding import Forwarder, endpoint_in, headers_in, without_secrets

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:4318/"}, "http://b:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"}, "http://t/x"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_endpoint_in_follows_the_specification(environment: dict[str, str], endpoint: str | None) -> None:
    """The variables mean what they mean to any exporter."""
    assert endpoint_in(environment) == endpoint


def test_headers_in_are_percent_decoded() -> None:
    """Those for traces come first; what is no pair is left out."""
    assert headers_in({"OTEL_EXPORTER_OTLP_HEADERS": "api-key=a%20b, x=1,rubbish,=2"}) == {"api-key": "a b", "x": "1"}
    both = {"OTEL_EXPORTER_OTLP_HEADERS": "a=1", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "b=2"}
    assert headers_in(both) == {"b": "2"}


def test_without_secrets_shows_no_password_and_no_query() -> None:
    """What the page shows of the endpoint is its place alone."""
    assert without_secrets("https://me:secret@b.example:4318/v1/traces?key=secret#secret") == (
        "https://b.example:4318/v1/traces"
    )


class Backend:
    """Takes spans, or not."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.taken: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        status = self.answers.pop(0) if self.answers else 200
        if status == 0:
            raise httpx.ConnectError("refused")
        if status == 200:
            self.taken.append(request)
        return httpx.Response(status)


def forwarder(backend: Callable[[httpx.Request], httpx.Response]) -> Forwarder:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://backend", "OTEL_EXPORTER_OTLP_HEADERS": "api-key=secret"}
    return Forwarder(environment, transport=httpx.MockTransport(backend))


async def test_put_is_passed_on_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes, their encoding and the user's headers; again after a backend that was down or busy, in order."""
    monkeypatch.setattr(forwarding, "FIRST_PAUSE_S", 0.001)
    backend = Backend(0, 503, 200, 400, 200)
    forward = forwarder(backend)
    forward.start()
    for body in (b"one", b"refused for good", b"two"):
        forward.put(body, "gzip")
    await forward.stop()
    assert [request.content for request in backend.taken] == [b"one", b"two"]
    (first, _) = backend.taken
    assert str(first.url) == "http://backend/v1/traces"
    assert first.headers["api-key"] == "secret"
    assert first.headers["content-encoding"] == "gzip"
    assert first.headers["content-type"] == "application/x-protobuf"


async def test_put_to_a_backend_that_stays_down_is_bounded_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, the oldest goes first, and the demo's end is not held up."""
    monkeypatch.setattr(forwarding, "MAX_BYTES", 10)
    monkeypatch.setattr(forwarding, "FIRST_PAUSE_S", 0.001)
    backend = Backend(*[0] * 100_000)
    forward = forwarder(backend)
    forward.start()
    for number in range(10):
        forward.put(b"%4d" % number, "")
    await asyncio.sleep(0.005)
    backend.answers = []
    await forward.stop()
    assert [request.content for request in backend.taken] == [b"   8", b"   9"]
    forward = forwarder(Backend(*[0] * 100_000))
    forward.start()
    forward.put(b"lost", "")
    await asyncio.wait_for(forward.stop(within_s=0.01), 5)


async def test_put_without_a_backend_keeps_nothing() -> None:
    """Nothing is sent, and nothing waits."""
    forward = Forwarder({})
    forward.start()
    forward.put(b"x", "")
    await forward.stop()
    assert forward.shown is None
