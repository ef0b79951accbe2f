"""A look into a journal on PostgreSQL: a read-only transaction a page. It takes no place and locks no row."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, Self

import psycopg

from metered_billing.journal import JournalError, NoJournal, transaction_in
from metered_billing.journal.postgres import LEASE_S, SCHEMA, _record
from metered_billing.journal.reading import PAGE, Seen, Wanted
from metered_billing.postgres import Connection, _parameters, first_line, place
from metered_billing.schemas import SchemaMismatch

PATIENCE = "30s"
"""What a page may take."""

_TABLES: Final = "metered_billing"


class PostgresReader:
    """A journal in a PostgreSQL database.

    Args:
        url: As `PostgresJournal` takes it.

    Raises:
        ValueError: It is no such URL; the text shows nothing of it.
        NoJournal: On entering: there is none.
        JournalError: On entering: it cannot be reached, or is of another version.
    """

    known_dead_after_s = LEASE_S + 2  # and a second look

    def __init__(self, url: str) -> None:
        self._parameters = _parameters(url) | {"application_name": "metered-billing reader"}
        self._place = place(self._parameters)
        self._unusable: dict[str, str] = {}
        self._connection: Connection | None = None

    @property
    def place(self) -> str:
        return self._place

    @property
    def unusable(self) -> Mapping[str, str]:
        return self._unusable

    @property
    def realms(self) -> Collection[str]:
        return {realm for (realm,) in self._read(f"SELECT DISTINCT realm FROM {_TABLES}.owners")}  # noqa: S608

    def __enter__(self) -> Self:
        try:
            self._connection = psycopg.connect(**self._parameters, autocommit=True)
            self._connection.read_only = True
        except psycopg.Error as error:
            raise JournalError(f"{self._place} cannot be reached: {first_line(error)}") from error
        try:
            if self._read("SELECT to_regclass(%s)", f"{_TABLES}.versions") == [(None,)]:
                raise NoJournal(f"there is no journal at {self._place}")
            versions = self._read(f"SELECT version FROM {_TABLES}.versions WHERE what = %s", SCHEMA.what)  # noqa: S608
            if not versions:
                raise NoJournal(f"there is no journal at {self._place}")
            SCHEMA.check(versions[0][0])
        except SchemaMismatch as error:
            self._connection.close()
            raise JournalError(f"{self._place}: {error}") from error
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def charges(self, wanted: Wanted) -> Iterator[Seen]:
        where, values = _conditions(wanted)
        order, beyond = ("ASC", ">") if wanted.oldest_first else ("DESC", "<")
        statement = (
            "SELECT id, charges.owner, state, opened_at, tries, due_at, closed_at, body,"  # noqa: S608 - our words
            " COALESCE(expires_at > clock_timestamp(), false)"
            f" FROM {_TABLES}.charges LEFT JOIN {_TABLES}.owners ON owners.owner = charges.owner"
            f" WHERE {' AND '.join(where)} AND (%s::text IS NULL OR id {beyond} %s) ORDER BY id {order} LIMIT {PAGE}"
        )
        last = None
        while True:
            page = self._read(statement, *values, last, last)
            for *row, living in page:
                try:
                    record = _record(tuple(row))
                except JournalError as error:
                    self._unusable[f"charge {row[0]}"] = str(error)
                    continue
                if wanted.covers(record):
                    yield Seen(record, living)
            if len(page) < PAGE:
                return
            last = page[-1][0]

    def complete_since(self, closed_since: float, keep: int) -> float | None:
        oldest: float | None
        closed: float
        ((oldest,),) = self._read(f"SELECT MIN(opened_at) FROM {_TABLES}.charges")  # noqa: S608
        ((count, closed),) = self._read(
            f"SELECT COUNT(*), MIN(closed_at) FROM {_TABLES}.charges"  # noqa: S608
            " WHERE closed_at IS NOT NULL AND state <> 'disputed'"
        )
        if oldest is None:
            return None
        return max(oldest, closed_since, closed if count >= keep else closed_since)

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        if self._connection is None:
            raise JournalError(f"{self._place} is not open")
        try:
            with self._connection.transaction():
                self._connection.execute(f"SET LOCAL statement_timeout = '{PATIENCE}'".encode())
                return self._connection.execute(statement.encode(), values).fetchall()
        except psycopg.Error as error:
            raise JournalError(f"{self._place}: {first_line(error)}") from error


def _conditions(wanted: Wanted) -> tuple[list[str], list[Any]]:
    where, values = ["true"], list[Any]()
    if wanted.name is not None:
        where.append("(id = %s OR request_id = %s)")
        # No text in PostgreSQL has a zero in it, so that such a name is nowhere.
        values += [wanted.name.replace("\x00", "?")] * 2
    if wanted.transaction_id is not None:
        where.append("strpos(body, %s) > 0")
        values.append(transaction_in(wanted.transaction_id))
    if wanted.unsettled:
        where.append("closed_at IS NULL")
    if wanted.states is not None:
        where.append("state = ANY(%s)")
        values.append(sorted(map(str, wanted.states)))
    if wanted.since is not None:
        where.append("opened_at >= %s")
        values.append(wanted.since)
    return where, values
