"""The journal on PostgreSQL: leases, who is taken for dead, and what the tables need.

What is true of any journal stands in `test_contract`.
"""

import asyncio
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from metered_billing.charge import State
from metered_billing.journal import Journal, JournalError, PlaceLost
from metered_billing.journal import postgres as module
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.postgres import migrate
from metered_billing.runtime import Runtime
from metered_billing.schemas import Schema
from tests import postgres
from tests.docs.pages import EXAMPLES
from tests.journal.engines import Postgres, charge, everything, ids, moved


class Heart:
    """A heartbeat that beats when it is told to."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, interval_s: float, call: Callable[[], None]) -> Callable[[], None]:
        entry = (interval_s, call)
        self._calls.append(entry)
        return lambda: self._calls.remove(entry)

    def beat(self) -> None:
        for interval_s, call in self._calls:
            if interval_s == module.BEAT_EVERY_S:
                call()


async def started(shared: Postgres, runtime: Runtime | None = None, realm: str = "") -> Journal:
    journal = shared.journal(runtime)
    await journal.start(realm)
    return journal


async def turned(journal: Journal) -> None:
    """Whatever it had queued is done."""
    await journal.next_due(0.0)


def leases(shared: Postgres) -> dict[str, float]:
    """How many seconds each has left."""
    return dict(shared.sql("SELECT owner, extract(epoch FROM expires_at - clock_timestamp())::float8 FROM owners"))


def locking(shared: Postgres) -> "psycopg.Connection[Any]":
    """A process that is stopped in the middle of a transaction."""
    return psycopg.connect(shared.url, options="-c search_path=metered_billing")


# A process that was stopped, and goes on.


async def test_who_comes_back_after_it_was_adopted_takes_a_new_place(shared: Postgres) -> None:
    """It writes to nothing that was its own, opens nothing under the old name, and the next request is served."""
    stopped, other = await started(shared, Runtime(every=Heart())), await started(shared)
    record = charge(stopped)
    await stopped.open(record)
    before = stopped.owner
    shared.expire(stopped)
    assert await other.adopt(5.0) == 1
    assert not await stopped.write(record, dataclasses.replace(record, state=State.DEDUCTED), durable=False)
    with pytest.raises(PlaceLost, match=r"charge c2 was not put on record: .* not heard of for 15 s"):
        await stopped.open(charge(stopped, "c2"))
    assert stopped.owner != before
    await stopped.open(charge(stopped, "c2"))
    assert [list(ids(await everything(each))) for each in (stopped, other)] == [["c2"], ["c1"]]
    assert set(leases(shared)) == {stopped.owner, other.owner}


async def test_first_heartbeat_takes_the_new_place(shared: Postgres) -> None:
    """No request has to fail for it."""
    heart = Heart()
    stopped, other = await started(shared, Runtime(every=heart)), await started(shared)
    before = stopped.owner
    shared.expire(stopped)
    await other.adopt(5.0)
    assert set(leases(shared)) == {other.owner}
    heart.beat()
    await turned(stopped)
    assert stopped.owner != before
    await stopped.open(charge(stopped))


async def test_who_comes_back_before_anybody_came_by_goes_on(shared: Postgres) -> None:
    """Its lease had run out; nobody has noticed, so nothing has happened."""
    heart = Heart()
    stopped, other = await started(shared, Runtime(every=heart)), await started(shared)
    record = charge(stopped)
    await stopped.open(record)
    shared.expire(stopped)
    record = await moved(stopped, record, state=State.DEDUCTED)
    await stopped.open(charge(stopped, "c2"))
    heart.beat()
    await turned(stopped)
    assert leases(shared)[stopped.owner] > 10
    assert await other.adopt(5.0) == 0
    await moved(stopped, record, state=State.SETTLED, closed_at=6.0)


# A process that is frozen between requests.


async def test_paused_journal_has_nothing_under_way_and_does_not_beat(shared: Postgres) -> None:
    """What was queued is written before; afterwards its thread is idle, and its connection in no transaction."""
    heart = Heart()
    journal = await started(shared, Runtime(every=heart))
    assert isinstance(journal, PostgresJournal)
    opening = asyncio.ensure_future(journal.open(charge(journal)))
    await asyncio.sleep(0)
    await journal.pause()
    assert shared.sql("SELECT id FROM charges") == [("c1",)]
    await opening
    shared.expire(journal)
    heart.beat()
    assert not journal._taken()._database._working
    assert not journal._taken()._database._waiting
    [(state,)] = shared.sql("SELECT state FROM pg_stat_activity WHERE application_name = 'metered-billing journal'")
    assert state == "idle"
    assert leases(shared)[journal.owner] < 0


async def test_resumed_journal_is_heard_of_before_it_opens_a_charge(shared: Postgres) -> None:
    """In the same transaction: nobody can take the charge for a dead process's in between."""
    heart = Heart()
    journal = await started(shared, Runtime(every=heart))
    assert isinstance(journal, PostgresJournal)
    await journal.pause()
    shared.expire(journal)
    commits = journal._taken()._database.commits
    journal.resume()
    await journal.open(charge(journal))
    assert journal._taken()._database.commits == commits + 1
    assert leases(shared)[journal.owner] > 10
    shared.expire(journal)
    heart.beat()
    await turned(journal)
    assert leases(shared)[journal.owner] > 10


