"""`metered-billing backup`: a sound copy of a ledger's file, also while a service has it open."""

from pathlib import Path
from typing import Annotated

import typer

from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.ledger.backup import BackupFailed, back_up
from metered_billing.ledger.places import POSTGRES, sqlite_path


def backup(
    file: Annotated[Path, typer.Argument(help="Where to put the copy; nothing that is there is replaced.")],
    database: Annotated[str, typer.Option(help="sqlite:///relative.db or sqlite:////absolute.db")] = (
        "sqlite:///credits.db"
    ),
) -> None:
    """Copy a ledger's file as it is now, and look the copy through. Its service may go on meanwhile."""
    if database.startswith(POSTGRES):
        raise Failure("--database: PostgreSQL has tools of its own for this, pg_dump for one.", 2)
    try:
        found = back_up(sqlite_path(database), file)
    except ValueError as error:
        raise Failure(f"--database: {error}.", 2) from None
    except BackupFailed as error:
        raise Failure(f"{error}.") from None
    held = terminal.credits_in_words(found.held_credits)
    until = "" if found.last_at is None else f", the latest of {found.last_at}"
    terminal.say(f"{file}: {held} in {found.accounts:,} accounts, {found.entries:,} entries{until}; all adds up")
