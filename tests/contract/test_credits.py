"""What the biller may rely on, whoever keeps the credits."""

import asyncio
from dataclasses import replace

from metered_billing.charge import (
    Account,
    AlreadyVoided,
    Declined,
    Deducted,
    Found,
    NotFound,
    Record,
    Refunded,
    Refused,
    State,
    Unknown,
    Voided,
)

from .conftest import Backend

ALICE = Account("acme", "alice")
BOB = Account("acme", "bob")
POOL = Account("acme")


def charge(amount: int = 10, key: str = "charge-1", account: Account = ALICE) -> Record:
    return Record(id=key, account=account, amount_credits=amount, units=amount, opened_at=0.0)


def refunding(record: Record, answer: object, amount: int) -> Record:
    """The charge as it is when `amount` of it is due back."""
    assert isinstance(answer, Deducted)
    return replace(
        record,
        state=State.REFUNDING,
        transaction_id=answer.transaction_id,
        refund_credits=amount,
        refund_items=("img-3", "img-7"),
        reason="failed items",
    )


async def test_deduct_takes_credits_once(backend: Backend) -> None:
    """However often it is sent: one transaction, one answer."""
    await backend.grant(ALICE, 100)
    first = await backend.credits.deduct(charge())
    assert isinstance(first, Deducted)
    assert first.balance == 90
    assert await backend.credits.deduct(charge()) == first
    assert await backend.balance(ALICE) == 90


async def test_deduct_too_much_is_declined_for_ever(backend: Backend) -> None:
    """Declines are remembered, also after a top-up; a new charge goes through."""
    assert backend.credits.remembers_declines
    for _ in range(2):
        assert await backend.credits.deduct(charge()) == Declined(0)
        await backend.grant(ALICE, 100)
    assert isinstance(await backend.credits.deduct(charge(key="charge-2")), Deducted)


async def test_deduct_from_user_does_not_touch_the_pool(backend: Backend) -> None:
    """Accounts are apart."""
    await backend.grant(POOL, 100)
    assert isinstance(await backend.credits.deduct(charge()), Declined)
    assert isinstance(await backend.credits.deduct(charge(key="charge-2", account=POOL)), Deducted)
    assert await backend.balance(POOL) == 90


async def test_deduct_with_reused_key_is_our_bug(backend: Backend) -> None:
    """Another amount under the same key moves nothing, and is not called a decline."""
    await backend.grant(ALICE, 100)
    await backend.credits.deduct(charge(10))
    answer = await backend.credits.deduct(charge(11))
    assert isinstance(answer, Unknown)
    assert answer.misconfigured
    assert await backend.balance(ALICE) == 90


async def test_deduct_carries_what_people_read(backend: Backend) -> None:
    """Metadata and request id are in the ledger."""
    await backend.grant(ALICE, 100)
    await backend.credits.deduct(replace(charge(), metadata={"route": "/x"}, request_id="r-1"))
    entry = (await backend.ledger.transactions("acme")).items[0]
    assert (entry["metadata"], entry["request_id"]) == ({"route": "/x"}, "r-1")


async def test_deduct_concurrently_never_overdraws(backend: Backend) -> None:
    """100 at once for 60 credits: 60 are deducted, 40 declined."""
    await backend.grant(ALICE, 60)
    answers = await asyncio.gather(*(backend.credits.deduct(charge(1, f"charge-{n}")) for n in range(100)))
    assert sum(isinstance(answer, Deducted) for answer in answers) == 60
    assert sum(isinstance(answer, Declined) for answer in answers) == 40
    assert await backend.balance(ALICE) == 0


async def test_refund_gives_back_once(backend: Backend) -> None:
    """However often it is sent; and it says for what."""
    await backend.grant(ALICE, 100)
    record = refunding(charge(), await backend.credits.deduct(charge()), 2)
    first = await backend.credits.refund(record)
    assert isinstance(first, Refunded)
    assert first.balance == 92
    assert await backend.credits.refund(record) == first
    assert await backend.balance(ALICE) == 92
    entry = (await backend.ledger.transactions("acme")).items[0]
    assert (entry["reason"], entry["items"]) == ("failed items", ["img-3", "img-7"])


async def test_refund_of_unknown_transaction_is_refused(backend: Backend) -> None:
    """For good: trying again would not help."""
    record = refunding(charge(), Deducted("nope"), 2)
    assert isinstance(await backend.credits.refund(record), Refused)


async def test_refund_after_void_says_so(backend: Backend) -> None:
    """Everything is back already."""
    await backend.grant(ALICE, 100)
    record = refunding(charge(), await backend.credits.deduct(charge()), 10)
    await backend.credits.void(charge())
    assert await backend.credits.refund(record) == AlreadyVoided()
    assert await backend.balance(ALICE) == 100


async def test_void_undoes_a_deduction_once(backend: Backend) -> None:
    """Again: the same answer, and nothing moves."""
    await backend.grant(ALICE, 100)
    await backend.credits.deduct(charge())
    for _ in range(2):
        assert await backend.credits.void(charge()) == Voided(10)
    assert await backend.balance(ALICE) == 100


async def test_void_before_its_deduction_keeps_it_out(backend: Backend) -> None:
    """A copy that arrives late is unknown to its caller, and takes nothing."""
    await backend.grant(ALICE, 100)
    assert await backend.credits.void(charge()) == Voided(0)
    answer = await backend.credits.deduct(charge())
    assert isinstance(answer, Unknown)
    assert not answer.misconfigured
    assert await backend.balance(ALICE) == 100


async def test_void_of_somebody_elses_charge_is_refused(backend: Backend) -> None:
    """The account must be the deduction's."""
    await backend.grant(ALICE, 100)
    await backend.credits.deduct(charge())
    assert isinstance(await backend.credits.void(charge(account=BOB)), Refused)
    assert await backend.balance(ALICE) == 90


async def test_find_sees_what_happened_and_moves_nothing(backend: Backend) -> None:
    """Found if credits were taken, else not."""
    await backend.grant(ALICE, 100)
    assert await backend.credits.find(charge()) == NotFound()
    answer = await backend.credits.deduct(charge())
    assert isinstance(answer, Deducted)
    assert await backend.credits.find(charge()) == Found(answer.transaction_id)
    assert await backend.balance(ALICE) == 90


async def test_credits_can_be_used_after_closing(backend: Backend) -> None:
    """`aclose` lets go of connections and files, not of the account."""
    await backend.grant(ALICE, 100)
    await backend.credits.aclose()
    assert isinstance(await backend.credits.deduct(charge()), Deducted)
