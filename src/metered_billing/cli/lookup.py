"""What the credits service has of a charge, and what that says beside the journal."""

from collections.abc import AsyncIterator, Collection
from typing import Any

from metered_billing.charge import Found, NoLookup, NotFound, Record, State, Unanswered
from metered_billing.cli.failure import Failure
from metered_billing.cli.options import secret
from metered_billing.cli.source import Source, open_source
from metered_billing.credits.contract import Contract
from metered_billing.explain import in_words
from metered_billing.ledger.store import MAX_PAGE
from metered_billing.reconcile import SLACK_S, Entry, compare, entry_of, happened_at, net_of
from metered_billing.runtime import Runtime
from metered_billing.settings import open_credits
from metered_billing.telemetry import Telemetry

NOT_A_SERVICE = "That is an answer, but not a credits service's."


class Looked:
    """What is known of a charge from the service, too.

    Attributes:
        says: In words: what is there, what is not, and what to do.
        agrees: Whether that is what the journal says; None: it cannot be told.
        entries: Of its deduction; None where only the deduction itself could be looked for.
    """

    def __init__(self, says: str, agrees: bool | None, entries: list[Entry] | None = None) -> None:
        self.says = says
        self.agrees = agrees
        self.entries = entries

    def to_json(self) -> dict[str, Any]:
        return {
            "entries": [
                {"id": entry.id, "kind": entry.kind, "amount": entry.amount, "created_at": entry.created_at}
                for entry in self.entries or ()
            ],
            "net": None if self.entries is None else net_of(self.entries),
            "agrees": self.agrees,
            "verdict": self.says,
        }


async def look_up(
    url: str, token: str | None, contract: Contract | None, records: list[Record], realms: Collection[str]
) -> dict[str, Looked]:
    """What the service has of these charges, by their ids.

    Args:
        contract: For a service of another shape: it is asked for each deduction, and for nothing else.
        realms: Where the journal's charges were made.

    Raises:
        Failure: No answer, or not a credits service's.
    """
    if contract is not None:
        return await _look_through(url, token, contract, records, realms)
    async with open_source(url, token) as source:
        return {record.id: await _look(source, record, realms) for record in records}


async def _look(source: Source, record: Record, realms: Collection[str]) -> Looked:
    transaction_id = record.transaction_id
    if transaction_id is None:
        # The answer may have been lost: then only its key tells.
        account = record.account
        async for entry in entries_since(source, account.tenant_id, account.user_id, record.opened_at - SLACK_S):
            if entry.kind == "deduction" and entry.idempotency_key == record.id:
                transaction_id = entry.transaction_id
    entries = [] if transaction_id is None else await entries_of(source, transaction_id)
    if not entries:
        return _absent(record, realms)
    kept, difference = f"{in_words(net_of(entries))} kept", compare(record, entries)
    if record.transaction_id is None:
        kept += f" in {transaction_id}, of which the journal has no answer"
    if difference is not None:
        return Looked(f"{kept}: {difference.kind}: {difference.says}", False, entries)
    certain = record.final and record.state is not State.DISPUTED
    return Looked(f"{kept}: {'journal and service agree' if certain else 'nothing to compare yet'}", True, entries)


async def _look_through(
    url: str, token: str | None, contract: Contract, records: list[Record], realms: Collection[str]
) -> dict[str, Looked]:
    """Look for the deductions through a mapping."""
    try:
        service = open_credits(url, secret(token), Runtime(), Silent(), contract=contract)
    except ValueError as error:
        raise Failure(f"{error}.", 2) from None
    looked: dict[str, Looked] = {}
    await service.start()
    try:
        for record in records:
            answer = await service.find(record)
            if isinstance(answer, Unanswered):
                raise Failure(f"{service.realm} does not say whether it has charge {record.id}: {answer.reason}.")
            looked[record.id] = _mapped(record, answer, realms)
    finally:
        await service.aclose()
    return looked


def _mapped(record: Record, answer: Found | NotFound | NoLookup, realms: Collection[str]) -> Looked:
    name = record.transaction_id or f"the key {record.id}"
    if isinstance(answer, NotFound):
        return _absent(record, realms)
    if isinstance(answer, NoLookup):
        says = f"its mapping has no list to look in, so the journal alone says this. Look up {name} in its own records"
        return Looked(says, None)
    if record.transaction_id not in (None, answer.transaction_id):
        says = f"other deduction: the journal has transaction {name}, the service {answer.transaction_id}"
        return Looked(says, False)
    there = f"the deduction is there, {answer.transaction_id}"
    if record.transaction_id is None:
        there += ", of which the journal has no answer"
    says = f"{there}. What came back of it, a mapping does not say: look it up in its own records"
    return Looked(says, None)


def _absent(record: Record, realms: Collection[str]) -> Looked:
    """The service has no deduction of this charge."""
    if record.transaction_id is not None:
        where = f"at {' or '.join(sorted(realms))}" if any(realms) else "where the app's credits are"
        says = (
            f"no such transaction. The journal has the answer: {in_words(record.amount_credits)} were taken, {where}."
            f" If that is another place, name it (--credits); if the token may not see {record.account.tenant_id}, give"
            " one that may (--token). If neither, the service's ledger has lost it, as one does that was put back"
            " from a backup: `metered-billing reconcile` lists all that is lost"
        )
        return Looked(says, False, [])
    nothing = "no deduction under the key of this charge: nothing was taken"
    if record.state is State.DISPUTED:
        return Looked(f"{nothing}, and there is nothing to give back", True, [])
    if record.final:
        return Looked(f"{nothing}: journal and service agree", True, [])
    return Looked(f"{nothing} so far. If it arrives late it is undone: see `pending`", True, [])


async def entries_of(source: Source, transaction_id: str) -> list[Entry]:
    """A deduction and what came back of it; none where the service has no such deduction.

    Raises:
        Failure: No answer, or not a credits service's.
    """
    found = await source.transaction(transaction_id)
    if found is None:
        return []
    try:
        return [entry_of(found), *map(entry_of, found["refunds"])]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure(NOT_A_SERVICE) from None


async def entries_since(source: Source, tenant: str, user: str | None, since: float) -> AsyncIterator[Entry]:
    """The tenant's entries since then, or its user's, newest first, page by page.

    Raises:
        Failure: Likewise.
    """
    cursor: str | None = None
    while True:
        page = await source.transactions(tenant, user, MAX_PAGE, cursor)
        try:
            entries = [entry_of(item) for item in page["items"]]
            following = page["next_cursor"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Failure(NOT_A_SERVICE) from None
        for entry in entries:
            yield entry
        oldest = happened_at(entries[-1]) if entries else None
        if following is None or (oldest is not None and oldest < since):
            return
        if not entries or following == cursor:
            raise Failure("The credits service's pages lead nowhere: it gave an empty page, or the same one twice.")
        cursor = following


class Silent(Telemetry):
    """Whatever goes wrong is said by the command."""

    def log(self, *_: Any, **__: Any) -> None:
        pass
