"""The journal against the credits service's transactions: what should be there, and what is. It moves nothing.

An app may be serving meanwhile, so the order of reading matters. First the journal: what is final there is
in the service's ledger already, and stays so. Then the service. Then the journal again, for deductions that
it did not have before: each was on record before it was sent.
"""

import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Any, Self

from metered_billing.charge import Account, Record, State

SLACK_S = 3_600.0
"""How far the clocks of the app and of the service may differ."""

MARGIN_S = 60.0
"""What the journal may have forgotten since it was asked how far back it goes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A deduction, refund or void in the service's ledger; `amount` is signed."""

    id: str
    kind: str
    transaction_id: str
    idempotency_key: str
    tenant_id: str
    user_id: str | None
    amount: int
    created_at: str


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs about a charge.

    Attributes:
        kind: One of `KINDS`.
        says: What the journal has, and what the service has.
        credits: How many more than the journal says the service has taken (below 0: fewer).
    """

    charge_id: str
    tenant_id: str
    user_id: str | None
    kind: str
    says: str
    credits: int


KINDS: Mapping[str, str] = {
    "no deduction": "the journal has it as deducted, and the service has no such deduction",
    "other deduction": "the deduction is of another amount, account or transaction than the journal has",
    "deducted twice": "the service has more than one deduction under the charge's key",
    "not refunded": "the journal has the refund as confirmed, and the service has none or a smaller one",
    "refunded otherwise": "the service has given back more than the journal knows of, or under another key",
    "not undone": "the journal has it as moving nothing, and the service has kept credits",
    "unknown deduction": "the service has a deduction that the journal knows nothing of",
}
"""The kinds of differences there are."""

MOVES_NOTHING = frozenset({State.DECLINED, State.ABANDONED, State.VOIDED})
"""The final states in which nothing was taken, or all of it was undone."""


def entry_of(item: Mapping[str, Any]) -> Entry:
    """An entry as the credits API has it.

    Raises:
        ValueError: It is none.
    """
    amount, user_id = item.get("amount"), item.get("user_id")
    # Some services have no more than an id for a deduction.
    given = {**item, "transaction_id": item.get("transaction_id") or item.get("id")}
    names = [given.get(name) for name in ("id", "kind", "transaction_id", "idempotency_key", "tenant_id", "created_at")]
    if type(amount) is not int or not all(isinstance(name, str) for name in names):
        raise ValueError("not an entry of a credits service's ledger")
    entry_id, kind, transaction_id, key, tenant_id, created_at = map(str, names)
    user = None if user_id is None else str(user_id)
    return Entry(entry_id, kind, transaction_id, key, tenant_id, user, amount, created_at)


def net_of(entries: Iterable[Entry]) -> int:
    """What the service has taken by these and not given back, in credits."""
    return -sum(entry.amount for entry in entries)


def compare(record: Record, entries: Iterable[Entry]) -> Difference | None:
    """What differs between a charge as the journal has it, and all entries that belong to it.

    A charge that is not final can differ in nothing yet, and a disputed one is for a person to look at.
    """
    if not record.final or record.state is State.DISPUTED:
        return None
    found = list(entries)
    for kind, says in _differing(record, found):
        account, taken = record.account, net_of(found) - record.kept_credits
        return Difference(record.id, account.tenant_id, account.user_id, kind, says, taken)
    return None


def _differing(record: Record, entries: list[Entry]) -> Iterator[tuple[str, str]]:
    deductions = [entry for entry in entries if entry.kind == "deduction"]
    returned = [entry for entry in entries if entry.kind != "deduction"]
    back = sum(entry.amount for entry in returned)
    if len(deductions) > 1:
        yield "deducted twice", f"the service has deductions {', '.join(entry.id for entry in deductions)}"
    if record.state in MOVES_NOTHING:
        if net_of(entries):
            taken = -sum(entry.amount for entry in deductions)
            yield "not undone", f"the journal has {record.state}; the service took {taken:,} and gave {back:,} back"
        return
    if not deductions:
        yield "no deduction", f"the journal has {record.amount_credits:,} in {record.transaction_id}"
        return
    one, account = deductions[0], record.account
    if -one.amount != record.amount_credits:
        yield "other deduction", f"the journal has {record.amount_credits:,}, the service {-one.amount:,}"
    if one.idempotency_key != record.id:
        yield "other deduction", f"transaction {one.transaction_id} has the key {one.idempotency_key} at the service"
    if (one.tenant_id, one.user_id or None) != (account.tenant_id, account.user_id):
        yield "other deduction", f"the service took it from {one.tenant_id} / {one.user_id or '(shared pool)'}"
    if one.transaction_id != record.transaction_id:
        yield (
            "other deduction",
            f"the journal has transaction {record.transaction_id}, the service {one.transaction_id}",
        )
    if back < record.refund_credits:
        yield "not refunded", f"the journal has {record.refund_credits:,} refunded, the service {back:,}"
    others = [entry for entry in returned if entry.idempotency_key != record.refund_key]
    if back > record.refund_credits or others:
        keys = ", ".join(sorted({entry.idempotency_key for entry in others})) or record.refund_key
        yield (
            "refunded otherwise",
            f"the journal has {record.refund_credits:,} refunded, the service {back:,}, under {keys}",
        )


def unknown(entry: Entry) -> Difference:
    """A deduction that the journal knows nothing of."""
    says = f"the service took {-entry.amount:,} in {entry.transaction_id} at {entry.created_at}"
    return Difference(entry.idempotency_key, entry.tenant_id, entry.user_id, "unknown deduction", says, -entry.amount)


def made_at(entry: Entry) -> float | None:
    """When the charge of a deduction was made: by the app's clock, where its key tells; None where nothing does."""
    try:
        key = uuid.UUID(entry.idempotency_key)
    except ValueError:
        return happened_at(entry)
    return (key.int >> 80) / 1_000 if key.version == 7 else happened_at(entry)


