"""Statuses out of JSON: what the path selects, and what holds without one.

A status is any JSON value; `succeeded` says which of them mean success. An entry is an item's id, where it
has one, and whether it succeeded.
"""

from collections.abc import Iterable
from typing import Any

from jsonpath_rfc9535 import JSONPathError, JSONPathQuery
from jsonpath_rfc9535 import compile as compile_query
from jsonpath_rfc9535.segments import JSONPathChildSegment
from jsonpath_rfc9535.selectors import NameSelector, WildcardSelector

from metered_billing.outcomes.decode import Unreadable
from metered_billing.outcomes.paid import Paid, id_of, shown

Entry = tuple[str | None, bool]

_SUCCEEDED = frozenset({"succeeded", "success", "ok"})

_FAILED = frozenset({"failed", "failure", "fail", "error", "errored"})
"""Words that tell a report from a list of things that have some status. With a path, any other word fails too."""


def succeeded(status: object) -> bool:
    """Whether this status means success: "succeeded", "success" or "ok" in any case, true, 200 to 299."""
    if isinstance(status, str):
        return status in _SUCCEEDED or (status.isascii() and status.lower() in _SUCCEEDED)
    if isinstance(status, bool):
        return status
    if isinstance(status, int | float):
        # A float only where it is a whole number: 250.5 is nobody's status code.
        return 200 <= status <= 299 and status == int(status)
    return False


class Unfitting(Exception):
    """A body that seems to report, but not on what was paid for. The text says how."""


class Path:
    """A compiled JSONPath (RFC 9535). Called with a JSON value it lists the entries that it selects."""

    __slots__ = ("_query", "_steps", "text")

    def __init__(self, text: str, query: JSONPathQuery) -> None:
        self.text = text
        self._query = query
        self._steps = _steps_of(query)

    @property
    def matched_nothing(self) -> str:
        return f"{shown(self.text)} matched nothing"

    def __call__(self, value: object) -> list[Entry]:
        """
        Raises:
            Unreadable: The path cannot be applied to this value, which may be nested too deeply.
        """
        return list(map(entry, self.select(value)))

    def select(self, value: object) -> list[Any]:
        """The values themselves.

        Raises:
            Unreadable: Likewise.
        """
        try:
            if self._steps is not None:
                return _walk(self._steps, value)
            return [node.value for node in self._query.finditer(value)]  # type: ignore[arg-type]
        except Exception as error:
            # A RecursionError, the library's or Python's; a UnicodeEncodeError, where half a surrogate pair is
            # matched. Whatever it is, this body is beyond us, and that must not cost the client the response.
            raise Unreadable(f"the path cannot be applied: {type(error).__name__}") from error


def compile_path(text: str) -> Path:
    """The path, ready to be applied.

    Raises:
        ValueError: It is not a JSONPath by RFC 9535.
    """
    try:
        return Path(text, compile_query(text))
    except (JSONPathError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a JSONPath (RFC 9535): {shown(text)}: {error}") from error


def _steps_of(query: JSONPathQuery) -> tuple[str | None, ...] | None:
    """What a path of nothing but names and wildcards goes through: a name, or None for all; of any other path, None.

    Nearly every path is one of these, and takes much less time than the library's way.
    """
    steps: list[str | None] = []
    for segment in query.segments:
        selector = segment.selectors[0]
        if not isinstance(segment, JSONPathChildSegment) or len(segment.selectors) > 1:
            return None
        if isinstance(selector, NameSelector):
            steps.append(selector.name)
        elif isinstance(selector, WildcardSelector):
            steps.append(None)
        else:
            return None
    return tuple(steps)


def _walk(steps: tuple[str | None, ...], value: object) -> list[Any]:
    """The values that such a path selects, in the library's order."""
    found = [value]
    for step in steps:
        if step is None:
            found = [child for parent in found for child in _children(parent)]
        else:
            found = [parent[step] for parent in found if isinstance(parent, dict) and step in parent]
    return found


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def entry(selected: object) -> Entry:
    """One selected value as an entry: an object by its `id` and `status`, any other as the status itself."""
    if not isinstance(selected, dict):
        return None, succeeded(selected)
    item, status = selected.get("id"), selected.get("status")
    # As nearly always, without a call for each.
    return (
        item if type(item) is str else id_of(item),
        True if type(status) is str and status in _SUCCEEDED else succeeded(status),
    )


def listed_in(body: object) -> Any:
    """Where a body without a path reports, if it does."""
    return body.get("results", body.get("items")) if isinstance(body, dict) else None


def all_succeeded(listed: Any, paid: Paid) -> bool:
    """Whether these are objects that report on just what was paid for, and all of it succeeded: as nearly always.

    Anything else has to be looked at entry by entry.
    """
    try:
        if not listed or not _SUCCEEDED.issuperset([each["status"] for each in listed]):
            return False
        if paid.by_item is None:
            return len(listed) == paid.units
        return len(listed) == len(paid.by_item) and {each["id"] for each in listed} == paid.by_item.keys()
    except (KeyError, TypeError):  # no list, no objects, without such a member, or it is no word
        return False


def entries_without_path(body: object, paid: Paid) -> list[Entry] | None:
    """What a body reports in `$.results[*]` or `$.items[*]`; None where that is no report on what was paid.

    It is one only where every element is an object with a `status`, or a boolean, where at least one of them
    is a word for an outcome (orders are "shipped" or "pending", which says nothing of this request), and
    where there are as many as units were paid for, or exactly the ids: any other list is a list of things.

    Raises:
        Unfitting: It looks like a report, but not on all that was paid for.
    """
    if not isinstance(body, dict):
        return None
    unfitting: str | None = None
    for name in ("results", "items"):
        listed = body.get(name)
        if isinstance(listed, dict):
            listed = list(listed.values())
        if not isinstance(listed, list) or not all(map(_is_report, listed)):
            continue
        if listed and not any(map(_is_outcome, listed)):
            continue
        entries = list(map(entry, listed))
        if _fits(entries, paid):
            return entries
        if listed and (paid.by_item is not None or paid.units > 1):
            unfitting = unfitting or f"`{name}` does not report on exactly what was paid for, and was not read"
    if unfitting is not None:
        raise Unfitting(unfitting)
    return None


def entries_of_line(value: object) -> list[Entry]:
    """What a line of a stream reports without a path: itself, where it is an object with a `status`."""
    return [entry(value)] if isinstance(value, dict) and "status" in value else []


def _is_report(element: object) -> bool:
    return isinstance(element, bool) or (isinstance(element, dict) and "status" in element)


def _is_outcome(element: object) -> bool:
    status = element.get("status") if isinstance(element, dict) else element
    if isinstance(status, str):
        return succeeded(status) or status.lower() in _FAILED
    return isinstance(status, bool) or (isinstance(status, int | float) and 100 <= status < 600)


def _fits(entries: list[Entry], paid: Paid) -> bool:
    if paid.by_item is None:
        return len(entries) == paid.units
    return {item for item, _ in entries} == paid.by_item.keys()
