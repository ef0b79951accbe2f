"""A batch: operations that share one call and one commit, and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from metered_billing.ledger import Answer, Command, Ledger, Refund
from metered_billing.service.bodies import Malformed, Operation
from metered_billing.service.perform import perform_all, result_of
from metered_billing.service.problems import READS_ONLY, forbidden, invalid
from metered_billing.service.tokens import Access


async def results(
    ledger: Ledger, access: Access, operations: Sequence[Operation | Malformed], headers: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The operations' results, in their order. What may not or cannot be done spoils nothing else."""
    asked = [(_command(operation, access), operation) for operation in operations]
    decided = iter(
        await perform_all(
            ledger,
            [
                (command, operation.carrier)
                for command, operation in asked
                if not isinstance(command, Answer) and not isinstance(operation, Malformed)
            ],
            headers,
            size=len(operations),
        )
    )
    return [result_of(answer if isinstance(answer, Answer) else next(decided)) for answer, _ in asked]


def _command(operation: Operation | Malformed, access: Access) -> Command | Answer:
    if isinstance(operation, Malformed):
        return invalid(operation.errors).answer
    if not access.moves:
        return forbidden(READS_ONLY).answer
    try:
        command = operation.to_command(access.tenant_id)
    except ValueError as error:
        return invalid([{"field": "body", "message": str(error)}]).answer
    if not isinstance(command, Refund) and not access.covers(command.tenant_id):
        return forbidden().answer
    return command