async def test_closed_journal_may_be_paused_and_resumed(shared: Postgres) -> None:
    """Whoever looks after it need not know; nor what has closed it in the same moment."""
    journal = await started(shared)
    assert isinstance(journal, PostgresJournal)
    place = journal._taken()
    await journal.close()
    await journal.pause()
    journal.resume()
    await place.pause()
    place.resume()
    assert leases(shared) == {}


async def test_resumed_journal_whose_database_is_away_says_so_at_the_next_charge() -> None:
    """Nobody waits for the lease alone."""
    journal = PostgresJournal("postgresql://127.0.0.1:1/billing")
    place = module._Place(journal._database(), "", Runtime())
    place.resume()
    with pytest.raises(JournalError, match="cannot be reached"):
        await place.run(place.renew)
    await place.leave()


async def test_heartbeat_needs_no_event_loop(shared: Postgres) -> None:
    """A route that blocks it does not cost the lease."""
    heart = Heart()
    journal = await started(shared, Runtime(every=heart))
    shared.expire(journal)
    heart.beat()
    # The loop stands still from here on.
    for _ in range(500):
        if leases(shared)[journal.owner] > 0:
            return
        time.sleep(0.02)
    pytest.fail("the lease was not renewed")


async def test_everybody_beats_more_often_than_a_lease_runs_out(shared: Postgres) -> None:
    """Three beats may be lost; and a dead process is found within half a minute of a restart."""
    journal = await started(shared)
    assert 3 * module.BEAT_EVERY_S < module.LEASE_S
    assert 14 < leases(shared)[journal.owner] <= 15


# After an outage of the database.


async def test_after_an_outage_nobody_is_taken_for_dead_at_once(shared: Postgres) -> None:
    """All leases have run out: whoever is back first gives the others time to be heard of."""
    first, second = await started(shared, Runtime(every=Heart())), await started(shared, Runtime(every=Heart()))
    record = charge(second)
    await second.open(record)
    shared.expire(first)
    shared.expire(second)
    assert await first.adopt(5.0) == 0  # it was cut off itself, until now
    assert await first.adopt(5.0) == 0
    shared.stay(first)  # time passes; the second is not heard of
    assert await first.adopt(5.0) == 1


async def test_who_lost_its_place_adopts_nobody_at_once(shared: Postgres) -> None:
    """It is back, in a new place: it was cut off just now."""
    stopped, other = await started(shared, Runtime(every=Heart())), await started(shared, Runtime(every=Heart()))
    await other.open(charge(other))
    shared.expire(stopped)
    await other.adopt(1.0)
    shared.expire(other)
    assert await stopped.adopt(5.0) == 0
    assert stopped.owner in leases(shared)
    shared.stay(stopped)
    assert await stopped.adopt(5.0) == 1


