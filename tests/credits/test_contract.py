"""What the credits API's client asks, and what it takes an answer for. No network."""

import email.utils
import json
from functools import reduce
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_billing.charge import (
    MAX_AMOUNT,
    Account,
    AlreadyVoided,
    Declined,
    Deducted,
    Found,
    NotFound,
    NoVoid,
    Record,
    Refunded,
    Refused,
    State,
    Unanswered,
    Unknown,
    Voided,
)
from metered_billing.credits.contract import MAX_PATIENCE_S, Call, Contract, Page, Reply, read_json, retry_after_s

CONTRACT = Contract()

JSON = {"content-type": "application/json"}
PROBLEM = {"content-type": "application/problem+json"}

DEDUCTION = {"transaction_id": "tx-1", "tenant_id": "acme", "user_id": "alice", "amount": 10, "balance": 90}
REFUND = {"refund_id": "re-1", "transaction_id": "tx-1", "amount": 2, "balance": 92}
VOID = {"status": "voided", "refunded": 10}
ENTRY = {"id": "tx-1", "kind": "deduction", "transaction_id": "tx-1", "idempotency_key": "charge-1"}


def record(**changes: Any) -> Record:
    """A charge of 10 credits, of which 2 are to go back."""
    fields: dict[str, Any] = {
        "id": "charge-1",
        "account": Account("acme", "alice"),
        "amount_credits": 10,
        "units": 10,
        "opened_at": 0.0,
        "state": State.REFUNDING,
        "transaction_id": "tx-1",
        "refund_credits": 2,
    }
    return Record(**{**fields, **changes})


def answer(status: int, body: Any = None) -> Reply:
    """An answer in JSON."""
    return Reply(status, httpx.Headers(JSON), body)


def problem(status: int, name: str) -> Reply:
    """A problem of ours."""
    return Reply(status, httpx.Headers(PROBLEM), {"type": f"urn:metered-billing:{name}", "status": status})


def stray(status: int) -> Reply:
    """What a proxy says: a page of HTML."""
    return Reply(status, httpx.Headers({"content-type": "text/html"}), None)


