"""Operations, done on the ledger with a span each."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from metered_billing.ledger import Answer, Command, Ledger, LedgerError
from metered_billing.service.problems import unanswered
from metered_billing.service.spans import close_span, count_batch, fail_span, open_span, tracer

Asked = tuple[Command, Mapping[str, str]]
"""A command, and what carries its own trace context."""

NOWHERE: Final[Mapping[str, str]] = {}


async def perform(ledger: Ledger, command: Command, headers: Mapping[str, str]) -> Answer:
    """Do what one request asks for.

    Raises:
        LedgerError: It gave no answer.
    """
    span = open_span(tracer(), command, headers)
    try:
        answer = await ledger.decide(command)
    except BaseException as error:
        fail_span(span, error)
        raise
    close_span(span, answer)
    return answer


async def perform_all(
    ledger: Ledger, asked: Sequence[Asked], headers: Mapping[str, str], *, size: int | None = None
) -> list[Answer | LedgerError]:
    """Do what a batch asks for, in its order and in one commit; each stands alone.

    Args:
        size: How many operations came, where some of them were refused already.
    """
    count_batch(len(asked) if size is None else size)
    traced_by = tracer()
    spans = [open_span(traced_by, command, carrier, headers) for command, carrier in asked]
    try:
        decided = await ledger.batch([command for command, _ in asked])
    except BaseException as error:
        for span in spans:
            fail_span(span, error)
        raise
    for span, answer in zip(spans, decided, strict=True):
        if isinstance(answer, LedgerError):
            fail_span(span, answer)
        else:
            close_span(span, answer)
    return decided


def result_of(answer: Answer | LedgerError) -> dict[str, Any]:
    """One operation's part of a batch's answer."""
    if isinstance(answer, LedgerError):
        answer = unanswered(answer).answer
    result: dict[str, Any] = {"status": answer.status, "body": answer.body}
    if answer.replayed:
        result["replayed"] = True
    return result