async def test_fresh_process_adopts_at_once(shared: Postgres) -> None:
    """What a killed process left does not wait longer than its lease."""
    dead = await started(shared)
    await dead.open(charge(dead))
    shared.kill(dead)
    fresh = await started(shared)
    assert await fresh.adopt(5.0) == 1


# Adopting.


async def test_adoption_goes_a_little_at_a_time(shared: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, each transaction is small, and requests go in between."""
    monkeypatch.setattr(module, "AT_A_TIME", 2)
    dead, ours = await started(shared), await started(shared)
    await asyncio.gather(*(dead.open(charge(dead, f"c{n:02}")) for n in range(21)))
    shared.kill(dead)
    order: list[str] = []

    async def adopt() -> None:
        assert await ours.adopt(5.0) == 21
        order.append("adopted")

    async def serve() -> None:
        await asyncio.sleep(0)
        await ours.open(charge(ours, "new"))
        order.append("served")

    await asyncio.gather(adopt(), serve())
    assert order == ["served", "adopted"]
    assert len(await everything(ours)) == 22
    assert set(leases(shared)) == {ours.owner}


async def test_charge_that_a_stopped_process_has_locked_is_adopted_later(shared: Postgres) -> None:
    """The others are adopted now, and nobody waits; its owner's row stands until it is adopted too."""
    dead, ours = await started(shared), await started(shared)
    for n in range(3):
        await dead.open(charge(dead, f"c{n}"))
    shared.kill(dead)
    with locking(shared) as stopped:
        stopped.execute("UPDATE charges SET tries = 1 WHERE id = 'c1'")
        assert await ours.adopt(5.0) == 2
        assert len(leases(shared)) == 2
        stopped.rollback()
    assert await ours.adopt(5.0) == 1
    assert set(leases(shared)) == {ours.owner}


async def test_charge_that_is_just_being_opened_is_left_under_no_name_that_is_gone(shared: Postgres) -> None:
    """Its owner's row is locked until it is on record; then both are adopted."""
    dead, ours = await started(shared), await started(shared)
    await dead.open(charge(dead))
    shared.kill(dead)
    with locking(shared) as stopped:
        stopped.execute(module.OPEN, (dead.owner, "c2", "opened", 1.0, 0, 1.0, None, "{}", None))
        assert await ours.adopt(5.0) == 0
        stopped.commit()
    assert await ours.adopt(5.0) == 2


async def test_opening_waits_for_who_adopts_and_is_refused(shared: Postgres) -> None:
    """The row is locked, and gone a moment later: the charge is not on record."""
    stopped = await started(shared, Runtime(every=Heart()))
    with locking(shared) as adopting:
        adopting.execute("SELECT FROM owners WHERE owner = %s FOR UPDATE", (stopped.owner,))
        opening = asyncio.ensure_future(stopped.open(charge(stopped)))
        while not shared.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
            assert not opening.done()
            await asyncio.sleep(0.01)
        adopting.execute("DELETE FROM owners")
    with pytest.raises(JournalError, match="charge c1 was not put on record"):
        await opening
    assert shared.sql("SELECT id FROM charges") == []


async def test_row_that_cannot_be_read_is_adopted_and_reported(shared: Postgres) -> None:
    """It stops no other, and is in nobody's way."""
    dead, ours = await started(shared), await started(shared)
    await dead.open(charge(dead))
    await dead.open(charge(dead, "c2"))
    shared.sql("UPDATE charges SET body = '{' WHERE id = 'c1'")
    shared.kill(dead)
    assert await ours.adopt(5.0) == 2
    assert list(ids(await everything(ours))) == ["c2"]
    assert list(ours.unusable) == ["charge c1"]


async def test_places_of_other_credits_go_when_nothing_is_left_in_them(shared: Postgres) -> None:
    """And what is no longer so is no longer reported."""
    dead, ours = await started(shared, realm="http://old"), await started(shared, realm="http://new")
    await dead.open(charge(dead))
    shared.kill(dead)
    await ours.adopt(5.0)
    assert list(ours.unusable) == ["charges made at http://old"]
    shared.sql("UPDATE charges SET closed_at = 1")
    await ours.adopt(5.0)
    assert ours.unusable == {}
    assert set(leases(shared)) == {ours.owner}


# Starting and closing.


async def test_close_leaves_a_row_only_where_something_is_unsettled(shared: Postgres) -> None:
    """Others need not wait for the lease."""
    journal = await started(shared)
    await journal.close()
    assert leases(shared) == {}
    await journal.start("")
    await journal.open(charge(journal))
    await journal.close()
    [lease] = leases(shared).values()
    assert lease == float("-inf")


async def test_heartbeat_after_close_takes_no_place(shared: Postgres) -> None:
    """One may be under way in its thread."""
    journal = await started(shared)
    assert isinstance(journal, PostgresJournal)
    place = journal._taken()
    closed = place.leave()
    place.beat()
    await closed
    assert leases(shared) == {}


async def test_unreachable_database_is_a_clear_error_without_the_password() -> None:
    """At the start; nothing is remembered of it."""
    journal = PostgresJournal("postgresql://app:hunter2@127.0.0.1:1/billing")
    for _ in range(2):
        with pytest.raises(JournalError, match=r"postgresql://127.0.0.1:1/billing cannot be reached: ") as error:
            await journal.start("")
        assert "hunter2" not in "".join(traceback.format_exception(error.value))
    await journal.close()


async def test_url_that_is_none_is_refused_without_its_password() -> None:
    """When it is made, not when it is used."""
    with pytest.raises(ValueError, match="is named by") as error:
        PostgresJournal("postgresql://app:hunter2@127.0.0.1/billing?nonsense=1")
    assert "hunter2" not in str(error.value)


async def test_tables_of_another_version_keep_the_app_from_starting(
    shared: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later one: upgrade. An older one: migrate; other processes may be at work with it."""
    journal = await started(shared)
    await journal.open(charge(journal))
    await journal.close()
    later = Schema("journal", (*module.SCHEMA.steps, ("ALTER TABLE charges ADD COLUMN more text",)))
    with monkeypatch.context() as patch:
        patch.setattr(module, "SCHEMA", later)
        with pytest.raises(JournalError, match=r"journal has schema version 1, .* run `metered-billing migrate`"):
            await journal.start("")
    shared.sql("UPDATE versions SET version = 2 WHERE what = 'journal'")
    with pytest.raises(JournalError, match=r"journal has schema version 2, .* upgrade metered-billing"):
        await journal.start("")
    assert shared.sql("SELECT id FROM charges") == [("c1",)]


async def test_release_that_runs_goes_on_beside_a_newer_one(shared: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rolling update: both have their place in the journal. The older one's next start is refused."""
    older = await started(shared)
    later = Schema("journal", (*module.SCHEMA.steps, ("ALTER TABLE charges ADD COLUMN more text",)))
    assert migrate(shared.url, later) == 1
    await older.open(charge(older))
    with monkeypatch.context() as patch:
        patch.setattr(module, "SCHEMA", later)
        newer = await started(shared)
        assert await newer.adopt(0) == 0
        await newer.open(charge(newer, "c2"))
    assert list(ids(await everything(older))) == ["c1"]
    await newer.close()
    await older.close()
    with pytest.raises(JournalError, match=r"journal has schema version 2, .* upgrade metered-billing"):
        await older.start("")


@pytest.fixture
def role(shared: Postgres) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The URL of a role without any rights, and what the database's administrator does."""
    name = f"app_{os.getpid()}"
    database = urlsplit(shared.url).path[1:]

    def administer(statement: str) -> None:
        with psycopg.connect(shared.url, autocommit=True) as connection:
            connection.execute(statement.format(role=name, database=database).encode())

    administer("CREATE ROLE {role} LOGIN PASSWORD 'hunter2'; REVOKE CREATE ON DATABASE {database} FROM PUBLIC")
    parts = urlsplit(shared.url)
    yield urlunsplit(parts._replace(netloc=f"{name}:hunter2@{parts.netloc.rpartition('@')[2]}")), administer
    administer("DROP SCHEMA IF EXISTS metered_billing CASCADE; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_role_that_may_not_make_tables_is_told(role: tuple[str, Any]) -> None:
    """The text says what is missing."""
    journal = PostgresJournal(role[0])
    with pytest.raises(JournalError, match="permission denied for database"):
        await journal.start("")


async def test_role_that_may_not_use_the_tables_is_told(shared: Postgres, role: tuple[str, Any]) -> None:
    """They are there, and nobody has granted it its rights."""
    first = await started(shared)
    await first.close()
    journal = PostgresJournal(role[0])
    with pytest.raises(JournalError, match=r"may not use the schema metered_billing, .* grant it USAGE"):
        await journal.start("")


@pytest.mark.parametrize("given", ["the schema", "the tables"])
async def test_role_needs_no_more_than_its_rows(shared: Postgres, role: tuple[str, Any], given: str) -> None:
    """An empty schema of its own will do; or tables that somebody else has made."""
    url, administer = role
    if given == "the schema":
        administer("CREATE SCHEMA metered_billing AUTHORIZATION {role}")
    else:
        first = await started(shared)
        await first.close()
        administer((EXAMPLES / "rights-journal.sql").read_text(encoding="utf-8").replace("TO app;", "TO {role};"))
    for _ in range(2):
        journal = PostgresJournal(url)
        await journal.start("")
        await journal.adopt(1.0)
        record = charge(journal, journal.owner)
        await journal.open(record)
        await moved(journal, record, state=State.SETTLED, closed_at=1.0)
        assert await journal.forget(0.0, keep=0) == 1
        await journal.close()


async def test_two_first_processes_make_the_tables_once(shared: Postgres) -> None:
    """The second waits for the first."""
    journals = [shared.journal() for _ in range(4)]
    await asyncio.gather(*(journal.start("") for journal in journals))
    assert len(leases(shared)) == 4


async def test_journal_that_is_let_go_of_leaves_neither_thread_nor_connection(shared: Postgres) -> None:
    """An app that was never shut down, in a test say. Its lease runs out, because nothing renews it."""
    before = set(threading.enumerate())
    journal = PostgresJournal(shared.url)
    await journal.start("")
    await journal.next_due(1.0)
    del journal
    for _ in range(250):
        gc.collect()
        left = shared.sql("SELECT pid FROM pg_stat_activity WHERE application_name = 'metered-billing journal'")
        if not left and not [thread for thread in set(threading.enumerate()) - before if "heart" not in thread.name]:
            return
        await asyncio.sleep(0.02)
    pytest.fail("something is left")


# Forks.

FORKS = """
    import asyncio, gc, os, signal, sys
    from metered_billing.charge import Account, Record
    from metered_billing.journal import JournalError
    from metered_billing.journal.postgres import PostgresJournal

    def charge(journal, name):
        return Record(id=name, account=Account("acme"), amount_credits=3, units=3, opened_at=1.0,
                      owner=journal.owner, due_at=1.0)

    async def of_its_own(journal):
        await journal.start("")
        await journal.open(charge(journal, "child"))
        await journal.close()

    def child(journal):
        try:
            journal.open(charge(journal, "no"))
        except JournalError:
            asyncio.run(of_its_own(journal))
            del journal
            gc.collect()
            os._exit(0)

    async def main():
        journal = PostgresJournal(sys.argv[1])
        await journal.start("")
        await journal.open(charge(journal, "before"))
        other = os.fork()
        if other == 0:
            child(journal)
        _, status = os.waitpid(other, 0)
        await journal.open(charge(journal, "after"))
        print(os.waitstatus_to_exitcode(status), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_forked_child_leaves_its_parents_connection_alone(shared: Postgres) -> None:
    """Neither its own place, nor its end, disturbs the parent; both journals' charges are adopted."""
    script = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKS), shared.url], capture_output=True, text=True, timeout=60
    )
    assert (script.stdout, script.returncode) == ("0\n", -signal.SIGKILL), script.stderr
    shared.sql("UPDATE owners SET expires_at = '-infinity'")
    ours = await started(shared)
    assert await ours.adopt(1.0) == 3
    assert sorted(ids(await everything(ours))) == ["after", "before", "child"]


