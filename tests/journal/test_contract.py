"""What is true of any journal, on each engine: the promises of `Journal`."""

import asyncio
import dataclasses
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metered_billing import commits
from metered_billing.charge import FINAL, MAX_AMOUNT, Account, Record, State
from metered_billing.journal import Journal, JournalError, body_of, record_of
from tests.journal.engines import Engine, charge, everything, ids, moved

# Opening: on record, once, or an error.


async def test_charge_is_opened_once(ours: Journal) -> None:
    """The same id again is refused."""
    await ours.open(charge(ours))
    with pytest.raises(JournalError, match=r"(?i)unique"):
        await ours.open(charge(ours))
    assert len(await everything(ours)) == 1


async def test_charge_that_is_refused_stops_no_other(ours: Journal) -> None:
    """Those that are opened in the same moment are on record."""
    await ours.open(charge(ours))
    opened = (ours.open(charge(ours, name)) for name in ("c0", "c1", "c2"))
    results = await asyncio.gather(*opened, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), JournalError, type(None)]
    assert sorted(ids(await everything(ours))) == ["c0", "c1", "c2"]


async def test_what_no_database_takes_is_a_journal_error(ours: Journal) -> None:
    """A lone surrogate in a request's id, say: refused, as any write that fails."""
    with pytest.raises(JournalError, match="surrogates"):
        await ours.open(charge(ours, request_id="\ud800"))
    await ours.open(charge(ours))


async def test_cancelled_write_is_written(ours: Journal) -> None:
    """It was in the queue before anybody waited for it."""
    opening = asyncio.ensure_future(ours.open(charge(ours)))
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    assert list(ids(await everything(ours))) == ["c1"]


async def test_writes_happen_in_the_order_of_the_calls(ours: Journal) -> None:
    """Also where nobody waits for one before the next: each finds what the one before has written."""
    record = charge(ours)
    deducted = dataclasses.replace(record, state=State.DEDUCTED, transaction_id="tx")
    settled = dataclasses.replace(deducted, state=State.SETTLED, closed_at=200.0)
    opening = ours.open(record)
    first, second = ours.write(record, deducted, durable=False), ours.write(deducted, settled, durable=True)
    assert await second
    assert await first
    await opening
    assert await everything(ours) == []


