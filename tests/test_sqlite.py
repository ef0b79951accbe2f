"""One SQLite file: group commit, order, rollbacks, and what becomes of those who wait."""

import asyncio
import contextlib
import gc
import resource
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metered_billing import commits as module
from metered_billing.commits import StorageError
from metered_billing.runtime import one_thread
from metered_billing.sqlite import SqliteFile
from tests.fakes import Inline

SCHEMA = "CREATE TABLE IF NOT EXISTS notes (n INTEGER PRIMARY KEY)"


@pytest.fixture
def executor() -> Iterator[Any]:
    executor = one_thread()
    yield executor
    executor.shutdown()


@pytest.fixture
def file(tmp_path: Path, executor: Any) -> SqliteFile:
    return SqliteFile(tmp_path / "notes.db", SCHEMA, executor)


def note(n: int) -> Callable[[sqlite3.Connection], int]:
    """An operation that writes a row."""

    def insert(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO notes VALUES (?)", (n,))
        return n

    return insert


def notes(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT n FROM notes ORDER BY n")]


def synchronous(connection: sqlite3.Connection) -> int:
    level: int = connection.execute("PRAGMA synchronous").fetchone()[0]
    return level


class Held:
    """The thread, held up, so that operations gather behind it."""

    def __init__(self, file: SqliteFile) -> None:
        self._gate = threading.Event()
        self._begun = threading.Event()
        self._future = file.run(self._wait)

    def _wait(self, connection: sqlite3.Connection) -> None:
        self._begun.set()
        self._gate.wait(10)

    async def __aenter__(self) -> None:
        await asyncio.to_thread(self._begun.wait, 10)

    async def __aexit__(self, *_: object) -> None:
        self._gate.set()
        await self._future


# What fails.


async def test_operation_that_raises_is_rolled_back_alone(file: SqliteFile) -> None:
    """Its neighbours in the same commit go through, and what it had written before it raised is gone."""

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO notes VALUES (50)")
        raise ValueError("no")

    async with Held(file):
        futures: list[Any] = [file.run(note(1)), file.run(half), file.run(note(2)), file.run(note(1))]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result) for result in results] == [int, ValueError, int, sqlite3.IntegrityError]
    assert await file.run(notes) == [1, 2]
    await file.close()


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), SystemExit(1), KeyboardInterrupt()])
async def test_operation_that_raises_what_no_future_carries_is_an_error(file: SqliteFile, error: BaseException) -> None:
    """`next(cursor)` on nothing, say: the caller gets an error, and the thread serves the next."""

    def stop(connection: sqlite3.Connection) -> None:
        raise error

    async with Held(file):
        stopped, neighbour = file.run(stop), file.run(note(1))
    with pytest.raises(StorageError, match=type(error).__name__):
        await asyncio.wait_for(stopped, 5)
    assert await asyncio.wait_for(neighbour, 5) == 1
    await file.close()


async def test_connection_that_cannot_be_rolled_back_is_replaced(file: SqliteFile) -> None:
    """One operation fails; those after it do not find a transaction begun for ever."""

    def spoil(connection: sqlite3.Connection) -> None:
        connection.close()

    with pytest.raises(sqlite3.Error):
        await file.run(spoil)
    assert await file.run(note(1)) == 1
    await file.close()


async def test_more_than_may_wait_are_refused(file: SqliteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that hangs costs bounded memory; what was refused is not done later."""
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    async with Held(file):
        futures = [file.run(note(n)) for n in range(3)]
        with pytest.raises(StorageError, match="3 operations are waiting already"):
            file.run(note(3))
    assert await asyncio.gather(*futures) == [0, 1, 2]
    assert await file.run(notes) == [0, 1, 2]
    await file.close()


async def test_executor_that_is_shut_down_fails_every_call(tmp_path: Path) -> None:
    """At the interpreter's end: an error, again and again, and nobody waits for ever."""
    executor = one_thread()
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, executor)
    assert await file.run(note(1)) == 1
    executor.shutdown()
    for _ in range(2):
        with pytest.raises(StorageError, match="shutdown"):
            await asyncio.wait_for(file.run(note(2)), 5)
    await file.close()
    assert file._connection is None


async def test_cancelled_waiter_does_not_cancel_the_write(file: SqliteFile) -> None:
    """What is in the queue is written, whoever waits for it."""
    async with Held(file):
        waiting = asyncio.ensure_future(file.run(note(1)))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await file.run(notes) == [1]
    await file.close()


