"""What each command does to the books. Every rule about credits is here; no SQL, no clock, no loop.

Each rule decides first and writes last, and a refusal is a value: it must not spoil the neighbours that
share its commit. Its first question is always whether the key was answered before; only then whether the
charge was voided.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger import answers
from metered_billing.ledger.answers import Answer, refused
from metered_billing.ledger.commands import Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.failures import LedgerCorrupt


class Stamp(NamedTuple):
    """The id and time (RFC 3339, UTC) of the entry that a command may write; taken before it is decided."""

    id: str
    at: str


class Held(NamedTuple):
    """What an account holds, and what it was granted in its life: in credits."""

    balance: int
    granted: int


class Entry(NamedTuple):
    """One movement of credits; never changed once written.

    Attributes:
        id: UUIDv7.
        kind: grant, deduction, refund or void.
        transaction_id: The deduction that a refund or void belongs to; its own id otherwise.
        amount: Signed: what the balance changed by.
        balance: The account's, after it.
    """

    id: str
    kind: str
    transaction_id: str
    idempotency_key: str
    tenant_id: str
    user_id: str | None
    amount: int
    balance: int
    created_at: str
    reason: str | None = None
    request_id: str | None = None
    metadata: Mapping[str, str] | None = None
    items: tuple[str, ...] = ()


class Remembered(NamedTuple):
    """What an idempotency key was used for, by whom, and what the answer was.

    Attributes:
        body: What was answered; None where the entry tells.
        entry_id: None where the answer was no.
    """

    kind: str
    user_id: str | None
    payload_hash: bytes
    status: int
    body: Mapping[str, Any] | None
    entry_id: str | None


class Voided(NamedTuple):
    """A deduction's key that was voided, by whom, and what that gave back."""

    user_id: str | None
    refunded: int


class Books(Protocol):
    """The rows, within one transaction that nobody else writes in."""

    def held(self, tenant_id: str, user_id: str | None) -> Held:
        """What an account holds; nothing, if it is unknown."""
        ...

    def hold(self, tenant_id: str, user_id: str | None, held: Held) -> None: ...

    def entry(self, entry_id: str) -> Entry | None: ...

    def write(self, entry: Entry) -> None: ...

    def refunded(self, transaction_id: str) -> int:
        """What all refunds and the void of a deduction gave back, in credits."""
        ...

    def remembered(self, tenant_id: str, key: str) -> Remembered | None: ...

    def remember(self, tenant_id: str, key: str, what: Remembered) -> None: ...

    def voided(self, tenant_id: str, key: str) -> Voided | None: ...

    def mark_voided(self, tenant_id: str, key: str, what: Voided, at: str) -> None: ...


def decide(books: Books, command: Command, stamp: Stamp) -> Answer:
    """Do what is asked, or say why not.

    Raises:
        LedgerCorrupt: The books contradict themselves; whatever was written must be rolled back.
    """
    match command:
        case Deduct():
            return _deduct(books, command, stamp)
        case Refund():
            return _refund(books, command, stamp)
        case Void():
            return _void(books, command, stamp)
        case Grant():
            return _grant(books, command, stamp)


def _deduct(books: Books, command: Deduct, stamp: Stamp) -> Answer:
    key = command.idempotency_key
    if (remembered := books.remembered(command.tenant_id, key)) is not None:
        return _replay(books, remembered, command)
    if (voided := books.voided(command.tenant_id, key)) is not None:
        return _key_reused(key) if voided.user_id != command.user_id else _charge_voided()
    held = books.held(command.tenant_id, command.user_id)
    if held.balance < command.amount:
        answer = refused(
            answers.INSUFFICIENT_CREDITS,
            f"{command.amount} credits are required and the account has {held.balance}. Nothing was taken.",
            required=command.amount,
            balance=held.balance,
        )
        # Remembered: a copy that arrives after a top-up must not succeed where its caller was told no.
        refusal = Remembered(command.kind, command.user_id, command.payload_hash, answer.status, answer.body, None)
        books.remember(command.tenant_id, key, refusal)
        return answer
    entry = Entry(
        id=stamp.id,
        kind=Deduct.kind,
        transaction_id=stamp.id,
        idempotency_key=key,
        tenant_id=command.tenant_id,
        user_id=command.user_id,
        amount=-command.amount,
        balance=held.balance - command.amount,
        created_at=stamp.at,
        request_id=command.request_id,
        metadata=command.metadata,
    )
    _move(books, entry, held)
    return _done(books, command, entry)


def _refund(books: Books, command: Refund, stamp: Stamp) -> Answer:
    deduction = books.entry(command.transaction_id)
    if deduction is None or deduction.kind != Deduct.kind or command.only_tenant not in (None, deduction.tenant_id):
        return refused(answers.NOT_FOUND, "There is no deduction with this transaction id.")
    tenant_id, key = deduction.tenant_id, command.idempotency_key
    if (remembered := books.remembered(tenant_id, key)) is not None:
        return _replay(books, remembered, command)
    if books.voided(tenant_id, key) is not None:
        return _key_reused(key)
    if books.voided(tenant_id, deduction.idempotency_key) is not None:
        return _charge_voided()
    left = _left(books, deduction)
    if command.amount > left:
        return refused(
            answers.REFUND_EXCEEDS,
            f"Of {-deduction.amount} credits deducted {left} can still be refunded, not {command.amount}.",
            deducted=-deduction.amount,
            refundable=left,
        )
    held = books.held(tenant_id, deduction.user_id)
    entry = _give_back(deduction, Refund.kind, key, command.amount, held, stamp, command.reason, command.items)
    _move(books, entry, held)
    return _done(books, command, entry)


