"""The disk edge: real SQLite files that fill up, fail, hang, and lose what was not synced when the power goes.

In WAL mode a commit appends to the log, and syncs it only where `synchronous=FULL` asks for that. So what a
power loss may take is the log's tail behind the last commit that was synced: some of it, all, or the half of
a page. The database file itself is written by checkpoints alone, which sync.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.simulation.processes import Dead, Process

if TYPE_CHECKING:
    from tests.simulation.world import World


class Gone(sqlite3.OperationalError, Dead):
    """What a dead process is told by its disk."""


class Connection(sqlite3.Connection):
    """A connection that the disk can fail under."""

    disk: "Disk"
    process: Process
    path: Path
    log: Path
    full: bool

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if not self.process.alive:
            raise Gone("the process is dead")
        word = sql[:6]
        if word == "COMMIT":
            return self.disk.commit(self)
        if word in ("INSERT", "UPDATE", "DELETE"):
            self.disk.before_write(self)
        elif sql.startswith("PRAGMA synchronous="):
            self.full = sql.endswith("=FULL")
        return super().execute(sql, parameters)

    def really(self, sql: str) -> sqlite3.Cursor:
        return super().execute(sql)

    def close(self) -> None:
        # A dead process's was let go of when it died.
        if self.process.alive:
            super().close()
            self.process.connections.remove(self)
            self.disk.closed(self)

    def abandon(self) -> None:
        """Let go of the file as the system does for a killed process: without the checkpoint of a `close`."""
        if self.disk.shared(self):  # its lock was lost, and somebody else has the file open
            super().close()
            return
        kept = [(path, path.read_bytes()) for path in (self.path, self.log) if path.exists()]
        super().close()
        if self.log.exists():
            raise RuntimeError(f"{self.path} is still open after its process died")
        for path, content in kept:
            path.write_bytes(content)
            self.disk.touch(path)


class Disk:
    """The disks of all machines."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._touched = 0
        # By machine and log: how much of it is safe from a power loss, in bytes.
        self._synced: dict[str, dict[Path, int]] = {}

    def connect(self, path: Path, process: Process) -> sqlite3.Connection:
        process.check()
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=Connection)
        connection.disk, connection.process, connection.path, connection.full = self, process, path, True
        connection.log = path.with_name(path.name + "-wal")
        process.connections.append(connection)
        self._synced.setdefault(process.machine.name, {}).setdefault(connection.log, 0)
        return connection

    def shared(self, connection: Connection) -> bool:
        """Whether another process has the same file open: only the last one that closes it makes a checkpoint."""
        return any(
            other.path == connection.path
            for machine in self._world.machines
            for process in machine.processes
            for other in process.connections
            if other is not connection
        )

    def latency_s(self, process: Process) -> float:
        """How long the thread takes to begin what it was given."""
        world = self._world
        if world.strikes("disk hangs", process):
            return world.random.choice((0.2, 3.0, 6.0, 30.0)) * world.random.random()
        return world.random.choice((0.0, 0.0001, 0.001, 0.01))

    def before_write(self, connection: Connection) -> None:
        world, process = self._world, connection.process
        if world.strikes("disk full", process):
            raise sqlite3.OperationalError("database or disk is full")
        if world.strikes("killed in a transaction", process):
            process.kill("killed in a transaction")
            raise Gone("killed")

    def commit(self, connection: Connection) -> sqlite3.Cursor:
        world, process = self._world, connection.process
        if world.strikes("disk full at commit", process):
            raise sqlite3.OperationalError("database or disk is full")
        if world.strikes("I/O error at commit", process):
            raise sqlite3.OperationalError("disk I/O error")
        if world.strikes("killed before a commit", process):
            process.kill("killed before a commit")
            raise Gone("killed")
        done = connection.really("COMMIT")
        self.touch(connection.log)
        if connection.full:
            self._synced[process.machine.name][connection.log] = connection.log.stat().st_size
        if world.strikes("killed after a commit", process):
            process.kill("killed after a commit")
            raise Gone("killed")
        if world.strikes("power loss after a commit", process):
            world.struck("power loss after a commit", process)
            process.machine.lose_power()
            raise Gone("power loss")
        if world.strikes("I/O error after a commit", process):
            raise sqlite3.OperationalError("disk I/O error")
        return done

    def closed(self, connection: Connection) -> None:
        if not self.shared(connection):
            self._synced[connection.process.machine.name].pop(connection.log, None)
            self.touch(connection.path)

    def lose_power(self, machine: str) -> None:
        """Take of each log's tail what was not synced, or leave rubbish of it."""
        random = self._world.random
        for log, synced in self._synced.get(machine, {}).items():
            size = log.stat().st_size if log.exists() else 0
            if size <= synced:
                continue
            content = bytearray(log.read_bytes())
            kept = random.randint(synced, size)
            if random.random() < 0.5:  # a torn write: the file has its length, but not its content
                for at in range(kept, size, 97):
                    content[at] ^= 0x55
            else:
                del content[kept:]
            log.write_bytes(content)
            self.touch(log)
            self._world.note(machine, "loses of", log.name, size - kept)

    def touch(self, path: Path) -> None:
        """Give the file a time of our own: the system's is neither virtual nor fine enough to tell two writes apart."""
        self._touched += 1
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, ns=(self._touched * 1000, self._touched * 1000))