def test_loop_that_is_closed_while_it_waits_is_not_told(file: SqliteFile) -> None:
    """The write is done all the same, and the thread serves the next loop."""
    gate = threading.Event()

    async def leave() -> None:
        file.run(lambda connection: gate.wait(10))
        file.run(note(1))

    async def come() -> list[int]:
        found = await file.run(notes)
        await file.close()
        return found

    asyncio.run(leave())
    gate.set()
    assert asyncio.run(come()) == [1]


async def test_missing_directory_is_an_error_until_it_is_there(tmp_path: Path, executor: Any) -> None:
    """Nothing is remembered of a failed opening."""
    file = SqliteFile(tmp_path / "absent" / "notes.db", SCHEMA, executor)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        await file.run(note(1))
    (tmp_path / "absent").mkdir()
    assert await file.run(note(1)) == 1
    await file.close()


async def test_file_that_is_no_database_is_an_error_and_stays_as_it_is(file: SqliteFile) -> None:
    """Somebody else's file is not ours to overwrite."""
    file.path.write_bytes(b"not a database, but a letter to mother" * 40)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        await file.run(note(1))
    assert file.path.read_bytes().startswith(b"not a database")


async def test_removed_file_is_noticed(file: SqliteFile) -> None:
    """The connection would write to it for ever, for nobody; another file in its place is not it either."""
    in_place = lambda connection: file.in_place()  # noqa: E731
    assert await file.run(in_place)
    for path in file.path.parent.glob("notes.db*"):
        path.unlink()
    assert not await file.run(in_place)
    file.path.touch()
    assert not await file.run(in_place)
    await file.close()


