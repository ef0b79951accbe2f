"""The journal: charges that are not final yet, durable, so that whatever dies, somebody goes on.

Here is what the biller asks of any journal, and how a record is written down. `sqlite.SqliteJournal` keeps
one file a process in a directory; `postgres.PostgresJournal` keeps the charges of several machines in a database.
"""

import json
from collections.abc import Awaitable, Collection, Mapping
from typing import Protocol

from metered_billing.charge import Account, Record, State


class JournalError(Exception):
    """The journal could not be opened, read or written."""


class NoJournal(JournalError):
    """There is none at this place, to look into."""


class PlaceLost(JournalError):
    """The charge is certainly not on record: others were given this process's place. It has a new one by now,
    and the charge can be opened under that `owner`."""


class Journal(Protocol):
    """Unsettled charges.

    `open` and `write` queue their write at once, in the order of the calls, when they are called: what is
    awaited is only how it went. Cancelling that takes nothing back.
    """

    @property
    def owner(self) -> str:
        """The name that new charges are written under, since it took its place."""
        ...

    @property
    def unusable(self) -> Mapping[str, str]:
        """What could not be read, by name, and why: it is left as it is, for a person to look at."""
        ...

    async def start(self, realm: str) -> None:
        """Take a place in it. May be called again, also after `close`.

        Args:
            realm: Whose credits its charges move (`Credits.realm`). What is on record for another realm is
                left alone: it can only be settled there.

        Raises:
            JournalError: It cannot be had, or is open for another realm; the text says what to do.
        """
        ...

    def open(self, record: Record) -> Awaitable[None]:
        """Put a new charge on record; done when it is synced to disk.

        Raises:
            PlaceLost: Its owner's name is not ours any more.
            JournalError: It is not on record, as far as is known. (Here and below: from the call, or from
                what it returns.)
        """
        ...

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        """Replace `before` by `after`, if its owner and state still are what they were.

        A confirmed deduction need not have come on record as such: one that stands there as opened is replaced too.

        Args:
            durable: Done only when it is synced to disk. Otherwise a power loss may undo it.

        Returns:
            False where somebody else has moved it: nothing was written, and what is on record decides.

        Raises:
            JournalError: Not written, as far as is known.
        """
        ...

    def holds(self, record: Record) -> bool:
        """Whether nobody else can have moved this charge meanwhile, nor can before it is given up."""
        ...

    async def adopt(self, now: float) -> int:
        """Take over what dead processes left, due at once. Returns how many charges that are not final.

        What cannot be read stands in `unusable`, and is tried again each time.
        """
        ...

    async def due(self, now: float, *, besides: Collection[str], limit: int) -> list[Record]:
        """This owner's charges that are not final and due by `now`, the longest due first.

        Args:
            besides: Ids to leave out: charges whose requests are running.
        """
        ...

    async def next_due(self, now: float) -> float | None:
        """When the next attempt after `now` is due, if one is."""
        ...

    async def unsettled(self, now: float) -> Mapping[str, tuple[int, float]]:
        """By state that is not final: how many of this owner's, and the age of the oldest in seconds."""
        ...

    async def forget(self, closed_before: float, *, keep: int) -> int:
        """Delete charges that became final before then, or before the latest `keep`; disputed ones stay.

        Returns:
            How many were deleted.
        """
        ...

    async def pause(self) -> None:
        """Do nothing by itself before `resume`; done when nothing is under way. The process may be frozen then."""
        ...

    def resume(self) -> None:
        """Go on, and be heard of before whatever is asked next. Harmless where it was not paused."""
        ...

    async def close(self) -> None:
        """Finish what is queued and give the place up, so that others can adopt what is left."""
        ...


def taken_for(realm: str, asked: str) -> JournalError:
    """Why a journal that is open for one realm cannot be had for another: each would settle the other's charges."""
    return JournalError(f"this journal is open for the credits at {realm}: those at {asked} need one of their own")


def states_of(before: Record) -> tuple[str, str]:
    """The states on record that `write` replaces: two, for the statement's sake."""
    state = str(before.state)
    return state, "opened" if state == "deducted" else state


def body_of(record: Record) -> str:
    """A record as JSON, but for what stands in columns of its own, because it is searched for or compared.

    What is None or empty is left out.
    """
    # By hand: it is done three times a charge, and json.dumps would take as long as writing the row does.
    account = record.account
    body = f'{{"tenant_id":{_text(account.tenant_id)},"amount":{record.amount_credits},"units":{record.units}'
    if account.user_id is not None:
        body += f',"user_id":{_text(account.user_id)}'
    if record.request_id is not None:
        body += f',"request_id":{_text(record.request_id)}'
    if record.metadata:
        body += f',"metadata":{_json(dict(record.metadata))}'
    if record.transaction_id is not None:
        body += f',"transaction_id":{_text(record.transaction_id)}'
    if record.refund_credits:
        body += f',"refund":{record.refund_credits}'
    if record.refund_items:
        body += f',"refund_items":{_json(record.refund_items)}'
    if record.reason is not None:
        body += f',"reason":{_text(record.reason)}'
    if record.traceparent is not None:
        body += f',"traceparent":{_text(record.traceparent)}'
    if record.declined_at is not None:
        body += f',"declined_at":{record.declined_at!r}'
    if record.history:
        body += f',"history":[{",".join([f"[{_text(what)},{at!r}]" for what, at in record.history])}]'
    return body + "}"


def transaction_in(transaction_id: str) -> str:
    """What stands in the body of each charge with this transaction: what to look for, before it is read."""
    return f'"transaction_id":{_text(transaction_id)}'


_text = json.encoder.encode_basestring_ascii
_json = json.JSONEncoder(separators=(",", ":")).encode


def record_of(
    charge_id: str,
    body: str,
    *,
    owner: str,
    state: str,
    opened_at: float,
    tries: int,
    due_at: float,
    closed_at: float | None,
) -> Record:
    """The record whose body and columns these are.

    Raises:
        JournalError: They are not what this version writes.
    """
    try:
        fields = json.loads(body)
        return Record(
            id=charge_id,
            account=Account(fields["tenant_id"], fields.get("user_id")),
            amount_credits=fields["amount"],
            units=fields["units"],
            state=State(state),
            opened_at=opened_at,
            request_id=fields.get("request_id"),
            metadata=fields.get("metadata", {}),
            transaction_id=fields.get("transaction_id"),
            refund_credits=fields.get("refund", 0),
            refund_items=tuple(fields.get("refund_items", ())),
            reason=fields.get("reason"),
            traceparent=fields.get("traceparent"),
            owner=owner,
            tries=tries,
            due_at=due_at,
            declined_at=fields.get("declined_at"),
            closed_at=closed_at,
            history=tuple((str(occasion), float(at)) for occasion, at in fields.get("history", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise JournalError(f"charge {charge_id} cannot be read: {error!r}") from error
