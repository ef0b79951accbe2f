"""What can still be read in a corrupt journal file: into a new file, which the running app adopts.

    python -m metered_billing.journal.mend journal/charges-0.corrupt-20261125T101500Z.db

For a person: see docs/how-to/mend-a-journal.md. The corrupt file is copied, read and left as it is.
"""

import contextlib
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metered_billing.charge import State
from metered_billing.journal import JournalError, aside
from metered_billing.journal.rows import COLUMNS, SCHEMA, record_in, text_or_bytes
from metered_billing.schemas import prepare_sqlite


@dataclass(frozen=True, slots=True)
class Mended:
    """What came of it.

    Attributes:
        path: The new file, or None where nothing was left to do.
        found: The ids of the charges in it: unsettled ones, and disputed ones.
        lost: What is known of unsettled charges that could not be read: id and state.
        whole: Whether that is all: neither the rows nor the index that names them broke off.
    """

    path: Path | None
    found: tuple[str, ...]
    lost: tuple[tuple[str, str], ...]
    whole: bool


def mend(corrupt: Path) -> Mended:
    """Put what can be read of a corrupt file into a new one beside it.

    Raises:
        OSError: It cannot be read, or the new one not be made.
        ValueError: It is not a file that was set aside. One that is in use must not be copied: its charges would be
            settled twice over.
    """
    if not aside.is_aside(corrupt):
        raise ValueError(f"{corrupt} is not a file that was set aside: those are named charges-N.corrupt-TIME.db")
    with tempfile.TemporaryDirectory(prefix="mend-", dir=corrupt.parent) as place:
        copy = Path(place) / "copy.db"
        shutil.copyfile(corrupt, copy)
        _put_magic_back(copy)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(corrupt.with_name(corrupt.name + "-wal"), copy.with_name("copy.db-wal"))
        connection = sqlite3.connect(copy)
        try:
            connection.text_factory = text_or_bytes
            rows, lost, whole = _read(connection)
            realms = list(_as_far_as_it_goes(connection, "SELECT realm FROM about", []))
        finally:
            connection.close()
        path = None
        if rows:
            new = Path(place) / "new.db"
            _write(new, rows, realms)
            path = _publish(new, corrupt)
    return Mended(path, tuple(sorted(rows)), tuple(lost), whole)


def _put_magic_back(copy: Path) -> None:
    """The same 16 bytes begin every SQLite file: where only they are gone, all of it can be read."""
    with copy.open("r+b") as file:
        file.write(_MAGIC)


_MAGIC = b"SQLite format 3\x00"


def _read(connection: sqlite3.Connection) -> tuple[dict[str, tuple[Any, ...]], list[tuple[str, str]], bool]:
    """The rows that matter, what an index knows of unsettled ones that cannot be read, and whether that is all."""
    rows: dict[str, tuple[Any, ...]] = {}

    def keep(row: tuple[Any, ...]) -> None:
        with contextlib.suppress(JournalError):
            record = record_in(row[: len(COLUMNS)])
            if record.closed_at is None or record.state is State.DISPUTED:
                rows[record.id] = row

    select = f"SELECT {', '.join(COLUMNS)}, request_id FROM charges"  # noqa: S608 - names of ours
    # From both ends up to whatever is broken, then one by one what an index still names.
    broken: list[sqlite3.Error] = []
    for order in ("ASC", "DESC"):
        for row in _as_far_as_it_goes(connection, f"{select} ORDER BY id {order}", broken):
            keep(row)
    unnamed: list[sqlite3.Error] = []
    known: dict[str, str] = {}
    for order in ("ASC", "DESC"):
        for charge_id, state in _as_far_as_it_goes(
            connection,
            "SELECT id, state FROM charges INDEXED BY charges_unsettled WHERE closed_at IS NULL"  # noqa: S608
            f" ORDER BY owner {order}, due_at {order}, id {order}",
            unnamed,
        ):
            known[str(charge_id)] = str(state)
    for charge_id in known.keys() - rows.keys():
        for row in _as_far_as_it_goes(connection, f"{select} WHERE id = ?", [], charge_id):
            keep(row)
    lost = sorted((charge_id, state) for charge_id, state in known.items() if charge_id not in rows)
    return rows, lost, not (broken and unnamed)


def _as_far_as_it_goes(
    connection: sqlite3.Connection, statement: str, errors: list[sqlite3.Error], *values: str
) -> Iterator[tuple[Any, ...]]:
    try:
        yield from connection.execute(statement, values)
    except sqlite3.Error as error:
        errors.append(error)


def _write(path: Path, rows: dict[str, tuple[Any, ...]], realms: list[tuple[Any, ...]]) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("BEGIN")
        prepare_sqlite(connection, SCHEMA)
        connection.executemany("INSERT INTO about VALUES (?)", realms[:1])
        marks = ", ".join("?" * (len(COLUMNS) + 1))
        connection.executemany(
            f"INSERT INTO charges ({', '.join(COLUMNS)}, request_id) VALUES ({marks})",  # noqa: S608
            rows.values(),
        )
        connection.execute("COMMIT")
    finally:
        connection.close()


def _publish(new: Path, corrupt: Path) -> Path:
    """Under a free number, whole and at once: the running app adopts it within seconds."""
    numbers = [int(found.group(1)) for path in corrupt.parent.iterdir() if (found := _NUMBER.match(path.name))]
    number = max(numbers, default=-1) + 1
    while True:
        path = corrupt.with_name(f"charges-{number}.db")
        try:
            os.link(new, path)  # a rename would replace what somebody has just put there
        except FileExistsError:
            number += 1
        else:
            aside.sync_directory(path.parent)
            return path


_NUMBER = re.compile(r"charges-(\d+)\.")


def main(arguments: list[str], write: Callable[[str], object] = sys.stdout.write) -> int:
    """The command. Returns 1 where something is lost, or may be."""
    try:
        if len(arguments) != 1:
            raise ValueError("name one file")
        done = mend(Path(arguments[0]))
    except (ValueError, OSError) as error:
        write(f"{error}\nusage: python -m metered_billing.journal.mend FILE\n")
        return 2
    write(f"{len(done.found)} charges that need something done could be read")
    write(".\n" if done.path is None else f"; they are in {done.path.name}, which the app adopts.\n")
    for charge_id, state in done.lost:
        write(f"charge {charge_id}, {state}: could not be read. Look for it in the service's transactions.\n")
    if not done.whole:
        write(
            "Not all of it could be read, and nothing tells what is missing: look for deductions of that time among the"
            " service's transactions.\n"
        )
    return 1 if done.lost or not done.whole else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
