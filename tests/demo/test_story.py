"""From a trace's spans alone, people are told what a request cost, what failed, what came back, and why."""

from examples.fastapi_app.desk import spans, traces
from examples.fastapi_app.desk.story import BELONGS, CAME_BACK, COST, FAILED, HOW_MANY, LATER, RETRIED, WHOM, WHY
from opentelemetry.trace import Span, SpanKind

from metered_billing import names

from .spans import APP_AGAIN, Scene, prefixed, remote


def deducted(scene: Scene, request: Span) -> tuple[Span, Span]:
    """A charge whose deduction went well at once: its span, under way, and the deduction's."""
    charge = scene.begin(names.SPAN_CHARGE, request, 1, charge=True)
    deduct = scene.begin(names.SPAN_DEDUCT, charge, 2, charge=True)
    scene.attempt(deduct, 3, 2, status=201, ledger="deduct", amount=10, transaction_id="t-1")
    scene.end(deduct, 6, **prefixed({"outcome": "ok", "transaction.id": "t-1", "balance": 90}))
    return charge, deduct


def answered(scene: Scene, request: Span, status: int, raised: str | None = None) -> None:
    request.set_attributes({"error.type": raised} if raised else {})
    scene.end(request, 100, status=status)


def refused(scene: Scene, request: Span, status: int, outcome: str, reason: str) -> tuple[Span, Span]:
    """A request whose deduction was not confirmed; attempts are put below its deduction, which is returned first."""
    charge = scene.begin(names.SPAN_CHARGE, request, 1, charge=True)
    deduct = scene.begin(names.SPAN_DEDUCT, charge, 2, charge=True)
    scene.end(deduct, 60, error=reason, **prefixed({"outcome": outcome, "reason": reason}))
    scene.end(charge, 61, **prefixed({"outcome": "not run"}))
    answered(scene, request, status)
    return deduct, charge


def test_names_are_the_librarys() -> None:
    """The desk reads the spans by the names that the library gives them."""
    assert traces.CHARGE == names.SPAN_CHARGE
    assert traces.DEDUCT == names.SPAN_DEDUCT
    assert traces.REFUND == names.SPAN_REFUND
    assert traces.VOID == names.SPAN_VOID
    assert traces.RECOVER == names.SPAN_RECOVER
    assert names.SPAN_LEDGER_DEDUCT == traces.LEDGER + "deduct"
    for name in ("OUTCOME", "REASON", "AMOUNT", "KEPT", "REFUNDED", "TRIES", "ITEMS", "BALANCE", "CHARGE_ID",
                 "REQUEST_ID", "TENANT_ID", "USER_ID", "TRANSACTION_ID", "STATUS_CODE", "REPLAYED", "MISMATCH",
                 "UNREADABLE"):  # fmt: skip
        assert getattr(traces, name) == getattr(names, name)
    assert traces.STATE == names.CHARGE_STATE
    assert spans.CREDITS == "credits"


def test_story_partial_refund() -> None:
    """Cost, failed items by name and cause, what came back, and to whom."""
    scene = Scene()
    request = scene.request()
    charge, deduct = deducted(scene, request)
    scene.span("cut out", request, 10, attributes={"demo.image.id": "lamp", "demo.image.status": "succeeded"})
    scene.span(
        "cut out",
        request,
        10,
        attributes={"demo.image.id": "cup", "demo.image.status": "failed", "demo.image.error": "damaged image"},
    )
    scene.end(charge, 90, **prefixed({"outcome": "refunding", "kept": 9, "refunded": 1, "reason": "failed items"}))
    scene.span(
        names.SPAN_REFUND,
        charge,
        91,
        link=deduct,
        charge=True,
        attributes=prefixed({"outcome": "ok", "refunded": 1, "items": ["cup"], "reason": "failed items", "tries": 1}),
    )
    answered(scene, request, 200)
    assert scene.answers(request) == {
        COST: "9 credits: 10 deducted before the work began, 1 given back.",
        FAILED: "cup (damaged image).",
        CAME_BACK: "1 credit, by a refund against the same transaction.",
        RETRIED: "No.",
        WHOM: "demo/alice; transaction t-1.",
        LATER: "No.",
    }
    summary = scene.summary(request)
    assert (summary["amount"], summary["kept"], summary["refunded"], summary["voided"]) == (10, 9, 1, None)
    assert (summary["trouble"], summary["status"], summary["outcome"]) == ([], 200, "refunding")
    assert (summary["ended"], summary["services"]) == (True, ["app", "credits"])