# A server that goes away.


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    """One that may be stopped."""
    try:
        server = postgres.Server()
    except postgres.NoPostgres as error:
        pytest.skip(str(error))
    yield server
    server.remove()


@pytest.mark.slow
async def test_server_that_is_away_for_a_while_costs_only_what_was_asked_meanwhile(server: postgres.Server) -> None:
    """An error each time, and the same place afterwards: nobody has come by."""
    journal = PostgresJournal(server.url)
    await journal.start("")
    owner = journal.owner
    await journal.open(charge(journal))
    server.stop(signal.SIGQUIT)
    for _ in range(2):
        with pytest.raises(JournalError, match="cannot be reached"):
            await journal.open(charge(journal, "c2"))
        with pytest.raises(JournalError):
            await everything(journal)
    server.start()
    await journal.open(charge(journal, "c3"))
    assert journal.owner == owner
    assert list(ids(await everything(journal))) == ["c1", "c3"]
    await journal.close()


@pytest.mark.slow
async def test_close_does_not_wait_for_a_server_that_hangs(server: postgres.Server) -> None:
    """An app has to come to its end; the lease runs out by itself."""
    journal = PostgresJournal(server.url)
    await journal.start("")
    opening = asyncio.ensure_future(journal.open(charge(journal, journal.owner)))
    await opening
    server.pause()
    try:
        await asyncio.wait_for(journal.close(), 2 * module.CLOSE_WITHIN_S)
    finally:
        server.resume()


