"""A copy of a ledger's file, as it was at one moment, while its owner goes on; looked through before it counts."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from metered_billing.ledger.books import SCHEMA
from metered_billing.ledger.failures import LedgerError, LedgerLocked
from metered_billing.ledger.owner import OwnerLock


class BackupFailed(LedgerError):
    """There is no copy; the ledger is as it was."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a ledger's file holds.

    Attributes:
        held_credits: All balances together.
        last_at: When its latest entry was made; None without any.
    """

    accounts: int
    entries: int
    held_credits: int
    last_at: str | None


def back_up(file: Path, to: Path) -> Contents:
    """Copy the ledger, and look the copy through. Nothing is put at `to` that is not whole and sound.

    Raises:
        BackupFailed: The text says why.
    """
    if not file.is_file():
        raise BackupFailed(f"there is no ledger at {file}")
    if os.path.lexists(to):
        raise BackupFailed(f"{to} is there already, and backups replace nothing: name another file")
    unfinished = to.with_name(f"{to.name}.unfinished")
    try:
        _remove(unfinished)
        unfinished.touch(0o600)
        with _readable(file) as source, contextlib.closing(sqlite3.connect(unfinished)) as copy:
            # In one step: a read transaction, which the owner's writes neither wait for nor change.
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log
            contents = look_through(copy)
        _sync(unfinished)
        unfinished.rename(to)
        _sync(to.parent)
    except (sqlite3.Error, OSError) as error:
        raise BackupFailed(f"{file} was not backed up: {error}") from error
    finally:
        _remove(unfinished)
    return contents


def look_through(connection: sqlite3.Connection) -> Contents:
    """Read all of it, and add it up.

    Raises:
        BackupFailed: It is not a ledger that this release knows, is damaged, or does not add up.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 1 <= version <= SCHEMA.version or not connection.execute(_IS_A_LEDGER).fetchone():
        raise BackupFailed("this is not a ledger that this release of metered-billing can read")
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise BackupFailed(f"the file is damaged: {verdict}")
    wrong = connection.execute(_WRONG).fetchone()
    if wrong is not None:
        raise BackupFailed(f"the account {' / '.join(filter(None, wrong))} does not hold the sum of its entries")
    (accounts,) = connection.execute("SELECT COUNT(*) FROM accounts").fetchone()
    entries, last_at = connection.execute("SELECT COUNT(*), MAX(created_at) FROM entries").fetchone()
    # Not SQL's SUM: many tenants together may have more than its 64 bits.
    held_credits = sum(balance for (balance,) in connection.execute("SELECT balance FROM accounts"))
    return Contents(accounts, entries, held_credits, last_at)


_IS_A_LEDGER = "SELECT 1 FROM sqlite_master WHERE name = 'entries'"

_WRONG = """
    SELECT tenant_id, user_id FROM (
        SELECT tenant_id, user_id, -balance AS amount, -granted AS granted FROM accounts
        UNION ALL
        SELECT tenant_id, user_id, amount, CASE kind WHEN 'grant' THEN amount ELSE 0 END FROM entries
    )
    GROUP BY tenant_id, user_id HAVING SUM(amount) <> 0 OR SUM(granted) <> 0 LIMIT 1
"""


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[sqlite3.Connection]:
    """The file, for reading.

    With an owner: beside it, as SQLite allows; such a connection cannot write. Without one a log may be left that
    only an owner may recover: so we are the owner, for as long as it takes.
    """
    lock = OwnerLock(file.resolve())
    with contextlib.ExitStack() as stack:
        try:
            lock.acquire()
        except LedgerLocked:
            # Percent signs and question marks are a URL's own.
            connection = sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)
        else:
            stack.callback(lock.release)
            connection = sqlite3.connect(file)
        stack.callback(connection.close)
        yield connection


def _remove(unfinished: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        Path(f"{unfinished}{suffix}").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
