"""A bench that speaks through a `Contract` of a user's own: what it builds is sent, and what it reads is believed.

A check sees what the library would see: each answer is told in the forms of the credits API, whatever its own.
"""

import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx

from metered_billing.charge import (
    Account,
    AlreadyVoided,
    Declined,
    DeductAnswer,
    Deducted,
    FindAnswer,
    NotFound,
    NoVoid,
    Record,
    RefundAnswer,
    Refunded,
    Refused,
    State,
    Unanswered,
    Unknown,
    VoidAnswer,
    Voided,
)
from metered_billing.conformance.bench import Bench, Broken, Misread, NotTried, Taken, number, split
from metered_billing.credits.contract import Call, Contract, Page, Reply
from metered_billing.errors import TYPE_PREFIX

T = TypeVar("T")

MAX_PAGES = 200


@dataclass(slots=True)
class Told(Reply):
    """An answer as the mapping reads it, in the forms of the credits API.

    Attributes:
        answer: What the library would be told.
        came: The status that really came.
    """

    answer: Any = None
    came: int = 0

    def __str__(self) -> str:
        reason = getattr(self.answer, "reason", None)
        return f"HTTP {self.came}, read as {type(self.answer).__name__}" + (f" ({reason[:100]})" if reason else "")


@dataclass(frozen=True, kw_only=True)
class _Refund(Record):
    """A refund under any key: a charge has one, and a check tries several."""

    key: str

    @property
    def refund_key(self) -> str:
        return self.key


