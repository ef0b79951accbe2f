"""How a charge lies in a file of the journal: the tables, a charge's row, and what is done to it."""

import sqlite3
from collections.abc import Iterator
from typing import Any

from metered_billing.charge import Record
from metered_billing.journal import JournalError, body_of, record_of
from metered_billing.schemas import Schema

_VERSION_1 = (
    """CREATE TABLE IF NOT EXISTS charges (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        state TEXT NOT NULL,
        opened_at REAL NOT NULL,
        tries INTEGER NOT NULL,
        due_at REAL NOT NULL,
        closed_at REAL,
        request_id TEXT,
        body TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS about (realm TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS charges_due ON charges (due_at) WHERE closed_at IS NULL",
    "CREATE INDEX IF NOT EXISTS charges_closed ON charges (closed_at, id)"
    " WHERE closed_at IS NOT NULL AND state <> 'disputed'",
    "CREATE INDEX IF NOT EXISTS charges_request ON charges (request_id) WHERE request_id IS NOT NULL",
)
_VERSION_2 = (
    # Covers what a hundred thousand unsettled charges are counted by, and is searched by owner first, so that
    # a file can be taken over a little at a time.
    "CREATE INDEX IF NOT EXISTS charges_unsettled ON charges (owner, due_at, id, state, opened_at, closed_at)"
    " WHERE closed_at IS NULL",
    "DROP INDEX IF EXISTS charges_due",
)

_VERSION_3 = (
    # Requests' ids come in no order, so that each new charge had a page of its own to write to keep this index.
    # What is searched for by them, a person looks for, now and then: a file is read through in a moment.
    "DROP INDEX IF EXISTS charges_request",
)

SCHEMA = Schema("journal", (_VERSION_1, _VERSION_2, _VERSION_3))

COLUMNS = ("id", "owner", "state", "opened_at", "tries", "due_at", "closed_at", "body")
COLUMN_LIST = ", ".join(COLUMNS)
Row = tuple[str, str, str, float, int, float, float | None, str]

OPEN = f"INSERT INTO charges ({COLUMN_LIST}, request_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
WRITE = (
    "UPDATE charges SET state = ?, tries = ?, due_at = ?, closed_at = ?, body = ?"
    " WHERE id = ? AND owner = ? AND state IN (?, ?)"
)


def rows_of(connection: sqlite3.Connection, statement: str, values: tuple[object, ...]) -> Iterator[Any]:
    """Rows whose text may be bytes: one that is no UTF-8 must not keep the others from being read."""
    cursor = connection.cursor()
    before, connection.text_factory = connection.text_factory, text_or_bytes
    try:
        yield from cursor.execute(statement, values)
    finally:
        cursor.close()
        connection.text_factory = before


def text_or_bytes(raw: bytes) -> str | bytes:
    """Text as SQLite gives it; bytes where it is no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def columns_of(record: Record) -> Row:
    return (
        record.id,
        record.owner,
        str(record.state),
        record.opened_at,
        record.tries,
        record.due_at,
        record.closed_at,
        body_of(record),
    )


def record_in(row: Row) -> Record:
    """The record in a row of `COLUMNS`.

    Raises:
        JournalError: It cannot be read.
    """
    charge_id, owner, state, opened_at, tries, due_at, closed_at, body = row
    if not isinstance(charge_id, str):
        raise JournalError(f"charge {charge_id!r} cannot be read: its id is no text")
    return record_of(
        charge_id,
        body,
        owner=owner,
        state=state,
        opened_at=opened_at,
        tries=tries,
        due_at=due_at,
        closed_at=closed_at,
    )
