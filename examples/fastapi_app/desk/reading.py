"""Traces as people read them: the list, and one whole."""

from collections.abc import Callable
from typing import Any

from .collector import Collector, Trace
from .spans import Span
from .story import story
from .traces import Facts, summary, waterfall


class Reading:
    """Reads what a collector keeps; a trace that has not changed is not read again for the list.

    Args:
        running: The ids of the processes that run now.
    """

    def __init__(self, collector: Collector, running: Callable[[], frozenset[int]]) -> None:
        self._collector = collector
        self._running = running
        self._known: dict[str, tuple[object, dict[str, Any]]] = {}

    def summaries(self) -> list[dict[str, Any]]:
        """All that are kept, the latest first."""
        running = self._running()
        current: dict[str, tuple[object, dict[str, Any]]] = {}
        for trace in self._collector:
            state = (trace.changed, running)
            known = self._known.get(trace.trace_id)
            if known is None or known[0] != state:
                known = state, summary(self._facts(trace, running))
            current[trace.trace_id] = known
        self._known = current
        return sorted((known for _, known in current.values()), key=lambda one: str(one["started_at"]), reverse=True)

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """One, whole; None where it is not here, or not any more."""
        trace = self._collector.get(trace_id)
        if trace is None:
            return None
        facts = self._facts(trace, self._running())
        return {"summary": summary(facts), "story": story(facts), "spans": waterfall(facts, self._linked(facts))}

    def _facts(self, trace: Trace, running: frozenset[int]) -> Facts:
        return Facts(trace.spans.values(), self._collector.linking(trace.trace_id), running)

    def _linked(self, facts: Facts) -> dict[tuple[str, str], Span]:
        """The spans that this trace links to, as far as they are here."""
        found: dict[tuple[str, str], Span] = {}
        for trace_id, span_id in (link for span in facts.spans for link in span.links):
            other = self._collector.get(trace_id)
            if other is not None and span_id in other.spans:
                found[trace_id, span_id] = other.spans[span_id]
        return found
