"""What the ledger answers: an HTTP status and a JSON body, whoever asks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from metered_billing.errors import TYPE_PREFIX

Body = Mapping[str, Any]

INSUFFICIENT_CREDITS = "insufficient-credits"
NOT_FOUND = "not-found"
CHARGE_VOIDED = "charge-voided"
KEY_REUSED = "idempotency-key-reused"
REFUND_EXCEEDS = "refund-exceeds-deduction"
GRANT_TOO_LARGE = "grant-too-large"

REFUSALS: Mapping[str, tuple[int, str]] = {
    INSUFFICIENT_CREDITS: (402, "Too few credits"),
    NOT_FOUND: (404, "No such transaction"),
    CHARGE_VOIDED: (409, "The charge was voided"),
    KEY_REUSED: (422, "Idempotency key reused"),
    REFUND_EXCEEDS: (422, "Refund exceeds its deduction"),
    GRANT_TOO_LARGE: (422, "Grant too large"),
}


class Answer(NamedTuple):
    """What came of a command.

    Attributes:
        status: 200 or 201: done, or done before; 402 and above: refused, no credits moved.
        body: The JSON object to answer with; an RFC 9457 problem if refused.
        replayed: It is the remembered answer to an earlier command with the same key.
    """

    status: int
    body: Body
    replayed: bool = False

    @property
    def done(self) -> bool:
        return self.status < 300

    @property
    def refusal(self) -> str | None:
        """The name of the problem, such as `charge-voided`; None if it was done."""
        return None if self.done else str(self.body["type"]).removeprefix(TYPE_PREFIX)


@dataclass(frozen=True, slots=True)
class Page:
    """Entries, newest first, and the cursor of the page after them (None: there is none)."""

    items: tuple[dict[str, Any], ...]
    next_cursor: str | None


def problem(name: str, status: int, title: str, detail: str, **extra: Any) -> dict[str, Any]:
    """An RFC 9457 problem document."""
    return {"type": TYPE_PREFIX + name, "title": title, "status": status, "detail": detail, **extra}


def refused(name: str, detail: str, **extra: Any) -> Answer:
    """The answer to a command that the rules forbid."""
    status, title = REFUSALS[name]
    return Answer(status, problem(name, status, title, detail, **extra))
