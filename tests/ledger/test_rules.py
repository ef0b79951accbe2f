"""What the ledger answers to deductions, refunds, voids and grants, and what they move."""

from typing import Any

import pytest

from metered_billing.charge import MAX_AMOUNT
from metered_billing.ledger import Deduct, Ledger

from .asking import deduct, deducted, grant, granted, refund, void


class TestDeduct:
    async def test_deduct_takes_credits(self, ledger: Ledger) -> None:
        """201, the transaction, and the balance after it."""
        await granted(ledger, 100)
        answer = await ledger.deduct(deduct(10))
        assert answer.status == 201
        assert not answer.replayed
        assert set(answer.body) == {
            "transaction_id",
            "tenant_id",
            "user_id",
            "amount",
            "balance",
            "created_at",
        }
        assert answer.body["balance"] == 90 == await ledger.balance("acme", "alice")
        assert answer.body["created_at"].endswith("Z")

    async def test_deduct_replay_takes_nothing(self, ledger: Ledger) -> None:
        """The same key again is answered 200 with the same body, and moves nothing."""
        first = await deducted(ledger, 10)
        await ledger.deduct(deduct(5, key="other"))
        again = await ledger.deduct(deduct(10))
        assert (again.status, again.body, again.replayed) == (200, first.body, True)
        assert await ledger.balance("acme", "alice") == 85

    async def test_deduct_replay_after_void_is_the_first_answer(self, ledger: Ledger) -> None:
        """A replay is looked for before a void is."""
        first = await deducted(ledger)
        await ledger.void(void())
        again = await ledger.deduct(deduct())
        assert (again.status, again.body) == (200, first.body)
        assert await ledger.balance("acme", "alice") == 100

    async def test_deduct_too_much_is_declined_and_remembered(self, ledger: Ledger) -> None:
        """402 is answered 402 again under its key, also after a top-up."""
        first = await ledger.deduct(deduct(10))
        assert first.status == 402
        assert first.refusal == "insufficient-credits"
        assert (first.body["required"], first.body["balance"]) == (10, 0)
        await granted(ledger, 100)
        again = await ledger.deduct(deduct(10))
        assert (again.status, again.body, again.replayed) == (402, first.body, True)
        assert await ledger.balance("acme", "alice") == 100
        assert (await ledger.deduct(deduct(10, key="charge-2"))).status == 201

    async def test_deduct_whole_balance_then_nothing_more(self, ledger: Ledger) -> None:
        """The last credit can be taken, and no credit beyond it."""
        await granted(ledger, 100)
        assert (await ledger.deduct(deduct(100))).body["balance"] == 0
        assert (await ledger.deduct(deduct(1, key="one-more"))).status == 402

    async def test_deduct_from_user_leaves_the_pool_alone(self, ledger: Ledger) -> None:
        """A user with too few credits does not fall back to the tenant's shared pool."""
        await granted(ledger, 100, user=None)
        assert (await ledger.deduct(deduct(1, user="alice"))).status == 402
        assert (await ledger.deduct(deduct(1, key="pool", user=None))).status == 201
        assert await ledger.balance("acme") == 99

    @pytest.mark.parametrize(
        "other",
        [{"amount": 11}, {"user_id": "bob"}, {"user_id": None}],
        ids=["amount", "user", "no user"],
    )
    async def test_deduct_key_with_other_payload_is_refused(self, ledger: Ledger, other: dict[str, Any]) -> None:
        """The same key with another amount or account is a bug of the caller's, never a replay."""
        await deducted(ledger, 10)
        answer = await ledger.deduct(deduct(**{"amount": 10, **other}))
        assert (answer.status, answer.refusal) == (422, "idempotency-key-reused")
        assert await ledger.balance("acme", "alice") == 90

    async def test_deduct_replay_ignores_metadata(self, ledger: Ledger) -> None:
        """Metadata and request id are for people: they do not make a payload another one."""
        await deducted(ledger, 10)
        again = await ledger.deduct(deduct(10, metadata={"attempt": "2"}, request_id="r-2"))
        assert again.replayed

    async def test_deduct_keys_belong_to_their_tenant(self, ledger: Ledger) -> None:
        """Two tenants may use the same key."""
        await deducted(ledger, 10)
        answer = await ledger.deduct(deduct(10, tenant_id="globex"))
        assert answer.status == 402

    async def test_deduct_after_void_is_refused(self, ledger: Ledger) -> None:
        """A deduction that arrives after its void gets 409 and takes nothing."""
        await granted(ledger)
        await ledger.void(void())
        answer = await ledger.deduct(deduct())
        assert (answer.status, answer.refusal) == (409, "charge-voided")
        assert await ledger.balance("acme", "alice") == 100

    async def test_deduct_with_key_voided_for_another_user_is_refused(self, ledger: Ledger) -> None:
        """The key was used for somebody else's charge."""
        await granted(ledger)
        await ledger.void(void(user="bob"))
        assert (await ledger.deduct(deduct())).refusal == "idempotency-key-reused"