async def test_full_database_refuses_the_write_and_keeps_the_rest(file: SqliteFile) -> None:
    """The big one fails; small ones before, beside and after it are written."""

    def bound(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE big (blob)")
        connection.execute("PRAGMA max_page_count = 20")

    def big(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO big VALUES (zeroblob(1000000))")

    await file.run(bound)
    async with Held(file):
        futures: list[Any] = [file.run(note(1)), file.run(big), file.run(note(2))]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert isinstance(results[1], sqlite3.OperationalError)
    assert "full" in str(results[1])
    assert await file.run(note(3)) == 3
    assert await file.run(notes) == [1, 2, 3]
    await file.close()


@pytest.mark.slow
def test_full_disk_fails_writes_until_there_is_room(tmp_path: Path) -> None:
    """What was told to be written is there, what failed is not, and afterwards all goes on."""
    script = """
        import asyncio, resource, signal, sqlite3, sys
        from pathlib import Path
        from metered_billing.runtime import one_thread
        from metered_billing.sqlite import SqliteFile

        async def main():
            file = SqliteFile(Path(sys.argv[1]), "CREATE TABLE IF NOT EXISTS notes (n, filler)", one_thread())
            insert = lambda n: lambda c: c.execute("INSERT INTO notes VALUES (?, zeroblob(5000))", (n,)).rowcount
            written = failed = 0
            await file.run(insert(0))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            for n in range(1, 100):
                try:
                    await file.run(insert(n))
                    written += 1
                except sqlite3.OperationalError:
                    failed += 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await file.run(insert(100))
            rows = await file.run(lambda c: c.execute("SELECT COUNT(*) FROM notes").fetchone()[0])
            await file.close()
            print(written, failed, rows)

        asyncio.run(main())
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "notes.db")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    written, failed, rows = map(int, answer.stdout.split())
    assert failed > 0
    assert rows == written + 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


# What works.


async def test_operations_that_wait_share_one_commit(file: SqliteFile) -> None:
    """Sixty writes behind one cost one sync to disk."""
    async with Held(file):
        futures = [file.run(note(n)) for n in range(60)]
    assert await asyncio.gather(*futures) == list(range(60))
    assert file.commits == 2
    await file.close()


async def test_operations_run_in_the_order_of_the_calls(file: SqliteFile) -> None:
    """First come, first served, within a commit and across them."""
    order: list[int] = []

    def noting(number: int) -> Callable[[sqlite3.Connection], None]:
        return lambda _: order.append(number)

    async with Held(file):
        first = [file.run(noting(number)) for number in range(20)]
    second = [file.run(noting(number)) for number in range(20, 40)]
    await asyncio.gather(*first, *second)
    assert order == list(range(40))
    await file.close()


async def test_durable_is_synced_and_the_rest_is_not(file: SqliteFile) -> None:
    """FULL (2) where it is asked for, NORMAL (1) else; one durable operation makes its whole commit so."""
    assert await file.run(synchronous) == 2
    assert await file.run(synchronous, durable=False) == 1
    assert await file.run(synchronous) == 2
    async with Held(file):
        futures = [file.run(synchronous, durable=False), file.run(note(1), durable=True)]
    assert (await asyncio.gather(*futures))[0] == 2
    assert await file.run(lambda connection: connection.execute("PRAGMA journal_mode").fetchone()) == ("wal",)
    await file.close()


@pytest.mark.parametrize("broken", ["first", "then"])
async def test_closing_comes_to_its_end_whatever_raises(file: SqliteFile, broken: str) -> None:
    """Whoever waits for it hears of its end, and the file is closed."""
    done: list[str] = []

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            done.append(name)
            if name == broken:
                raise ZeroDivisionError

        return run

    await file.run(note(1))
    async with asyncio.timeout(5):
        await file.close(first=step("first"), then=step("then"))
    assert done == ["first", "then"]
    assert file._connection is None


async def test_closed_file_is_opened_by_the_next_operation(file: SqliteFile) -> None:
    """Closing finishes what waits, and leaves one plain file behind."""
    async with Held(file):
        waiting = file.run(note(1))
        told: list[str] = []
        closing = file.close(then=lambda: told.append("closed"))
    assert await waiting == 1
    await closing
    assert told == ["closed"]
    assert [path.name for path in file.path.parent.iterdir()] == ["notes.db"]
    assert await file.run(notes) == [1]
    await file.close()
    await file.close()


def test_loops_in_sequence_and_at_once_share_a_file(file: SqliteFile) -> None:
    """Each gets its own answers, on its own loop."""

    async def write(begin: int) -> list[int]:
        return await asyncio.gather(*(file.run(note(n)) for n in range(begin, begin + 50)))

    for begin in (0, 50):
        assert asyncio.run(write(begin)) == list(range(begin, begin + 50))
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda b=b: found.append(asyncio.run(write(b)))) for b in (100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [list(range(100, 150)), list(range(200, 250))]

    async def count() -> int:
        found = len(await file.run(notes))
        await file.close()
        return found

    assert asyncio.run(count()) == 200


async def test_injected_executor_runs_everything_in_the_callers_thread(tmp_path: Path) -> None:
    """A simulation has no threads: the write is done a turn of the loop later, and told in the next."""
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, Inline())
    seen: list[threading.Thread] = []
    future = file.run(lambda _: seen.append(threading.current_thread()))
    assert seen == []
    await asyncio.sleep(0)
    assert seen == [threading.current_thread()]
    assert not future.done()
    await future
    await file.close()


async def test_commit_waits_for_who_comes_turn_after_turn(tmp_path: Path) -> None:
    """As long as each turn of the loop brings some, up to a bound; so a crowd is one commit."""
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, Inline())
    crowd = []
    for number in range(module.TURNS + 1):
        assert file.commits == 0
        crowd += [file.run(note(10 * number)), file.run(note(10 * number + 1))]
        await asyncio.sleep(0)
    crowd.append(file.run(note(99)))
    await asyncio.gather(*crowd)
    assert file.commits == 2
    await file.close()


def test_nobody_waits_for_another_loop(tmp_path: Path) -> None:
    """What a loop has queued before it was closed is committed with what the next one queues, and so is a thread's."""
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, one_thread())
    gone = asyncio.new_event_loop()

    async def leave() -> None:
        file.run(note(1)).add_done_callback(lambda done: done.cancelled())

    gone.run_until_complete(leave())
    gone.close()

    async def come() -> list[int]:
        async with asyncio.timeout(5):
            return await file.run(notes)

    assert asyncio.run(come()) == [1]

    async def leave_again() -> None:
        file.run(note(2))

    gone = asyncio.new_event_loop()
    gone.run_until_complete(leave_again())
    file.post(note(3))
    gone.close()
    assert asyncio.run(come()) == [1, 2, 3]

    async def close() -> None:
        await file.close()

    asyncio.run(close())


def test_closing_commits_what_a_closed_loop_has_left(tmp_path: Path) -> None:
    """Nothing that was queued is lost."""
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, one_thread())

    async def leave() -> None:
        file.run(note(1))

    gone = asyncio.new_event_loop()
    gone.run_until_complete(leave())
    gone.close()

    async def close() -> list[int]:
        await file.close()
        found = await file.run(notes)
        await file.close()
        return found

    assert asyncio.run(close()) == [1]


async def test_loop_that_closes_while_its_commit_is_under_way(tmp_path: Path) -> None:
    """What it has queued meanwhile is committed all the same."""
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, one_thread())
    entered, go_on = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        go_on.wait(5)

    async def leave() -> None:
        file.run(hold)
        await asyncio.to_thread(entered.wait, 5)
        file.run(note(1))

    gone = asyncio.new_event_loop()
    await asyncio.to_thread(gone.run_until_complete, leave())
    gone.close()
    go_on.set()
    async with asyncio.timeout(5):
        assert await file.run(notes) == [1]
    await file.close()


