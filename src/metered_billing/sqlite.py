"""One SQLite file, one connection, one thread, group commit: what the journal and the ledger write with.

One connection, because aiosqlite interleaves two coroutines' transactions on one, and because two that write
and checkpoint a WAL file can corrupt it in SQLite before 3.51.3.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

from metered_billing.commits import GroupCommit, Outcome, Waiting
from metered_billing.runtime import Executor, connect_sqlite


class SqliteFile(GroupCommit[sqlite3.Connection]):
    """A SQLite database that this process alone writes.

    Args:
        path: The file; made where it is missing.
        schema: SQL that runs once, at opening; must be repeatable (`CREATE … IF NOT EXISTS`).
        executor: The one thread. All of SQLite happens there.
        connect: Opens the file.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        executor: Executor,
        connect: Callable[[Path], sqlite3.Connection] = connect_sqlite,
    ) -> None:
        super().__init__(path.name, executor)
        self.path = path
        self._schema = schema
        self._connect = connect
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None

    def __del__(self) -> None:
        # An app that was never shut down (a test client without a lifespan, say) just lets go of it.
        if getattr(self, "_connection", None) is not None:
            with contextlib.suppress(Exception):
                self._disconnect()

    # Below: in the thread.

    def in_place(self) -> bool:
        """Whether the file that is open still stands at its path: what is written to another is lost."""
        try:
            return self._opened == _identity(self.path)
        except OSError:
            return False

    def _transaction(self, batch: list[Waiting[sqlite3.Connection]]) -> list[Outcome]:
        connection = self._open()
        durable = any(waiting.durable for waiting in batch)
        try:
            connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            results = [waiting.operation(connection) for waiting in batch]
            connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise
        return [(result, None) for result in results]

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            # After a failed COMMIT (disk full) SQLite may have rolled back by itself.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            # A connection stuck in a transaction would fail for ever: the next operation gets a new one.
            self._disconnect()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = self._connect(self.path)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                connection.executescript(self._schema)
                self._opened = _identity(self.path)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
