"""The service's spans: one for each operation on the ledger, in the caller's trace.

The OpenTelemetry API only: without an SDK they cost next to nothing and go nowhere.
"""

from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from metered_billing.ledger import Answer, Command, Deduct, Grant, Refund, Void

TRACER = "metered_billing.service"

SPAN_LEDGER = "metered_billing.ledger."
"""Then the operation: `metered_billing.ledger.deduct`."""

OPERATION = "metered_billing.operation"
TENANT_ID = "metered_billing.tenant.id"
USER_ID = "metered_billing.user.id"
TRANSACTION_ID = "metered_billing.transaction.id"
AMOUNT = "metered_billing.amount"
STATUS_CODE = "metered_billing.status_code"
REPLAYED = "metered_billing.replayed"
ERROR_TYPE = "error.type"

_OPERATIONS: Mapping[type[Command], str] = {
    Deduct: "deduct",
    Refund: "refund",
    Void: "void",
    Grant: "grant",
}

_propagator = TraceContextTextMapPropagator()


def open_span(command: Command, *carriers: Mapping[str, str]) -> Span:
    """Begin the span of a command; `close_span` or `fail_span` ends it.

    Args:
        carriers: Where the caller's `traceparent` may stand, the most particular first: an operation of a
            batch, then the request's headers. What is no valid traceparent counts as none.
    """
    operation = _OPERATIONS[type(command)]
    attributes: dict[str, str | int] = {OPERATION: operation}
    if isinstance(command, Refund):
        attributes[TRANSACTION_ID] = command.transaction_id
    else:
        attributes[TENANT_ID] = command.tenant_id
        if command.user_id is not None:
            attributes[USER_ID] = command.user_id
    if not isinstance(command, Void):
        attributes[AMOUNT] = command.amount
    return trace.get_tracer(TRACER).start_span(
        SPAN_LEDGER + operation, context=_parent(carriers), kind=SpanKind.INTERNAL, attributes=attributes
    )


def close_span(span: Span, answer: Answer) -> None:
    """End the span of a command that was answered. A refusal is an answer, not an error."""
    span.set_attribute(STATUS_CODE, answer.status)
    span.set_attribute(REPLAYED, answer.replayed)
    if not answer.done:
        span.set_attribute(ERROR_TYPE, answer.refusal or "refused")
    elif "transaction_id" in answer.body:
        span.set_attribute(TRANSACTION_ID, answer.body["transaction_id"])
    span.end()


def fail_span(span: Span, error: BaseException) -> None:
    """End the span of a command without an answer."""
    span.set_attribute(ERROR_TYPE, type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
    span.end()


def _parent(carriers: Sequence[Mapping[str, str]]) -> Context | None:
    for carrier in carriers[:-1]:
        if "traceparent" in carrier:
            return _propagator.extract(carrier)
    if trace.get_current_span().get_span_context().is_valid:
        # An instrumented server has made a span for the request already, in the caller's trace.
        return None
    return _propagator.extract(carriers[-1])
