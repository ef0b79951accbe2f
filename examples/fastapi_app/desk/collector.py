"""The latest traces, in memory: spans are put in as they arrive, in any order, and the oldest traces go.

For one event loop.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .spans import Span

MAX_TRACES = 1_000
MAX_SPANS = 20_000
MAX_BYTES = 16 << 20
"""What is kept at the most, in all: about 60 MB, for a span takes a few times in memory what it took on the wire."""

MAX_SPANS_OF_A_TRACE = 2_000
"""More than that of one trace are not kept: nobody reads them, and one trace must not drive out all others."""

MAX_WAITING = 64
"""How many may wait for news at the same time; the next ones are answered at once."""


@dataclass(slots=True)
class Trace:
    """The spans of one trace that have arrived so far."""

    trace_id: str
    spans: dict[str, Span] = field(default_factory=dict)
    size: int = 0
    changed: int = 0


class Collector:
    """Keeps traces, and tells of changes.

    Attributes:
        version: Grows with every change.
        dropped: Traces that had to make room.
    """

    def __init__(self, *, max_traces: int = MAX_TRACES, max_spans: int = MAX_SPANS, max_bytes: int = MAX_BYTES) -> None:
        self.version = 0
        self.dropped = 0
        self._max = max_traces, max_spans, max_bytes
        self._traces: dict[str, Trace] = {}
        self._spans = 0
        self._bytes = 0
        # Who links to a span, by trace and span.
        self._linking: defaultdict[str, list[tuple[str, Span]]] = defaultdict(list)
        self._waiting: set[asyncio.Future[None]] = set()
        self._closed = False

    def add(self, spans: Iterable[Span]) -> None:
        """Keep these; one that is here already (an exporter that tries again) changes nothing."""
        version = self.version + 1
        for span in spans:
            trace = self._traces.get(span.trace_id)
            if trace is None:
                trace = self._traces[span.trace_id] = Trace(span.trace_id)
            if span.span_id in trace.spans or len(trace.spans) >= MAX_SPANS_OF_A_TRACE:
                continue
            trace.spans[span.span_id] = span
            trace.size += span.size
            trace.changed = version
            self._spans += 1
            self._bytes += span.size
            for trace_id, span_id in span.links:
                self._linking[trace_id].append((span_id, span))
                if (linked := self._traces.get(trace_id)) is not None:
                    linked.changed = version
            self.version = version
        self._make_room()
        if self.version == version:
            self._wake()

    def get(self, trace_id: str) -> Trace | None:
        """A trace, as far as it has arrived."""
        return self._traces.get(trace_id)

    def linking(self, trace_id: str) -> list[tuple[str, Span]]:
        """The spans that link to spans of a trace, each with the id of the one that it links to."""
        return self._linking.get(trace_id, [])

    def __iter__(self) -> Iterator[Trace]:
        """The traces, in the order in which they were heard of."""
        return iter(self._traces.values())

    def __len__(self) -> int:
        return len(self._traces)

    async def newer(self, version: int, within_s: float) -> None:
        """Wait until something has changed since `version`, but not for ever."""
        if self.version > version or self._closed or len(self._waiting) >= MAX_WAITING:
            return
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(news)
        try:
            await asyncio.wait((news,), timeout=within_s)
        finally:
            self._waiting.discard(news)

    def touch(self) -> None:
        """Something has changed that traces are judged by: a process has died."""
        self.version += 1
        self._wake()

    def close(self) -> None:
        """Let nobody wait any more: the demo is about to end."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for news in self._waiting:
            if not news.done():
                news.set_result(None)

    def _make_room(self) -> None:
        traces, spans, size = self._max
        while len(self._traces) > 1 and (len(self._traces) > traces or self._spans > spans or self._bytes > size):
            # The first in is the first out.
            oldest = self._traces.pop(next(iter(self._traces)))
            self._spans -= len(oldest.spans)
            self._bytes -= oldest.size
            self.dropped += 1
            for trace_id in {link[0] for span in oldest.spans.values() for link in span.links}:
                left = [pair for pair in self._linking[trace_id] if pair[1].trace_id != oldest.trace_id]
                if left:
                    self._linking[trace_id] = left
                else:
                    del self._linking[trace_id]
