"""What a failed assertion tells: accounts, calls in their order, what went wrong, what is unsettled. Pure."""

from collections.abc import Iterable, Iterator, Sequence

from metered_billing import reconcile
from metered_billing.charge import Record, State
from metered_billing.explain import in_words
from metered_billing.testing.entries import Entry, faults_in
from metered_billing.testing.wire import Call


def told(tenant_id: str, user_id: str | None) -> str:
    """An account, for people."""
    return f"{tenant_id} / {user_id}" if user_id else f"{tenant_id} (shared pool)"


def story(
    entries: Sequence[Entry], calls: Sequence[Call], unsettled: Sequence[Record], remaining: Sequence[str]
) -> str:
    """All of it, a line each.

    Args:
        remaining: What is still to go wrong.
    """
    lines = []
    for account in dict.fromkeys((entry.tenant_id, entry.user_id) for entry in entries):
        lines.append(f"{told(*account)}, in the service's ledger:")
        lines += [f"  {entry}" for entry in entries if (entry.tenant_id, entry.user_id) == account]
    if not entries:
        lines.append("The service's ledger has no entries.")
    lines.append("The app asked, in this order:" if calls else "The app asked the service for nothing.")
    lines += [f"  {call}" for call in calls]
    if unsettled:
        lines.append("Not settled:")
        lines += [f"  {pending(record)}" for record in unsettled]
    if remaining:
        lines.append("Still to go wrong:")
        lines += [f"  {each}" for each in remaining]
    return "\n".join(lines)


def pending(record: Record) -> str:
    """What a charge waits for."""
    account = told(record.account.tenant_id, record.account.user_id)
    due = {
        State.OPENED: "its deduction has no answer yet",
        State.DEDUCTED: "its request is running still, or its app was killed: the next one to start gives it back",
        State.REFUNDING: f"{in_words(record.refund_credits)} to be refunded; tried {record.tries} x",
        State.VOIDING: f"its deduction is to be undone; tried {record.tries} x",
    }
    why = "" if record.reason is None else f" ({record.reason})"
    return f"{record.id}, {in_words(record.amount_credits)} of {account}: {due.get(record.state, record.state)}{why}"


def differences(entries: Sequence[Entry], records: Sequence[Record]) -> list[str]:
    """What is not as it should be: in the ledger by itself, and in it against the apps' journals.

    Args:
        entries: Of all accounts, oldest first.
        records: Of all apps; none where they have their journals elsewhere.
    """
    wrong = faults_in(entries)
    wrong += [f"not settled: {pending(record)}" for record in records if not record.final]
    wrong += [
        f"disputed, a person has to look at it: {record.id}: {record.reason}"
        for record in records
        if record.state is State.DISPUTED
    ]
    compared = [_compared(entry) for entry in entries if entry.kind != "grant"]
    for record in records:
        difference = reconcile.compare(record, list(_of(record, compared)))
        if difference is not None:
            wrong.append(f"{difference.kind}: {record.id}: {difference.says}")
    known = {record.id for record in records}
    if records:
        unknown = [entry for entry in entries if entry.kind == "deduction" and entry.idempotency_key not in known]
        wrong += [f"no app has it on record: {entry}" for entry in unknown]
    return wrong


def _of(record: Record, entries: Iterable[reconcile.Entry]) -> Iterator[reconcile.Entry]:
    """A charge's entries: its deduction's, by its key, and all that belongs to that transaction."""
    entries = list(entries)
    account = record.account
    mine = {
        entry.transaction_id
        for entry in entries
        if entry.kind == "deduction" and (entry.tenant_id, entry.idempotency_key) == (account.tenant_id, record.id)
    }
    return (entry for entry in entries if entry.transaction_id in mine | {record.transaction_id})


def _compared(entry: Entry) -> reconcile.Entry:
    return reconcile.Entry(
        entry.id,
        entry.kind,
        entry.transaction_id,
        entry.idempotency_key,
        entry.tenant_id,
        entry.user_id,
        entry.amount,
        "",
    )