class TestRefund:
    async def test_refund_gives_back(self, ledger: Ledger) -> None:
        """201, and the credits are back in the account."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        answer = await ledger.refund(refund(transaction, 2))
        assert answer.status == 201
        assert set(answer.body) == {"refund_id", "transaction_id", "amount", "balance", "created_at"}
        assert (answer.body["amount"], answer.body["balance"]) == (2, 92)

    async def test_refund_replay_gives_nothing_more(self, ledger: Ledger) -> None:
        """The same key again is answered 200 with the same body; reason and items do not matter."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        first = await ledger.refund(refund(transaction, 2))
        again = await ledger.refund(refund(transaction, 2, reason="other words", items=("img-1",)))
        assert (again.status, again.body, again.replayed) == (200, first.body, True)
        assert await ledger.balance("acme", "alice") == 92

    async def test_refunds_together_never_exceed_the_deduction(self, ledger: Ledger) -> None:
        """Several refunds may share a deduction, as far as it goes."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        assert (await ledger.refund(refund(transaction, 6))).status == 201
        answer = await ledger.refund(refund(transaction, 5, key="second"))
        assert (answer.status, answer.refusal) == (422, "refund-exceeds-deduction")
        assert (await ledger.refund(refund(transaction, 4, key="third"))).status == 201
        assert await ledger.balance("acme", "alice") == 100

    @pytest.mark.parametrize("other", [{"amount": 3}, {"key": "charge-1"}], ids=["amount", "deduction's key"])
    async def test_refund_key_with_other_payload_is_refused(self, ledger: Ledger, other: dict[str, Any]) -> None:
        """One namespace of keys for all operations; the same key with another amount is refused."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.refund(refund(transaction, 2))
        answer = await ledger.refund(refund(transaction, **{"amount": 2, **other}))
        assert (answer.status, answer.refusal) == (422, "idempotency-key-reused")

    async def test_refund_key_of_another_transaction_is_refused(self, ledger: Ledger) -> None:
        """A refund's payload is its transaction and its amount."""
        first = (await deducted(ledger, 10)).body["transaction_id"]
        second = (await ledger.deduct(deduct(10, key="charge-2"))).body["transaction_id"]
        await ledger.refund(refund(first, 2))
        assert (await ledger.refund(refund(second, 2))).refusal == "idempotency-key-reused"

    async def test_refund_of_unknown_transaction_is_not_found(self, ledger: Ledger) -> None:
        """404, also for the id of a grant or a refund."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        refund_id = (await ledger.refund(refund(transaction, 2))).body["refund_id"]
        grant_id = (await ledger.grant(grant())).body["transaction_id"]
        for unknown in ("nope", refund_id, grant_id):
            answer = await ledger.refund(refund(unknown, 1, key="another"))
            assert (answer.status, answer.refusal) == (404, "not-found")

    async def test_refund_of_another_tenants_transaction_is_not_found(self, ledger: Ledger) -> None:
        """404: whether it exists is nobody else's business."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        assert (await ledger.refund(refund(transaction, 2, only_tenant="globex"))).status == 404
        assert (await ledger.refund(refund(transaction, 2, only_tenant="acme"))).status == 201

    async def test_refund_after_void_is_refused(self, ledger: Ledger) -> None:
        """Everything went back already: 409."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.void(void())
        answer = await ledger.refund(refund(transaction, 2))
        assert (answer.status, answer.refusal) == (409, "charge-voided")
        assert await ledger.balance("acme", "alice") == 100

    async def test_refund_replay_after_void_is_the_first_answer(self, ledger: Ledger) -> None:
        """A replay is looked for before a void is."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        first = await ledger.refund(refund(transaction, 2))
        await ledger.void(void())
        again = await ledger.refund(refund(transaction, 2))
        assert (again.status, again.body) == (200, first.body)

    async def test_refund_with_a_tombstones_key_is_refused(self, ledger: Ledger) -> None:
        """A key that was voided belongs to the deduction that may still arrive."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.void(void("never-seen"))
        answer = await ledger.refund(refund(transaction, 2, key="never-seen"))
        assert answer.refusal == "idempotency-key-reused"


class TestVoid:
    async def test_void_gives_all_back_once(self, ledger: Ledger) -> None:
        """Again: the same answer, and nothing moves."""
        await deducted(ledger, 10)
        for _ in range(2):
            answer = await ledger.void(void())
            assert (answer.status, answer.body) == (200, {"status": "voided", "refunded": 10})
        assert await ledger.balance("acme", "alice") == 100

    async def test_void_gives_back_what_refunds_left(self, ledger: Ledger) -> None:
        """Refunds made before are not given twice."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.refund(refund(transaction, 4))
        assert (await ledger.void(void())).body["refunded"] == 6
        assert await ledger.balance("acme", "alice") == 100

    async def test_void_of_fully_refunded_gives_nothing(self, ledger: Ledger) -> None:
        """Nothing was left, so there is no entry for it either."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.refund(refund(transaction, 10))
        assert (await ledger.void(void())).body["refunded"] == 0
        assert [item["kind"] for item in (await ledger.transactions("acme")).items] == [
            "refund",
            "deduction",
            "grant",
        ]

    async def test_void_of_declined_keeps_the_decline(self, ledger: Ledger) -> None:
        """Refunded 0; the deduction's replay is still the 402 that was remembered."""
        declined = await ledger.deduct(deduct())
        assert (await ledger.void(void())).body == {"status": "voided", "refunded": 0}
        await granted(ledger)
        assert (await ledger.deduct(deduct())).body == declined.body

    async def test_void_never_seen_leaves_a_tombstone(self, ledger: Ledger) -> None:
        """Refunded 0, again the same."""
        for _ in range(2):
            assert (await ledger.void(void())).body == {"status": "voided", "refunded": 0}

    @pytest.mark.parametrize("seen", ["deducted", "declined", "tombstone"])
    async def test_void_by_another_user_is_refused(self, ledger: Ledger, seen: str) -> None:
        """Nobody undoes a charge of an account other than the one they name."""
        if seen == "deducted":
            await deducted(ledger)
        elif seen == "declined":
            await ledger.deduct(deduct())
        else:
            await ledger.void(void())
        answer = await ledger.void(void(user="bob"))
        assert (answer.status, answer.refusal) == (422, "idempotency-key-reused")

    async def test_void_of_another_kind_of_key_is_refused(self, ledger: Ledger) -> None:
        """Grants and refunds are not voided."""
        transaction = (await deducted(ledger, 10)).body["transaction_id"]
        await ledger.grant(grant(1, key="grant-2"))
        await ledger.refund(refund(transaction, 2))
        for key in ("grant-2", "charge-1:refund"):
            assert (await ledger.void(void(key))).refusal == "idempotency-key-reused"
        assert await ledger.balance("acme", "alice") == 93

    async def test_void_in_another_tenant_touches_nothing(self, ledger: Ledger) -> None:
        """Keys belong to their tenant, and so do voids."""
        await deducted(ledger, 10)
        assert (await ledger.void(void(tenant="globex"))).body["refunded"] == 0
        assert await ledger.balance("acme", "alice") == 90


