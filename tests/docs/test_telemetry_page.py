"""The telemetry page says what the code emits: every name, type and unit."""

import logging

from metered_billing import names, telemetry

from .pages import DOCS, Page, code, table

PAGE = Page(DOCS / "reference" / "telemetry.md")


def constants(*prefixes: str) -> set[str]:
    return {value for name, value in vars(names).items() if name.startswith(prefixes) and isinstance(value, str)}


def first_column(heading: str) -> list[str]:
    return [name for row in table(PAGE, heading) for name in code(row[0])]


def test_spans_and_metrics_are_on_the_page() -> None:
    """All names of ours."""
    assert {name for name in first_column("Spans") if name.startswith(names.SCOPE)} == constants("SPAN_")
    assert set(first_column("Metrics")) == constants("METRIC_")


def test_log_events_are_on_the_page_with_their_levels() -> None:
    """All of them, and no others; those that are counted are marked."""
    rows = table(PAGE, "Log events")
    shown = {code(row[0])[0]: row[1] for row in rows}
    assert shown == {
        event: logging.getLevelName(telemetry._LEVELS.get(event, logging.INFO)).lower() for event in constants("LOG_")
    }
    assert {code(row[0])[0] for row in rows if "•" in row[0]} == set(names.ANOMALIES)
