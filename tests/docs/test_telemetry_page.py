"""The telemetry page says what is emitted when everything happens: every name, type and unit, and nothing else."""

import asyncio
import importlib
import json
import logging
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opentelemetry.semconv.attributes
import pytest
from opentelemetry.sdk.metrics.export import Gauge, Histogram, Metric
from opentelemetry.trace import SpanKind

from metered_billing import names, telemetry
from metered_billing.ledger.answers import REFUSALS

from .everything import Everything
from .pages import DOCS, Page, code, table

PAGE = Page(DOCS / "reference" / "telemetry.md")
THE_APPS = {"charge", "deduct", "refund", "void", "recover"}
THE_SERVICES = {"ledger.deduct", "ledger.refund", "ledger.void", "ledger.grant"}
GROUPS = {"the app's": THE_APPS, "the service's": THE_SERVICES, "calls": {"GET", "POST"}}
OF_ALL = {
    "tenant_id",
    "user_id",
    "amount",
    "transaction_id",
    "charge_id",
    "request_id",
    "trace_id",
    "span_id",
}
TYPES: dict[str, type] = {"string": str, "int": int, "bool": bool, "string[]": tuple}
LOG_TYPES: dict[str, type] = {**TYPES, "float": float, "string[]": list}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    """What was emitted when everything had happened."""
    with pytest.MonkeyPatch.context() as patch:
        everything = Everything(tmp_path_factory.mktemp("everything"), patch)
        asyncio.run(everything.happen())
        yield everything


def short(name: str) -> str:
    return name.removeprefix("metered_billing.")


def points(metric: Metric) -> list[dict[str, Any]]:
    return [dict(point.attributes or {}) for point in metric.data.data_points]


def test_spans_are_on_the_page(everything: Everything) -> None:
    """Each with its parents and its link."""
    rows = table(PAGE, "Spans")
    assert {name for row in rows for name in code(row[0])} == {span.name for span in everything.spans}
    ids = {span.context.span_id: span.name for span in everything.spans if span.context is not None}
    linked = {(span.name, ids[link.context.span_id]) for span in everything.spans for link in span.links}
    operations = (names.SPAN_DEDUCT, names.SPAN_REFUND, names.SPAN_VOID)
    assert linked == {
        *((code(row[0])[0], names.SPAN_DEDUCT) for row in rows if "the deduction" in row[3]),
        *((code(row[0])[0], "POST") for row in rows if "the call that carried it" in row[3]),
        *(("POST", name) for row in rows if "the operations that it carried" in row[3] for name in operations),
    }
    for span in everything.spans:
        assert (span.kind is SpanKind.CLIENT) == (span.name in GROUPS["calls"])


def test_span_attributes_are_on_the_page(everything: Everything) -> None:
    """Each with its type and the spans that have it; the example is of that type."""
    emitted = {
        (attribute, type(value), short(span.name))
        for span in everything.spans
        for attribute, value in (span.attributes or {}).items()
    }
    rows = table(PAGE, "Span attributes")
    shown = {
        (code(row[0])[0], TYPES[row[1]], span)
        for row in rows
        for word in row[3].split(", ")
        for span in GROUPS.get(word, {word})
    }
    # A call that only reads, once in the life of a charge without voids, fails and is repeated like any other.
    assert {(name, kind) for name, kind, _ in emitted} == {(name, kind) for name, kind, _ in shown}
    assert {row for row in emitted if row[2] != "GET"} == {row for row in shown if row[2] != "GET"}
    assert {row for row in emitted if row[2] == "GET"} <= shown
    for row in rows:
        (example,) = code(row[5])
        read = example if row[1] == "string" else json.loads(example)
        assert isinstance(tuple(read) if isinstance(read, list) else read, TYPES[row[1]])


def test_metrics_are_on_the_page(everything: Everything) -> None:
    """Each with its kind, unit and attributes, and as Prometheus calls it."""
    kinds = {Histogram: "histogram", Gauge: "gauge"}
    emitted = {
        metric.name: (
            kinds.get(type(metric.data), "counter"),
            metric.unit,
            {key for at in points(metric) for key in at},
        )
        for metric in everything.metrics
    }
    rows = table(PAGE, "Metrics")
    assert {code(row[0])[0]: (row[1], "".join(code(row[2])), set(code(row[3]))) for row in rows} == emitted
    assert {name for row in rows for name in code(row[5])} == everything.prometheus
    for row in rows:
        assert code(row[5])[0].startswith(code(row[0])[0].replace(".", "_"))