# By index.


@pytest.mark.slow
async def test_hundred_thousand_charges_are_looked_through_by_index(shared: Postgres) -> None:
    """Whatever is asked, no statement reads the whole table."""
    journal = await started(shared)
    shared.sql(
        "INSERT INTO charges SELECT 'c' || n, CASE WHEN mod(n, 2) = 0 THEN 'dead' || mod(n, 20) ELSE ? END,"
        " CASE WHEN mod(n, 100) < 2 THEN 'refunding' ELSE 'settled' END, n, 0, n,"
        " CASE WHEN mod(n, 100) < 2 THEN NULL ELSE n END, 'r' || n, '{}' FROM generate_series(1, 100000) AS n",
        journal.owner,
    )
    shared.sql("ANALYZE charges")
    statements: dict[str, tuple[Any, ...]] = {
        module.WRITE: ("settled", 0, 1.0, 1.0, "{}", "c1", journal.owner, "opened", "opened"),
        module.DUE: (journal.owner, 1e9, float("-inf"), "", ["c7"], 200),
        module.NEXT_DUE: (journal.owner, 5.0),
        module.UNSETTLED: (journal.owner,),
        module.BEYOND: (90_000,),
        module.FORGET: (10.0, "", 500),
        module.ADOPT: (journal.owner, 1.0, ["dead0"], 500),
        "SELECT id FROM charges WHERE request_id = %s": ("r5",),
    }
    for statement, values in statements.items():
        plan = "\n".join(row[0] for row in shared.sql("EXPLAIN " + statement, *values))
        assert "Seq Scan" not in plan, plan
        assert "Index" in plan, plan
