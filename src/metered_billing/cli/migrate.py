"""`metered-billing migrate`: tables in PostgreSQL, from one release's to the next."""

from typing import Annotated

import typer

from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.commits import ConnectionLost
from metered_billing.ledger.places import POSTGRES
from metered_billing.schemas import Schema, SchemaMismatch


def migrate(
    database: Annotated[str | None, typer.Option(help="The ledger's: postgresql://user@host:port/database")] = None,
    journal: Annotated[
        str | None, typer.Option(envvar="METERED_BILLING_JOURNAL", help="The journal's: likewise.")
    ] = None,
) -> None:
    """Bring the tables in PostgreSQL up to date: once, before a new release starts."""
    if not database and not journal:
        raise Failure("Say what to migrate: --database URL, --journal URL, or both.", 2)
    if database:
        _bring_up_to_date("ledger", "--database", database)
    if journal:
        _bring_up_to_date("journal", "--journal", journal)


def _bring_up_to_date(what: str, option: str, url: str) -> None:
    if not url.startswith(POSTGRES):
        if not _in_files(what, url):
            raise Failure(f"{option}: not a place that a {what} can be kept in; write postgresql://…", 2)
        terminal.say(f"{what}: not in PostgreSQL, so whoever opens it brings it up to date")
        return
    try:
        from metered_billing.postgres import DatabaseError, first_line, migrate
    except ImportError as error:
        raise Failure(f"{error}.") from None
    schema = _schema(what)
    try:
        found = migrate(url, schema)
    except ValueError as error:
        raise Failure(f"{option}: {error}.", 2) from None
    except (ConnectionLost, SchemaMismatch) as error:
        raise Failure(f"{what}: {error}.") from None
    except DatabaseError as error:
        raise Failure(f"{what}: {first_line(error)}. Nothing was changed.") from None
    if found == schema.version:
        terminal.say(f"{what}: schema version {found}, nothing to do")
    elif found == 0:
        terminal.say(f"{what}: made, schema version {schema.version}")
    else:
        terminal.say(f"{what}: migrated from schema version {found} to {schema.version}")


def _in_files(what: str, url: str) -> bool:
    # A scheme that is misspelt must not pass for a directory: a deployment would go on as if it had been migrated.
    named = url.startswith("sqlite:///")
    return named if what == "ledger" else named or (bool(url.strip()) and ":" not in url)


def _schema(what: str) -> Schema:
    # Only here: both need the driver.
    if what == "ledger":
        from metered_billing.ledger.postgres_books import SCHEMA as LEDGER

        return LEDGER
    from metered_billing.journal.postgres import SCHEMA as JOURNAL

    return JOURNAL
