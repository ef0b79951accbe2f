"""An outage of the journal is a line at its beginning, and one at its end."""

import json
import logging

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from metered_billing import names
from metered_billing.charge import Account, Record, opened
from metered_billing.journal import JournalError
from metered_billing.outage import SAID_AT_MOST, Outage
from metered_billing.telemetry import Telemetry

AWAY = JournalError("postgresql://db/journal: connection refused")


def record(charge_id: str) -> Record:
    return opened(charge_id, Account("acme"), amount_credits=10, units=10, now=0.0, owner="me")


class Said:
    """What an outage's lines and counters say, under a clock that is set by hand."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.time = 0.0
        self._caplog = caplog
        self._reader = InMemoryMetricReader()
        telemetry = Telemetry(meter_provider=MeterProvider([self._reader]))
        self.outage = Outage(telemetry, lambda: self.time)

    def fail(self, error: Exception, times: int = 1) -> None:
        for _ in range(times):
            self.outage.failed(error)
            self.time += 10

    @property
    def lines(self) -> list[str]:
        return self._caplog.messages

    @property
    def records(self) -> list[logging.LogRecord]:
        return self._caplog.records

    def counted(self, event: str) -> int:
        data = json.loads(self._reader.get_metrics_data().to_json())  # type: ignore[union-attr]
        metrics = data["resource_metrics"][0]["scope_metrics"][0]["metrics"]
        (anomalies,) = [metric for metric in metrics if metric["name"] == names.METRIC_ANOMALIES]
        points = anomalies["data"]["data_points"]
        return sum(int(point["value"]) for point in points if point["attributes"][names.EVENT] == event)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    caplog.set_level(logging.DEBUG)
    return Said(caplog)


def test_hours_are_two_lines(said: Said) -> None:
    """What it is, without a traceback; then how often it was tried, and for how long."""
    said.fail(AWAY, 360)
    said.outage.looked()

    first, last = said.lines
    assert first.startswith("journal.failed")
    assert "recovery failed: postgresql://db/journal: connection refused" in first
    assert last.startswith("recovery.resumed")
    assert "tries=360" in last
    assert "outage_s=3600.0" in last
    assert not any(record.exc_info for record in said.records)


def test_each_try_is_counted(said: Said) -> None:
    """An alert must last as long as what it is about."""
    said.fail(AWAY, 360)
    assert said.counted("journal.failed") == 360


def test_another_error_is_said_too(said: Said) -> None:
    """A database that is back, but read-only, is something else than one that is away."""
    said.fail(AWAY, 3)
    said.fail(JournalError("read-only"), 3)
    said.fail(AWAY)
    assert [line.partition("recovery failed: ")[2].split('"')[0] for line in said.lines] == [str(AWAY), "read-only"]


def test_text_that_changes_each_time_is_not_said_for_ever(said: Said) -> None:
    """There may be a time in it."""
    for number in range(100):
        said.fail(JournalError(f"no answer after {number} s"))
    assert len(said.lines) == SAID_AT_MOST


def test_bug_has_its_traceback(said: Said) -> None:
    """Once; and of its text nothing but the traceback, which has it anyway."""
    said.fail(ZeroDivisionError("s"), 3)
    (record,) = said.records
    assert record.exc_info
    assert record.getMessage().startswith("billing.bug")
    assert said.counted("billing.bug") == 3


def test_charges_that_are_stuck_are_one_outage(said: Said) -> None:
    """A disk that is full can be read: the journal is looked through, and each charge fails to be written."""
    for _ in range(3):
        for number in range(8):
            said.outage.stuck(JournalError("disk full"), record(f"c{number}"))
        said.outage.looked()
        said.time += 10
    said.outage.looked()

    first, last = said.lines
    assert "c0" in first
    assert "recovery failed: disk full" in first
    assert "tries=3" in last
    assert said.counted("journal.failed") == 24


def test_look_that_was_cut_short_is_one_try(said: Said) -> None:
    """A charge was stuck, and then nothing could be read at all."""
    said.outage.stuck(AWAY, record("c0"))
    said.fail(AWAY)
    said.fail(AWAY)
    said.outage.looked()
    assert "tries=2" in said.lines[-1]


def test_next_outage_is_said_again(said: Said) -> None:
    """It is another one; and where there was none, nothing is over."""
    said.outage.looked()
    assert said.lines == []
    for _ in range(2):
        said.fail(AWAY, 2)
        said.outage.looked()
    assert [line.split()[0] for line in said.lines] == ["journal.failed", "recovery.resumed"] * 2