class TestGrant:
    async def test_grant_adds_once(self, ledger: Ledger) -> None:
        """The same key again adds nothing, whatever the reason says."""
        first = await ledger.grant(grant(100))
        again = await ledger.grant(grant(100, reason="other words"))
        assert (first.status, again.status, again.replayed) == (201, 200, True)
        assert first.body == again.body
        assert await ledger.balance("acme", "alice") == 100

    async def test_grant_key_with_other_payload_is_refused(self, ledger: Ledger) -> None:
        """Another amount, another account, another operation, a tombstone: all refused."""
        await deducted(ledger, 10, key="charge-1")
        await ledger.grant(grant(100))
        await ledger.void(void("never-seen"))
        for other in (
            grant(101),
            grant(100, user="bob"),
            grant(10, key="charge-1"),
            grant(10, key="never-seen"),
        ):
            assert (await ledger.grant(other)).refusal == "idempotency-key-reused"

    async def test_grants_of_a_lifetime_are_bounded(self, ledger: Ledger) -> None:
        """2^53-1 in all, spent or not: so no refund can ever make a balance too large."""
        await ledger.grant(grant(MAX_AMOUNT - 5))
        await ledger.deduct(deduct(MAX_AMOUNT - 5))
        assert (await ledger.grant(grant(5, key="grant-2"))).status == 201
        answer = await ledger.grant(grant(1, key="grant-3"))
        assert (answer.status, answer.refusal) == (422, "grant-too-large")
        assert (await ledger.void(void())).body["refunded"] == MAX_AMOUNT - 5
        assert await ledger.balance("acme", "alice") == MAX_AMOUNT