class TestCalls:
    def test_deduction_names_account_amount_and_key(self) -> None:
        """The key of the deduction is the charge's id."""
        call = CONTRACT.deduction(record())

        assert call == Call(
            "POST", "/v1/deductions", {"tenant_id": "acme", "user_id": "alice", "amount": 10}, key="charge-1"
        )

    def test_deduction_from_the_pool_names_no_user(self) -> None:
        """Without a user there is no `user_id`, not even null."""
        assert CONTRACT.deduction(record(account=Account("acme"))).body == {"tenant_id": "acme", "amount": 10}

    def test_deduction_carries_what_people_read(self) -> None:
        """The request's id and the metadata go along, where there are any."""
        body = CONTRACT.deduction(record(request_id="req-1", metadata={"route": "/x"})).body

        assert body is not None
        assert body["request_id"] == "req-1"
        assert body["metadata"] == {"route": "/x"}

    def test_refund_is_under_a_key_of_its_own(self) -> None:
        """The one refund of a charge has the key `{charge id}:refund`."""
        call = CONTRACT.refund(record(reason="failed items"))

        assert (call.method, call.path, call.key) == ("POST", "/v1/deductions/tx-1/refunds", "charge-1:refund")
        assert call.body == {"amount": 2, "reason": "failed items"}

    def test_refund_names_as_many_items_as_the_service_takes(self) -> None:
        """At most 1,000 items are named; the amount is what goes back."""
        items = tuple(f"img-{number}" for number in range(1_200))

        body = CONTRACT.refund(record(refund_items=items)).body

        assert body is not None
        assert body["items"] == list(items[:1_000])

    @pytest.mark.parametrize(
        ("reason", "sent"),
        [
            (None, "failed items"),
            ("", "failed items"),
            ("x" * 300, "x" * 255),
            ("a\x00b", "a b"),
            ("a\ud800b", "a?b"),
        ],
    )
    def test_refund_does_not_fail_for_its_reason(self, reason: str | None, sent: str) -> None:
        """A reason is made fit to be sent: an exception's text must not hold up a refund."""
        body = CONTRACT.refund(record(reason=reason)).body

        assert body is not None
        assert body["reason"] == sent

    @pytest.mark.parametrize(
        ("transaction_id", "segment"),
        [
            ("a/b", "a%2Fb"),
            ("a?b", "a%3Fb"),
            ("a#b", "a%23b"),
            ("a%2Fb", "a%252Fb"),
            ("ä b", "%C3%A4%20b"),
            ("a.b", "a.b"),
            (".", "%2E"),
            ("..", "%2E%2E"),
        ],
    )
    def test_refund_stays_below_its_transaction(self, transaction_id: str, segment: str) -> None:
        """Whatever a transaction is called, its name is one segment of the path."""
        call = CONTRACT.refund(record(transaction_id=transaction_id))

        assert call.path == f"/v1/deductions/{segment}/refunds"
        assert httpx.URL("https://h").copy_with(raw_path=call.path.encode()).raw_path.decode() == call.path

    def test_void_names_the_deductions_key(self) -> None:
        """A void has no key of its own: it names the key that it undoes."""
        call = CONTRACT.void(record())

        assert call == Call(
            "POST", "/v1/voids", {"tenant_id": "acme", "user_id": "alice", "idempotency_key": "charge-1"}
        )

    def test_transactions_are_asked_for_by_account(self) -> None:
        """A list is of one account, from one cursor on; what is not given is not sent."""
        whole = CONTRACT.transactions("acme", None, None, 200)
        assert whole == Call("GET", "/v1/transactions", params={"tenant_id": "acme", "limit": 200})
        params: dict[str, str | int] = {"tenant_id": "acme", "user_id": "alice", "cursor": "c", "limit": 5}
        assert CONTRACT.transactions("acme", "alice", "c", 5) == Call("GET", "/v1/transactions", params=params)

    def test_balance_is_asked_for_by_account(self) -> None:
        """And read as whole credits, or not at all."""
        asked = [CONTRACT.balance(Account("acme", user)) for user in (None, "alice")]
        assert [call.params for call in asked] == [{"tenant_id": "acme"}, {"tenant_id": "acme", "user_id": "alice"}]
        read = [
            CONTRACT.read_balance(answer(*told)) for told in ((200, {"balance": 7}), (200, {}), (401, {"balance": 7}))
        ]
        assert read == [7, None, None]

    def test_problem_of_ours_is_named(self) -> None:
        """A problem is ours by its content type and the `type` in it."""
        assert problem(404, "not-found").problem == "not-found"
        assert str(problem(404, "not-found")) == "HTTP 404 not-found"

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            ("application/json", {"type": "urn:metered-billing:not-found"}),
            ("", {"type": "urn:metered-billing:not-found"}),
            ("application/problem+json", {"type": "about:blank"}),
            ("application/problem+json", {"type": 7}),
            ("application/problem+json", {"title": "Not found"}),
            ("application/problem+json", ["urn:metered-billing:not-found"]),
            ("application/problem+json", None),
        ],
    )
    def test_problem_of_others_is_none(self, content_type: str, body: Any) -> None:
        """Without our content type and a type of ours it may be anybody's."""
        reply = Reply(404, httpx.Headers({"content-type": content_type}), body)

        assert reply.problem is None
        assert str(reply) == "HTTP 404"

    def test_problem_with_a_charset_is_ours_still(self) -> None:
        """Case and parameters of a content type say nothing."""
        headers = httpx.Headers({"Content-Type": "Application/Problem+JSON; charset=utf-8"})

        assert Reply(404, headers, {"type": "urn:metered-billing:not-found"}).problem == "not-found"

    @pytest.mark.parametrize("name", ["no-such-route", "method-not-allowed"])
    def test_wrong_address_is_not_the_services_refusal(self, name: str) -> None:
        """What the reference service says to a wrong address counts as little as a proxy's 404; logs show it."""
        assert problem(404, name).problem is None
        assert str(problem(404, name)) == f"HTTP 404 {name}"


