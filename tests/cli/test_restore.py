"""A ledger that was restored from a backup knows less than the apps' journals: what comes of that."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from metered_billing import SqlCredits
from metered_billing.charge import Deducted, Record, Refunded, Reported, Unknown, Voided, step
from tests.scenes import charge, keep

JOURNAL = Path("metered-billing-journal")
LEDGER = "sqlite:///credits.db"


async def taken(credits: SqlCredits, record: Record) -> Record:  # noqa: A002
    answer = await credits.deduct(record)
    assert isinstance(answer, Deducted)
    return step(record, answer, now=record.opened_at)


async def since_the_backup() -> dict[str, Record]:
    """One charge of each kind: settled, to be refunded, at work, asked for."""
    credits = SqlCredits("credits.db")  # noqa: A001
    settled, refunding, at_work = [await taken(credits, charge()) for _ in range(3)]
    settled, refunding = (step(record, Reported(7), now=time.time()) for record in (settled, refunding))
    answer = await credits.refund(settled)
    assert isinstance(answer, Refunded)
    settled = step(settled, answer, now=time.time())
    asked = charge()
    await credits.deduct(asked)
    records = {"settled": settled, "refunding": refunding, "at work": at_work, "asked": asked}
    await keep(JOURNAL, list(records.values()), realm=credits.realm)
    await credits.aclose()
    return records


def test_restored_ledger_gives_back_nothing_that_it_did_not_take(run: Any) -> None:
    """What it lacks is disputed or voided, no credit moves, and reconcile names each charge."""
    run("grant", "100", "--tenant", "acme", "--user", "ann", "--reason", "test", CREDITS=LEDGER)
    assert run("backup", "copy.db").code == 0
    records = asyncio.run(since_the_backup())
    assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 63 credits\n"
    for lost in Path().glob("credits.db*"):
        lost.unlink()
    Path("copy.db").rename("credits.db")

    recovered = run("recover", CREDITS=LEDGER)
    assert recovered.code == 3
    assert "Now final: 2 disputed, 1 voided. 0 credits went back." in recovered.out
    assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 100 credits\n"

    reconciled = run("reconcile", "--json", CREDITS=LEDGER)
    assert reconciled.code == 3
    found = json.loads(reconciled.out)
    missing = {each["charge_id"]: each["kind"] for each in found["differences"]}
    assert missing[records["settled"].id] == "no deduction"
    # What nobody can give back is for a person; a deduction that is not there is over.
    listed = json.loads(run("charges", "list", "--json").out)["items"]
    states = {each["id"]: each["state"] for each in listed}
    assert {name: states[record.id] for name, record in records.items()} == {
        "settled": "settled",
        "refunding": "disputed",
        "at work": "disputed",
        "asked": "voided",
    }
    assert not isinstance(asyncio.run(late(records["asked"])), Deducted)
    assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 100 credits\n"


def test_refunds_and_voids_since_the_backup_are_named_and_can_be_repeated(run: Any) -> None:
    """The journal has them as done, so nothing repeats them by itself; under their keys they take effect once."""
    run("grant", "100", "--tenant", "acme", "--user", "ann", "--reason", "test", CREDITS=LEDGER)
    records = asyncio.run(deducted_before_the_backup(run))
    assert run("reconcile", CREDITS=LEDGER).code == 0
    Path("copy.db").rename("credits.db")
    for lost in Path().glob("credits.db-*"):
        lost.unlink()

    assert run("recover", CREDITS=LEDGER).out == "Nothing is left.\n"
    found = json.loads(run("reconcile", "--json", CREDITS=LEDGER).out)
    assert [each["kind"] for each in found["differences"]] == ["not refunded", "not undone"]
    assert f"by the refund {records[0].id}:refund" in run("explain", records[0].id).out
    for _ in range(2):
        asyncio.run(repeated(*records))
        assert run("reconcile", CREDITS=LEDGER).out.startswith("0 differences: 2 charges")
        assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 93 credits\n"


async def deducted_before_the_backup(run: Any) -> tuple[Record, Record]:
    """One charge that was refunded in part since, and one whose answer was lost and that was voided since."""
    credits = SqlCredits("credits.db")  # noqa: A001
    failed, unknown = charge(), charge()
    refunding = step(await taken(credits, failed), Reported(7), now=time.time())
    await credits.deduct(unknown)
    assert (await asyncio.to_thread(run, "backup", "copy.db")).code == 0
    await credits.aclose()
    refunded, voided = await repeated(refunding, unknown)
    settled = step(refunding, refunded, now=time.time())
    undone = step(step(unknown, Unknown("lost"), now=time.time()), voided, now=time.time())
    await keep(JOURNAL, [settled, undone], realm=credits.realm)
    return settled, undone


async def repeated(settled: Record, undone: Record) -> tuple[Refunded, Voided]:
    credits = SqlCredits("credits.db")  # noqa: A001
    try:
        refunded, voided = await credits.refund(settled), await credits.void(undone)
    finally:
        await credits.aclose()
    assert isinstance(refunded, Refunded)
    assert isinstance(voided, Voided)
    return refunded, voided


async def late(record: Record) -> object:
    """A copy of its deduction that was under way all the time."""
    credits = SqlCredits("credits.db")  # noqa: A001
    try:
        return await credits.deduct(record)
    finally:
        await credits.aclose()
