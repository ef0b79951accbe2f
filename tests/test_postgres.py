"""One PostgreSQL database: group commit, rollbacks, and a server that goes away."""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from metered_billing import commits
from metered_billing import postgres as module
from metered_billing.commits import CommitUnknown, ConnectionLost, StorageError
from metered_billing.postgres import PostgresDatabase
from metered_billing.runtime import Runtime
from tests import postgres

TABLE = "CREATE SCHEMA IF NOT EXISTS metered_billing; CREATE TABLE IF NOT EXISTS metered_billing.notes (n int)"


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[PostgresDatabase]:
    database = PostgresDatabase(url, Runtime())
    try:
        yield database
    finally:
        await database.close()
        database.shutdown()


@pytest.fixture
async def database(pg_url: str) -> AsyncIterator[PostgresDatabase]:
    async with opened(pg_url) as database:
        await database.run(lambda connection: connection.execute(TABLE))
        yield database


def note(n: int) -> Any:
    return lambda connection: connection.execute("INSERT INTO notes VALUES (%s)", (n,)).rowcount


async def notes(database: PostgresDatabase) -> list[int]:
    return await database.run(lambda c: [n for (n,) in c.execute("SELECT n FROM notes ORDER BY n").fetchall()])


# What fails.


async def test_operation_that_raises_is_rolled_back_alone(database: PostgresDatabase) -> None:
    """Its neighbours in the same commit go through."""

    def fail(connection: Any) -> None:
        note(99)(connection)
        raise ValueError("a bug")

    results = await asyncio.gather(
        database.run(note(1)), database.run(fail), database.run(note(2)), return_exceptions=True
    )
    assert [type(result) for result in results] == [int, ValueError, int]
    assert await notes(database) == [1, 2]


async def test_error_that_an_operation_swallows_is_not_taken_for_a_commit(database: PostgresDatabase) -> None:
    """The server rolls all of it back: whoever waits is told, and its neighbours go through."""

    def swallow(connection: Any) -> None:
        note(99)(connection)
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT 1/0")

    results = await asyncio.gather(
        database.run(note(1)), database.run(swallow), database.run(note(2)), return_exceptions=True
    )
    assert [type(result) for result in results] == [int, StorageError, int]
    assert "rolled back" in str(results[1])
    assert await notes(database) == [1, 2]


@pytest.mark.parametrize("error", [psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected])
async def test_transaction_that_another_got_in_the_way_of_is_tried_again(
    database: PostgresDatabase, error: type[Exception]
) -> None:
    """After all of it was rolled back; three times at the most."""
    tries: list[int] = []

    def twice_in_the_way(connection: Any) -> int:
        note(1)(connection)
        tries.append(1)
        if len(tries) < 3:
            raise error
        return len(tries)

    def always_in_the_way(connection: Any) -> None:
        tries.append(1)
        raise error

    assert await database.run(twice_in_the_way) == 3
    assert await notes(database) == [1]
    tries.clear()
    with pytest.raises(error):
        await database.run(always_in_the_way)
    assert len(tries) == 3


@pytest.mark.slow
async def test_two_that_lock_each_other_out_both_go_through(database: PostgresDatabase, pg_url: str) -> None:
    """A real deadlock: the server ends one, and it is tried again."""
    await database.run(lambda c: c.execute("INSERT INTO notes VALUES (1), (2)"))
    both = threading.Barrier(2)

    def update(first: int, second: int) -> Any:
        tried: list[int] = []

        def operation(connection: Any) -> int:
            connection.execute("UPDATE notes SET n = n + 10 WHERE mod(n, 10) = %s", (first,))
            if not tried:
                tried.append(1)
                both.wait(10)
            connection.execute("UPDATE notes SET n = n + 10 WHERE mod(n, 10) = %s", (second,))
            return 1

        return operation

    async with opened(pg_url) as other:
        await other.run(lambda c: c.execute("SELECT 1") and 1)  # connected, so that neither waits for the other idly
        assert list(await asyncio.gather(database.run(update(1, 2)), other.run(update(2, 1)))) == [1, 1]
    assert await notes(database) == [21, 22]


async def test_unreachable_server_is_an_error_without_the_password() -> None:
    """It names the place."""
    async with opened("postgresql://app:hunter2@127.0.0.1:1/billing") as database:
        with pytest.raises(ConnectionLost, match=r"^postgresql://127.0.0.1:1/billing cannot be reached: ") as error:
            await database.run(note(1))
    assert "hunter2" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    "url",
    [
        "mysql://app:hunter2@host/db",
        "app:hunter2",
        "",
        "host=localhost password=hunter2",
        "postgresql://app:hunter2@host/db?nonsense=1",
    ],
)
def test_what_is_no_url_is_refused_without_its_password(url: str) -> None:
    """Also in the chain of its causes."""
    with pytest.raises(ValueError, match="is named by") as error:
        PostgresDatabase(url, Runtime())
    assert "hunter2" not in "".join(traceback.format_exception_only(error.value))
    assert error.value.__cause__ is None


