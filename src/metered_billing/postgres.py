"""PostgreSQL as the journal and the ledger use it: one connection, one thread, group commit.

Synchronous psycopg in a thread of ours, so that what runs in a transaction is the same plain functions as on
SQLite. Whatever becomes of this process or of the network, the server ends its transaction within seconds:
one that is stopped in the middle (SIGSTOP, a frozen host) holds no lock that the others wait for. Settings are
made in each transaction and not for the session, and no statement is prepared, so that PgBouncer in transaction
mode may stand in between.
"""

import contextlib
import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
except ImportError as error:  # it is not there, or finds no libpq
    raise ImportError(
        f"PostgreSQL needs psycopg ({error}): pip install 'metered-billing[postgres]'", name=error.name
    ) from error

from metered_billing.commits import (
    Committed,
    CommitUnknown,
    ConnectionLost,
    GroupCommit,
    Outcome,
    StorageError,
    Waiting,
)
from metered_billing.runtime import Runtime
from metered_billing.schemas import Schema, prepare_postgres

A = TypeVar("A")
T = TypeVar("T")

Connection = psycopg.Connection[tuple[Any, ...]]
Cursor = psycopg.Cursor[tuple[Any, ...]]
ClientCursor = psycopg.ClientCursor[tuple[Any, ...]]
DatabaseError = psycopg.Error
IntegrityError = psycopg.IntegrityError

CONNECT_WITHIN_S = 3
"""How long connecting may take, per address."""

UNUSED_FOR_S = 300.0
"""A connection that was idle for so long is not used again. A process that lives keeps it open by keepalives; over one
that was frozen, load balancers and NAT forget it (AWS's after 350 s), and would swallow the next statement."""

STUCK_AFTER_S = 9.0
"""An operation that keeps us waiting for so long is broken off; the server gives up before that."""

LOOK_EVERY_S = 1.0
"""How often it is looked whether one is."""

TRIES = 3
"""How often a transaction is tried that another one got in the way of."""

PAUSE_S = 0.05
"""The most that is waited before the second try; the double before each further one."""

_BEGIN: Final = (
    "BEGIN ISOLATION LEVEL READ COMMITTED;"
    " SET LOCAL idle_in_transaction_session_timeout = '4s';"
    " SET LOCAL lock_timeout = '5s';"  # longer: whoever holds it and is stopped has been ended by then
    " SET LOCAL statement_timeout = '8s';"
    # What text says is not to hang on how somebody has set up the database.
    " SET LOCAL array_nulls = on; SET LOCAL extra_float_digits = 1;"
    " SET LOCAL synchronous_commit = {};"
    " SET LOCAL search_path = {};"
)

_UNREAD: Final = " SET LOCAL tcp_user_timeout = '8s';"
"""On Linux: whoever is stopped while a long answer comes is gone then, which the server would not notice otherwise."""

_ENCODING: Final = {"client_encoding": "utf8"}
"""Whatever else the environment, the role or the database asks for: statements are made of what is written in it."""


class BeginAgain(StorageError):
    """Raised by an operation that found, too late, what it should have locked: it runs again in a new transaction."""


IN_THE_WAY: Final = (
    BeginAgain,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.UniqueViolation,
)
"""Another transaction was in the way: this one is rolled back, and may go through now."""