class TestCommands:
    @pytest.mark.parametrize("amount", [0, -1, True, 1.0, "1", MAX_AMOUNT + 1, None])
    def test_amount_must_be_a_whole_number_from_one(self, amount: Any) -> None:
        """Not even `True`, which is an int, or 1.0, which equals one."""
        with pytest.raises(ValueError, match="amount"):
            deduct(amount)

    @pytest.mark.parametrize("key", ["", "x" * 256, "two words", "naïve", "a\n", "a\x00", None, 7])
    def test_key_must_be_visible_ascii(self, key: Any) -> None:
        """1 to 255 characters that any header carries unchanged."""
        with pytest.raises(ValueError, match="idempotency_key"):
            deduct(key=key)

    @pytest.mark.parametrize("tenant", ["", "x" * 256, "a\tb", "a\x7f", "a\x00", "\ud800"])
    def test_ids_have_no_control_characters(self, tenant: str) -> None:
        """Nor lone surrogates, which no database stores."""
        with pytest.raises(ValueError, match="tenant_id"):
            Deduct(idempotency_key="k", tenant_id=tenant, amount=1)

    @pytest.mark.parametrize(
        "metadata", [{"a": 1}, {"a": {"b": "c"}}, {"a": "x" * 2048}, {"a": "\x00"}, {"\udfff": "a"}]
    )
    def test_metadata_is_a_small_flat_map_of_strings(self, metadata: Any) -> None:
        """At most 2 KiB of JSON, with nothing in it that cannot be stored."""
        with pytest.raises(ValueError, match="metadata"):
            deduct(metadata=metadata)

    @pytest.mark.parametrize("items", [("x",) * 1001, ("x" * 256,), ("",)])
    def test_items_are_bounded(self, items: tuple[str, ...]) -> None:
        """At most 1,000 of them, of at most 255 characters."""
        with pytest.raises(ValueError, match="items"):
            refund("t", items=items)
