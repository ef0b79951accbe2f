"""`charges` and `explain`, as people run them."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from metered_billing import SqlCredits
from metered_billing.charge import (
    Declined,
    Deducted,
    Event,
    Record,
    Refunded,
    Refused,
    Reported,
    Unknown,
    Unread,
    Voided,
)
from metered_billing.ledger import Ledger
from metered_billing.runtime import new_uuid7
from metered_billing.service import Tokens, create_app
from tests.docs.sandbox import serving_thread
from tests.scenes import ANN, charge, keep
from tests.serving import free_port

JOURNAL = "metered-billing-journal"
API = "metered_billing.credits.contract:Contract"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

SETTLED = charge(Deducted("t-1"), Reported(8, ("img-3", "img-7")), Refunded(), request_id="req-1")
DECLINED = charge(Declined(3), request_id="req-2")
DISPUTED = charge(Deducted("t-3"), Unread("KeyError in outcomes"), request_id="req-3")
OPENED = charge(request_id="req-1")


def kept(*records: Record) -> None:
    asyncio.run(keep(Path(JOURNAL), records, realm="the-app's" if records[0] is SETTLED else ""))


def in_the_ledger(record: Record, *, refund: int) -> Record:
    """The record with a transaction in `credits.db`."""

    async def book() -> str:
        credits = SqlCredits("credits.db")  # noqa: A001 - the field's word
        await credits.grant("acme", "ann", amount=100, reason="test", idempotency_key=new_uuid7())
        done = await credits.deduct(record)
        assert isinstance(done, Deducted)
        if refund:
            back = charge(done, Reported(record.amount_credits - refund), id=record.id)
            assert isinstance(await credits.refund(back), Refunded)
        await credits.aclose()
        return done.transaction_id

    transaction_id = asyncio.run(book())
    return charge(Deducted(transaction_id), Reported(8, ("img-3",)), Refunded(), id=record.id, request_id="req-9")


async def another_charge() -> None:
    """Something that its account's list has besides."""
    credits = SqlCredits("credits.db")  # noqa: A001 - the field's word
    await credits.grant("acme", "ann", amount=10, reason="test", idempotency_key=new_uuid7())
    assert isinstance(await credits.deduct(charge()), Deducted)
    await credits.aclose()


class TestBadInput:
    @pytest.mark.parametrize(
        "arguments", [["charges", "list"], ["charges", "show", "x"], ["explain", "x"]], ids=lambda words: words[-1]
    )
    def test_no_journal_there(self, run: Any, arguments: list[str]) -> None:
        """One sentence that says how to name it, exit code 1, and none is made."""
        done = run(*arguments)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert "--journal" in done.err
        assert not Path(JOURNAL).exists()

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["charges", "list", "--state", "lost"], "lost"),
            (["charges", "list", "--since", "yesterday"], "--since: write 30m"),
            (["charges", "list", "--limit", "0"], "limit"),
            (["charges", "list", "--journal", "ftp://x:secret@y"], "--journal: a directory"),
            (["charges"], ""),
            (["explain"], "Missing argument 'ID'"),
            (["explain", "req-1", "--credits", "ftp://x"], "not a ledger"),
        ],
    )
    def test_asked_for_wrongly(self, run: Any, arguments: list[str], sentence: str) -> None:
        """Exit code 2, and what is wrong, without secrets."""
        kept(SETTLED)
        done = run(*arguments)
        assert done.code == 2
        assert sentence in done.err
        assert "secret" not in done.err
        assert "Traceback" not in done.err

    @pytest.mark.parametrize("command", [["charges", "show"], ["explain"]], ids=lambda words: words[-1])
    def test_unknown_id_says_what_a_journal_forgets(self, run: Any, command: list[str]) -> None:
        """Exit code 1."""
        kept(SETTLED)
        done = run(*command, "req-\x1b[2J")
        assert (done.code, done.out) == (1, "")
        assert "7 days" in done.err
        assert "\x1b" not in done.err

    def test_what_cannot_be_read_is_named_and_the_rest_shown(self, run: Any) -> None:
        """A corrupt file and one of another version: on stderr, exit code 3."""
        kept(SETTLED)
        (Path(JOURNAL) / "charges-1.db").write_bytes(b"rubbish" * 1_000)
        with closing(sqlite3.connect(Path(JOURNAL) / "charges-2.db")) as connection:
            connection.execute("PRAGMA user_version = 9")
        done = run("charges", "list")
        assert done.code == 3
        assert SETTLED.id in done.out
        assert "charges-1.db" in done.err
        assert "version 9" in done.err

    @pytest.mark.parametrize("credits_at", ["http://127.0.0.1:{}", "sqlite:///no/such.db"])
    def test_service_that_is_not_there_keeps_no_story_from_being_told(self, run: Any, credits_at: str) -> None:
        """The journal's side is told; then a sentence, and exit code 1."""
        kept(SETTLED)
        done = run("explain", "req-1", "--credits", credits_at.format(free_port()))
        assert done.code == 1
        assert "paid 8 credits" in done.out
        assert done.err.count("\n") == 1