def test_story_all_succeeded() -> None:
    """All is kept, and nothing came back because nothing had to."""
    scene = Scene()
    request = scene.request()
    charge, _ = deducted(scene, request)
    scene.end(charge, 90, **prefixed({"outcome": "settled", "kept": 10, "refunded": 0}))
    answered(scene, request, 200)
    told = scene.answers(request)
    assert told[COST] == "10 credits, deducted before the work began. All of it succeeded."
    assert told[FAILED] == "Nothing."
    assert told[CAME_BACK] == "Nothing: there was nothing to give back."


def test_story_route_raised() -> None:
    """All comes back, and the exception is named."""
    scene = Scene()
    request = scene.request()
    charge, deduct = deducted(scene, request)
    scene.end(charge, 90, **prefixed({"outcome": "refunding", "kept": 0, "refunded": 10, "reason": "KeyError"}))
    scene.span(names.SPAN_REFUND, charge, 91, link=deduct, attributes=prefixed({"outcome": "ok", "refunded": 10}))
    answered(scene, request, 500, "KeyError")
    told = scene.answers(request)
    assert told[COST] == "Nothing: the 10 credits that were deducted before the work began are given back."
    assert told[FAILED] == "All of it: KeyError."
    assert told[CAME_BACK].startswith("10 credits, by a refund")
    assert told[WHY.format(500)] == "The route raised KeyError."
    assert scene.summary(request)["trouble"] == ["500"]


def test_story_402_says_price_and_balance() -> None:
    """Nothing ran, nothing was taken; and nobody has to look at it."""
    scene = Scene()
    request = scene.request()
    deduct, _ = refused(scene, request, 402, "declined", "insufficient credits")
    scene.attempt(deduct, status=402)
    told = scene.answers(request)
    assert (
        told[WHY.format(402)] == "It costs 10 credits, and the account held less. Nothing was taken, and nothing ran."
    )
    assert told[CAME_BACK] == "Nothing: nothing had been taken."
    assert scene.summary(request)["trouble"] == []

    scene = Scene()
    request = scene.request()
    scene.span(names.SPAN_DEDUCT, request, charge=True, attributes=prefixed({"outcome": "declined", "balance": 3}))
    answered(scene, request, 402)
    assert "the account held 3." in scene.answers(request)[WHY.format(402)]


def test_story_503_unreachable_was_never_sent() -> None:
    """Each attempt says that no connection existed, so nothing was taken and nothing has to be undone."""
    scene = Scene()
    request = scene.request()
    deduct, _ = refused(scene, request, 503, "notsent", "ConnectError")
    for number in range(3):
        scene.attempt(deduct, 3 + 9 * number, error="ConnectError", resend=number)
    told = scene.answers(request)
    assert told[WHY.format(503)] == (
        "The deduction was not confirmed: 3 attempts (1. not sent, ConnectError; 2. not sent, ConnectError;"
        " 3. not sent, ConnectError). Nothing ran."
    )
    assert told[CAME_BACK] == "Nothing: no attempt ever reached the service, so nothing had been taken."
    assert told[LATER] == "No."
    assert scene.summary(request)["trouble"] == ["503", "not sent", "retried"]


def test_story_503_circuit_open() -> None:
    """No attempt was made, because of those before."""
    scene = Scene()
    request = scene.request()
    refused(scene, request, 503, "notsent", "circuit open")
    why = scene.answers(request)[WHY.format(503)]
    assert "the circuit is open after earlier failures, so nothing was sent" in why
    assert scene.summary(request)["trouble"] == ["503", "circuit open"]


def test_story_503_no_answer_and_voided_at_once() -> None:
    """What was taken without an answer is undone, in the same trace."""
    scene = Scene()
    request = scene.request()
    deduct, _ = refused(scene, request, 503, "unknown", "ReadTimeout; then circuit open")
    scene.attempt(deduct, 3, 2000, error="TimeoutError")
    scene.attempt(deduct, 2003, 5, error="RemoteProtocolError", resend=1)
    assert scene.answers(request)[CAME_BACK].startswith("Not known yet: the deduction is to be voided")
    assert scene.answers(request)[LATER].startswith("Not yet")
    void = prefixed({"outcome": "ok", "refunded": 10, "tries": 1})
    scene.span(names.SPAN_VOID, deduct, 2100, link=deduct, charge=True, attributes=void)
    told = scene.answers(request)
    assert "1. no answer within 2.0 s; 2. answer lost, RemoteProtocolError" in told[WHY.format(503)]
    assert "then the circuit was open" in told[WHY.format(503)]
    assert told[CAME_BACK] == "10 credits: the deduction had happened, and was voided."
    assert told[LATER] == "No."
    assert scene.summary(request)["voided"] == 10
    assert scene.summary(request)["trouble"] == ["503", "no answer", "timed out", "retried"]


