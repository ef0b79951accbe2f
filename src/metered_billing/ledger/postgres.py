"""The ledger in a PostgreSQL database, which several processes may move credits in at once.

Each transaction locks the rows of its accounts, in the order of accounts, before it decides anything: so two
processes never decide on one balance, and never wait for each other in a circle. What no account keeps apart
(one key, two users) meets in the unique index of `keys`: one is rolled back, runs again, and sees the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from metered_billing.commits import Committed, CommitUnknown, StorageError, Waiting
from metered_billing.ledger.commands import Command
from metered_billing.ledger.engine import Rows
from metered_billing.ledger.failures import LedgerBusy, LedgerCorrupt, LedgerNotOpened, LedgerUnavailable
from metered_billing.ledger.grouped import Work
from metered_billing.ledger.postgres_books import SCHEMA, PostgresBooks
from metered_billing.postgres import IN_THE_WAY, Connection, DatabaseError, IntegrityError, PostgresDatabase, first_line
from metered_billing.runtime import Runtime
from metered_billing.schemas import SchemaMismatch, prepare_postgres

T = TypeVar("T")


class _Database(PostgresDatabase):
    """Works that are waiting share one transaction, its locks, and its round trips."""

    def _operate(self, connection: Connection, batch: list[Waiting[Connection]]) -> list[Any]:
        works = [waiting.operation for waiting in batch if isinstance(waiting.operation, Work)]
        if len(works) < len(batch):  # one of them makes the tables
            return super()._operate(connection, batch)
        commands = [command for work in works for command in work.commands]
        books = self._timed(lambda on: PostgresBooks(on, commands), connection)
        done = [self._timed(work.do, books) for work in works]
        self._timed(PostgresBooks.flush, books)
        return done


class PostgresEngine:
    """An `Engine`.

    Raises:
        ValueError: The URL is none of PostgreSQL's; the text shows nothing of it.
    """

    def __init__(self, url: str, runtime: Runtime, committed: Committed | None = None) -> None:
        self._database = _Database(url, runtime, application_name="metered-billing ledger", committed=committed)
        self._prepared = False

    @property
    def place(self) -> str:
        return self._database.place

    async def start(self) -> None:
        """Connect, and make the tables where there are none.

        Raises:
            LedgerNotOpened: It cannot be reached, the role may not use it, or the tables are another version's.
        """
        try:
            await self._database.run(lambda connection: prepare_postgres(connection, SCHEMA))
        except SchemaMismatch as error:
            raise LedgerNotOpened(f"{self.place}: {error}") from None
        except StorageError as error:
            raise LedgerNotOpened(str(error)) from error
        except DatabaseError as error:
            raise LedgerNotOpened(f"{self.place} cannot be used: {first_line(error)}") from error
        self._prepared = True

    async def close(self) -> None:
        """Finish what is under way and disconnect."""
        self._prepared = False
        await self._database.close()

    async def run(self, work: Callable[[Rows], T], commands: Sequence[Command] = ()) -> T:
        if not self._prepared:
            await self.start()
        try:
            return await self._database.run(Work(work, commands, PostgresBooks), durable=bool(commands))
        except CommitUnknown as error:
            raise LedgerUnavailable(str(error)) from error
        except StorageError as error:
            raise LedgerNotOpened(str(error)) from error
        except IntegrityError as error:
            # The tables' own walls held where the rules did not: repeating it would never help.
            raise LedgerCorrupt(f"{self.place}: {first_line(error)}") from error
        except DatabaseError as error:
            # All of these come from before the commit, and were rolled back.
            failure = LedgerBusy if isinstance(error, IN_THE_WAY) else LedgerNotOpened
            raise failure(f"{self.place}: {first_line(error)}") from error