def test_values_of_metrics_are_few_and_on_the_page(everything: Everything) -> None:
    """All that there are have been seen, and each is named."""
    text = PAGE.text.partition("## Metrics")[2]
    ledger_outcomes = {*REFUSALS, "ok", "unavailable", "corrupt", "cancelled", "error"}
    seen: dict[tuple[str, str], set[str]] = {}
    for metric in everything.metrics:
        for at in points(metric):
            for attribute, value in at.items():
                seen.setdefault((metric.name, attribute), set()).add(value)
                assert f"`{value}`" in text, f"{metric.name}: {attribute}={value}"
    assert seen[names.METRIC_DURATION, names.OUTCOME] == names.OUTCOMES
    assert seen[names.METRIC_DURATION, names.OPERATION] == {"deduct", "refund", "void", "recover", "attempt"}
    assert seen[names.METRIC_LEDGER_DURATION, names.OUTCOME] == ledger_outcomes
    assert seen[names.METRIC_ANOMALIES, names.EVENT] == set(names.ANOMALIES)


def test_counters_were_counted(everything: Everything) -> None:
    """None of them stayed at the 0 that it began with."""
    still = [
        (metric.name, dict(point.attributes or {}))
        for metric in everything.metrics
        if not isinstance(metric.data, Histogram | Gauge)
        for point in metric.data.data_points
        if getattr(point, "value", 1) == 0
    ]
    assert still == []


def test_log_events_are_on_the_page(everything: Everything) -> None:
    """Each with its level and its further fields; those that are counted are marked."""
    emitted: dict[str, tuple[str, set[str]]] = {}
    for log in everything.logs:
        level, fields = emitted.setdefault(log["event"], (log["level"], set()))
        assert level == log["level"]
        fields |= log.keys() - OF_ALL - {"event", "level", "exc_info"}
    rows = table(PAGE, "Log events")
    assert {code(row[0])[0]: (row[1], set(code(row[3]))) for row in rows} == emitted
    assert {code(row[0])[0] for row in rows if "•" in row[0]} == set(names.ANOMALIES)


def test_log_fields_are_on_the_page(everything: Everything) -> None:
    """Each with its type; the example is of that type."""
    emitted = {
        (field, type(value))
        for log in everything.logs
        for field, value in log.items()
        if value is not None and field not in ("event", "level", "exc_info")
    }
    rows = table(PAGE, "Log fields")
    assert {(code(row[0])[0], LOG_TYPES[row[1]]) for row in rows} == emitted
    for row in rows:
        (example,) = code(row[4])
        assert isinstance(example if row[1] == "string" else json.loads(example), LOG_TYPES[row[1]])


def test_all_names_are_in_one_module_and_used(everything: Everything) -> None:
    """What stands there is emitted, and what is emitted stands there."""
    constants = {
        value
        for name, value in vars(names).items()
        if name.isupper() and isinstance(value, str) and not name.endswith("SCOPE")
    }
    emitted = {span.name for span in everything.spans} | {log["event"] for log in everything.logs}
    emitted |= {attribute for span in everything.spans for attribute in span.attributes or ()}
    for metric in everything.metrics:
        emitted |= {metric.name, *(key for at in points(metric) for key in at)}
    assert emitted - GROUPS["calls"] == constants


def test_names_that_are_not_ours_are_opentelemetrys(everything: Everything) -> None:
    """The stable ones; and an HTTP call has all that its conventions require."""
    known = {
        value
        for module in pkgutil.iter_modules(opentelemetry.semconv.attributes.__path__)
        for value in vars(importlib.import_module(f"opentelemetry.semconv.attributes.{module.name}")).values()
        if isinstance(value, str)
    }
    theirs = {
        attribute
        for span in everything.spans
        for attribute in span.attributes or ()
        if not attribute.startswith("metered_billing.")
    }
    assert theirs <= known
    required = {"http.request.method", "server.address", "server.port", "url.full"}
    for span in everything.spans:
        if span.kind is SpanKind.CLIENT:
            attributes = span.attributes or {}
            assert required <= attributes.keys()
            assert attributes.keys() & {"http.response.status_code", "error.type"}


def test_levels_are_those_of_the_code() -> None:
    """For whoever filters by them."""
    for event, level in telemetry._LEVELS.items():
        assert re.search(rf"^\| `{event}`(?: •)? \| {logging.getLevelName(level).lower()} \|", PAGE.text, re.M)


def test_no_secret_is_emitted(everything: Everything, tmp_path: Path) -> None:
    """The token was in use all the time."""
    text = repr(everything.logs) + "".join(span.to_json() for span in everything.spans)
    assert "img-3" in text
    assert "admin-secret" not in text