def test_story_void_that_is_tried_again_in_other_traces() -> None:
    """Attempts without an answer are told of, until one goes through."""
    scene = Scene()
    request = scene.request()
    deduct, _ = refused(scene, request, 503, "unknown", "ReadError")
    scene.attempt(deduct, error="ReadError")
    lost = prefixed({"outcome": "unanswered", "tries": 1})
    scene.span(names.SPAN_VOID, deduct, 70, link=deduct, charge=True, attributes=lost, error="ReadError")
    assert "attempt 1 at the void got no answer (ReadError)" in scene.answers(request)[CAME_BACK]
    recover = scene.begin(names.SPAN_RECOVER, at_ms=5000, link=deduct, charge=True)
    void = prefixed({"outcome": "ok", "refunded": 0, "tries": 2})
    scene.span(names.SPAN_VOID, recover, 5001, link=deduct, charge=True, attributes=void)
    scene.end(recover, 5003, **prefixed({"outcome": "ok"}))
    told = scene.answers(request)
    assert told[CAME_BACK].startswith("Nothing had been taken. The deduction is voided")
    assert told[RETRIED] == "Yes: the void took 2 attempts so far."
    assert told[LATER].startswith("No: by the same one, app pid 101, in the background, 4.9 s later.")


def test_story_lost_reply_then_replay() -> None:
    """Asked twice under the same key, taken once."""
    scene = Scene()
    request = scene.request()
    charge = scene.begin(names.SPAN_CHARGE, request, 1, charge=True)
    deduct = scene.begin(names.SPAN_DEDUCT, charge, 2, charge=True)
    scene.attempt(deduct, 3, error="RemoteProtocolError", ledger="deduct", amount=10)
    scene.attempt(deduct, 30, status=200, resend=1, ledger="deduct", amount=10, replayed=True)
    scene.end(deduct, 40, **prefixed({"outcome": "ok", "transaction.id": "t-1"}))
    scene.end(charge, 90, **prefixed({"outcome": "settled", "kept": 10, "refunded": 0}))
    answered(scene, request, 200)
    assert scene.answers(request)[RETRIED] == (
        "Yes: 2 attempts at the deduction, under one key (1. answer lost, RemoteProtocolError; 2. answered 200)."
        " The service was asked for this deduct twice under the same key, and did it once."
    )
    assert scene.summary(request)["retries"] == 1
    assert scene.summary(request)["attempts"] == 2


def test_story_500_after_the_commit() -> None:
    """The status that stood in for the answer is told."""
    scene = Scene()
    request = scene.request()
    charge = scene.begin(names.SPAN_CHARGE, request, 1, charge=True)
    deduct = scene.begin(names.SPAN_DEDUCT, charge, 2, charge=True)
    scene.attempt(deduct, 3, status=500, error="500")
    scene.attempt(deduct, 30, status=200, resend=1)
    scene.end(deduct, 40, **prefixed({"outcome": "ok"}))
    answered(scene, request, 200)
    assert "(1. answered 500; 2. answered 200)" in scene.answers(request)[RETRIED]
    assert "credits answered 500" in scene.summary(request)["trouble"]


def test_story_still_running() -> None:
    """Nothing is made up about a request whose process lives."""
    scene = Scene()
    deducted(scene, scene.request())
    (summary,) = scene.send().reading.summaries()
    found = scene.reading.trace(summary["trace_id"])
    assert found
    told = {one["question"]: one["answer"] for one in found["story"]}
    assert told[COST] == "Not known yet: its price is 10 credits, and no outcome is on record."
    assert told[CAME_BACK] == "Nothing yet: it is still running."
    assert told[LATER] == "No: app pid 101 is at work on it."
    assert (summary["ended"], summary["trouble"]) == (False, [])


def killed(scene: Scene) -> Span:
    """A request of ten pictures whose process dies; its deduction's span."""
    request = scene.request()
    _, deduct = deducted(scene, request)
    scene.span("cut out", request, 10, attributes={"demo.image.id": "a", "demo.image.status": "succeeded"})
    scene.running.discard(101)
    return deduct