class TestDeductionAnswers:
    @pytest.mark.parametrize("status", [200, 201])
    def test_confirmed(self, status: int) -> None:
        """201 is a deduction made now, 200 the same one made before: both are confirmed."""
        assert CONTRACT.read_deduction(record(), answer(status, DEDUCTION)) == Deducted("tx-1", 90)

    def test_confirmed_without_what_is_optional(self) -> None:
        """The transaction and the amount are what counts; a null user and unknown fields are no matter."""
        body = {"transaction_id": "tx-1", "amount": 10, "user_id": None, "more": [1]}

        assert CONTRACT.read_deduction(record(), answer(201, body)) == Deducted("tx-1", None)

    @pytest.mark.parametrize(
        "changes",
        [
            {"amount": 9},
            {"amount": 11},
            {"amount": 0},
            {"amount": -10},
            {"amount": 10.0},
            {"amount": "10"},
            {"amount": True},
            {"amount": None},
            {"amount": 10**30},
            {"amount": float("nan")},
            {"transaction_id": ""},
            {"transaction_id": None},
            {"transaction_id": 7},
            {"transaction_id": True},
            {"transaction_id": ["tx-1"]},
            {"transaction_id": "x" * 256},
            {"transaction_id": "\ud800"},
            {"balance": -1},
            {"balance": True},
            {"balance": "90"},
            {"balance": MAX_AMOUNT + 1},
            {"tenant_id": "another"},
            {"user_id": "another"},
            {"user_id": 7},
            {"user_id": ""},
            {"tenant_id": 7},
        ],
    )
    def test_broken_reply_confirms_nothing(self, changes: dict[str, Any]) -> None:
        """A 201 that does not say what was asked for is no answer: the credits may be taken or not."""
        got = CONTRACT.read_deduction(record(), answer(201, {**DEDUCTION, **changes}))

        assert got == Unknown("broken reply (HTTP 201)")

    def test_answer_about_a_user_is_none_about_the_pool(self) -> None:
        """Somebody else would have paid."""
        pool = record(account=Account("acme"))
        assert CONTRACT.read_deduction(pool, answer(201, DEDUCTION)) == Unknown("broken reply (HTTP 201)")
        assert CONTRACT.read_deduction(pool, answer(201, DEDUCTION | {"user_id": ""})) == Deducted("tx-1", 90)

    def test_one_credit_is_not_true(self) -> None:
        """`true` is not 1, though Python thinks so."""
        got = CONTRACT.read_deduction(
            record(amount_credits=1, refund_credits=1), answer(201, DEDUCTION | {"amount": True})
        )

        assert isinstance(got, Unknown)

    @pytest.mark.parametrize("body", [None, [], {}, "ok", 10, True, [DEDUCTION]])
    def test_body_of_another_shape_confirms_nothing(self, body: Any) -> None:
        """HTML, nothing, a list: no answer."""
        assert isinstance(CONTRACT.read_deduction(record(), answer(200, body)), Unknown)

    @pytest.mark.parametrize(
        ("body", "balance", "certain"),
        [
            ({"required": 10, "balance": 7}, 7, True),
            ({"required": 10}, None, True),
            ({"balance": 0}, 0, True),
            ({"balance": -1}, None, True),
            ({"balance": True}, None, True),
            ({"balance": "7"}, None, True),
            ({}, None, False),
            (None, None, False),
            ([7], None, False),
        ],
    )
    def test_declined(self, body: Any, balance: int | None, certain: bool) -> None:
        """402 is a decline, with the balance where it can be read; in a proxy's words it is in doubt."""
        assert CONTRACT.read_deduction(record(), answer(402, body)) == Declined(balance, certain=certain)
        own = CONTRACT.read_deduction(record(), problem(402, "insufficient-credits"))
        assert own == Declined(None, certain=True)

    def test_voided(self) -> None:
        """A deduction that arrives after its void is unknown: the void is made sure of again."""
        got = CONTRACT.read_deduction(record(), problem(409, "charge-voided"))

        assert got == Unknown("it was voided before it arrived")

    @pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404, 405, 406, 410, 413, 415, 422, 431, 451])
    def test_our_bug(self, status: int) -> None:
        """We asked wrongly, or in the wrong place. Whatever happened is undone."""
        for reply in (stray(status), problem(status, "invalid-request")):
            got = CONTRACT.read_deduction(record(), reply)
            assert isinstance(got, Unknown)
            assert got.misconfigured

    @pytest.mark.parametrize("status", [202, 204, 206, 401, 403, 408, 409, 425, 429, 500, 501, 502, 503, 504, 599])
    def test_no_answer(self, status: int) -> None:
        """No yes and no no: unknown, and not our bug."""
        assert CONTRACT.read_deduction(record(), stray(status)) == Unknown(f"HTTP {status}")