class PostgresDatabase(GroupCommit[Connection]):
    """A PostgreSQL database, which other processes may use at the same time.

    Args:
        url: `postgresql://user@host:port/database`, or whatever else libpq takes.
        schema: The tables' PostgreSQL schema, so that they are in nobody's way.
        application_name: What `pg_stat_activity` calls the connection.
        committed: See `GroupCommit`.

    Raises:
        ValueError: It is no such URL; the text shows nothing of it.
    """

    def __init__(
        self,
        url: str,
        runtime: Runtime,
        *,
        schema: str = "metered_billing",
        application_name: str = "metered-billing",
        committed: Committed | None = None,
    ) -> None:
        self._parameters = _parameters(url) | {"application_name": application_name}
        if not schema.isidentifier() or not schema.isascii():
            raise ValueError("a PostgreSQL schema is named by letters, digits and underscores")
        self.place = place(self._parameters)
        super().__init__(self.place, runtime.executor(), committed=committed, clock=runtime.monotonic)
        self._runtime = runtime
        self._schema = schema
        self._connection: Connection | None = None
        self._unread = ""
        self._busy_since: float | None = None
        self._used_at = 0.0
        self._stop_watching: Callable[[], object] | None = None

    def __del__(self) -> None:
        # An app that was never shut down (a test client without a lifespan, say) just lets go of it.
        if getattr(self, "_connection", None) is not None:
            with contextlib.suppress(Exception):
                self._disconnect()

    def shutdown(self) -> None:
        """Let the thread end once it has nothing to do any more."""
        self._executor.shutdown(wait=False)

    # Below: in the thread.

    def _transaction(self, batch: list[Waiting[Connection]]) -> list[Outcome]:
        for tried in range(TRIES - 1):
            with contextlib.suppress(*IN_THE_WAY):
                return self._try(batch)
            # At once, on a busy machine, it would take the lock again that the other one was waiting for.
            time.sleep(self._runtime.random.uniform(0, PAUSE_S * 2**tried))
        return self._try(batch)

    def _try(self, batch: list[Waiting[Connection]]) -> list[Outcome]:
        try:
            connection = self._begin("on" if any(waiting.durable for waiting in batch) else "off")
            try:
                results = self._operate(connection, batch)
            except BaseException as error:
                self._roll_back(connection)
                if connection.closed and isinstance(error, psycopg.Error):
                    # Its transaction is gone with it, or will be.
                    raise ConnectionLost(f"{self.place}: {first_line(error)}") from error
                raise
            self._finish(connection)
        finally:
            self._busy_since = None
            self._used_at = self._runtime.now()
        return [(result, None) for result in results]

    def _operate(self, connection: Connection, batch: list[Waiting[Connection]]) -> list[Any]:
        """Run the operations within the transaction that has begun. Returns what each returned."""
        return [self._timed(waiting.operation, connection) for waiting in batch]

    def _timed(self, operation: Callable[[A], T], on: A) -> T:
        # Each has its own time: ten thousand of them take theirs, though none is stuck.
        self._busy_since = self._runtime.monotonic()
        return operation(on)

    def _begin(self, synchronous_commit: str) -> Connection:
        self._busy_since = self._runtime.monotonic()
        begin = _BEGIN.format(synchronous_commit, self._schema)
        # By the wall clock, in whichever direction it jumped: the other one may stand still with the process.
        if abs(self._runtime.now() - self._used_at) > UNUSED_FOR_S:
            self._disconnect()
        if self._connection is not None:
            try:
                self._connection.execute((begin + self._unread).encode())
                return self._connection
            except psycopg.Error:
                # The server was restarted since: nothing has begun, so a new connection is as good.
                self._disconnect()
        try:
            connection = self._connect()
            self._unread = _UNREAD if "linux" in str(connection.execute("SELECT version()").fetchone()) else ""
            connection.execute((begin + self._unread).encode())
        except psycopg.Error as error:
            self._disconnect()
            raise ConnectionLost(f"{self.place} cannot be reached: {first_line(error)}") from error
        return connection

    def _connect(self) -> Connection:
        # Values are written into the statement, so that it is one message: whoever stops within it has left the server
        # idle, which it bears for seconds. The parts of an extended query, and all of a pipeline, are executed as they
        # come: for the next of them it waits for ever, with all locks.
        connection = psycopg.connect(**self._parameters, autocommit=True, cursor_factory=ClientCursor)
        self._connection = connection
        if self._stop_watching is None:
            this = weakref.ref(self)  # a thread must not keep alive what nobody else does

            def watch() -> None:
                database = this()
                if database is not None:
                    database._break_off_if_stuck()

            self._stop_watching = weakref.finalize(self, self._runtime.every(LOOK_EVERY_S, watch))
        return connection

    def _finish(self, connection: Connection) -> None:
        self._busy_since = self._runtime.monotonic()
        try:
            done = connection.execute("COMMIT").statusmessage
        except psycopg.Error as error:
            if connection.closed:
                self._disconnect()
                raise CommitUnknown(f"{self.place}: the connection broke while committing") from error
            raise
        if done != "COMMIT":  # an operation has swallowed an error: all of it is rolled back
            raise StorageError(f"{self.place}: the transaction was rolled back")

    def _roll_back(self, connection: Connection) -> None:
        try:
            connection.execute("ROLLBACK")
        except psycopg.Error:
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    # In the heartbeat's thread.

    def _break_off_if_stuck(self) -> None:
        """End a wait for a server that is stopped: libpq itself would wait for as long as the host lives."""
        since, connection = self._busy_since, self._connection
        if since is None or connection is None or self._runtime.monotonic() - since < STUCK_AFTER_S:
            return
        with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as waiting:
            waiting.shutdown(socket.SHUT_RDWR)


