"""What succeeded, of what was paid for. Pure: bytes and values in, an `Outcome` out; no I/O.

A request's price is a `Paid`. What its response reports is read by one of the readers (`reader_for`), or
comes from the app's own function (`from_returned`, then `count`). What the route itself said, while it
ran, is a `Said`. The three make the `Outcome`: the units that stay paid, and the items that failed.

    paid.py      what was paid for, and what the route says of it
    report.py    the counting: every rule about matching a report to what was paid
    select.py    statuses out of JSON: the path, and what holds without one
    bodies.py    whole JSON bodies, and the choice of the reader
    streams.py   NDJSON and server-sent events, line by line
    decode.py    bytes to JSON values: gzip, deflate, JSON, all bounded
"""

from metered_billing.outcomes.bodies import BodyReader, Reader, StatusReader, reader_for
from metered_billing.outcomes.paid import Paid, Said, cost_of, whole_number
from metered_billing.outcomes.report import (
    ById,
    Delivered,
    InOrder,
    Outcome,
    Report,
    by_status,
    count,
    from_returned,
    none_kept,
)
from metered_billing.outcomes.select import Path, compile_path
from metered_billing.outcomes.streams import LineReader

__all__ = [
    "BodyReader",
    "ById",
    "Delivered",
    "InOrder",
    "LineReader",
    "Outcome",
    "Paid",
    "Path",
    "Reader",
    "Report",
    "Said",
    "StatusReader",
    "by_status",
    "compile_path",
    "cost_of",
    "count",
    "from_returned",
    "none_kept",
    "reader_for",
    "whole_number",
]