async def test_full_queue_is_a_journal_error(ours: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once, not queued."""
    monkeypatch.setattr(commits, "MAX_WAITING", 0)
    with pytest.raises(JournalError, match="waiting already"):
        ours.open(charge(ours))
    with pytest.raises(JournalError, match="waiting already"):
        ours.write(charge(ours), charge(ours), durable=True)
    monkeypatch.undo()
    assert await everything(ours) == []


# Writing: one compare-and-set.


@pytest.mark.parametrize("change", [{"owner": "somebody"}, {"state": State.VOIDING}, {"id": "c2"}])
async def test_write_of_what_has_moved_changes_nothing(ours: Journal, change: dict[str, Any]) -> None:
    """Another owner, another state or no such charge: False, and what is on record stays."""
    record = charge(ours)
    await ours.open(record)
    seen = dataclasses.replace(record, **change)
    after = dataclasses.replace(seen, state=State.DEDUCTED, transaction_id="tx")
    assert not await ours.write(seen, after, durable=True)
    assert await everything(ours) == [record]


async def test_outcome_replaces_what_stands_as_opened_still(ours: Journal) -> None:
    """The confirmed deduction need not have come on record as such; it does not come afterwards either."""
    opened = charge(ours)
    await ours.open(opened)
    deducted = dataclasses.replace(opened, state=State.DEDUCTED, transaction_id="tx")
    refunding = dataclasses.replace(deducted, state=State.REFUNDING, refund_credits=2)
    results = await asyncio.gather(
        ours.write(deducted, refunding, durable=True), ours.write(opened, deducted, durable=False)
    )
    assert list(results) == [True, False]
    assert await everything(ours) == [refunding]


async def test_outcome_on_record_is_never_changed(ours: Journal) -> None:
    """Of two outcomes for one charge the first stands."""
    record = charge(ours, state=State.DEDUCTED)
    await ours.open(record)
    settled = dataclasses.replace(record, state=State.SETTLED, closed_at=200.0)
    lost = dataclasses.replace(record, state=State.REFUNDING, refund_credits=10)
    results = await asyncio.gather(ours.write(record, settled, durable=True), ours.write(record, lost, durable=True))
    assert list(results) == [True, False]
    assert await everything(ours) == []


async def test_charge_of_another_owner_is_not_ours(place: Engine, ours: Journal) -> None:
    """Somebody took it over behind our back: what is theirs, we neither read nor count nor write."""
    record = charge(ours)
    await ours.open(record)
    place.sql("UPDATE charges SET owner = 'somebody'")
    assert await everything(ours) == []
    assert await ours.next_due(0.0) is None
    assert await ours.unsettled(200.0) == {}
    assert not await ours.write(record, dataclasses.replace(record, state=State.VOIDING), durable=True)


# Reading.


async def test_due_is_in_order_without_the_running_ones_up_to_a_limit(ours: Journal) -> None:
    """The longest due first; not what is due later, final, or left out."""
    for n in range(8):
        await ours.open(charge(ours, f"c{n}", due_at=100.0 + (5 * n) % 8))
    await moved(ours, charge(ours, "c1"), state=State.VOIDED, closed_at=1.0)
    due = await ours.due(106.0, besides={"c0", "c5"}, limit=3)
    assert [(record.id, record.due_at) for record in due] == [("c2", 102.0), ("c7", 103.0), ("c4", 104.0)]
    assert await ours.next_due(106.0) == 107.0
    assert await ours.next_due(107.0) is None


async def test_due_at_the_same_time_is_in_the_order_of_the_ids(ours: Journal) -> None:
    """Bytes, not letters: on every engine the same, whatever the database's language."""
    for name in ("b", "B", "a-1", "a1", "A", "é", "z"):
        await ours.open(charge(ours, name))
    assert list(ids(await everything(ours))) == ["A", "B", "a-1", "a1", "b", "z", "é"]


async def test_unsettled_counts_by_state_with_the_oldest_age(ours: Journal) -> None:
    """Final charges do not count."""
    for n, state in enumerate([State.OPENED, State.OPENED, State.REFUNDING, State.SETTLED]):
        closed_at = 5.0 if state in FINAL else None
        await ours.open(charge(ours, f"c{n}", state=state, opened_at=100.0 + n, closed_at=closed_at))
    assert await ours.unsettled(200.0) == {"opened": (2, 100.0), "refunding": (1, 98.0)}


@pytest.mark.parametrize("column", ["body = '{'", "body = '{}'", "state = 'strange'", "body = ''"])
async def test_row_that_cannot_be_read_stops_no_other(place: Engine, ours: Journal, column: str) -> None:
    """It is reported by its charge's id, not deleted, and counts as unsettled."""
    for n in range(6):
        await ours.open(charge(ours, f"c{n}"))
    place.sql(f"UPDATE charges SET {column} WHERE id IN ('c0', 'c1', 'c3')")
    assert list(ids(await everything(ours))) == ["c2", "c4", "c5"]
    for limit in (1, 2, 3):
        assert list(ids(await ours.due(200.0, besides=(), limit=limit))) == ["c2", "c4", "c5"][:limit]
    assert sorted(ours.unusable) == ["charge c0", "charge c1", "charge c3"]
    assert "charge c1 cannot be read" in ours.unusable["charge c1"]
    assert sum(count for count, _ in (await ours.unsettled(200.0)).values()) == 6


TEXT = st.text(max_size=30)
ID = st.from_regex(r"[^\x00-\x1f\x7f]{1,40}", fullmatch=True)
TIME = st.floats(0, 1e12)
RECORDS = st.builds(
    lambda refund, **fields: Record(refund_credits=min(refund, fields["amount_credits"]), **fields),
    refund=st.integers(0, MAX_AMOUNT),
    id=ID,
    account=st.builds(Account, ID, st.none() | ID),
    amount_credits=st.integers(1, MAX_AMOUNT),
    units=st.integers(0, MAX_AMOUNT),
    state=st.sampled_from(State),
    opened_at=TIME,
    request_id=st.none() | st.just("") | ID,
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
    transaction_id=st.none() | TEXT,
    refund_items=st.lists(TEXT, max_size=3).map(tuple),
    reason=st.none() | TEXT,
    traceparent=st.none() | TEXT,
    tries=st.integers(0, 2**40),
    due_at=TIME,
    declined_at=st.none() | TIME,
    history=st.lists(st.tuples(TEXT, TIME), max_size=3).map(tuple),
)


async def test_of_many_written_at_once_the_stale_ones_alone_are_lost(ours: Journal) -> None:
    """They share commits, and each is told what became of itself; the same with one id that is opened twice."""
    records = [charge(ours, f"c{number:02}") for number in range(40)]
    opened = await asyncio.gather(*map(ours.open, [*records, records[7]]), return_exceptions=True)
    assert [number for number, error in enumerate(opened) if error is not None] == [40]
    stale = {3, 17, 39}
    befores = [
        dataclasses.replace(record, state=State.REFUNDING) if number in stale else record
        for number, record in enumerate(records)
    ]
    written = [ours.write(before, dataclasses.replace(before, state=State.VOIDING), durable=True) for before in befores]
    assert await asyncio.gather(*written) == [number not in stale for number in range(40)]
    found = {record.id: record.state for record in await everything(ours)}
    assert found == {
        record.id: State.OPENED if number in stale else State.VOIDING for number, record in enumerate(records)
    }


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=20
)
@given(pairs=st.lists(st.tuples(RECORDS, RECORDS), max_size=5, unique_by=lambda pair: pair[0].id))
async def test_record_comes_back_exactly_as_it_was(
    place: Engine, ours: Journal, pairs: list[tuple[Record, Record]]
) -> None:
    """Every field, opened and rewritten: empty strings, zero, and midnight of 1 January 1970 too."""
    place.sql("DELETE FROM charges")
    opened = {record.id: dataclasses.replace(record, owner=ours.owner, closed_at=None) for record, _ in pairs}
    await asyncio.gather(*map(ours.open, opened.values()))
    assert {record.id: record for record in await everything(ours)} == opened
    changed = {
        record.id: dataclasses.replace(
            after, id=record.id, owner=ours.owner, opened_at=record.opened_at, request_id=record.request_id
        )
        for record, after in pairs
    }
    written = [ours.write(opened[name], changed[name], durable=False) for name in opened]
    assert all(await asyncio.gather(*written))
    assert {record.id: record for record in await everything(ours)} == changed