def migrate(url: str, tables: Schema, *, schema: str = "metered_billing") -> int:
    """Make the tables, or bring them up to date, however long it takes. Returns the version that was found.

    Raises:
        ConnectionLost: The database cannot be reached.
        SchemaMismatch: A later release wrote them; nothing was changed.
        psycopg.Error: Something else went wrong; nothing was changed.
        ValueError: The URL is none of PostgreSQL's.
    """
    parameters = _parameters(url)
    try:
        connection = psycopg.connect(**parameters, prepare_threshold=None, application_name="metered-billing migrate")
    except psycopg.Error as error:
        raise ConnectionLost(f"{place(parameters)} cannot be reached: {first_line(error)}") from error
    with connection:  # one transaction
        connection.execute("SELECT set_config('search_path', %s, true)", (schema,))
        return prepare_postgres(connection, tables, migrate=True)


def version_of(url: str, tables: Schema, *, schema: str = "metered_billing") -> int | None:
    """The version of the tables that are there, in a read-only transaction: nothing is made, and nobody waits.

    Returns:
        0 where there are none yet; None where this role may not make them, either.

    Raises:
        ConnectionLost: The database cannot be reached.
        psycopg.Error: Something else went wrong.
        ValueError: The URL is none of PostgreSQL's.
    """
    with _looking(url) as connection:
        row = connection.execute("SELECT to_regnamespace(%s)", (schema,)).fetchone()
        if row == (None,):
            row = connection.execute("SELECT has_database_privilege(current_database(), 'CREATE')").fetchone()
            return 0 if row == (True,) else None
        connection.execute("SELECT set_config('search_path', %s, true)", (schema,))
        if connection.execute("SELECT to_regclass('versions')").fetchone() != (None,):
            row = connection.execute("SELECT version FROM versions WHERE what = %s", (tables.what,)).fetchone()
            if row is not None:
                return int(row[0])
        row = connection.execute("SELECT has_schema_privilege(%s, 'CREATE')", (schema,)).fetchone()
        return 0 if row == (True,) else None


def may_insert(url: str, table: str, *, schema: str = "metered_billing") -> bool:
    """Whether this role may add rows to a table. False where there is none.

    Raises:
        As `version_of`.
    """
    with _looking(url) as connection:
        asked = (f"{schema}.{table}",)
        row = connection.execute("SELECT has_table_privilege(to_regclass(%s)::oid, 'INSERT')", asked).fetchone()
        return row == (True,)


@contextlib.contextmanager
def _looking(url: str) -> Iterator[Connection]:
    """A connection of its own, in a read-only transaction."""
    parameters = _parameters(url)
    try:
        connection = psycopg.connect(**parameters, prepare_threshold=None, application_name="metered-billing check")
    except psycopg.Error as error:
        raise ConnectionLost(f"{place(parameters)} cannot be reached: {first_line(error)}") from error
    connection.read_only = True
    with connection:
        connection.execute("SET LOCAL statement_timeout = '5s'")
        yield connection


def place(parameters: Mapping[str, Any]) -> str:
    """Where a database is, without user and password: what may stand in logs."""
    host = parameters.get("host") or parameters.get("hostaddr") or "localhost"
    return f"postgresql://{host}:{parameters.get('port') or 5432}/{parameters.get('dbname') or ''}"


def _parameters(url: str) -> dict[str, Any]:
    try:
        given = conninfo_to_dict(url)
    except psycopg.Error:
        given = {}
    if not url.startswith(("postgresql://", "postgres://")) or not given:
        raise ValueError("a PostgreSQL database is named by postgresql://user@host:port/database")
    # A password with a bare `@` or `/` ends up in what libpq takes for the host or the database, which texts show.
    named = f"{given.get('host', '')}{given.get('hostaddr', '')}{given.get('dbname', '')}"
    if "@" in named or not re.fullmatch(r"[0-9,]*", str(given.get("port", ""))):
        raise ValueError("this PostgreSQL URL has a user or password with characters that must be percent-encoded")
    # A host that is gone without a word is noticed within half a minute.
    patience = {"connect_timeout": CONNECT_WITHIN_S, "keepalives_idle": 10, "keepalives_interval": 5}
    return patience | {"keepalives_count": 3, "tcp_user_timeout": int(STUCK_AFTER_S * 1000)} | given | _ENCODING


def first_line(error: psycopg.Error) -> str:
    """What it says, without the context that may quote what was written."""
    return (str(error).splitlines() or [type(error).__name__])[0]
