"""The desk keeps the latest traces, within bounds, and believes nothing that is sent to it."""

import asyncio
import gzip
import math

import pytest
from examples.fastapi_app.desk.collector import MAX_SPANS_OF_A_TRACE, MAX_WAITING, Collector
from examples.fastapi_app.desk.otlp import MAX_BODY_BYTES, MAX_TEXT, BadBody, decode, unpack
from examples.fastapi_app.desk.spans import Span

from .spans import Scene, span_id, trace_id

pytestmark = pytest.mark.anyio


def span(trace: str, number: int = 0, *, links: tuple[tuple[str, str], ...] = (), size: int = 10) -> Span:
    return Span(
        trace_id=trace, span_id=f"{trace}-{number}", name="x", start_ns=number, end_ns=number, links=links, size=size
    )


def kept(collector: Collector) -> list[str]:
    return [trace.trace_id for trace in collector]


def test_add_more_traces_than_are_kept_drops_the_oldest() -> None:
    """The number of traces, of spans and of bytes are all bounds; the first in is the first out."""
    collector = Collector(max_traces=2)
    collector.add([span("a"), span("b"), span("c")])
    assert (kept(collector), collector.dropped) == (["b", "c"], 1)
    collector = Collector(max_spans=3)
    collector.add([span("a"), span("a", 1), span("b"), span("b", 1)])
    assert kept(collector) == ["b"]
    collector = Collector(max_bytes=25)
    collector.add([span("a"), span("b"), span("c")])
    assert kept(collector) == ["b", "c"]


def test_add_endless_trace_is_cut() -> None:
    """One trace does not drive out all others."""
    collector = Collector()
    collector.add(span("a", number) for number in range(MAX_SPANS_OF_A_TRACE + 5))
    (trace,) = collector
    assert len(trace.spans) == MAX_SPANS_OF_A_TRACE


def test_add_same_span_again_changes_nothing() -> None:
    """An exporter that had no answer sends its batch once more."""
    collector = Collector()
    collector.add([span("a")])
    version = collector.version
    collector.add([span("a")])
    assert collector.version == version
    assert len(collector) == 1


def test_add_dropped_trace_links_to_nothing_any_more() -> None:
    """What linked to a trace is forgotten with the trace that it stood in."""
    collector = Collector(max_traces=2)
    collector.add([span("a"), span("b", links=(("c", "c-0"),))])
    assert len(collector.linking("c")) == 1
    collector.add([span("c"), span("d")])
    assert kept(collector) == ["c", "d"]
    assert collector.linking("c") == []


async def test_newer_waits_for_a_change() -> None:
    """Who asks for news is answered at once when there is some, else when it comes, or when time is up."""
    collector = Collector()
    collector.add([span("a")])
    await asyncio.wait_for(collector.newer(0, 60), 5)
    waiting = asyncio.ensure_future(collector.newer(collector.version, 60))
    await asyncio.sleep(0)
    assert not waiting.done()
    collector.add([span("b")])
    await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(collector.newer(collector.version, 0.01), 5)


async def test_newer_does_not_let_everybody_wait_nor_at_the_end() -> None:
    """The crowd is answered at once; and all are when the demo ends, which waits for their answers."""
    collector = Collector()
    waiting = [asyncio.ensure_future(collector.newer(0, 60)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    await asyncio.wait_for(collector.newer(0, 60), 5)
    assert not any(one.done() for one in waiting)
    collector.close()
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    await asyncio.wait_for(collector.newer(0, 60), 5)


def test_decode_keeps_what_was_sent() -> None:
    """Ids, times, kinds, statuses, attributes of every type, events and links arrive as the SDK sent them."""
    scene = Scene()
    target = scene.begin("target")
    sent = scene.begin(
        "sent",
        at_ms=1.5,
        link=target,
        attributes={"a": "x" * (MAX_TEXT + 1), "b": 1, "c": 2.5, "d": True, "e": ["f"], "g": math.nan},
    )
    sent.add_event("happened", {"why": "because"}, timestamp=7)
    scene.end(sent, 3, error="broken")
    trace = scene.send().collector.get(trace_id(sent))
    assert trace
    found = trace.spans[span_id(sent)]
    assert (found.name, found.kind, found.status, found.message) == ("sent", "internal", "error", "broken")
    assert found.end_ns - found.start_ns == 1_500_000
    assert (found.service, found.pid, found.parent_id) == ("app", 101, None)
    assert found.attributes == {"a": "x" * MAX_TEXT + "…", "b": 1, "c": 2.5, "d": True, "e": ["f"], "g": "nan"}
    assert list(found.links) == [(trace_id(target), span_id(target))]
    (event,) = found.events
    assert (event.name, event.at_ns, event.attributes) == ("happened", 7, {"why": "because"})


@pytest.mark.parametrize("body", [b"\xff\xff", b"not protobuf", b"\x0a\xff\xff\xff\xff\x0f"])
def test_decode_rubbish_is_refused(body: bytes) -> None:
    """It is an error of the sender's, and none of ours."""
    with pytest.raises(BadBody):
        decode(body)


def test_unpack_gzip_and_its_bombs() -> None:
    """What unpacks to more than a body may be is refused before it is unpacked."""
    assert unpack(gzip.compress(b"spans"), "gzip") == b"spans"
    assert unpack(b"spans", "") == b"spans"
    for body, encoding in (
        (gzip.compress(bytes(MAX_BODY_BYTES + 1)), "gzip"),
        (b"no gzip", "gzip"),
        (b"spans", "br"),
    ):
        with pytest.raises(BadBody):
            unpack(body, encoding)
