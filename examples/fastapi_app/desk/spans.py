"""A span as the desk keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CREDITS = "credits"
"""The credits service's `service.name`."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one moment of a span."""

    name: str
    at_ns: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span that has ended. Times are nanoseconds since the epoch; ids lower-case hex.

    Attributes:
        remote: Whether its parent is in another process, as OTLP's flags say.
        links: Pairs of trace id and span id.
        size: Bytes that it took on the wire: what keeping it costs.
    """

    trace_id: str
    span_id: str
    parent_id: str | None = None
    remote: bool = False
    name: str
    kind: str = "internal"
    service: str = ""
    pid: int | None = None
    start_ns: int
    end_ns: int
    status: str = "unset"
    message: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Event] = ()
    links: Sequence[tuple[str, str]] = ()
    size: int = 0

    @property
    def entry(self) -> bool:
        """Whether the trace begins with it: its parent, if there is one, is a client that sends us no spans."""
        return self.parent_id is None or (self.remote and self.kind == "server" and self.service != CREDITS)

    @property
    def process(self) -> str:
        return f"{self.service} pid {self.pid}" if self.pid is not None else self.service

    def get(self, name: str) -> Any:
        """An attribute; None where it has none of this name."""
        return self.attributes.get(name)