class TestList:
    def test_all_is_well(self, run: Any) -> None:
        """Newest first, exit code 0."""
        kept(SETTLED, DECLINED)
        done = run("charges", "list")
        lines = done.out.splitlines()
        assert (done.code, done.err, len(lines)) == (0, "", 3)
        assert lines[1].split()[2:] == [
            "declined", "acme", "/", "ann", "10", "0", DECLINED.id, "req-2", "insufficient", "credits",
        ]  # fmt: skip
        assert lines[2].split()[2:9] == ["settled", "acme", "/", "ann", "10", "8", SETTLED.id]

    @pytest.mark.parametrize(
        ("options", "shown", "code"),
        [
            (["--state", "settled", "--state", "declined"], [DECLINED, SETTLED], 0),
            (["--unsettled"], [OPENED], 3),
            (["--request-id", "req-1"], [OPENED, SETTLED], 3),
            (["--state", "disputed"], [DISPUTED], 3),
            (["--tenant", "acme", "--user", "ann", "--limit", "1"], [OPENED], 3),
            (["--tenant", "nobody"], [], 0),
            (["--since", "1h"], [], 0),
            (["--since", "2025-11-25"], [OPENED, DISPUTED, DECLINED, SETTLED], 3),
            (["--since", "2025-11-25T12:00:01Z"], [], 0),
        ],
    )
    def test_options_narrow_it_down(self, run: Any, options: list[str], shown: list[Record], code: int) -> None:
        """Exit code 3 where one of those asked for is for somebody to see to."""
        kept(SETTLED, DECLINED, DISPUTED, OPENED)
        done = run("charges", "list", "--json", *options)
        assert done.code == code
        assert [item["id"] for item in json.loads(done.out)["items"]] == [record.id for record in shown]
        as_table = run("charges", "list", *options)
        assert as_table.code == code
        assert [record.id in as_table.out for record in (SETTLED, DECLINED, DISPUTED, OPENED)] == [
            record in shown for record in (SETTLED, DECLINED, DISPUTED, OPENED)
        ]

    def test_more_than_the_limit_is_said(self, run: Any) -> None:
        """Nobody takes the first page for all."""
        kept(SETTLED, DECLINED)
        assert "raise --limit" in run("charges", "list", "--limit", "1").out
        assert "raise --limit" not in run("charges", "list", "--limit", "2").out

    def test_what_is_not_shown_is_judged_too(self, run: Any) -> None:
        """Cron is told of a dispute, however many charges came after it."""
        kept(DISPUTED, replace(SETTLED, id="later", opened_at=DISPUTED.opened_at + 60))
        done = run("charges", "list", "--limit", "1")
        assert (done.code, DISPUTED.id in done.out) == (3, False)

    def test_text_from_elsewhere_is_not_obeyed(self, run: Any) -> None:
        """Whatever an app put into a charge; and each charge is one line in a pipe."""
        evil = "\x1b[2J[bold]\u202e\n" + "long " * 60
        record = charge(Deducted("t"), Unread(evil), metadata={"\x1b[1m": evil}, request_id=evil)
        kept(record)
        for command in (["charges", "list"], ["charges", "show", record.id], ["explain", evil]):
            out = run(*command).out
            assert "[bold]" in out
            assert "\x1b" not in out
            assert "\u202e" not in out
        assert len(run("charges", "list").out.splitlines()) == 2


class TestShow:
    def test_charge_is_shown_whole(self, run: Any) -> None:
        """As it stands on record, for people and as JSON."""
        kept(SETTLED)
        done = run("charges", "show", SETTLED.id)
        assert done.code == 0
        assert "refund_items    img-3, img-7\n" in done.out
        document = json.loads(run("charges", "show", SETTLED.id, "--json").out)
        assert document["history"][-1]["what"] == "refunded"
        assert (document["kept"], document["attention"]) == (8, None)

    def test_request_id_names_no_charge(self, run: Any) -> None:
        """`show` takes a charge's id; `explain` takes either."""
        kept(SETTLED)
        assert run("charges", "show", "req-1").code == 1
        assert run("charges", "show", DISPUTED.id).code == 1