class TestRefundAnswers:
    @pytest.mark.parametrize("status", [200, 201])
    def test_confirmed(self, status: int) -> None:
        """201 is a refund made now, 200 the same one made before."""
        assert CONTRACT.read_refund(record(), answer(status, REFUND)) == Refunded("re-1", 92)

    @pytest.mark.parametrize(
        "body",
        [
            None,
            {},
            {"status": "ok"},
            {"amount": 2},
            {**REFUND, "amount": 1},
            {**REFUND, "amount": True},
            {**REFUND, "amount": "2"},
            {**REFUND, "refund_id": None},
            {**REFUND, "transaction_id": "another"},
            {**REFUND, "balance": -1},
        ],
    )
    def test_broken_reply_confirms_nothing(self, body: Any) -> None:
        """Only an answer that names the refund and its amount ends it; anything else is asked again."""
        assert CONTRACT.read_refund(record(), answer(200, body)) == Unanswered("broken reply (HTTP 200)")

    def test_voided_before(self) -> None:
        """409 `charge-voided`: the whole deduction was undone already."""
        assert CONTRACT.read_refund(record(), problem(409, "charge-voided")) == AlreadyVoided()

    @pytest.mark.parametrize(
        ("status", "name"),
        [
            (400, "invalid-request"),
            (404, "not-found"),
            (409, "something-else"),
            (413, "body-too-large"),
            (422, "refund-exceeds-deduction"),
            (422, "idempotency-key-reused"),
        ],
    )
    def test_refused_by_the_service_itself(self, status: int, name: str) -> None:
        """A problem of ours is the service's last word: a person looks."""
        assert CONTRACT.read_refund(record(), problem(status, name)) == Refused(f"HTTP {status} {name}")

    @pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
    def test_stray_refusal_is_asked_again(self, status: int) -> None:
        """A proxy's 404, or that of a deployment under way, is not the service's."""
        assert CONTRACT.read_refund(record(), stray(status)) == Unanswered(f"HTTP {status}")
        assert isinstance(CONTRACT.read_refund(record(), problem(status, "no-such-route")), Unanswered)

    @pytest.mark.parametrize("status", [202, 204, 301, 401, 402, 403, 405, 408, 425, 429, 500, 501, 502, 503, 504])
    def test_everything_else_is_asked_again(self, status: int) -> None:
        """A rotated token, a redirect, an outage: none of them is a dispute, whoever says it."""
        assert isinstance(CONTRACT.read_refund(record(), stray(status)), Unanswered)
        assert isinstance(CONTRACT.read_refund(record(), problem(status, "unauthorized")), Unanswered)


