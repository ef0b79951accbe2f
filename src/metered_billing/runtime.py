"""What a process takes from the world: time, sleep, chance, ids and a thread.

Everything that is not a pure function of its arguments comes in through here, so that a simulation
can run the whole library under a virtual clock and a seeded random source.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from uuid_utils import uuid7


class Executor(Protocol):
    """One thread: runs what is submitted, one after the other, in order."""

    def submit(self, fn: Callable[[], Any], /) -> Any: ...

    def shutdown(self, wait: bool = True) -> None: ...


def new_uuid7() -> str:
    """A fresh UUIDv7: unique, and ordered by time, so that indexes grow at their end."""
    return str(uuid7())


def one_thread() -> Executor:
    """A real thread, named for whoever looks at a stack dump."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="metered-billing")


def connect_sqlite(path: Path) -> sqlite3.Connection:
    """A connection for whichever thread writes; what begins and ends a transaction, it leaves to us."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def every_so_often(interval_s: float, call: Callable[[], None]) -> Callable[[], None]:
    """Call it again and again from a thread of its own, which a blocked event loop does not hold up.

    Returns:
        What stops it.
    """
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(interval_s):
            call()

    threading.Thread(target=beat, name="metered-billing heartbeat", daemon=True).start()
    return stopped.set


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The world, as seen by the library.

    Attributes:
        now: Wall clock, seconds since the epoch; for records and due times, may jump.
        monotonic: For durations and deadlines, never jumps.
        sleep: Waits, in seconds.
        random: For jitter; never for ids or secrets.
        new_id: Ids of charges and ledger entries.
        executor: Makes the one thread that a database is written by.
        connect: Opens a SQLite file: the edge to the disk.
        every: Calls something every so many seconds, until what it returns is called.
    """

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Random = field(default_factory=Random)
    new_id: Callable[[], str] = new_uuid7
    executor: Callable[[], Executor] = one_thread
    connect: Callable[[Path], sqlite3.Connection] = connect_sqlite
    every: Callable[[float, Callable[[], None]], Callable[[], None]] = every_so_often