def test_story_killed_says_what_died_and_what_is_due() -> None:
    """Before anybody has recovered: the next process will."""
    scene = Scene()
    told = scene.answers(deduct := killed(scene))
    assert told[FAILED] == (
        "Its process: app pid 101 died before the answer with 1 picture done. What had not ended left no span."
    )
    assert told[LATER] == "Not yet: the next process does it."
    assert scene.summary(deduct)["trouble"] == ["process died"]


def test_story_killed_and_recovered_names_the_other_process() -> None:
    """The request's trace says who settled it, when and how; the recovery's says whose charge it was."""
    scene = Scene()
    deduct = killed(scene)
    recover = scene.begin(
        names.SPAN_RECOVER,
        at_ms=3000,
        pid=APP_AGAIN,
        link=deduct,
        charge=True,
        attributes=prefixed({"charge.state": "deducted"}),
    )
    refund = scene.begin(
        names.SPAN_REFUND,
        recover,
        3001,
        pid=APP_AGAIN,
        link=deduct,
        charge=True,
        attributes=prefixed({"outcome": "ok", "refunded": 10, "reason": "the request ended", "tries": 1}),
    )
    scene.attempt(refund, 3002, status=201, pid=APP_AGAIN)
    scene.end(refund, 3010)
    scene.end(recover, 3011, **prefixed({"outcome": "ok"}))
    told = scene.answers(deduct)
    assert told[LATER] == (
        "Yes: by app pid 102, 3.0 s later, which found the charge deducted. app pid 101 had served the request."
        " 10 credits, by a refund against the same transaction: the request ended."
    )
    assert told[COST].startswith("Nothing: its price was 10 credits. 10 credits, by a refund")
    summary = scene.summary(deduct)
    assert (summary["kept"], summary["refunded"]) == (0, 10)
    later = scene.answers(recover)
    assert later[BELONGS] == "Charge c-1: 10 credits of demo/alice. The link leads to its deduction."
    assert later[LATER] == "Yes, here: by app pid 102, which found the charge deducted."
    assert scene.summary(recover)["name"] == "recovery"
    assert scene.summary(recover)["trouble"] == ["recovered"]


def test_story_killed_before_its_first_span_is_told_from_the_services() -> None:
    """Where only the service's span arrived, the recovery that links to the deduction tells that its caller died."""
    scene = Scene()
    charge = scene.begin(names.SPAN_CHARGE, scene.request(), 1, charge=True)
    deduct = scene.begin(names.SPAN_DEDUCT, charge, 2, charge=True)
    attempt = scene.begin("POST", deduct, 3, kind=SpanKind.CLIENT)
    scene.span(names.SPAN_LEDGER_DEDUCT, attempt, 4, pid=201, attributes=prefixed({"amount": 10, "status_code": 201}))
    scene.running.discard(101)
    assert scene.summary(deduct)["trouble"] == []
    recover = scene.begin(names.SPAN_RECOVER, at_ms=3000, pid=APP_AGAIN, link=deduct, charge=True)
    scene.span(
        names.SPAN_VOID,
        recover,
        3001,
        pid=APP_AGAIN,
        link=deduct,
        attributes=prefixed({"outcome": "ok", "refunded": 10}),
    )
    scene.end(recover, 3011)
    assert scene.summary(deduct)["trouble"] == ["process died"]
    assert "10 credits: the deduction had happened, and was voided." in scene.answers(deduct)[LATER]
    assert scene.answers(deduct)[WHOM] == "demo/alice; no transaction is known."


def test_story_of_two_requests_in_one_trace_says_so() -> None:
    """Nobody takes the answers about one of them for answers about both."""
    scene = Scene()
    page = scene.begin("the page's own")
    for at_ms in (0, 500):
        request = scene.request(at_ms, parent=remote(page))
        charge, _ = deducted(scene, request)
        scene.end(charge, at_ms + 90, **prefixed({"outcome": "settled", "kept": 10, "refunded": 0}))
        answered(scene, request, 200)
    assert scene.answers(request)[HOW_MANY].startswith("2: ")


def test_story_without_a_charge() -> None:
    """A request that was answered before anything was charged cost nothing, and why is told."""
    scene = Scene()
    request = scene.request()
    answered(scene, request, 401)
    assert scene.answers(request) == {
        COST: "Nothing: it was never charged.",
        WHY.format(401): "It came without a token that somebody has.",
    }