def _void(books: Books, command: Void, stamp: Stamp) -> Answer:
    tenant_id, key = command.tenant_id, command.idempotency_key
    if (voided := books.voided(tenant_id, key)) is not None:
        if voided.user_id != command.user_id:
            return _key_reused(key)
        return Answer(200, _voided_body(voided.refunded))
    remembered = books.remembered(tenant_id, key)
    deduction = None
    if remembered is not None:
        if remembered.kind != Deduct.kind or remembered.user_id != command.user_id:
            return _key_reused(key)
        if remembered.entry_id is not None:
            deduction = _remembered_entry(books, remembered.entry_id)
    refunded = 0
    if deduction is not None:
        refunded = _left(books, deduction)
        if refunded:
            held = books.held(tenant_id, deduction.user_id)
            _move(books, _give_back(deduction, Void.kind, key, refunded, held, stamp, "voided"), held)
    # Also for a key never seen: the deduction may still arrive, and must be refused then.
    books.mark_voided(tenant_id, key, Voided(command.user_id, refunded), stamp.at)
    return Answer(200, _voided_body(refunded))


def _grant(books: Books, command: Grant, stamp: Stamp) -> Answer:
    tenant_id, key = command.tenant_id, command.idempotency_key
    if (remembered := books.remembered(tenant_id, key)) is not None:
        return _replay(books, remembered, command)
    if books.voided(tenant_id, key) is not None:
        return _key_reused(key)
    held = books.held(tenant_id, command.user_id)
    granted = held.granted + command.amount
    if granted > MAX_AMOUNT:
        # A balance is never more than what was granted, so this also keeps every refund from overflowing.
        return refused(
            answers.GRANT_TOO_LARGE,
            f"An account can be granted {MAX_AMOUNT} credits in its life; {held.granted} have been.",
            granted=held.granted,
        )
    entry = Entry(
        id=stamp.id,
        kind=Grant.kind,
        transaction_id=stamp.id,
        idempotency_key=key,
        tenant_id=tenant_id,
        user_id=command.user_id,
        amount=command.amount,
        balance=held.balance + command.amount,
        created_at=stamp.at,
        reason=command.reason,
    )
    _move(books, entry, Held(held.balance, granted))
    return _done(books, command, entry)


def _left(books: Books, deduction: Entry) -> int:
    """What of a deduction can still be given back, in credits."""
    left = -deduction.amount - books.refunded(deduction.id)
    if left < 0:
        raise LedgerCorrupt(f"transaction {deduction.id}: more is refunded than was deducted")
    return left


def _give_back(
    deduction: Entry,
    kind: str,
    key: str,
    amount: int,
    held: Held,
    stamp: Stamp,
    reason: str,
    items: tuple[str, ...] = (),
) -> Entry:
    return Entry(
        id=stamp.id,
        kind=kind,
        transaction_id=deduction.id,
        idempotency_key=key,
        tenant_id=deduction.tenant_id,
        user_id=deduction.user_id,
        amount=amount,
        balance=held.balance + amount,
        created_at=stamp.at,
        reason=reason,
        items=items,
    )


def _move(books: Books, entry: Entry, held: Held) -> None:
    """Write the entry and the balance after it.

    Args:
        held: What the account held before, with `granted` as it is to be.
    """
    if not 0 <= entry.balance <= held.granted or entry.balance != held.balance + entry.amount:
        raise LedgerCorrupt(f"{entry.kind} {entry.id} would leave a balance of {entry.balance} credits")
    books.hold(entry.tenant_id, entry.user_id, Held(entry.balance, held.granted))
    books.write(entry)


def _done(books: Books, command: Deduct | Refund | Grant, entry: Entry) -> Answer:
    done = Remembered(command.kind, entry.user_id, command.payload_hash, 201, None, entry.id)
    books.remember(entry.tenant_id, command.idempotency_key, done)
    return Answer(201, _done_body(entry))


def _replay(books: Books, remembered: Remembered, command: Deduct | Refund | Grant) -> Answer:
    if remembered.payload_hash != command.payload_hash:
        return _key_reused(command.idempotency_key)
    if remembered.entry_id is None:
        return Answer(remembered.status, remembered.body or {}, replayed=True)
    return Answer(200, _done_body(_remembered_entry(books, remembered.entry_id)), replayed=True)


def _remembered_entry(books: Books, entry_id: str) -> Entry:
    entry = books.entry(entry_id)
    if entry is None:
        raise LedgerCorrupt(f"entry {entry_id} is remembered, but is not there")
    return entry


def _key_reused(key: str) -> Answer:
    return refused(
        answers.KEY_REUSED,
        f"The idempotency key {key} was used for something else. Use a new key for a new operation.",
    )


def _charge_voided() -> Answer:
    return refused(answers.CHARGE_VOIDED, "This deduction was voided; its credits are back, or never left.")


def _done_body(entry: Entry) -> dict[str, Any]:
    """What is answered to who made the entry, then and whenever it is asked again."""
    if entry.kind == Refund.kind:
        return {
            "refund_id": entry.id,
            "transaction_id": entry.transaction_id,
            "amount": entry.amount,
            "balance": entry.balance,
            "created_at": entry.created_at,
        }
    return {
        "transaction_id": entry.transaction_id,
        "tenant_id": entry.tenant_id,
        "user_id": entry.user_id,
        "amount": abs(entry.amount),
        "balance": entry.balance,
        "created_at": entry.created_at,
    }


def _voided_body(refunded: int) -> dict[str, Any]:
    return {"status": "voided", "refunded": refunded}
