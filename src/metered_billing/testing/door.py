"""A credits service, as the test kit asks it."""

from collections.abc import Mapping
from typing import Any, Protocol

from metered_billing.testing.wire import Request, Response


class Door(Protocol):
    """A credits service without a network before it, and without anything that goes wrong."""

    def answer(self, request: Request) -> Response:
        """What it answers. From any thread; an event loop is held up meanwhile."""
        ...

    async def answer_soon(self, request: Request) -> Response:
        """The same, on any event loop."""
        ...

    def decline(self, operation: Mapping[str, Any]) -> None:
        """Decline this deduction, whatever the account holds, and remember it: when it comes, that is its answer."""
        ...

    def close(self) -> None: ...


class Switch(Protocol):
    """Whether the service can be reached."""

    def check(self, fault: str) -> None:
        """Refuse a fault that cannot happen here.

        Raises:
            ValueError: Why, and what to do instead.
        """
        ...

    def down(self) -> None: ...

    def up(self) -> None: ...
