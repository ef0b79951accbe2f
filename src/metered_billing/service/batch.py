"""A batch: operations that share one call and one commit, and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from metered_billing.ledger import Answer, Command, Ledger, LedgerError, Refund
from metered_billing.service.bodies import Malformed, Operation
from metered_billing.service.problems import forbidden, invalid, unanswered
from metered_billing.service.spans import close_span, count_batch, fail_span, open_span
from metered_billing.service.tokens import Access


async def perform_all(
    ledger: Ledger, access: Access, operations: Sequence[Operation | Malformed], headers: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The operations' results, in their order. What may not or cannot be done spoils nothing else."""
    count_batch(len(operations))
    answers: list[Answer | None] = []
    commands: list[Command] = []
    spans = []
    for operation in operations:
        command = _command(operation, access)
        if isinstance(command, Answer):
            answers.append(command)
        else:
            answers.append(None)
            commands.append(command)
            carrier = {} if isinstance(operation, Malformed) else operation.carrier
            spans.append(open_span(command, carrier, headers))
    try:
        decided = await ledger.batch(commands)
    except BaseException as error:
        for span in spans:
            fail_span(span, error)
        raise
    for span, answer in zip(spans, decided, strict=True):
        if isinstance(answer, LedgerError):
            fail_span(span, answer)
        else:
            close_span(span, answer)
    rest = iter(decided)
    return [_result(next(rest) if answer is None else answer) for answer in answers]


def _command(operation: Operation | Malformed, access: Access) -> Command | Answer:
    if isinstance(operation, Malformed):
        return invalid(operation.errors).answer
    try:
        command = operation.to_command(access.tenant_id)
    except ValueError as error:
        return invalid([{"field": "body", "message": str(error)}]).answer
    if not isinstance(command, Refund) and not access.covers(command.tenant_id):
        return forbidden().answer
    return command


def _result(answer: Answer | LedgerError) -> dict[str, Any]:
    if isinstance(answer, LedgerError):
        answer = unanswered(answer).answer
    result: dict[str, Any] = {"status": answer.status, "body": dict(answer.body)}
    if answer.replayed:
        result["replayed"] = True
    return result
