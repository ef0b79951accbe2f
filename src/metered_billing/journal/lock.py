"""An advisory lock on a file of its own, that ends with the process, however it ends."""

import fcntl
import os
import weakref
from pathlib import Path
from typing import Protocol, Self


class FileLock:
    """`flock` on a file beside the one it is for: closing any handle of a SQLite file drops SQLite's own locks.

    Two locks in one process shut each other out too. A child made by `fork` does not hold it: while such a
    child lived, its dead parent's file could not be adopted.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._changed_ns = os.fstat(descriptor).st_ctime_ns
        _HELD.add(self)

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Take the lock, or None where somebody living has it.

        Raises:
            OSError: The lock file cannot be made, or locked.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return cls(path, descriptor)

    @classmethod
    def held(cls, path: Path) -> bool:
        """Whether somebody living has the lock. Asking takes it for an instant, shared, and makes no file.

        Raises:
            OSError: The lock file cannot be read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def in_place(self) -> bool:
        """Whether whoever asks for the lock meets this one: not if its file was removed."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False

    def removed(self) -> bool:
        """Whether its file was deleted, replaced or moved: not `in_place`, found out for less."""
        if self._descriptor is None:
            return True
        found = os.fstat(self._descriptor)
        if found.st_ctime_ns == self._changed_ns and found.st_nlink:
            return False  # each of those is a change to the file itself
        if not self.in_place():
            return True
        self._changed_ns = found.st_ctime_ns
        return False

    def release(self) -> None:
        """Let go of it. The file stays: another process may have opened it already."""
        descriptor, self._descriptor = self._descriptor, None
        _HELD.discard(self)
        if descriptor is not None:
            os.close(descriptor)


class Forkable(Protocol):
    """What wants to know that this process is a forked child."""

    def forked(self) -> None: ...


def call_in_forked_child(what: Forkable) -> None:
    """Call `what.forked()` in children, as long as it lives."""
    _FORKABLE.add(what)


def _forked() -> None:
    for lock in list(_HELD):
        lock.release()
    for what in list(_FORKABLE):
        what.forked()


_HELD: set[FileLock] = set()
_FORKABLE: "weakref.WeakSet[Forkable]" = weakref.WeakSet()

os.register_at_fork(after_in_child=_forked)
