"""Tables by number: each step brings a database from one version to the next, in one transaction.

A SQLite file has one owner, who brings it up to date when it opens it. In PostgreSQL other processes may be
at work with the version that is there, so that only `metered-billing migrate` changes tables; new ones are
made by whoever comes first.
"""

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metered_billing.postgres import Connection

_LOCK = 0x6D65_7465_7265_6462
"""An advisory lock of PostgreSQL's: "meteredb"."""


class SchemaMismatch(Exception):
    """The tables are of a version that this release cannot work with, or this role may not use.

    Nothing was changed.
    """


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one component.

    Args:
        what: "journal" or "ledger".
        steps: The statements from nothing to version 1, from version 1 to version 2, …
    """

    what: str
    steps: tuple[tuple[str, ...], ...]

    @property
    def version(self) -> int:
        return len(self.steps)

    def due(self, found: int) -> list[str]:
        """The statements that bring version `found` (0: no tables yet) up to date.

        Raises:
            SchemaMismatch: A later release wrote it.
        """
        if found > self.version:
            raise SchemaMismatch(
                f"this {self.what} has schema version {found}, and this release of metered-billing knows versions up"
                f" to {self.version}: upgrade metered-billing, or use the release that wrote it"
            )
        return [statement for step in self.steps[found:] for statement in step]

    def check(self, found: int) -> None:
        """See that tables in PostgreSQL are as this release needs them.

        Raises:
            SchemaMismatch: They are of another version; the text says what to do.
        """
        if self.due(found):
            raise SchemaMismatch(
                f"this {self.what} has schema version {found}, and this release of metered-billing needs version"
                f" {self.version}: run `metered-billing migrate`, once, before the new release starts"
            )


def prepare_sqlite(connection: sqlite3.Connection, schema: Schema) -> int:
    """Bring the file's tables up to date, within the transaction under way. Returns the version that was found.

    Raises:
        SchemaMismatch: A later release wrote it.
    """
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    for statement in schema.due(found):
        connection.execute(statement)
    if found != schema.version:
        connection.execute(f"PRAGMA user_version = {schema.version}")
    return found


def prepare_postgres(connection: "Connection", schema: Schema, *, migrate: bool = False) -> int:
    """Make the tables where there are none, within the transaction under way. Returns the version that was found.

    Args:
        migrate: Bring older tables up to date too.

    Raises:
        SchemaMismatch: They are of another version, or this role may not use them; the text says what to do.
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in (None, "UTF8"):
        raise SchemaMismatch(f"the database is encoded in {encoding}, which cannot hold every text: make one in UTF8")
    # The first of several processes makes them, while the others wait.
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
    # Only where they are missing: afterwards the role needs no right to create anything.
    if connection.execute("SELECT to_regclass('versions')").fetchone() == (None,):
        where = connection.execute("SHOW search_path").fetchone() or ("",)
        usable = "SELECT has_schema_privilege(to_regnamespace(%s)::oid, 'USAGE')"
        may_use = connection.execute(usable.encode(), where).fetchone()
        # IF NOT EXISTS would ask for the right to create one, also where somebody has made it for us.
        if may_use == (None,):
            connection.execute(f"CREATE SCHEMA {where[0]}".encode())
        elif may_use == (False,):  # PostgreSQL would only say that no schema has been selected
            raise SchemaMismatch(
                f"this role may not use the schema {where[0]}, where the {schema.what}'s tables are: grant it USAGE on"
                " the schema, and its rights on the tables"
            )
        connection.execute("CREATE TABLE IF NOT EXISTS versions (what text PRIMARY KEY, version int NOT NULL)")
    row = connection.execute("SELECT version FROM versions WHERE what = %s", (schema.what,)).fetchone()
    found = 0 if row is None else int(row[0])
    statements = schema.due(found)
    if found and not migrate:
        schema.check(found)
    for statement in statements:
        connection.execute(statement.encode())
    if statements:
        connection.execute(
            "INSERT INTO versions VALUES (%s, %s) ON CONFLICT (what) DO UPDATE SET version = excluded.version",
            (schema.what, schema.version),
        )
    return found
