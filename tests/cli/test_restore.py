"""A ledger that was restored from a backup knows less than the apps' journals: what comes of that."""

import asyncio
import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from metered_billing import SqlCredits
from metered_billing.charge import Deducted, Record, Refunded, Reported, Unanswered, Unknown, Voided, step
from metered_billing.cli import repair
from metered_billing.cli.failure import Failure
from metered_billing.cli.repair import Repairs
from metered_billing.ledger import Ledger
from tests.ledger.asking import refund
from tests.scenes import charge, keep
from tests.serving import TOKENS, start_service

JOURNAL = Path("metered-billing-journal")
LEDGER = "sqlite:///credits.db"


def restore() -> None:
    """Put the backup at the lost ledger's place."""
    for lost in Path().glob("credits.db*"):
        lost.unlink()
    Path("copy.db").rename("credits.db")


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
    restore()

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
    restore()

    assert run("recover", CREDITS=LEDGER).out == "Nothing is left.\n"
    found = json.loads(run("reconcile", "--json", CREDITS=LEDGER).out)
    assert [each["kind"] for each in found["differences"]] == ["not refunded", "not undone"]
    assert f"by the refund {records[0].id}:refund" in run("explain", records[0].id).out
    assert "--repair gives back" in run("reconcile", CREDITS=LEDGER).out
    assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 80 credits\n"

    for back in ("2 charges. 13 credits", "0 charges. 0 credits"):
        done = run("reconcile", "--repair", CREDITS=LEDGER)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"Repaired: {back} went back.\n0 differences: 2 charges")
        assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 93 credits\n"
        asyncio.run(repeated(*records))  # by hand it is the same, and moves nothing more


@pytest.mark.slow
def test_who_may_only_read_repairs_nothing(run: Any, tmp_path: Path) -> None:
    """Each is still a difference, with the service's reason; with a token that may write, they are given back."""
    refunded, voided = lost_since_the_backup(run)
    with start_service(tmp_path, tokens=f"{TOKENS},eyes=read:tenant:acme") as (_, url):
        refused = run("reconcile", "--repair", "--json", CREDITS=url, TOKEN="eyes")
        assert refused.code == 3
        found = json.loads(refused.out)
        assert (found["difference_count"], found["repaired_count"], found["repaired_credits"]) == (2, 0, 0)
        assert set(found["not_repaired"]) == {refunded.id, voided.id}
        assert (
            f"{refunded.id} could not be repaired: HTTP 403"
            in run("reconcile", "--repair", CREDITS=url, TOKEN="eyes").err
        )
        given = json.loads(run("reconcile", "--repair", "--json", CREDITS=url, TOKEN="acmes").out)
        assert (given["difference_count"], given["repaired_count"], given["repaired_credits"]) == (0, 2, 13)
        assert given["not_repaired"] == {}


def test_what_only_a_person_can_decide_is_not_repaired(run: Any) -> None:
    """A deduction that the ledger has lost is not taken again."""
    run("grant", "100", "--tenant", "acme", "--user", "ann", "--reason", "test", CREDITS=LEDGER)
    assert run("backup", "copy.db").code == 0
    asyncio.run(since_the_backup())
    restore()
    done = run("reconcile", "--repair", CREDITS=LEDGER)
    assert done.code == 3
    assert done.out.startswith("Repaired: 0 charges. 0 credits went back.")
    assert "no deduction: " in done.out
    assert run("balance", "--tenant", "acme", "--user", "ann", CREDITS=LEDGER).out == "acme / ann: 100 credits\n"


def test_refund_that_somebody_began_to_give_by_hand_is_not_repaired(run: Any) -> None:
    """The whole of it besides would be too much."""
    settled, _ = lost_since_the_backup(run)
    asyncio.run(given_by_hand(settled))
    done = run("reconcile", "--repair", CREDITS=LEDGER)
    assert done.code == 3
    assert "not refunded: the journal has 3 refunded, the service 1" in done.out
    assert done.out.startswith("Repaired: 1 charges. 10 credits went back.")
    assert "--repair gives back" not in run("reconcile", CREDITS=LEDGER).out


