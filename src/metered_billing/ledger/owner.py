"""One owner process for a file: an advisory lock beside it."""

import fcntl
import os
from pathlib import Path

from metered_billing.ledger.failures import LedgerLocked


class OwnerLock:
    """Holds `<file>.lock` under `flock` until released, or until the process ends, however it ends.

    A child made by `fork` does not inherit it: the child would otherwise keep a dead parent's ledger shut.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._path = file.with_name(file.name + ".lock")
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock; nothing happens where it is held already.

        Raises:
            LedgerLocked: Another process, or another ledger object of this one, has it.
            OSError: The lock file cannot be made.
        """
        if self.held:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise LedgerLocked(_in_use(self._file, owner)) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Let the next owner have it. The file stays: another may have opened it already."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close the file and leave the lock as it is: in a forked child, it is the parent's."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)


def _in_use(file: Path, owner: str) -> str:
    if owner == str(os.getpid()):
        return f"{file} is open in this process already: use that one, or close it first"
    return (
        f"{file} is in use{f' by process {owner}' if owner.isdigit() else ''}, and a SQLite ledger has one "
        "owner. To share it, run `metered-billing serve --database sqlite:///…` and give every process the "
        "service's URL as its credits"
    )


_held: set[OwnerLock] = set()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)