class MappedBench(Bench):
    """Deductions, refunds, voids and look-ups by the contract.

    Args:
        contract: The user's.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        account: Account,
        contract: Contract,
        *,
        prefix: str,
        token: str,
        foreign_token: str | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        scheme = f"{contract.auth_scheme} " if contract.auth_scheme else ""
        super().__init__(
            client,
            account,
            prefix=prefix,
            token=token,
            foreign_token=foreign_token,
            timeout_s=timeout_s,
            auth=(contract.auth_header, scheme),
        )
        self.contract = contract
        self.lacks = lacks(contract) | {"batch"}  # which is not tried through a mapping
        self._deductions: dict[str, Record] = {}

    async def deduct(self, amount: Any, key: str, *, account: Account | None = None, **more: Any) -> Told:
        """What `read_deduction` makes of it."""
        call, fields = split(more)
        whose = account or self.account
        taken = self._taken.setdefault((whose.tenant_id, key), Taken(whose, amount))
        told = await self._deduct(record_of(whose, key, amount, fields), **call)
        taken.note(told.body)
        return told

    async def _deduct(self, record: Record, **call: Any) -> Told:
        reply = await self._ask(lambda: self.contract.deduction(record), **call)
        answer = as_read(lambda: self.contract.read_deduction(record, reply))
        if isinstance(answer, Deducted):
            self._deductions[answer.transaction_id] = record
        return _deduction(answer, reply, record.amount_credits)

    async def refund(self, transaction_id: str, amount: int, key: str, **more: Any) -> Told:
        """What `read_refund` makes of it."""
        call, fields = split(more)
        deduction = self._deductions.get(transaction_id)
        record = _Refund(
            id=key if deduction is None else deduction.id,
            account=self.account if deduction is None else deduction.account,
            amount_credits=max(amount, 0 if deduction is None else deduction.amount_credits),
            units=1,
            opened_at=0.0,
            state=State.REFUNDING,
            transaction_id=transaction_id,
            refund_credits=amount,
            refund_items=tuple(fields.get("items", ())),
            reason=fields.get("reason", "conformance"),
            key=key,
        )
        reply = await self._ask(lambda: self.contract.refund(record), **call)
        return _refund(as_read(lambda: self.contract.read_refund(record, reply)), reply, amount)

    async def void(self, key: str, *, account: Account | None = None, **more: Any) -> Told:
        """What `read_void` makes of it; without a call where the contract makes none."""
        call, _ = split(more)
        record = record_of(account or self.account, key, 1, {})
        if "voids" in self.lacks:
            return _void(NoVoid(), Reply(404, {}, None))
        reply = await self._ask(lambda: self.contract.void(record), **call)
        return _void(as_read(lambda: self.contract.read_void(record, reply)), reply)

    async def batch(self, operations: Sequence[Mapping[str, Any]], **call: Any) -> Reply:
        """Not through a mapping."""
        raise NotTried("the batches of a mapping are not tried")

    async def balance(self) -> int:
        """What `read_balance` makes of it.

        Raises:
            Broken: No balance.
        """
        told = await self.ask_balance()
        if (balance := number(told, "balance")) is None:
            asked = self.exchanges[-1]
            raise Broken(
                f"{asked.method} {asked.path} was answered HTTP {told.came}, and `read_balance` made no balance of it"
            )
        return balance

    async def ask_balance(self, **call: Any) -> Told:
        """What `read_balance` makes of it."""
        reply = await self._ask(lambda: self.contract.balance(self.account), **call)
        balance = as_read(lambda: self.contract.read_balance(reply))
        if balance is None:
            return Told(_refusal(reply), reply.headers, None, Unanswered("no balance"), reply.status)
        if type(balance) is not int:
            raise Misread(f"the mapping read {balance!r} for a balance, which is no whole number")
        return Told(200, {}, {"balance": balance}, balance, reply.status)

    async def transactions(self, limit: int = 50, cursor: str | None = None, **call: Any) -> Told:
        """What `read_transactions` makes of one page."""
        tenant_id, user_id = self.account.tenant_id, self.account.user_id
        reply = await self._ask(lambda: self.contract.transactions(tenant_id, user_id, cursor, limit), **call)
        page = as_read(lambda: self.contract.read_transactions(reply))
        if page is None:
            return Told(_refusal(reply), reply.headers, None, Unanswered("no transactions"), reply.status)
        return Told(200, {}, {"items": list(page.items), "next_cursor": page.next_cursor}, page, reply.status)

    async def find(self, key: str, limit: int = 50) -> FindAnswer:
        """Look for a deduction as the library does, page by page.

        Raises:
            Broken: There is a page that is none, or no end of pages.
        """
        record, cursor = record_of(self.account, key, 1, {}), None
        for _ in range(MAX_PAGES):
            told = await self.transactions(limit, cursor)
            if not isinstance(told.answer, Page):
                raise Broken(f"the list of transactions was answered {told}")
            page = told.answer
            answer = as_read(partial(self.contract.find, record, page))
            cursor = page.next_cursor
            if not isinstance(answer, NotFound) or cursor is None:
                return answer
        raise Broken(f"the list of transactions had no end after {MAX_PAGES} pages")

    async def _ask(self, build: Callable[[], Call | None], **more: Any) -> Reply:
        call = as_read(build)
        if call is None:
            raise Broken("the mapping makes this call, and then again it does not")
        headers = {**(call.headers or {}), **(more.pop("headers", None) or {})}
        params = None if call.params is None else {name: str(value) for name, value in call.params.items()}
        return await self.call(call.method, call.path, call.body, call.key, params=params, headers=headers, **more)

    async def _deduct_again(self, taken: Taken, key: str) -> Reply:
        return await self._deduct(record_of(taken.account, key, taken.amount, {}))


def lacks(contract: Contract) -> frozenset[str]:
    """What the contract says that its service has not: `voids`, `batch`, `transactions`."""
    record = record_of(Account("conformance"), "conformance", 1, {})
    there = {
        "voids": as_read(lambda: contract.void(record)) is not None,
        "batch": contract.batches,
        "transactions": as_read(lambda: contract.transactions("conformance", None, None, 1)) is not None,
    }
    return frozenset(name for name, has in there.items() if not has)


def record_of(account: Account, key: str, amount: int, fields: Mapping[str, Any]) -> Record:
    return Record(
        id=key,
        account=account,
        amount_credits=amount,
        units=1,
        opened_at=0.0,
        request_id=fields.get("request_id"),
        metadata=fields.get("metadata") or {},
    )


def as_read(ask: Callable[[], T]) -> T:
    """What the mapping returns.

    Raises:
        Misread: It raised.
    """
    try:
        return ask()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise Misread(
            f"the mapping raised {type(error).__name__}: {error} (in {where.name}, line {where.lineno})"
        ) from error


# Answers, in the forms of the credits API.


def _refusal(reply: Reply) -> int:
    """A status that says no, whatever came: where a service says no with a 200, its mapping knows."""
    return reply.status if reply.status >= 400 else 503


def _problem(name: str, **members: Any) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    return {"content-type": "application/problem+json"}, {"type": TYPE_PREFIX + name, **members}


def _deduction(answer: DeductAnswer, reply: Reply, amount: int) -> Told:
    if isinstance(answer, Deducted):
        if not isinstance(answer.transaction_id, str) or not answer.transaction_id:
            raise Misread(f"the mapping read {answer.transaction_id!r} for a transaction, which is no text")
        body = {"transaction_id": answer.transaction_id, "amount": amount, "balance": answer.balance}
        return Told(201, {}, body, answer, reply.status)
    if isinstance(answer, Declined):
        headers, problem = _problem("insufficient-credits", balance=answer.balance)
        return Told(402, headers, problem, answer, reply.status)
    if not isinstance(answer, Unknown):
        raise Misread(f"the mapping read a deduction's answer as {answer!r}")
    return Told(_refusal(reply), reply.headers, reply.body, answer, reply.status)


def _refund(answer: RefundAnswer, reply: Reply, amount: int) -> Told:
    if isinstance(answer, Refunded):
        body = {"refund_id": answer.refund_id or "-", "amount": amount, "balance": answer.balance}
        return Told(201, {}, body, answer, reply.status)
    if isinstance(answer, AlreadyVoided):
        return Told(409, *_problem("charge-voided"), answer, reply.status)
    if isinstance(answer, Refused):
        return Told(422, *_problem("refused"), answer, reply.status)
    if not isinstance(answer, Unanswered):
        raise Misread(f"the mapping read a refund's answer as {answer!r}")
    return Told(_refusal(reply), reply.headers, None, answer, reply.status)


def _void(answer: VoidAnswer, reply: Reply) -> Told:
    if isinstance(answer, Voided):
        return Told(200, {}, {"status": "voided", "refunded": answer.refunded_credits}, answer, reply.status)
    if isinstance(answer, NoVoid):
        return Told(404, {}, None, answer, reply.status)
    if isinstance(answer, Refused):
        return Told(422, *_problem("refused"), answer, reply.status)
    if not isinstance(answer, Unanswered):
        raise Misread(f"the mapping read a void's answer as {answer!r}")
    return Told(_refusal(reply), reply.headers, None, answer, reply.status)


def mapped(check: Callable[[MappedBench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
    """A check that asks for more than every bench has."""

    async def run(bench: Bench) -> None:
        if not isinstance(bench, MappedBench):
            raise TypeError("this check needs a mapping")
        await check(bench)

    return run