class TestVoidAnswers:
    @pytest.mark.parametrize(("body", "refunded"), [(VOID, 10), ({"status": "voided"}, 0)])
    def test_confirmed(self, body: Any, refunded: int) -> None:
        """`voided` is the end of it, whether there was something to give back or not."""
        assert CONTRACT.read_void(record(), answer(200, body)) == Voided(refunded)

    @pytest.mark.parametrize(
        "body",
        [
            None,
            {},
            [],
            {"refunded": 10},
            {**VOID, "status": "ok"},
            {**VOID, "refunded": True},
            {**VOID, "refunded": -1},
        ],
    )
    def test_broken_reply_confirms_nothing(self, body: Any) -> None:
        """Only an answer that says "voided" ends it; anything else is asked again."""
        assert CONTRACT.read_void(record(), answer(200, body)) == Unanswered("broken reply (HTTP 200)")

    def test_voided_before(self) -> None:
        """409 `charge-voided` says what was asked for: it is voided."""
        assert CONTRACT.read_void(record(), problem(409, "charge-voided")) == Voided()

    @pytest.mark.parametrize("status", [404, 405, 501])
    def test_no_void_here(self, status: int) -> None:
        """A service without voids does not know the address; a problem of ours comes from one that has them."""
        assert CONTRACT.read_void(record(), stray(status)) == NoVoid()
        assert CONTRACT.read_void(record(), problem(status, "no-such-route")) == NoVoid()
        assert CONTRACT.read_void(record(), problem(status, "not-found")) == Refused(f"HTTP {status} not-found")

    @pytest.mark.parametrize("status", [400, 413, 422])
    def test_refused_by_the_service_itself(self, status: int) -> None:
        """Only a problem of ours is a refusal."""
        assert isinstance(CONTRACT.read_void(record(), problem(status, "invalid-request")), Refused)
        assert isinstance(CONTRACT.read_void(record(), stray(status)), Unanswered)

    @pytest.mark.parametrize("status", [202, 302, 401, 402, 403, 408, 409, 425, 429, 500, 502, 503, 504])
    def test_everything_else_is_asked_again(self, status: int) -> None:
        """What is not a word of the service's about this void is no answer."""
        assert CONTRACT.read_void(record(), stray(status)) == Unanswered(f"HTTP {status}")


class TestTransactions:
    def test_page(self) -> None:
        """A page is its items and where the next begins."""
        got = CONTRACT.read_transactions(answer(200, {"items": [ENTRY], "next_cursor": "c"}))

        assert got == Page([ENTRY], "c")

    @pytest.mark.parametrize(
        "body", [{"items": []}, {"items": [], "next_cursor": None}, {"items": [], "next_cursor": ""}]
    )
    def test_last_page(self, body: Any) -> None:
        """No cursor, or an empty one, is the end."""
        assert CONTRACT.read_transactions(answer(200, body)) == Page([], None)

    @pytest.mark.parametrize(
        "reply",
        [
            answer(200),
            answer(200, {}),
            answer(200, []),
            answer(200, {"items": [7]}),
            answer(200, {"items": None}),
            answer(200, {"items": [], "next_cursor": 7}),
            answer(404, {"items": []}),
            answer(500, {"items": []}),
        ],
    )
    def test_broken_page(self, reply: Reply) -> None:
        """What is no page says nothing: least of all that there is no transaction."""
        assert CONTRACT.read_transactions(reply) is None

    def test_found(self) -> None:
        """The deduction under the charge's key, and no other entry, is the one."""
        others = [
            {**ENTRY, "kind": "void"},
            {**ENTRY, "kind": "refund", "idempotency_key": "charge-1:refund"},
            {**ENTRY, "idempotency_key": "charge-2", "transaction_id": "tx-2"},
            {},
        ]

        assert CONTRACT.find(record(), Page(others, None)) == NotFound()
        assert CONTRACT.find(record(), Page([*others, ENTRY], None)) == Found("tx-1")

    def test_found_by_its_own_id(self) -> None:
        """A deduction is its own transaction, where the service names no other."""
        item = {"id": "tx-9", "kind": "deduction", "idempotency_key": "charge-1"}

        assert CONTRACT.find(record(), Page([item], None)) == Found("tx-9")

    @pytest.mark.parametrize("changes", [{}, {"id": 7}, {"id": ""}, {"transaction_id": {"a": 1}, "id": "tx-1"}])
    def test_found_without_an_id(self, changes: dict[str, Any]) -> None:
        """A transaction that cannot be named cannot be refunded, nor is it missing."""
        item = {"kind": "deduction", "idempotency_key": "charge-1", **changes}

        assert CONTRACT.find(record(), Page([item], None)) == Unanswered("a transaction without an id")


