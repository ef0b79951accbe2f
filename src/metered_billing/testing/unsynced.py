"""SQLite files that are not synced to disk: nobody pulls the plug of a test, and syncing would be most of its time."""

import sqlite3
from pathlib import Path
from typing import Any


def connect_unsynced(path: Path) -> sqlite3.Connection:
    """As `runtime.connect_sqlite`."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=_Unsynced)


class _Unsynced(sqlite3.Connection):
    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        return super().execute("PRAGMA synchronous=OFF" if sql.startswith("PRAGMA synchronous") else sql, parameters)