async def test_full_queue_refuses(database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queued; what is there goes on."""
    monkeypatch.setattr(commits, "MAX_WAITING", 0)
    with pytest.raises(StorageError, match="waiting already"):
        database.run(note(1))
    with pytest.raises(StorageError, match="waiting already"):
        database.post(note(1))
    monkeypatch.undo()
    assert await notes(database) == []


@pytest.mark.parametrize("schema", ["", "a-b", "a b", 'a"; DROP', "é"])
def test_schema_that_is_no_name_is_refused(schema: str) -> None:
    """It stands in SQL as it is."""
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        PostgresDatabase("postgresql://host/db", Runtime(), schema=schema)


# What is asked of the server.


async def test_durable_waits_for_the_disk_and_the_rest_does_not(database: PostgresDatabase) -> None:
    """And no setting outlives its transaction: PgBouncer may hand the connection to somebody else."""

    def level(connection: Any) -> str:
        found: str = connection.execute("SHOW synchronous_commit").fetchone()[0]
        return found

    assert await database.run(level) == "on"
    assert await database.run(level, durable=False) == "off"
    assert database._connection is not None
    for setting, usual in (
        ("synchronous_commit", "on"),
        ("idle_in_transaction_session_timeout", "0"),
        ("lock_timeout", "0"),
        ("statement_timeout", "0"),
        ("search_path", '"$user", public'),
    ):
        assert database._connection.execute(f"SHOW {setting}".encode()).fetchone() == (usual,)


async def test_no_statement_is_prepared(database: PostgresDatabase) -> None:
    """PgBouncer in transaction mode would look for it on another connection."""
    for n in range(20):
        await database.run(note(n))
    found = await database.run(lambda c: c.execute("SELECT COUNT(*) FROM pg_prepared_statements").fetchone())
    assert found == (0,)


async def test_operations_that_wait_share_a_commit_in_order(database: PostgresDatabase) -> None:
    """Sixty behind one that holds the thread cost one more commit."""
    before = database.commits
    gate = threading.Event()
    held = database.run(lambda c: gate.wait(3))
    order: list[int] = []

    def noting(number: int) -> Any:
        return lambda connection: order.append(number)

    futures = [database.run(noting(n)) for n in range(60)]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(held, *futures)
    assert order == list(range(60))
    assert database.commits <= before + 2


async def test_database_that_is_let_go_of_is_closed(pg_url: str) -> None:
    """An app that was never shut down leaves no connection to be warned of."""
    database = PostgresDatabase(pg_url, Runtime())
    await database.run(lambda c: c.execute("SELECT 1").fetchone())
    connection = database._connection
    assert connection is not None
    database._executor.shutdown()  # it may hold on to what it did last
    del database
    gc.collect()
    assert connection.closed


# A server that goes away, or stands still.


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    """One that may be stopped."""
    try:
        server = postgres.Server()
    except postgres.NoPostgres as error:
        pytest.skip(str(error))
    yield server
    server.remove()


@pytest.fixture
async def mortal(server: postgres.Server) -> AsyncIterator[PostgresDatabase]:
    """A database on it."""
    with postgres.new_database(server.url) as url:
        async with opened(url) as database:
            await database.run(lambda connection: connection.execute(TABLE))
            yield database


@pytest.mark.slow
async def test_server_that_was_restarted_is_not_noticed(mortal: PostgresDatabase, server: postgres.Server) -> None:
    """Nothing had begun: a new connection is as good."""
    await mortal.run(note(1))
    server.stop()
    server.start()
    await mortal.run(note(2))
    assert await notes(mortal) == [1, 2]


@pytest.mark.slow
async def test_server_that_is_killed_during_an_operation_has_done_nothing_of_it(
    mortal: PostgresDatabase, server: postgres.Server
) -> None:
    """It is not tried again either: whoever waits is told at once, and so are those who wait behind it."""
    begun = threading.Event()
    runs: list[int] = []

    def wait(connection: Any) -> None:
        note(1)(connection)
        runs.append(1)
        begun.set()
        connection.execute("SELECT pg_sleep(30)")

    waiting = mortal.run(wait)
    await asyncio.to_thread(begun.wait, 10)
    server.stop(signal.SIGQUIT)
    with pytest.raises(ConnectionLost):
        await waiting
    with pytest.raises(ConnectionLost, match="cannot be reached"):
        await mortal.run(note(2))
    server.start()
    await mortal.run(note(3))
    assert (runs, await notes(mortal)) == ([1], [3])


@pytest.mark.slow
async def test_server_that_stands_still_is_given_up(
    mortal: PostgresDatabase, server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay open and silent: we break ours off. When it goes on, so do we."""
    monkeypatch.setattr(module, "STUCK_AFTER_S", 1.0)
    begun = threading.Event()

    def wait(connection: Any) -> None:
        note(1)(connection)
        begun.set()
        connection.execute("SELECT pg_sleep(2)")

    waiting = mortal.run(wait)
    await asyncio.to_thread(begun.wait, 10)
    server.pause()
    try:
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(waiting, 30)
    finally:
        server.resume()
    await mortal.run(note(2))
    assert await notes(mortal) == [2]


@pytest.mark.slow
async def test_many_operations_that_take_their_time_are_not_stuck(
    database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own: together they may take longer."""
    monkeypatch.setattr(module, "STUCK_AFTER_S", 1.0)
    futures = [database.run(lambda c: c.execute("SELECT pg_sleep(0.2)") and 1) for _ in range(15)]
    assert await asyncio.gather(*futures) == [1] * 15


@pytest.mark.slow
async def test_process_that_is_stopped_in_mid_transaction_holds_up_nobody(
    database: PostgresDatabase, pg_url: str
) -> None:
    """The server ends its transaction, before those who wait for its locks give up."""
    await database.run(note(1))
    begun, go_on = threading.Event(), threading.Event()

    def stopped(connection: Any) -> None:
        connection.execute("UPDATE notes SET n = 50")
        begun.set()
        go_on.wait(30)
        connection.execute("UPDATE notes SET n = 51")

    async with opened(pg_url) as other:
        stuck = other.run(stopped)
        await asyncio.to_thread(begun.wait, 10)
        assert await database.run(lambda c: c.execute("UPDATE notes SET n = 2").rowcount) == 1
        assert not stuck.done()
        go_on.set()
        with pytest.raises(ConnectionLost):
            await stuck
        assert await notes(other) == [2]


class Deaf:
    """A way to the server on which the answer to a COMMIT is lost, as often as it is told to."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._to = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.lose = 0
        user = parts.netloc.rpartition("@")[0]
        port = self._listener.getsockname()[1]
        self.url = urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"))
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._to) as there:
            deaf = threading.Event()

            def answers() -> None:
                with contextlib.suppress(OSError):
                    while data := there.recv(65536):
                        if deaf.is_set():
                            client.shutdown(socket.SHUT_RDWR)
                            return
                        client.sendall(data)

            answering = threading.Thread(target=answers, daemon=True)
            answering.start()
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    if b"COMMIT\0" in data and self.lose:
                        self.lose -= 1
                        deaf.set()
                    there.sendall(data)
            with contextlib.suppress(OSError):
                there.shutdown(socket.SHUT_WR)
            answering.join(5)


async def test_commit_whose_answer_is_lost_is_unknown_and_never_run_twice(
    database: PostgresDatabase, pg_url: str
) -> None:
    """It has happened here; whoever waits is told that nobody knows. So is all that shared it."""
    way = Deaf(pg_url)
    runs: list[int] = []

    def counted(connection: Any) -> int:
        runs.append(1)
        return int(note(1)(connection))

    async with opened(way.url) as unlucky:
        await unlucky.run(note(0))
        way.lose = 1
        results = await asyncio.gather(unlucky.run(counted), unlucky.run(note(2)), return_exceptions=True)
        assert CommitUnknown in [type(result) for result in results]
        await unlucky.run(note(3))
    way.close()
    assert len(runs) == 1
    assert await notes(database) == [0, 1, 2, 3]


@pytest.mark.slow
async def test_durable_commits_are_told(pg_url: str) -> None:
    """What the server need not have on disk when it answers is not."""
    told: list[int] = []
    database = PostgresDatabase(pg_url, Runtime(), committed=lambda size, took: told.append(size))
    await database.run(lambda connection: connection.execute("SELECT 1") and 1, durable=False)
    await database.run(lambda connection: connection.execute("SELECT 1") and 1)
    assert told == [1]
    await database.close()
    database.shutdown()


async def test_connection_that_was_long_unused_is_not_used_again(pg_url: str) -> None:
    """Over a process that was frozen it may have been forgotten by all in between; the wall clock tells, either way."""
    skipped_s = 0.0
    database = PostgresDatabase(pg_url, Runtime(now=lambda: 1e9 + skipped_s))

    async def pid() -> int:
        return await database.run(lambda connection: connection.execute("SELECT pg_backend_pid()").fetchall()[0][0])

    first = await pid()
    skipped_s = 299.0
    assert await pid() == first
    skipped_s = 600.0
    second = await pid()
    skipped_s = 0.0
    assert len({first, second, await pid()}) == 3
    await database.close()
    database.shutdown()
