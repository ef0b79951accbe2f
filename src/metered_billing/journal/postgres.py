"""The journal on PostgreSQL: for several processes on several machines, and for disks that do not stay.

Each process has a row in `owners`: its place, held by a lease that a heartbeat renews. Whose lease has run out
may be dead, or stopped: whoever comes by takes over its charges, and then deletes its row. A process that
comes back from that finds its row gone; it writes to none of those charges, and takes a new place under a new
name. So that none is ever left under a name that is gone:

- A charge is opened only while its owner's row stands, and locks it (FOR KEY SHARE) until that is committed.
- Who adopts locks the row first (FOR UPDATE SKIP LOCKED), then moves its charges, and deletes it when there
  are none.

Whether a lease has run out, the database's clock says, never a process's.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, LiteralString, TypeVar

from metered_billing.charge import Record
from metered_billing.commits import StorageError, Waiting
from metered_billing.journal import JournalError, PlaceLost, body_of, record_of, states_of, taken_for
from metered_billing.journal.lock import call_in_forked_child
from metered_billing.postgres import ClientCursor, Connection, DatabaseError, PostgresDatabase, first_line
from metered_billing.runtime import Runtime
from metered_billing.schemas import Schema, SchemaMismatch, prepare_postgres
from metered_billing.telemetry import Telemetry

T = TypeVar("T")

LEASE_S = 15.0
"""How long a process that is not heard of keeps its place."""

BEAT_EVERY_S = 4.0
"""How often it is heard of: three beats may be lost."""

GRACE_S = 2 * BEAT_EVERY_S
"""Who was cut off itself gives the others so long to be heard of again, before it takes anybody for dead."""

AT_A_TIME = 500
"""Rows that one transaction adopts or deletes: requests wait for the same connection."""

CLOSE_WITHIN_S = 5.0
"""How long `close` waits for a database that hangs. The lease runs out by itself."""

SCHEMA: Final = Schema(
    "journal",
    (
        (
            # `since`: when it came back from having been cut off, if it ever was.
            "CREATE TABLE owners (owner text PRIMARY KEY, realm text NOT NULL, expires_at timestamptz NOT NULL,"
            " since timestamptz NOT NULL)",
            """CREATE TABLE charges (
                id text COLLATE "C" PRIMARY KEY,
                owner text NOT NULL,
                state text NOT NULL,
                opened_at float8 NOT NULL,
                tries bigint NOT NULL,
                due_at float8 NOT NULL,
                closed_at float8,
                request_id text,
                body text NOT NULL
            )""",
            "CREATE INDEX charges_due ON charges (owner, due_at, id) WHERE closed_at IS NULL",
            "CREATE INDEX charges_closed ON charges (closed_at, id)"
            " WHERE closed_at IS NOT NULL AND state <> 'disputed'",
            "CREATE INDEX charges_request ON charges (request_id) WHERE request_id IS NOT NULL",
        ),
    ),
)

_COLUMNS: Final = "id, owner, state, opened_at, tries, due_at, closed_at, body"

OPEN: Final = (
    "WITH place AS (SELECT owner FROM owners WHERE owner = %s FOR KEY SHARE)"
    " INSERT INTO charges (id, owner, state, opened_at, tries, due_at, closed_at, body, request_id)"
    " SELECT %s, owner, %s, %s, %s, %s, %s::float8, %s, %s FROM place"
)
WRITE: Final = (
    "UPDATE charges SET state = %s, tries = %s, due_at = %s, closed_at = %s, body = %s"
    " WHERE id = %s AND owner = %s AND state IN (%s, %s)"
)
DUE: Final = (
    f"SELECT {_COLUMNS} FROM charges"  # noqa: S608
    " WHERE closed_at IS NULL AND owner = %s AND due_at <= %s AND (due_at, id) > (%s, %s) AND id <> ALL(%s::text[])"
    " ORDER BY due_at, id LIMIT %s"
)
NEXT_DUE: Final = "SELECT MIN(due_at) FROM charges WHERE closed_at IS NULL AND owner = %s AND due_at > %s"
UNSETTLED: Final = (
    "SELECT state, COUNT(*), MIN(opened_at) FROM charges WHERE closed_at IS NULL AND owner = %s GROUP BY state"
)
BEYOND: Final = (
    "SELECT closed_at, id FROM charges WHERE closed_at IS NOT NULL AND state <> 'disputed'"
    " ORDER BY closed_at DESC, id DESC LIMIT 1 OFFSET %s"
)
FORGET: Final = (
    "DELETE FROM charges WHERE id IN (SELECT id FROM charges"
    " WHERE closed_at IS NOT NULL AND state <> 'disputed' AND (closed_at, id) <= (%s, %s)"
    " ORDER BY closed_at, id LIMIT %s FOR UPDATE SKIP LOCKED)"
)

_TAKE = (
    "INSERT INTO owners (owner, realm, expires_at, since)"
    " VALUES (%s, %s, clock_timestamp() + %s * interval '1 second',"
    " CASE WHEN %s THEN clock_timestamp() ELSE '-infinity' END)"
)
_RENEW = (
    "UPDATE owners SET expires_at = clock_timestamp() + %s * interval '1 second',"
    " since = CASE WHEN expires_at < clock_timestamp() THEN clock_timestamp() ELSE since END"
    " WHERE owner = %s RETURNING since < clock_timestamp() - %s * interval '1 second'"
)
# Rows that somebody is opening a charge under, or adopting from, are left for the next time: nobody waits.
_EXPIRED = "SELECT owner, realm FROM owners WHERE expires_at < clock_timestamp() AND owner <> %s FOR UPDATE SKIP LOCKED"
# A process that was stopped in mid-transaction holds its rows until the server ends that: left for the next time.
ADOPT: Final = (
    "UPDATE charges SET owner = %s, due_at = %s WHERE id IN (SELECT id FROM charges"
    " WHERE closed_at IS NULL AND owner = ANY(%s::text[]) LIMIT %s FOR UPDATE SKIP LOCKED)"
)
# A statement of its own, after the lock: it sees whatever was opened before that.
_BURY = (
    "DELETE FROM owners WHERE owner = ANY(%s::text[])"
    " AND NOT EXISTS (SELECT FROM charges WHERE charges.owner = owners.owner AND closed_at IS NULL)"
)
_FOREIGN = (
    "SELECT realm, COUNT(*) FROM owners JOIN charges USING (owner)"
    " WHERE owners.owner = ANY(%s::text[]) AND realm <> %s AND closed_at IS NULL GROUP BY realm"
)
_GIVE_UP = "UPDATE owners SET expires_at = '-infinity' WHERE owner = %s"


class PostgresJournal:
    """A journal in a PostgreSQL database, which other processes of the same app share.

    Its tables live in the PostgreSQL schema `metered_billing`; they are made where they are missing.

    Args:
        url: `postgresql://user@host:port/database`, or whatever else libpq takes.

    Raises:
        ValueError: It is no such URL; the text shows nothing of it.
    """

    def __init__(self, url: str, *, runtime: Runtime | None = None, telemetry: Telemetry | None = None) -> None:
        self._url = url
        self._runtime = runtime or Runtime()
        self._committed = (telemetry or Telemetry()).committed("journal")
        self._fresh: PostgresDatabase | None = self._database()
        self._unusable: dict[str, str] = {}
        self._vacate()
        call_in_forked_child(self)

    def _database(self) -> PostgresDatabase:
        return _Database(
            self._url, self._runtime, application_name="metered-billing journal", committed=self._committed
        )

    def _vacate(self) -> None:
        self._mutex = threading.Lock()
        self._starting: concurrent.futures.Future[None] | None = None
        self._place: _Place | None = None
        self._realm = ""

    def forked(self) -> None:
        """This is a child: the place, the thread and the connection are its parent's."""
        # To close its copy of the connection would end the parent's.
        _INHERITED.append((self._place, self._fresh))
        self._fresh = None
        self._vacate()

    @property
    def owner(self) -> str:
        return "" if self._place is None else self._place.owner

    @property
    def unusable(self) -> Mapping[str, str]:
        return self._unusable

    async def start(self, realm: str = "") -> None:
        with self._mutex:
            if realm != self._realm and (self._place is not None or self._starting is not None):
                raise taken_for(self._realm, realm)
            if self._place is not None:
                return
            self._realm = realm
            starting, first = self._starting, self._starting is None
            if starting is None:
                starting = self._starting = concurrent.futures.Future()
        if not first:  # a concurrent first request was faster
            await asyncio.shield(asyncio.wrap_future(starting))
            return
        database, self._fresh = self._fresh or self._database(), None
        place = _Place(database, realm, self._runtime)
        try:
            await place.run(place.settle_in)
        except BaseException as error:
            self._starting = None
            place.leave()
            starting.set_exception(
                error if isinstance(error, JournalError) else JournalError("the start was interrupted")
            )
            raise
        place.keep()
        self._place, self._starting = place, None
        starting.set_result(None)

    def open(self, record: Record) -> Awaitable[None]:
        place = self._taken()
        charge_id, owner, *columns = _columns(record)
        values = (owner, charge_id, *columns, record.request_id)
        return _opened(record.id, place, place.queue(_Row(OPEN, values)))

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        place = self._taken()
        _, _, state, _, tries, due_at, closed_at, body = _columns(after)
        values = (state, tries, due_at, closed_at, body, before.id, before.owner, *states_of(before))
        return place.run(_Row(WRITE, values), durable=durable)

    def holds(self, record: Record) -> bool:
        return False  # a lease can run out while we live

    async def adopt(self, now: float) -> int:
        place = self._taken()
        found = 0
        while True:
            moved, foreign = await place.run(lambda connection: place.adopt(connection, now), durable=False)
            found += moved
            if moved < AT_A_TIME:
                break
        for name in [name for name in self._unusable if name.startswith(_MADE_AT) and name not in foreign]:
            self._unusable.pop(name, None)
        self._unusable.update(foreign)
        return found

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        place = self._taken()

        def select(connection: Connection) -> tuple[list[Record], dict[str, str]]:
            found: list[Record] = []
            unreadable: dict[str, str] = {}
            after = (float("-inf"), "")
            while left := limit - len(found):
                rows = connection.execute(DUE, (place.owner, now, *after, list(besides), left)).fetchall()
                for row in rows:
                    try:
                        found.append(_record(row))
                    except JournalError as error:
                        unreadable[f"charge {row[0]}"] = str(error)
                if len(rows) < left:
                    break
                after = (rows[-1][5], rows[-1][0])
            return found, unreadable

        found, unreadable = await place.run(select, durable=False)
        self._unusable.update(unreadable)
        return found

    async def next_due(self, now: float) -> float | None:
        place = self._taken()

        def select(connection: Connection) -> float | None:
            row = connection.execute(NEXT_DUE, (place.owner, now)).fetchone()
            return None if row is None else row[0]

        return await place.run(select, durable=False)

    async def unsettled(self, now: float) -> Mapping[str, tuple[int, float]]:
        place = self._taken()
        rows = await place.run(lambda connection: connection.execute(UNSETTLED, (place.owner,)).fetchall())
        return {state: (count, now - opened_at) for state, count, opened_at in rows}

    async def forget(self, closed_before: float, *, keep: int) -> int:
        """As any journal; what is kept is counted over all of the database's processes."""
        place = self._taken()
        newest_beyond = await place.run(
            lambda connection: connection.execute(BEYOND, (keep,)).fetchone(), durable=False
        )
        # No id is empty: so that is just before the first of that time.
        last = max((closed_before, ""), (newest_beyond or (float("-inf"), "")))
        forgotten = 0
        while deleted := await place.run(
            lambda connection: connection.execute(FORGET, (*last, AT_A_TIME)).rowcount, durable=False
        ):
            forgotten += deleted
        return forgotten

    async def pause(self) -> None:
        if self._place is not None:
            await self._place.pause()

    def resume(self) -> None:
        if self._place is not None:
            self._place.resume()

    async def close(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            await asyncio.wait([place.leave()], timeout=CLOSE_WITHIN_S)

    def _taken(self) -> "_Place":
        if self._place is None:
            raise JournalError("the journal is closed")
        return self._place


@dataclass(slots=True)
class _Row:
    """A charge that is opened or written: whether it was."""

    statement: LiteralString
    values: tuple[object, ...]

    def __call__(self, connection: Connection) -> bool:
        return connection.execute(self.statement, self.values).rowcount == 1


class _Database(PostgresDatabase):
    """What is opened and written at the same time goes in by one round trip each."""

    def _operate(self, connection: Connection, batch: list[Waiting[Connection]]) -> list[Any]:
        rows = [waiting.operation for waiting in batch if isinstance(waiting.operation, _Row)]
        if len(batch) == 1 or len(rows) < len(batch):
            return super()._operate(connection, batch)
        # What is opened here may be written here too, and never the other way round.
        for statement in (OPEN, WRITE):
            values = [row.values for row in rows if row.statement is statement]
            if values and self._timed(partial(_execute_many, statement, values), connection) != len(values):
                raise StorageError("not all of them were as they were read: each for itself")
        return [True] * len(batch)


def _execute_many(statement: LiteralString, values: list[tuple[object, ...]], connection: Connection) -> int:
    """Returns how many rows all of them changed together."""
    cursor = ClientCursor(connection)
    # One by one: only a statement that is short is taken apart but once.
    done = cursor.execute("; ".join(cursor.mogrify(statement, row) for row in values).encode())
    changed = done.rowcount
    while done.nextset():
        changed += done.rowcount
    return changed


class _Place:
    """A process's place in the journal.

    Attributes:
        owner: The name that its charges are under. Another one as soon as somebody else has taken them over.
    """

    def __init__(self, database: PostgresDatabase, realm: str, runtime: Runtime) -> None:
        self._database = database
        self._realm = realm
        self._runtime = runtime
        self._left = False
        self._paused = False
        self._stop_beating: Callable[[], object] = lambda: None
        self.owner = ""

    @property
    def name(self) -> str:
        return self._database.place

    def run(self, operation: Callable[[Connection], T], *, durable: bool = True) -> Awaitable[T]:
        # Not a coroutine: the write must be in the queue when this returns.
        return _translated(self.name, self.queue(operation, durable=durable))

    def queue(self, operation: Callable[[Connection], T], *, durable: bool = True) -> "asyncio.Future[T]":
        try:
            return self._database.run(operation, durable=durable)
        except StorageError as error:
            raise JournalError(str(error)) from error

    def keep(self) -> None:
        """From now on, renew the lease from a thread, which a blocked event loop does not hold up."""
        this = weakref.ref(self)

        def beat() -> None:
            place = this()
            if place is not None:
                place.beat()

        self._stop_beating = weakref.finalize(self, self._runtime.every(BEAT_EVERY_S, beat))

    def beat(self) -> None:
        """Renew the lease soon, from whichever thread; unless we pause."""
        if not self._paused:
            with contextlib.suppress(StorageError):  # very much is waiting; the next beat will do
                self._database.post(self.renew)

    async def pause(self) -> None:
        """Let the lease run out from now on; done when the thread has nothing under way."""
        self._paused = True
        with contextlib.suppress(RuntimeError):  # it is closed: there is no thread any more
            await self._database.idle()

    def resume(self) -> None:
        """Renew the lease, in the same transaction as whatever is asked in this turn of the event loop."""
        self._paused = False
        with contextlib.suppress(StorageError):
            self._database.run(self.renew, durable=False).add_done_callback(_heard)

    def leave(self) -> "asyncio.Future[None]":
        """Finish what is queued, give the place up and close the connection, whoever waits for it or not."""
        self._left = True
        self._stop_beating()
        if self.owner:
            with contextlib.suppress(StorageError):  # then the lease runs out
                self._database.post(self._give_up)
        closed = self._database.close()
        self._database.shutdown()
        return closed

    # In the thread, within a transaction. Each may run twice.

    def settle_in(self, connection: Connection) -> None:
        """Make the tables where they are missing, and take a place.

        Raises:
            JournalError: They are of another version.
        """
        try:
            prepare_postgres(connection, SCHEMA)
        except SchemaMismatch as error:
            raise JournalError(f"{self.name}: {error}") from error
        self._take(connection, cut_off=False)

    def renew(self, connection: Connection) -> bool:
        """Renew the lease; take a new place where ours is gone.

        Returns:
            Whether we have been in touch for long enough to take others for dead. After an outage of the
            database everybody's lease has run out: whoever is back first must not be taken for the only one.
        """
        if self._left:
            return False
        row = connection.execute(_RENEW, (LEASE_S, self.owner, GRACE_S)).fetchone()
        if row is None:
            self._take(connection, cut_off=True)
            return False
        return bool(row[0])

    def adopt(self, connection: Connection, now: float) -> tuple[int, dict[str, str]]:
        """Take over some of the charges of those whose lease has run out, due by `now`.

        Returns:
            How many, and what was made at other credits.
        """
        if not self.renew(connection):
            return 0, {}
        expired = connection.execute(_EXPIRED, (self.owner,)).fetchall()
        if not expired:
            return 0, {}
        owners = [owner for owner, _ in expired]
        of_our_realm = [owner for owner, realm in expired if realm == self._realm]
        moved = connection.execute(ADOPT, (self.owner, now, of_our_realm, AT_A_TIME)).rowcount
        connection.execute(_BURY, (owners,))
        foreign = {
            f"{_MADE_AT} {realm}": f"{left} unsettled charges were made at {realm}, and this app's credits are at"
            f" {self._realm}: they wait for an app with those credits on this journal"
            for realm, left in connection.execute(_FOREIGN, (owners, self._realm)).fetchall()
        }
        return moved, foreign

    def _take(self, connection: Connection, *, cut_off: bool) -> None:
        # If this is rolled back, the name stands nowhere, which the next beat finds out.
        self.owner = self._runtime.new_id()
        connection.execute(_TAKE, (self.owner, self._realm, LEASE_S, cut_off))

    def _give_up(self, connection: Connection) -> None:
        connection.execute(_GIVE_UP, (self.owner,))
        connection.execute(_BURY, ([self.owner],))


async def _translated(place: str, future: "asyncio.Future[T]") -> T:
    try:
        return await future
    except JournalError:
        raise
    except DatabaseError as error:
        raise JournalError(f"{place}: {first_line(error)}") from error
    except Exception as error:
        raise JournalError(str(error)) from error


async def _opened(charge_id: str, place: _Place, written: "asyncio.Future[bool]") -> None:
    if not await _translated(place.name, written):
        # Whoever comes next is to find us in place again, too.
        await place.run(place.renew, durable=False)
        raise PlaceLost(
            f"charge {charge_id} was not put on record: this process was not heard of for {LEASE_S:.0f} s, or its"
            " journal was closed, so that its place was given to others"
        )


def _heard(renewed: "asyncio.Future[bool]") -> None:
    """Whether it was renewed, the next charge that is opened finds out."""
    if not renewed.cancelled():
        renewed.exception()


def _columns(record: Record) -> tuple[str, str, str, float, int, float, float | None, str]:
    return (
        record.id,
        record.owner,
        str(record.state),
        record.opened_at,
        record.tries,
        record.due_at,
        record.closed_at,
        body_of(record),
    )


def _record(row: tuple[Any, ...]) -> Record:
    charge_id, owner, state, opened_at, tries, due_at, closed_at, body = row
    return record_of(
        charge_id,
        body,
        owner=owner,
        state=state,
        opened_at=opened_at,
        tries=tries,
        due_at=due_at,
        closed_at=closed_at,
    )


_MADE_AT = "charges made at"
_INHERITED: list[Any] = []