@given(record=RECORDS, closed_at=st.none() | TIME)
def test_body_and_columns_are_the_whole_record(record: Record, closed_at: float | None) -> None:
    """Nothing is lost between them."""
    record = dataclasses.replace(record, owner="me", closed_at=closed_at)
    assert record == record_of(
        record.id,
        body_of(record),
        owner=record.owner,
        state=str(record.state),
        opened_at=record.opened_at,
        tries=record.tries,
        due_at=record.due_at,
        closed_at=record.closed_at,
    )


@pytest.mark.parametrize(
    "body",
    ["", "{", "null", "[]", "1", '"text"', "{}", '{"tenant_id": ""}', "[" * 100_000],
)
def test_body_that_is_none_is_a_journal_error(body: str) -> None:
    """It names the charge."""
    with pytest.raises(JournalError, match="charge c1 cannot be read"):
        record_of("c1", body, owner="me", state="opened", opened_at=1, tries=0, due_at=1, closed_at=None)


# Forgetting.


@pytest.mark.parametrize("keep", [0, 3, 4, 9])
async def test_forget_keeps_the_newest(place: Engine, ours: Journal, keep: int) -> None:
    """Exactly so many, also where they became final in the same instant; unsettled and disputed ones stay."""
    for n in range(9):
        closed_at = 100.0 if n < 5 else 100.0 + n
        await ours.open(charge(ours, f"c{n}", state=State.SETTLED, closed_at=closed_at))
    for n in range(4):
        await ours.open(charge(ours, f"d{n}", state=State.DISPUTED, closed_at=1.0 + 500 * (n % 2)))
    await ours.open(charge(ours, "o"))
    forgotten = await ours.forget(50.0, keep=keep)
    kept = [row[0] for row in place.sql("SELECT id FROM charges WHERE state = 'settled' ORDER BY id")]
    assert forgotten == 9 - keep
    assert kept == [f"c{n}" for n in range(9 - keep, 9)]
    assert len(place.sql("SELECT id FROM charges WHERE state IN ('disputed', 'opened')")) == 5


