"""What can go wrong between an app and its credits service, by name; and what is still to go wrong in a test."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from metered_billing.bounds import whole

T = TypeVar("T", bound=str)

Operation = Literal["deduct", "refund", "void"]
"""What an app asks of the credits service."""

Fault = Literal[
    "ok",
    "refused",
    "timeout",
    "lost reply",
    "late request",
    "late duplicate",
    "503",
    "500 after commit",
    "broken reply",
    "401",
    "insufficient",
]
"""What happens to one operation."""

Silence = Literal["refused", "timeout", "lost reply"]
"""How a call ends that gets no answer."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a fault does.

    Attributes:
        done: Whether the service does what is asked, there and then.
        says: What it looks like from the app: in a sentence.
        silence: There is no answer; and how that comes.
        status: The answer's status, where it is not the service's own.
        again: A copy of the request arrives later.
        only: The operations that it can happen to.
    """

    done: bool
    says: str
    silence: Silence | None = None
    status: int | None = None
    again: bool = False
    only: tuple[Operation, ...] = get_args(Operation)


FAULTS: Mapping[Fault, Kind] = {
    "ok": Kind(True, "Nothing goes wrong: this one goes through, and the next fault is for the one after it."),
    "refused": Kind(False, "No connection: it was certainly not sent.", silence="refused"),
    "timeout": Kind(False, "Not done, and no answer within the time that an attempt has.", silence="timeout"),
    "lost reply": Kind(True, "Done; then the connection closes without an answer.", silence="lost reply"),
    "late request": Kind(False, "No answer in time; it arrives later, after all else.", silence="timeout", again=True),
    "late duplicate": Kind(True, "Done and answered; a copy of it arrives later, after all else.", again=True),
    "503": Kind(False, "Not done; the service answers 503.", status=503),
    "500 after commit": Kind(True, "Done; the service answers 500 all the same.", status=500),
    "broken reply": Kind(True, "Done; the answer is 200, and cannot be read.", status=200),
    "401": Kind(False, "Not done; the service does not know the token.", status=401),
    "insufficient": Kind(
        True, "Declined (402), whatever the account holds; the service remembers it.", only=("deduct",)
    ),
}
"""Every fault there is."""


@dataclass(slots=True)
class Planned:
    """A fault that is still to happen.

    Attributes:
        times: How often; None: whenever there is an occasion.
        met: How often it has happened.
        optional: Whether it may be left over.
    """

    operation: Operation
    fault: Fault
    times: int | None
    optional: bool
    met: int = 0
    ended: bool = False

    @property
    def over(self) -> bool:
        return self.ended or (self.times is not None and self.met >= self.times)

    @property
    def missed(self) -> bool:
        """Whether it had to happen, and has not."""
        return not self.optional and self.met < (self.times or 1)

    def __str__(self) -> str:
        often = "always" if self.times is None else f"{self.times} x"
        return f"{self.operation}: {self.fault!r}, {often}, happened {self.met} x"


class Plan:
    """The faults to come, in their order; the operations meet them from any thread."""

    def __init__(self) -> None:
        self._planned: list[Planned] = []
        self._lock = threading.Lock()
        self._down = False
        self._refused_while_down = 0
        self._was_down_in_vain = False

    def add(self, operation: str, fault: str, times: int | None = 1, *, optional: bool = False) -> None:
        """Let it happen to the next operations of this kind.

        Raises:
            ValueError: There is no such operation or fault, or it cannot happen to this operation.
        """
        __tracebackhide__ = True
        found_operation = _one_of("operation", operation, get_args(Operation))
        found = _one_of("fault", fault, get_args(Fault))
        if found_operation not in FAULTS[found].only:
            raise ValueError(f"{fault!r} can only happen to: {', '.join(FAULTS[found].only)}; not to {operation!r}")
        if times is not None:
            whole("times", times)
        with self._lock:
            self._planned.append(Planned(found_operation, found, times, optional))

    def take(self, operation: Operation) -> Fault | None:
        """What happens to this operation; None: nothing does."""
        with self._lock:
            for planned in self._planned:
                if planned.operation == operation and not planned.over:
                    planned.met += 1
                    return None if planned.fault == "ok" else planned.fault
        return None

    def go_down(self) -> None:
        """No call reaches the service from now on."""
        with self._lock:
            self._down, self._refused_while_down = True, 0

    def come_up(self) -> None:
        """The service can be reached again, and what was always to happen does not any more."""
        with self._lock:
            self._was_down_in_vain |= self._down and not self._refused_while_down
            self._down = False
            for planned in self._planned:
                planned.ended |= planned.times is None

    def refuses(self) -> bool:
        """Whether the service is down, for a call that has just been made."""
        with self._lock:
            self._refused_while_down += self._down
            return self._down

    @property
    def met(self) -> int:
        """How often something that was to go wrong so many times has."""
        with self._lock:
            return sum(planned.met for planned in self._planned if planned.times is not None)

    def remaining(self) -> list[str]:
        """What is still to go wrong, whether it has to or not."""
        with self._lock:
            remaining = [str(planned) for planned in self._planned if not planned.over]
            return [*remaining, "every call: the service is down"] if self._down else remaining

    def left(self) -> list[str]:
        """What nobody met, though it had to happen: a test that provokes nothing tests nothing."""
        with self._lock:
            left = [str(planned) for planned in self._planned if planned.missed]
            if self._was_down_in_vain or (self._down and not self._refused_while_down):
                left.append("the service was down, and nobody called it meanwhile")
            return left


def _one_of(what: str, name: str, known: Sequence[T]) -> T:
    __tracebackhide__ = True
    for each in known:
        if each == name:
            return each
    raise ValueError(f"there is no {what} {name!r}: {', '.join(map(repr, known))}")
