"""Where a ledger is: from a URL or a path to an engine."""

from pathlib import Path

from metered_billing.commits import Committed
from metered_billing.ledger.engine import Engine
from metered_billing.ledger.sqlite import SqliteEngine
from metered_billing.runtime import Runtime

_SQLITE = "sqlite:///"

POSTGRES = ("postgresql://", "postgres://")


def open_engine(where: str | Path, runtime: Runtime, committed: Committed | None = None) -> Engine:
    """The engine that a URL or a path asks for; nothing is opened yet.

    Args:
        committed: Told of its commits.

    Raises:
        ValueError: It names no ledger.
        ImportError: PostgreSQL, without `metered-billing[postgres]`.
    """
    if isinstance(where, str) and where.startswith(POSTGRES):
        # Only here: it needs a driver that a ledger in a file does without.
        from metered_billing.ledger.postgres import PostgresEngine

        return PostgresEngine(where, runtime, committed)
    return SqliteEngine(sqlite_path(where), runtime, committed)


def sqlite_path(url: str | Path) -> Path:
    """The file that `sqlite:///relative.db`, `sqlite:////absolute.db` or a path names.

    Raises:
        ValueError: It names none.
    """
    text = str(url)
    if text.startswith(_SQLITE):
        text = text.removeprefix(_SQLITE)
    elif "://" in text or text.lower().startswith(("sqlite:", "postgresql:", "postgres:")):
        # Only the scheme: the rest may hold a password.
        raise ValueError(f"{text.split(':')[0]}: not a ledger; write sqlite:///credits.db or postgresql://…")
    if not text or ":memory:" in text or "?" in text or "\x00" in text:
        raise ValueError("a ledger needs a file: sqlite:///relative.db or sqlite:////absolute.db")
    return Path(text)
