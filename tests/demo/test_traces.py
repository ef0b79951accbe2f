"""A trace is shown as a line and as a waterfall, exactly, whatever has arrived of it."""

from examples.fastapi_app.desk.traces import moment
from opentelemetry.trace import SpanKind

from metered_billing import names

from .spans import APP_AGAIN, Scene, remote, span_id, trace_id


def test_waterfall_depth_first_by_start() -> None:
    """Children stand under their parent in the order in which they began, whenever they arrived."""
    scene = Scene()
    request = scene.request()
    second = scene.span("second", request, 5, 2)
    scene.send()
    first = scene.begin("first", request, 1)
    scene.span("inner", first, 2, 1)
    scene.end(first, 4)
    scene.end(request, 10.0015, status=200)
    rows = scene.whole(request)["spans"]
    assert [(row["name"], row["depth"]) for row in rows] == [
        ("POST /create-products", 0),
        ("first", 1),
        ("inner", 2),
        ("second", 1),
    ]
    assert [row["start_ms"] for row in rows] == [0, 1, 2, 5]
    assert rows[0]["duration_ms"] == 10.002
    assert (rows[3]["span_id"], rows[3]["parent_id"]) == (span_id(second), span_id(request))
    assert (rows[0]["kind"], rows[0]["process"], rows[0]["orphan"]) == ("server", "app pid 101", False)


def test_waterfall_parent_that_never_came_makes_an_orphan() -> None:
    """Its children stand at the top, and say so; those below them do not."""
    scene = Scene()
    left = scene.begin("left", scene.request(), 1)
    scene.span("below", left, 2)
    scene.end(left, 5)
    rows = scene.whole(left)["spans"]
    assert [(row["name"], row["depth"], row["orphan"]) for row in rows] == [("left", 0, True), ("below", 1, False)]


def test_entry_below_a_page_is_no_orphan() -> None:
    """A browser that sends `traceparent` sends no spans: the request begins the trace all the same."""
    scene = Scene()
    page = scene.begin("the page's own")
    request = scene.request(parent=remote(page))
    scene.end(request, 3, status=204)
    whole = scene.whole(request)
    assert (whole["summary"]["name"], whole["summary"]["ended"]) == ("POST /create-products", True)
    assert whole["spans"][0]["orphan"] is False


def test_service_without_its_caller_is_an_orphan() -> None:
    """The service's server span never begins a trace that an app began."""
    scene = Scene()
    attempt = scene.begin("POST", kind=SpanKind.CLIENT)
    served = scene.span("POST /v1/deductions", remote(attempt), pid=201, kind=SpanKind.SERVER)
    assert scene.whole(served)["spans"][0]["orphan"] is True
    assert scene.summary(served)["ended"] is False


def test_links_are_shown_at_both_ends() -> None:
    """A recovery's trace and the request's name each other, whichever arrived first."""
    scene = Scene()
    request = scene.request()
    deduct = scene.span(names.SPAN_DEDUCT, request, charge=True)
    recover = scene.span(names.SPAN_RECOVER, at_ms=900, pid=APP_AGAIN, link=deduct)
    assert scene.summary(recover)["linked"] == [trace_id(deduct)]
    assert scene.summary(deduct)["linked"] == [trace_id(recover)]
    (row,) = scene.whole(recover)["spans"]
    assert row["links_to"] == [
        {"trace_id": trace_id(deduct), "span_id": span_id(deduct), "name": "metered_billing.deduct"}
    ]
    (row,) = scene.whole(deduct)["spans"]
    assert row["linked_from"] == [
        {"trace_id": trace_id(recover), "span_id": span_id(recover), "name": "metered_billing.recover"}
    ]


def test_link_to_a_trace_that_is_gone_has_no_name() -> None:
    """It is shown, though nothing is known of what it leads to."""
    scene = Scene()
    recover = scene.span(names.SPAN_RECOVER, link=scene.begin("elsewhere"))
    (row,) = scene.whole(recover)["spans"]
    assert row["links_to"][0]["name"] is None


def test_name_of_a_request_that_never_ended_is_handed_on() -> None:
    """The spans below it carry its name, so that a killed request is found by it."""
    scene = Scene()
    left = scene.span("cut out", scene.request(), attributes={"demo.request": "POST /batch"})
    assert scene.summary(left)["name"] == "POST /batch"
    other = scene.span("cut out", scene.request())
    assert scene.summary(other)["name"] == "unfinished request"


def test_spans_in_a_ring_are_shown() -> None:
    """A sender's bug does not make spans disappear, nor the page hang."""
    scene = Scene()
    first = scene.begin("first")
    second = scene.begin("second", first)
    scene.end(second, 1)
    scene.send()
    (known,) = scene.collector.get(trace_id(second)).spans.values()  # type: ignore[union-attr]
    ring = [
        type(known)(trace_id="f" * 32, span_id=one, parent_id=other, name=one, start_ns=5, end_ns=6)
        for one, other in (("a", "b"), ("b", "a"))
    ]
    scene.collector.add(ring)
    found = scene.reading.trace("f" * 32)
    assert found
    assert [row["name"] for row in found["spans"]] == ["a", "b"]


def test_moment_is_exact_to_the_microsecond() -> None:
    """No float comes in between."""
    assert moment(1_764_000_000_123_456_789) == "2025-11-24T16:00:00.123456Z"