def lost_since_the_backup(run: Any) -> tuple[Record, Record]:
    """A refund of 3 and a void of 10, which the restored ledger lacks."""
    run("grant", "100", "--tenant", "acme", "--user", "ann", "--reason", "test", CREDITS=LEDGER)
    records = asyncio.run(deducted_before_the_backup(run))
    restore()
    return records


def test_refund_that_is_given_by_hand_meanwhile_is_not_repaired(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at once more, just before it is sent."""
    settled, _ = lost_since_the_backup(run)
    looked: list[Any] = []
    go_on = Repairs._entries

    async def by_hand_first(repairs: Repairs, lost: Any) -> Any:
        if not looked:
            await given_by_hand(settled)
        looked.append(lost)
        return await go_on(repairs, lost)

    monkeypatch.setattr(Repairs, "_entries", by_hand_first)
    done = run("reconcile", "--repair", CREDITS=LEDGER)
    assert done.code == 3
    assert done.out.startswith("Repaired: 1 charges. 10 credits went back.")
    assert "the service 1" in done.out


def test_repair_is_told_by_what_is_there_whatever_was_heard(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that was lost is no failure where the credits are back."""
    lost_since_the_backup(run)
    go_on = SqlCredits.refund

    async def unheard(credits: SqlCredits, record: Record) -> Any:  # noqa: A002
        await go_on(credits, record)
        return Unanswered("HTTP 502")

    monkeypatch.setattr(SqlCredits, "refund", unheard)
    found = json.loads(run("reconcile", "--repair", "--json", CREDITS=LEDGER).out)
    assert (found["repaired_count"], found["repaired_credits"], found["not_repaired"]) == (2, 13, {})


def test_repair_that_breaks_off_says_how_far_it_came(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one does the rest."""
    lost_since_the_backup(run)
    monkeypatch.setattr(repair, "AT_ONCE", 1)
    looks: list[Any] = []
    go_on = Repairs._entries

    async def until_the_third(repairs: Repairs, lost: Any) -> Any:
        looks.append(lost)
        if len(looks) == 3:
            raise Failure("No answer from the service.")
        return await go_on(repairs, lost)

    with monkeypatch.context() as breaking:
        breaking.setattr(Repairs, "_entries", until_the_third)
        done = run("reconcile", "--repair", CREDITS=LEDGER)
    assert (done.code, done.out) == (1, "")
    assert "1 of 2 looked at. Repaired: 1 charges. 3 credits went back." in done.err
    assert (
        "No answer from the service. Repaired: 1 charges. 3 credits went back. Say it again for the rest." in done.err
    )
    assert run("reconcile", "--repair", CREDITS=LEDGER).out.startswith("Repaired: 1 charges. 10 credits went back.")


def test_what_is_repaired_need_not_be_listed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many other differences come before it; and it keeps the reason and the items that it had."""
    lost_since_the_backup(run)
    monkeypatch.setattr(importlib.import_module("metered_billing.cli.reconcile"), "LISTED", 1)
    gone = charge(Deducted("lost"), Reported(10), id="00000000-0000-7000-8000-000000000000", opened_at=time.time())
    asyncio.run(keep(JOURNAL, [gone], realm=f"sqlite:///{Path('credits.db').absolute()}"))
    done = run("reconcile", "--repair", CREDITS=LEDGER)
    assert done.out.startswith("Repaired: 2 charges. 13 credits went back.")
    assert "1 differences: " in done.out
    entries = json.loads(run("transactions", "--tenant", "acme", "--json", CREDITS=LEDGER).out)["items"]
    (refunded,) = [entry for entry in entries if entry["kind"] == "refund"]
    assert (refunded["reason"], refunded["items"]) == ("3 of 10 failed", ["img-3", "img-7"])


async def given_by_hand(settled: Record) -> None:
    assert settled.transaction_id is not None
    ledger = Ledger(LEDGER)
    by_hand = refund(settled.transaction_id, 1, key="by-hand")
    assert (await ledger.decide(by_hand)).done
    await ledger.close()


async def deducted_before_the_backup(run: Any) -> tuple[Record, Record]:
    """One charge that was refunded in part since, and one whose answer was lost and that was voided since."""
    credits = SqlCredits("credits.db")  # noqa: A001
    failed, unknown = charge(), charge()
    report = Reported(7, ("img-3", "img-7"), "3 of 10 failed")
    refunding = step(await taken(credits, failed), report, now=time.time())
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