class TestExplain:
    def test_all_charges_of_a_request_oldest_first(self, run: Any) -> None:
        """A client may send a request id twice."""
        kept(SETTLED, OPENED)
        done = run("explain", "req-1")
        assert done.out.index("paid 8 credits") < done.out.index("its process died")
        assert done.code == 3
        document = json.loads(run("explain", "req-1", "--json").out)
        assert [item["id"] for item in document["items"]] == [SETTLED.id, OPENED.id]
        assert "paid 8 credits" in document["items"][0]["story"][0]

    def test_transactions_id_will_do(self, run: Any) -> None:
        """It is what the customer was told, and all that is known of a request without an id."""
        kept(SETTLED, OPENED, DISPUTED)
        done = run("explain", "t-1")
        assert (done.code, done.out.count("Charge ")) == (0, 1)
        assert f"Charge {SETTLED.id}, settled" in done.out
        assert "no transaction t-" in run("explain", "t-").err

    def test_disputed_charge_is_for_a_person(self, run: Any) -> None:
        """Exit code 3."""
        kept(DISPUTED)
        done = run("explain", DISPUTED.id)
        assert done.code == 3
        assert "KeyError in outcomes" in done.out

    @pytest.mark.parametrize(
        ("refund", "code", "words"),
        [
            (2, 0, "8 credits kept: journal and service agree"),
            (0, 3, "not refunded: the journal has 2 refunded, the service 0"),
            (3, 3, "refunded otherwise: the journal has 2 refunded, the service 3"),
        ],
    )
    def test_service_is_asked_whether_it_agrees(self, run: Any, refund: int, code: int, words: str) -> None:
        """What its ledger says of the transaction, and exit code 3 where it says something else."""
        kept(in_the_ledger(charge(account=ANN), refund=refund))
        done = run("explain", "req-9", "--credits", "sqlite:///credits.db")
        assert words in done.out
        assert done.code == code
        document = json.loads(run("explain", "req-9", "--json", "--credits", "sqlite:///credits.db").out)
        service = document["items"][0]["service"]
        assert service["agrees"] is (code == 0)
        assert service["net"] == 10 - refund

    def test_transaction_that_the_service_does_not_have(self, run: Any) -> None:
        """It says so."""
        kept(SETTLED)
        done = run("explain", "req-1", "--credits", "sqlite:///credits.db")
        assert "no such transaction. The journal has the answer: 10 credits were taken, at the-app's." in done.out
        assert "if the token may not see acme, give one that may (--token). If neither, " in done.out
        assert done.code == 3

    @pytest.mark.parametrize("record", [charge(Deducted("t-1")), DISPUTED], ids=lambda record: record.state)
    def test_what_is_confirmed_has_to_be_there(self, run: Any, record: Record) -> None:
        """Also while there is nothing to compare yet: somebody has to look, and JSON says so."""
        kept(record)
        done = run("explain", record.id, "--json", "--credits", "sqlite:///credits.db")
        (item,) = json.loads(done.out)["items"]
        assert (done.code, item["service"]["agrees"], item["service"]["entries"]) == (3, False, [])
        assert "where the app's credits are" in item["service"]["verdict"]

    @pytest.mark.parametrize(
        ("events", "words"),
        [
            ((), "nothing was taken so far. If it arrives late it is undone"),
            ((Unknown("ReadTimeout"),), "nothing was taken so far. If it arrives late it is undone"),
            ((Unknown("ReadTimeout"), Voided()), "nothing was taken: journal and service agree"),
            ((Declined(3),), "nothing was taken: journal and service agree"),
            ((Unknown("ReadTimeout"), Refused("no")), "nothing was taken, and there is nothing to give back"),
        ],
        ids=["opened", "voiding", "voided", "declined", "disputed"],
    )
    def test_deduction_without_an_answer_that_never_arrived(
        self, run: Any, events: tuple[Event, ...], words: str
    ) -> None:
        """Its key tells: what is known, and what is not."""
        kept(record := charge(*events))
        asyncio.run(another_charge())
        done = run("explain", record.id, "--credits", "sqlite:///credits.db")
        assert f"service  no deduction under the key of this charge: {words}" in done.out

    @pytest.mark.parametrize(
        ("events", "code", "words"),
        [
            ((Unknown("ReadTimeout"),), 3, "of which the journal has no answer: nothing to compare yet"),
            ((Unknown("ReadTimeout"), Voided()), 3, "not undone: the journal has voided; the service took 10 and gave"),
        ],
        ids=["voiding", "voided"],
    )
    def test_deduction_without_an_answer_that_arrived(
        self, run: Any, events: tuple[Event, ...], code: int, words: str
    ) -> None:
        """The service has its transaction, which the journal never heard of."""
        record = charge()
        in_the_ledger(record, refund=0)
        asyncio.run(another_charge())
        kept(charge(*events, id=record.id))
        done = run("explain", record.id, "--credits", "sqlite:///credits.db")
        assert "service  10 credits kept in " in done.out
        assert words in done.out
        assert done.code == code


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The reference service, and a transaction of it, the deduction of `there`."""
    ledger = Ledger(tmp_path_factory.mktemp("service") / "credits.db")
    body = {"tenant_id": "acme", "user_id": "ann", "amount": 10}
    with serving_thread(create_app(ledger, Tokens({"t": "admin"})), port := free_port()):
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer t"}, verify=False) as client:
            grant = {**body, "reason": "test"}
            assert client.post("/v1/grants", json=grant, headers={"Idempotency-Key": "g"}).status_code == 201
            done = client.post("/v1/deductions", json=body, headers={"Idempotency-Key": "there"}).json()
        yield url, str(done["transaction_id"])


class TestExplainThroughAMapping:
    """A service of another shape has no transactions in the words of the credits API."""

    def explain(self, run: Any, url: str, record: Record, contract: str = API) -> Any:
        kept(record)
        return run("explain", record.id, "--credits", url, "--token", "t", "--contract", contract)

    @pytest.mark.parametrize(
        ("charge_id", "transaction_id", "code", "words"),
        [
            ("there", "{}", 0, "the deduction is there, {}. What came back of it, a mapping does not say"),
            ("there", "other", 3, "other deduction: the journal has transaction other, the service {}"),
            ("missing", "t-1", 3, "no such transaction. The journal has the answer"),
        ],
    )
    def test_deduction_is_looked_for(
        self, run: Any, service: tuple[str, str], charge_id: str, transaction_id: str, code: int, words: str
    ) -> None:
        """By its key, and that is all that a mapping can tell."""
        url, there = service
        done = self.explain(run, url, charge(Deducted(transaction_id.format(there)), Reported(10), id=charge_id))
        assert done.code == code
        assert words.format(there) in done.out

    def test_deduction_that_the_journal_has_no_answer_to(self, run: Any, service: tuple[str, str]) -> None:
        """It is named."""
        url, there = service
        done = self.explain(run, url, charge(Unknown("ReadTimeout"), id="there"))
        assert f"the deduction is there, {there}, of which the journal has no answer" in done.out

    def test_mapping_without_a_list(self, run: Any, monkeypatch: pytest.MonkeyPatch, service: tuple[str, str]) -> None:
        """The journal alone tells; that is neither agreement nor a difference."""
        monkeypatch.syspath_prepend(str(EXAMPLES))
        done = self.explain(run, service[0], SETTLED, "house_credits:HouseCredits")
        assert done.code == 0
        assert "no list to look in, so the journal alone says this. Look up t-1 in its own records" in done.out

    @pytest.mark.parametrize(
        ("url", "contract", "code", "sentence"),
        [
            ("http://127.0.0.1:{}", API, 1, "does not say whether it has charge"),
            ("sqlite:///credits.db", API, 2, "a contract is for credits at an http(s):// URL"),
        ],
    )
    def test_no_answer(self, run: Any, url: str, contract: str, code: int, sentence: str) -> None:
        """The journal's side is told; then a sentence."""
        done = self.explain(run, url.format(free_port()), SETTLED, contract)
        assert (done.code, done.err.count("\n")) == (code, 1)
        assert "paid 8 credits" in done.out
        assert sentence in done.err


def test_another_service_at_that_address(run: Any) -> None:
    """What does not speak the credits API is named as that, not as a transaction that is missing."""
    kept(SETTLED)
    with serving_thread(Starlette(), port := free_port()):
        done = run("explain", "req-1", "--credits", f"http://127.0.0.1:{port}")
    assert done.code == 1
    assert "answers 404, and not as a credits service does" in done.err
    assert "paid 8 credits" in done.out