class TestReadJson:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"<html>ok</html>",
            b'{"transaction_id": "tx-1", "amou',
            b"\xff\xfe\xfd",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"1" * 5_000,
            b'{"amount": ' + b"9" * 10_000 + b"}",
        ],
    )
    def test_unreadable(self, content: bytes) -> None:
        """What cannot be read is None, and raises nothing."""
        assert read_json(content) is None

    @pytest.mark.parametrize(
        ("content", "value"),
        [
            (b'{"detail": "half a character: \\ud800"}', {"detail": "half a character: \ud800"}),
            ('{"amount": 10}'.encode("utf-16"), {"amount": 10}),
            (b'\xef\xbb\xbf{"amount": 10}', {"amount": 10}),
            (b'{"amount": 1, "amount": 10}', {"amount": 10}),
            (b'{"amount": 9007199254740993}', {"amount": 2**53 + 1}),
            (b"[" * 500 + b"]" * 500, reduce(lambda inner, _: [inner], range(499), list[Any]())),
        ],
    )
    def test_readable(self, content: bytes, value: Any) -> None:
        """What Python's own reader makes sense of is read, and alike."""
        assert read_json(content) == value == json.loads(content)

    @given(st.binary())
    def test_any_bytes(self, content: bytes) -> None:
        """No bytes at all make it raise."""
        read_json(content)

    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), lambda more: (
        st.lists(more) | st.dictionaries(st.sampled_from(["transaction_id", "amount", "status", "items", "id"]), more)
    )), st.integers(100, 599))  # fmt: skip
    def test_any_json(self, body: Any, status: int) -> None:
        """Whatever a service says, the answers are values, and nothing confirms itself by accident."""
        for headers in (JSON, PROBLEM):
            reply = Reply(status, httpx.Headers(headers), json.loads(json.dumps(body)))
            assert not isinstance(CONTRACT.read_deduction(record(amount_credits=7777), reply), Deducted)
            assert not isinstance(CONTRACT.read_refund(record(amount_credits=7777), reply), Refunded)
            assert not isinstance(CONTRACT.read_void(record(), reply), Voided)
            CONTRACT.read_transactions(reply)


class TestRetryAfter:
    NOW = 1_445_412_480.0  # Wed, 21 Oct 2015 07:28:00 GMT

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("0", 0.0),
            ("3", 3.0),
            (" 120 ", 120.0),
            ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
            ("Wednesday, 21-Oct-15 07:28:30 GMT", 30.0),
            ("Wed Oct 21 07:28:30 2015", 30.0),
            ("Wed, 21 Oct 2015 07:00:00 GMT", 0.0),
        ],
    )
    def test_readable(self, value: str, seconds: float) -> None:
        """Seconds, or a date in any of the three forms of RFC 9110; a date that is over is now."""
        assert retry_after_s(httpx.Headers({"Retry-After": value}), self.NOW) == seconds

    @pytest.mark.parametrize("value", ["", "soon", "-1", "1.5", "٣", "1e3", "Wed, 99 Oct 99999 99:99:99 GMT"])
    def test_unreadable(self, value: str) -> None:
        """What is neither is as good as absent."""
        assert retry_after_s(httpx.Headers([(b"Retry-After", value.encode())]), self.NOW) is None

    def test_absent(self) -> None:
        """No header, no wait."""
        assert retry_after_s(httpx.Headers(), self.NOW) is None

    @pytest.mark.parametrize("value", ["3601", "999999999", "9" * 400, "Wed, 21 Oct 2115 07:28:00 GMT"])
    def test_at_most_an_hour(self, value: str) -> None:
        """A slip in a header must not put a refund off for years."""
        assert retry_after_s(httpx.Headers({"Retry-After": value}), self.NOW) == MAX_PATIENCE_S

    @given(st.text() | st.integers().map(str) | st.floats(0, 4e9).map(lambda at: email.utils.formatdate(at)))
    def test_any_text(self, value: str) -> None:
        """Whatever stands there, it is none, or from 0 seconds to an hour."""
        got = retry_after_s({"retry-after": value}, self.NOW)

        assert got is None or 0 <= got <= MAX_PATIENCE_S
