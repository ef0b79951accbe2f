"""Corrupt files of a journal: set aside under a name that says so, and never deleted.

`charges-3.db` becomes `charges-3.corrupt-20261125T101500Z.db`, and what belongs to it goes along: its log (`-wal`)
may hold the latest charges. All of this is for whoever holds the file's lock.

First the database, then the rest: a database that is left without its log might be read once more, and look
whole, with charges as they stood long ago. A log that is left without its database (we died in between) is
found by `complete`, before SQLite, which would delete it.
"""

import os
import re
import time
from pathlib import Path

COMPANIONS = ("-wal", "-journal", "-shm")

_LIVE = re.compile(r"charges-\d+\.db")
_ASIDE = re.compile(r"charges-\d+\.corrupt-.*\.db(-wal|-journal)?")


def live(directory: Path) -> list[Path]:
    """The files that are in use, or could be."""
    return sorted(path for path in directory.glob("charges-*.db") if _LIVE.fullmatch(path.name))


def is_aside(path: Path) -> bool:
    """Whether it is, by its name, a database that was set aside: nobody has it in use."""
    return path.suffix == ".db" and _ASIDE.fullmatch(path.name) is not None


def set_aside(path: Path, now: float) -> Path:
    """Rename a file, and what belongs to it. Returns its new path.

    Args:
        now: Seconds since the epoch, for the name.

    Raises:
        OSError: It cannot be renamed. It stands where it stood, or `complete` finds the rest.
    """
    aside = _free(path, now)
    path.rename(aside)
    # The names must not change in another order at a power loss either.
    sync_directory(path.parent)
    _bring_along(path, aside)
    return aside


def complete(path: Path, now: float) -> None:
    """Where a file is gone and its log is not: finish what was begun, before a new file takes the name.

    Raises:
        OSError: It cannot be renamed.
    """
    left = [suffix for suffix in COMPANIONS if _beside(path, suffix).is_file()]
    if path.exists() or not left:
        return
    latest = max(path.parent.glob(f"{path.stem}.corrupt-*.db"), default=None)
    if latest is None or any(_beside(latest, suffix).exists() for suffix in left):
        # Not of ours: somebody removed the database alone.
        latest = _free(path, now)
    _bring_along(path, latest)


def listed(directory: Path) -> list[str]:
    """The names of what was set aside, as long as it is there; a log only where it stands alone."""
    found = {path.name for path in directory.glob("charges-*") if _ASIDE.fullmatch(path.name)}
    return sorted(name for name in found if name.endswith(".db") or name.rpartition("-")[0] not in found)


def make_directory(directory: Path) -> None:
    """Make it, and its parents, so that they outlast a power loss: what is synced in a lost directory is lost.

    Raises:
        OSError: It cannot be made.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(path: Path, now: float) -> Path:
    """A name that nothing has yet: a rename replaces what is there."""
    stem = f"{path.stem}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}"
    number = 1
    while True:
        # An underscore, so that the later one sorts behind.
        aside = path.with_name(f"{stem}.db" if number == 1 else f"{stem}_{number}.db")
        if not any(_beside(aside, suffix).exists() for suffix in ("", *COMPANIONS)):
            return aside
        number += 1


def _bring_along(path: Path, aside: Path) -> None:
    for suffix in COMPANIONS:
        if _beside(path, suffix).is_file():
            _beside(path, suffix).rename(_beside(aside, suffix))
    sync_directory(path.parent)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