def test_closing_comes_after_what_another_loop_lets_begin(tmp_path: Path) -> None:
    """What was queued before is committed before the file is let go of, whichever of the threads is faster."""
    begins, closes = threading.Event(), threading.Event()
    thread = one_thread()

    class Overtaken:
        """The first to ask for the thread is overtaken by whoever closes."""

        def submit(self, job: Callable[[], Any], /) -> Any:
            if not begins.is_set():
                begins.set()
                closes.wait(5)
            return thread.submit(job)

        def shutdown(self, wait: bool = True) -> None:
            thread.shutdown(wait=wait)

    file = SqliteFile(tmp_path / "notes.db", SCHEMA, Overtaken())
    found: list[list[int]] = []

    async def write() -> None:
        await file.run(note(1))

    def let_go() -> None:
        with contextlib.closing(sqlite3.connect(file.path)) as other:
            other.execute(SCHEMA)
            found.append(notes(other))

    async def close() -> None:
        await file.close(then=let_go)

    writer = threading.Thread(target=asyncio.run, args=(write(),))
    writer.start()
    begins.wait(5)
    asyncio.run(close())
    closes.set()
    writer.join()
    assert found == [[1]]
    thread.shutdown()


async def test_loop_that_stands_still_holds_up_nobody_behind_it(file: SqliteFile) -> None:
    """What another loop has queued behind its operation is committed, though that loop does nothing any more."""

    async def leave() -> None:
        file.run(note(1))

    still = asyncio.new_event_loop()
    try:
        async with Held(file):
            await asyncio.to_thread(still.run_until_complete, leave())
            mine = file.run(notes)
        async with asyncio.timeout(2):
            assert await mine == [1]
    finally:
        still.close()
        await file.close()


async def test_file_that_is_let_go_of_is_closed(tmp_path: Path) -> None:
    """An app that was never shut down leaves no connection to be warned of."""
    thread = one_thread()
    file = SqliteFile(tmp_path / "notes.db", "", thread)
    await file.run(lambda connection: connection.execute("SELECT 1").fetchone())
    connection = file._connection
    assert connection is not None
    thread.shutdown(wait=True)  # it may hold on to what it did last
    del file
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        connection.execute("SELECT 1")


async def test_durable_commits_are_told_with_their_size_and_duration(tmp_path: Path, executor: Any) -> None:
    """What was not synced to disk is not; what nobody waits for counts."""
    told: list[tuple[int, float]] = []
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 0.25
        return now

    file = SqliteFile(
        tmp_path / "notes.db", SCHEMA, executor, committed=lambda size, took: told.append((size, took)), clock=tick
    )
    entered, go_on = threading.Event(), threading.Event()

    def wait(connection: sqlite3.Connection) -> None:
        entered.set()
        go_on.wait(10)

    waiting = file.run(wait)
    await asyncio.to_thread(entered.wait, 10)
    together = [file.run(note(1)), file.run(note(2), durable=False)]
    file.post(note(3))
    go_on.set()
    await asyncio.gather(waiting, *together)
    await file.run(note(4), durable=False)
    assert told == [(1, 0.25), (3, 0.25)]
    await file.close()


async def test_failed_operation_is_no_commit(tmp_path: Path, executor: Any) -> None:
    """Its neighbours commit one by one then, and each is told."""
    told: list[int] = []
    file = SqliteFile(tmp_path / "notes.db", SCHEMA, executor, committed=lambda size, took: told.append(size))
    entered, go_on = threading.Event(), threading.Event()

    def wait(connection: sqlite3.Connection) -> None:
        entered.set()
        go_on.wait(10)

    waiting = file.run(wait)
    await asyncio.to_thread(entered.wait, 10)
    writes = [file.run(note(1)), file.run(note(1)), file.run(note(2))]
    go_on.set()
    await waiting
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert told == [1, 1, 1]
    await file.close()


async def test_whoever_measures_commits_cannot_break_them(tmp_path: Path, executor: Any) -> None:
    """A caller is answered whatever the measurement does."""

    def measure(size: int, took: float) -> None:
        raise ZeroDivisionError

    file = SqliteFile(tmp_path / "notes.db", SCHEMA, executor, committed=measure)
    assert await file.run(note(1)) == 1
    assert await file.run(note(2)) == 2
    await file.close()