def happened_at(entry: Entry) -> float | None:
    """When it was written, by the service's clock."""
    try:
        return datetime.fromisoformat(entry.created_at).timestamp()
    except (ValueError, OverflowError):
        return None


class Worksheet:
    """Both sides, next to each other. On disk rather than in memory, and gone when it is closed."""

    def __init__(self) -> None:
        # SQLite's own temporary file, which has no name.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_TABLES)

    def __enter__(self) -> Self:
        self._db.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    # The journal's side.

    def add_charge(self, record: Record) -> None:
        """A charge as the journal has it, final or not."""
        compared = record.final and record.state is not State.DISPUTED
        account = record.account
        kept = (record.amount_credits, record.refund_credits, record.transaction_id, record.units)
        self._db.execute(
            "INSERT OR REPLACE INTO charges VALUES (?, ?, ?, ?, ?, ?, ?)",
            (record.id, account.tenant_id, account.user_id, str(record.state), record.opened_at, compared,
             json.dumps(kept)),
        )  # fmt: skip

    def tenants(self) -> Iterator[tuple[str, float | None]]:
        """Each tenant, and since when there are charges of it to compare, if there are any."""
        yield from self._db.execute(
            "SELECT tenant_id, MIN(CASE WHEN compared THEN opened_at END) FROM charges GROUP BY 1 ORDER BY 1"
        ).fetchall()

    # The service's side.

    def add_entry(self, entry: Entry) -> None:
        """A deduction, refund or void as the service has it."""
        self._db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", astuple(entry))

    # What comes of it.

    def counts(self) -> tuple[int, int]:
        """How many charges are compared, with how many entries."""
        ((charges,),) = self._db.execute("SELECT COUNT(*) FROM charges WHERE compared")
        ((entries,),) = self._db.execute("SELECT COUNT(*) FROM entries")
        return charges, entries

    def differing(self) -> Iterator[tuple[Record, list[Entry]]]:
        """Charges that the service has otherwise, and what it has of them."""
        for row in self._db.execute("SELECT * FROM charges WHERE compared ORDER BY id"):
            record = _record(row)
            entries = self._entries_of(record)
            if compare(record, entries) is not None:
                yield record, entries

    def unknown(self) -> Iterator[Entry]:
        """Deductions whose charges the journal did not have, newest first."""
        rows = self._db.execute(
            f"SELECT {_ENTRY} FROM entries WHERE kind = 'deduction' AND NOT EXISTS"  # noqa: S608 - our words
            " (SELECT 1 FROM charges WHERE id = idempotency_key AND charges.tenant_id = entries.tenant_id)"
            " ORDER BY created_at DESC, id DESC"
        )
        for row in rows:
            yield Entry(*row)

    def _entries_of(self, record: Record) -> list[Entry]:
        rows = self._db.execute(
            f"SELECT {_ENTRY} FROM entries WHERE transaction_id IN (SELECT transaction_id FROM entries"  # noqa: S608
            " WHERE idempotency_key = ? AND tenant_id = ? AND kind = 'deduction' UNION SELECT ?)",
            (record.id, record.account.tenant_id, record.transaction_id),
        )
        return [Entry(*row) for row in rows]


_ENTRY = "id, kind, transaction_id, idempotency_key, tenant_id, user_id, amount, created_at"

_TABLES = f"""
CREATE TABLE charges (id PRIMARY KEY, tenant_id, user_id, state, opened_at, compared, kept) WITHOUT ROWID;
CREATE TABLE entries ({_ENTRY}, PRIMARY KEY (id)) WITHOUT ROWID;
CREATE INDEX by_transaction ON entries (transaction_id);
CREATE INDEX by_key ON entries (idempotency_key);
"""


def _record(row: tuple[Any, ...]) -> Record:
    charge_id, tenant_id, user_id, state, opened_at, _, kept = row
    amount, refund, transaction_id, units = json.loads(kept)
    return Record(
        id=charge_id,
        account=Account(tenant_id, user_id),
        amount_credits=amount,
        units=units,
        state=State(state),
        opened_at=opened_at,
        refund_credits=refund,
        transaction_id=transaction_id,
    )
