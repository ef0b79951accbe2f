"""What a process takes from the world: time, sleep, chance, ids and a thread.

Everything that is not a pure function of its arguments comes in through here, so that a simulation
can run the whole library under a virtual clock and a seeded random source.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The world, as seen by the library.

    Attributes:
        now: Wall clock, seconds since the epoch; for records and due times, may jump.
        monotonic: For durations and deadlines, never jumps.
        sleep: Waits, in seconds.
        random: For jitter; never for ids or secrets.
        new_id: Ids of charges and ledger entries.
        executor: Makes the one thread that a SQLite file is written by.
    """

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Random = field(default_factory=Random)
    new_id: Callable[[], str] = new_uuid7
    executor: Callable[[], Executor] = one_thread
