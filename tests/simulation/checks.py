"""The promises, checked charge by charge when everything is quiet."""

import sqlite3
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from metered_billing.biller import JOURNAL_WITHIN_S
from metered_billing.charge import Account, Record, State
from metered_billing.journal.rows import COLUMN_LIST, record_in
from tests.simulation.app import Story

if TYPE_CHECKING:
    from tests.simulation.world import World


def check(world: "World", entries: list[dict[str, Any]], balances: dict[Account, int]) -> None:
    """Compare ledger, journal and what clients saw. What does not hold becomes a problem of the world's."""
    records = records_of(world)
    for record in records.values():
        for occasion, _ in record.history:
            world.coverage["transition", occasion] += 1
    _sums(world, entries, balances)
    by_request: dict[str, list[dict[str, Any]]] = defaultdict(list)
    of_transaction: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry["kind"] == "deduction":
            by_request[entry["request_id"]].append(entry)
        elif entry["kind"] != "grant":
            of_transaction[entry["transaction_id"]].append(entry)
    for story in world.stories.values():
        deductions = by_request.pop(story.id, [])
        if len(deductions) > 1:
            world.problem(f"{story.id} was deducted {len(deductions)} times")
            continue
        deduction = deductions[0] if deductions else None
        back = of_transaction[deduction["transaction_id"]] if deduction else []
        _answer(world, story)
        _charge(world, story, deduction, back, records.get(story.charge_id or ""))
    if by_request:
        world.problem(f"deductions of no request: {dict(by_request)}")


def records_of(world: "World") -> dict[str, Record]:
    """All records of all the journal's files."""
    found: dict[str, Record] = {}
    for path in sorted((world.directory / "journal").glob("*.db")):
        connection = sqlite3.connect(path)
        if connection.execute("PRAGMA user_version").fetchone() == (0,):
            connection.close()  # its process died as it made it
            continue
        for row in connection.execute(f"SELECT {COLUMN_LIST} FROM charges ORDER BY id"):
            record = record_in(row)
            if record.id in found:
                world.problem(f"{record.id} stands in two files")
            found[record.id] = record
        connection.close()
    return found


def _sums(world: "World", entries: list[dict[str, Any]], balances: dict[Account, int]) -> None:
    for account, balance in balances.items():
        moved = sum(entry["amount"] for entry in entries if _account(entry) == account)
        if moved != balance or balance < 0:
            world.problem(f"{account} holds {balance}, and its entries come to {moved}")


def _account(entry: dict[str, Any]) -> Account:
    return Account(entry["tenant_id"], entry["user_id"])


def _charge(
    world: "World",
    story: Story,
    deduction: dict[str, Any] | None,
    back: list[dict[str, Any]],
    record: Record | None,
) -> None:
    kinds = [entry["kind"] for entry in back]
    returned = sum(entry["amount"] for entry in back)
    deducted = -deduction["amount"] if deduction else 0
    kept = deducted - returned
    say = f"{story.id} ({story.kind}, {story.charge_id}): {deducted} deducted, {returned} back"
    meddled = story.charge_id in world.meddled
    if deduction is not None:
        if any(_account(entry) != story.account for entry in (deduction, *back)):
            world.problem(f"{say}: of another account")
        if deducted != story.amount or deduction["idempotency_key"] != story.charge_id:
            world.problem(f"{say}: not what was asked for")
    if not meddled and (kinds.count("refund") > 1 or kinds.count("void") > 1):
        world.problem(f"{say}: by {kinds}")
    if record is None:
        if deduction is not None:
            world.problem(f"{say}: nothing is on record")
        return
    if not record.final:
        world.problem(f"{say}: on record as {record.state}")
    if meddled:
        # A person has had a hand in it: what counts is that it came to an end, and never more went back.
        if returned > deducted:
            world.problem(f"{say}: more than all")
        return
    if record.id in world.refused and record.state is State.DISPUTED:
        # The refund or void that the service has refused for good is still due.
        if returned not in (0, record.refund_credits or deducted):
            world.problem(f"{say}: {record.refund_credits} disputed")
        return
    if kept != record.kept_credits:
        world.problem(f"{say}: {record.kept_credits} kept on record, {record.state}")
    if kept not in (allowed := _allowed(world, story)):
        world.problem(f"{say}: kept {kept}, and not one of {sorted(allowed)}; on record as {record.state}")
    if record.state is State.DISPUTED and story.kind != "unread":
        world.problem(f"{say}: disputed, {record.reason}")
    outcome = world.outcomes.get(record.id)
    if outcome is not None and kept != outcome.kept_credits:
        world.problem(f"{say}: {outcome.kept_credits} were to be kept, by the outcome on record")


def _allowed(world: "World", story: Story) -> set[int]:
    """What may be kept of a charge, in credits."""
    if not story.ran:
        return {0}
    whole = story.earns()
    if story.charge_id in world.unwritten:
        # The journal failed at the outcome: it came on record all the same, or everything went back.
        return {0, whole, *(story.earns_by(lines) for lines in (story.lines, story.lines + 1) if story.streams)}
    if not story.completed and story.process is not None and story.process.ended_in_chaos:
        # It may have died between the end of the request and the write of its outcome.
        return _unfinished(story, whole) | {0}
    if story.completed and story.left_at is None and story.cancelled_at is None and story.killed_at is None:
        return {whole}
    return _unfinished(story, whole)


def _unfinished(story: Story, whole: int) -> set[int]:
    """What may be kept where the response did not come to its end, or something struck at the end."""
    returned = story.returned_at is not None
    if story.killed_at is not None:
        # Whether the outcome came on record before the kill, the record says.
        cut = {story.earns_by(lines) for lines in (story.lines, story.lines + 1)} if story.streams else set()
        return {0} | ({whole} if returned else set()) | cut
    if story.streams:
        lines = range(story.lines, story.units + 1) if story.left_at is not None else (story.lines, story.lines + 1)
        return {story.earns_by(count) for count in lines} | ({whole} if returned else set())
    if story.cancelled_at is not None:
        return {0} | ({whole} if returned else set())
    if story.left_at is not None:
        if story.on_disconnect == "keep":
            return {whole}
        if story.returned_at is not None and story.left_at > story.returned_at:
            return {0, whole}
        return {0} if story.kind != "unread" else {0, whole}
    return {whole}


def _answer(world: "World", story: Story) -> None:
    """What the client was answered."""
    if story.process is None:
        return
    if story.status == 402 and story.charge_id not in world.heard_402:
        world.problem(f"{story.id} is answered 402, and nobody declined it")
    undisturbed = story.left_at is None and story.cancelled_at is None and story.killed_at is None
    if not undisturbed:
        return
    if not story.ran:
        if story.status not in (402, 500, 503):
            world.problem(f"{story.id} is answered {story.status}, and did not run")
        return
    if story.returned_at is None:
        world.problem(f"{story.id} ran, and did not return")
        return
    if story.kind == "broken stream":
        return
    if not story.completed or story.last_at is None:
        world.problem(f"{story.id} has its answer withheld")
        return
    delay_s = story.last_at - story.returned_at - 2 * story.send_s
    if delay_s > JOURNAL_WITHIN_S + 1.0:
        world.problem(f"{story.id} is answered {delay_s:.1f} s late")
    expected = story.expected_body()
    if expected is not None and (story.status != 200 or story.body != expected):
        world.problem(f"{story.id} is answered {story.status} {story.body!r}")
    status = {"raises": 500, "refuses": 422, "error": 500}.get(story.kind)
    if status is not None and story.status != status:
        world.problem(f"{story.id} is answered {story.status}, and not {status}")