async def test_forget_deletes_what_is_old_a_little_at_a_time(ours: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number, each deletion is small."""
    monkeypatch.setattr(f"{type(ours).__module__}.AT_A_TIME", 2)
    for n in range(7):
        await ours.open(charge(ours, f"c{n}", state=State.SETTLED, closed_at=float(n)))
    assert await ours.forget(5.0, keep=100) == 5
    assert await ours.forget(5.0, keep=100) == 0


# Starting and closing.


async def test_journal_that_is_not_started_refuses(place: Engine) -> None:
    """Before the first start, and after close, until it is started again under another name."""
    journal = place.journal()
    assert journal.owner == ""
    names = set()
    for _ in range(2):
        with pytest.raises(JournalError, match="closed"):
            journal.open(charge(journal))
        with pytest.raises(JournalError, match="closed"):
            journal.write(charge(journal), charge(journal), durable=True)
        for call in (
            journal.adopt(0),
            everything(journal),
            journal.next_due(0),
            journal.unsettled(0),
            journal.forget(0, keep=0),
        ):
            with pytest.raises(JournalError, match="closed"):
                await call
        await journal.start("")
        await journal.start("")
        names.add(journal.owner)
        await journal.close()
        await journal.close()
        assert journal.owner == ""
    assert len(names) == 2


async def test_concurrent_starts_take_one_place(place: Engine) -> None:
    """Fifty first requests at once: all wait until it is there, under one name."""
    journal = place.journal()

    async def start() -> str:
        await journal.start("")
        return journal.owner

    assert len(set(await asyncio.gather(*(start() for _ in range(50))))) == 1


async def test_interrupted_start_can_be_repeated(place: Engine) -> None:
    """Whoever waited for it is told, and the place is free for the next try."""
    journal = place.journal()
    first = asyncio.ensure_future(journal.start(""))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(journal.start(""))
    await asyncio.sleep(0)
    first.cancel()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, JournalError]
    await journal.start("")
    await journal.open(charge(journal))


async def test_close_finishes_what_is_queued(place: Engine, ours: Journal) -> None:
    """Whoever waits for it is told, and it is on record."""
    record = charge(ours)
    opening = asyncio.ensure_future(ours.open(record))
    await asyncio.sleep(0)
    written = ours.write(record, dataclasses.replace(record, state=State.VOIDING), durable=False)
    await ours.close()
    await opening
    assert await written
    assert place.sql("SELECT id, state FROM charges") == [("c1", "voiding")]


async def test_charge_from_before_a_restart_is_not_ours_any_more(ours: Journal) -> None:
    """A request that outlived a drain cannot write; what it had on record is due under the new name."""
    before = charge(ours)
    await ours.open(before)
    unopened = charge(ours, "c2")
    await ours.close()
    await ours.start("")
    await ours.adopt(50.0)
    assert ours.owner != before.owner
    assert not await ours.write(before, dataclasses.replace(before, state=State.DEDUCTED), durable=False)
    with pytest.raises(JournalError, match="journal was closed"):
        await ours.open(unopened)
    assert [(record.id, record.owner) for record in await everything(ours)] == [("c1", ours.owner)]


# Adopting.


@pytest.mark.parametrize("how", ["die", "close"])
async def test_what_another_left_is_adopted_and_due_at_once(place: Engine, ours: Journal, how: str) -> None:
    """Under our name, whenever it was due; what is final is not counted. The second time there is nothing."""
    other = place.journal()
    await other.start("")
    for state in State:
        closed_at = 5.0 if state in FINAL else None
        await other.open(charge(other, str(state), state=state, due_at=1e9, closed_at=closed_at))
    left = await everything(other)
    if how == "die":
        place.kill(other)
    else:
        await other.close()
    await ours.open(charge(ours, "own", due_at=5.0))
    assert await ours.adopt(7.0) == len(left) == 4
    assert await ours.next_due(5.0) == 7.0
    due = await ours.due(7.0, besides=(), limit=100)
    assert due == [
        charge(ours, "own", due_at=5.0),
        *(dataclasses.replace(record, owner=due[1].owner, due_at=7.0) for record in left),
    ]
    assert list(ids(await ours.due(7.0, besides=(), limit=1))) == ["own"]
    assert await ours.unsettled(101.0) == {
        "opened": (2, 1.0),
        "deducted": (1, 1.0),
        "refunding": (1, 1.0),
        "voiding": (1, 1.0),
    }
    assert await ours.adopt(8.0) == 0
    for record in due:
        await moved(ours, record, state=State.VOIDED, closed_at=8.0)
    assert await ours.adopt(9.0) == 0
    assert await ours.unsettled(101.0) == {}


async def test_who_was_adopted_from_cannot_write(place: Engine, ours: Journal) -> None:
    """Its outcome comes too late: what its successor has on record decides."""
    other = place.journal()
    await other.start("")
    record = charge(other, state=State.DEDUCTED)
    await other.open(record)
    await other.close()
    await ours.adopt(7.0)
    [found] = await everything(ours)
    settled = dataclasses.replace(record, state=State.SETTLED, closed_at=8.0)
    assert not await ours.write(record, settled, durable=True)
    await moved(ours, found, state=State.REFUNDING, refund_credits=10)


async def test_living_journal_is_left_alone(place: Engine, ours: Journal) -> None:
    """Neither sees, nor adopts, what is the other's."""
    other = place.journal()
    await other.start("")
    record = charge(ours)
    await ours.open(record)
    assert await other.adopt(1.0) == 0
    assert await everything(other) == []
    assert other.unusable == {}
    await moved(ours, record, state=State.DEDUCTED)


async def test_one_of_two_that_adopt_at_once_gets_each_charge(place: Engine, ours: Journal) -> None:
    """Both look at what a dead process left, at the same time: nothing is left, nothing is anybody's twice."""
    dead, other = place.journal(), place.journal()
    await dead.start("")
    await other.start("")
    await asyncio.gather(*(dead.open(charge(dead, f"c{n:02}")) for n in range(40)))
    place.kill(dead)
    counts = await asyncio.gather(ours.adopt(1.0), other.adopt(1.0), ours.adopt(1.0), other.adopt(1.0))
    mine, theirs = await everything(ours), await everything(other)
    assert sum(counts) == 40
    assert sorted([*ids(mine), *ids(theirs)]) == [f"c{n:02}" for n in range(40)]


async def test_charges_of_other_credits_are_left_alone_and_reported(place: Engine) -> None:
    """A charge can only be undone where it was made: two apps may share a journal by mistake."""
    theirs, ours = place.journal(), place.journal()
    await theirs.start("http://theirs")
    record = charge(theirs, state=State.DEDUCTED)
    await theirs.open(record)
    await theirs.close()
    await ours.start("http://ours")
    for _ in range(2):
        assert await ours.adopt(1000.0) == 0
        assert await everything(ours) == []
        [told] = ours.unusable.values()
        assert "1 unsettled charges" in told
        assert "made at http://theirs" in told
        assert "http://ours" in told
    again = place.journal()
    await again.start("http://theirs")
    await again.adopt(1000.0)
    assert list(ids(await everything(again))) == [record.id]
    assert again.unusable == {}


async def test_place_with_nothing_left_to_do_serves_other_credits(place: Engine) -> None:
    """A service that has moved needs no new journal, once everything is settled."""
    journal = place.journal()
    for realm in ("http://old", "http://new", "http://new"):
        await journal.start(realm)
        await journal.adopt(1.0)
        assert journal.unusable == {}
        await journal.close()


async def test_place_that_is_open_serves_no_other_credits(place: Engine) -> None:
    """Two apps with one journal and different credits would undo each other's charges where they never happened."""
    journal = place.journal()
    await journal.start("http://one")
    await journal.start("http://one")
    with pytest.raises(JournalError, match=r"open for the credits at http://one: those at http://other need"):
        await journal.start("http://other")
    await journal.open(charge(journal))
    await journal.close()


# Several event loops.


async def test_loops_in_several_threads_share_a_journal(ours: Journal) -> None:
    """Each hears of its own writes, on its own loop."""
    errors: list[BaseException] = []

    async def write(begin: int) -> None:
        for n in range(begin, begin + 20):
            record = charge(ours, f"c{n}")
            await ours.open(record)
            await moved(ours, record, state=State.DEDUCTED)
            await ours.adopt(1.0)

    def elsewhere(begin: int) -> None:
        try:
            asyncio.run(write(begin))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=elsewhere, args=(begin,)) for begin in (100, 200)]
    for thread in threads:
        thread.start()
    await write(300)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert errors == []
    assert len(await everything(ours)) == 60
