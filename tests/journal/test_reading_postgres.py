"""Looking into a journal on PostgreSQL, as its writer left it."""

import asyncio
from dataclasses import replace

import psycopg
import pytest

from metered_billing.charge import Deducted, Reported, State, Unread
from metered_billing.journal import JournalError
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.journal.reading import PAGE, Seen, Wanted
from metered_billing.journal.reading_postgres import PostgresReader
from tests.scenes import NOON, charge
from tests.serving import free_port

pytestmark = pytest.mark.anyio


def seen(url: str, wanted: Wanted | None = None) -> list[Seen]:
    with PostgresReader(url) as reader:
        return list(reader.charges(wanted or Wanted()))


@pytest.mark.slow
class TestBadInput:
    def test_unreachable_database_is_an_error_without_secrets(self) -> None:
        """Where, and what is wrong."""
        port = free_port()
        with (
            pytest.raises(JournalError, match=f":{port}") as raised,
            PostgresReader(f"postgresql://me:secret@127.0.0.1:{port}/x"),
        ):
            pass
        assert "secret" not in str(raised.value)
        with pytest.raises(ValueError, match="postgresql://"):
            PostgresReader("mysql://me:secret@x")

    async def test_database_without_a_journal_is_an_error_and_stays_without(self, pg_url: str) -> None:
        """Nor is one made; a ledger's tables are no journal either."""
        for _ in range(2):
            with pytest.raises(JournalError, match="no journal at"), PostgresReader(pg_url):
                pass
        with psycopg.connect(pg_url, autocommit=True) as connection:
            connection.execute("CREATE SCHEMA metered_billing")
            connection.execute("CREATE TABLE metered_billing.versions (what text PRIMARY KEY, version int NOT NULL)")
        with pytest.raises(JournalError, match="no journal at"), PostgresReader(pg_url):
            pass
        with psycopg.connect(pg_url, autocommit=True) as connection:
            connection.execute("INSERT INTO metered_billing.versions VALUES ('journal', 99)")
        with pytest.raises(JournalError, match=r"version 99, .*: upgrade metered-billing"), PostgresReader(pg_url):
            pass


@pytest.mark.slow
async def test_charges_are_told_page_by_page_with_whether_their_process_lives(pg_url: str) -> None:
    """In the order of their ids; of the living, and of one whose place is given up."""
    living, dead = PostgresJournal(pg_url), PostgresJournal(pg_url)
    await living.start("https://credits")
    await dead.start("https://credits")
    records = [charge(request_id=f"req-{number % 3}") for number in range(PAGE + 10)]
    await asyncio.gather(
        *(living.open(replace(record, owner=living.owner)) for record in records[::2]),
        *(dead.open(replace(record, owner=dead.owner)) for record in records[1::2]),
    )
    await dead.close()
    found = seen(pg_url, Wanted(oldest_first=True))
    assert [one.record.id for one in found] == [record.id for record in records]
    assert [one.living for one in found] == [number % 2 == 0 for number in range(len(records))]
    assert [one.record.id for one in seen(pg_url)] == [record.id for record in reversed(records)]
    assert len(seen(pg_url, Wanted(name="req-1"))) == len(records) // 3
    assert not seen(pg_url, Wanted(name="' OR true --\x00"))
    with PostgresReader(pg_url) as reader:
        assert set(reader.realms) == {"https://credits"}
    await living.close()


@pytest.mark.slow
async def test_only_what_is_wanted_is_yielded_and_how_far_back_is_known(pg_url: str) -> None:
    """By state, finality and time; what cannot be read is named."""
    journal = PostgresJournal(pg_url)
    await journal.start()
    with PostgresReader(pg_url) as reader:
        assert reader.complete_since(NOON, 100) is None
    settled, opened, broken = charge(Deducted('t"é\x00'), Reported(10)), charge(opened_at=NOON + 100), charge()
    disputed = charge(Deducted("t"), Unread("x"), opened_at=NOON - 1_000)
    for record in (settled, opened, broken, disputed):
        await journal.open(replace(record, owner=journal.owner))
    with psycopg.connect(pg_url, autocommit=True) as connection:
        connection.execute("UPDATE metered_billing.charges SET body = '{' WHERE id = %s", (broken.id,))

    def ids(**wanted: object) -> set[str]:
        return {one.record.id for one in seen(pg_url, Wanted(**wanted))}  # type: ignore[arg-type]

    assert ids(states=frozenset({State.SETTLED, State.DISPUTED})) == {settled.id, disputed.id}
    assert ids(unsettled=True) == {opened.id}
    assert ids(since=NOON + 50) == {opened.id}
    assert ids(transaction_id='t"é\x00') == {settled.id}
    assert ids(transaction_id='t"') == set()
    with PostgresReader(pg_url) as reader:
        assert len(list(reader.charges(Wanted()))) == 3
        assert f"charge {broken.id}" in reader.unusable
        assert reader.complete_since(NOON - 5_000, 100) == disputed.opened_at
        assert reader.complete_since(NOON - 5_000, 1) == settled.closed_at
    await journal.close()


@pytest.mark.slow
async def test_reading_cannot_write(pg_url: str) -> None:
    """The transaction is read-only, whatever is asked."""
    journal = PostgresJournal(pg_url)
    await journal.start()
    with PostgresReader(pg_url) as reader, pytest.raises(JournalError, match="read-only"):
        reader._read("DELETE FROM metered_billing.charges RETURNING id")
    await journal.close()
