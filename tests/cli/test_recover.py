"""`recover`: what the dead left is driven to its end; what the living hold is left to them."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from metered_billing import HttpCredits
from metered_billing.charge import Deducted, Lost, Record, Reported, Unknown, step
from metered_billing.credits.contract import Contract
from metered_billing.journal.postgres import PostgresJournal
from metered_billing.journal.sqlite import SqliteJournal
from tests.docs.sandbox import serving_thread
from tests.scenes import ANN, charge, keep
from tests.serving import free_port, start_service

JOURNAL = Path("metered-billing-journal")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    """A service in which ann of acme holds 100 credits."""
    with start_service(tmp_path) as (_, url):
        grant = {"tenant_id": "acme", "user_id": "ann", "amount": 100, "reason": "test"}
        headers = {"Authorization": "Bearer admins", "Idempotency-Key": "grant"}
        assert httpx.post(f"{url}/v1/grants", json=grant, headers=headers, trust_env=False, verify=False).is_success
        yield url


def deducted(url: str, record: Record) -> Record:
    """The charge, with its deduction at the service."""

    async def deduct() -> Record:
        credits = HttpCredits(url, token="admins")  # noqa: A001
        await credits.start()
        answer = await credits.deduct(record)
        await credits.aclose()
        assert isinstance(answer, Deducted)
        return step(record, answer, now=record.opened_at)

    return asyncio.run(deduct())


def balance(url: str) -> int:
    params = {"tenant_id": "acme", "user_id": "ann"}
    headers = {"Authorization": "Bearer admins"}
    held: int = httpx.get(f"{url}/v1/balance", params=params, headers=headers, trust_env=False, verify=False).json()[
        "balance"
    ]
    return held


def left_by_the_dead(url: str) -> list[Record]:
    """A process died while it asked, while it worked, and before it refunded."""
    asked, at_work, refunding = charge(), deducted(url, charge()), deducted(url, charge())
    refunding = step(refunding, Reported(7), now=time.time())
    records = [asked, at_work, refunding]
    asyncio.run(keep(JOURNAL, records, realm=url))
    return records


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "code", "sentence"),
        [
            ([], 2, "Say where the credits are"),
            (["--credits", "ftp://x"], 2, "must be an http(s)"),
            (["--credits", "http://x", "--within", "-1"], 2, "within"),
            (["--credits", "http://x", "--contract", "json:loads"], 2, "no Contract"),
            (["--credits", "sqlite:///x.db", "--contract", f"{Contract.__module__}:Contract"], 2, "http(s)"),
            (["--credits", "http://x", "--journal", "mysql://x:secret@y"], 2, "--journal"),
            (["--credits", "http://x", "--journal", "nowhere"], 1, "no journal at nowhere"),
            (["--credits", "sqlite:///no/such/credits.db"], 1, "credits.db"),
        ],
    )
    def test_asked_for_wrongly(self, run: Any, arguments: list[str], code: int, sentence: str) -> None:
        """One sentence; no journal is made."""
        JOURNAL.mkdir()
        done = run("recover", *arguments)
        assert (done.code, done.out) == (code, "")
        assert sentence in done.err
        assert "secret" not in done.err
        assert not Path("nowhere").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("token", ["nonsense", None])
    def test_wrong_token_moves_nothing_and_says_why(self, run: Any, service: str, token: str | None) -> None:
        """What is left stays, with its reason: exit code 3. With the right one it is finished."""
        left_by_the_dead(service)
        options = {"TOKEN": token} if token else {}
        done = run("recover", "--within", "1", CREDITS=service, **options)
        assert done.code == 3
        assert "Left: 3." in done.out
        assert "HTTP 401" in done.out
        assert run("recover", CREDITS=service, TOKEN="admins").code == 0
        assert balance(service) == 93

    def test_unreachable_service_leaves_all_in_the_journal(self, run: Any) -> None:
        """Within the time that it was given; the reason is told; the next one finds it again."""
        nobody = f"http://127.0.0.1:{free_port()}"
        asyncio.run(keep(JOURNAL, [charge(Deducted("t"), Lost("x"))], realm=nobody))
        for _ in range(2):
            done = run("recover", "--within", "0.5", "--json", CREDITS=nobody)
            document = json.loads(done.out)
            assert (done.code, document["left_count"]) == (3, 1)
            assert "onnect" in document["left"][0]["why"]

    def test_charges_of_other_credits_are_left_alone(self, run: Any) -> None:
        """They can only be settled where they were made: named, exit code 3."""
        asyncio.run(keep(JOURNAL, [charge(Deducted("t"))], realm="https://old"))
        done = run("recover", "--within", "1", CREDITS="sqlite:///credits.db")
        assert done.code == 3
        assert "https://old" in done.err
        assert "Left: 1." in done.out

    def test_journal_of_another_version_is_refused(self, run: Any) -> None:
        """Nothing of it is touched."""
        asyncio.run(keep(JOURNAL, [charge(Deducted("t"))]))
        with closing(sqlite3.connect(JOURNAL / "charges-0.db")) as connection:
            connection.execute("PRAGMA user_version = 99")
        done = run("recover", "--within", "1", CREDITS="sqlite:///credits.db")
        assert done.code in (1, 3)
        assert "version 99" in done.err


class TestRecover:
    def test_nothing_to_do(self, run: Any) -> None:
        """Exit code 0."""
        JOURNAL.mkdir()
        done = run("recover", CREDITS="sqlite:///credits.db")
        assert (done.code, done.out, done.err) == (0, "Nothing is left.\n", "")

    @pytest.mark.slow
    def test_what_the_dead_left_is_finished(self, run: Any, service: str) -> None:
        """Voided, refunded in whole and in part; afterwards there is no difference."""
        left_by_the_dead(service)
        done = run("recover", CREDITS=service, TOKEN="admins")
        assert (done.code, done.err) == (0, "")
        assert done.out == "Now final: 2 settled, 1 voided. 13 credits went back.\nNothing is left.\n"
        assert balance(service) == 93
        assert run("reconcile", CREDITS=service, TOKEN="admins").code == 0
        assert run("charges", "list", "--unsettled").code == 0

    def test_through_a_mapping(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A refund that is due goes to a service of another shape in its own words; without them it says what lacks."""
        examples = Path(__file__).parents[2] / "docs" / "examples"
        monkeypatch.syspath_prepend(str(examples))
        import house_service

        done = {"transactionId": "tx-left", "who": ("acme", "ann"), "credits": 10}
        monkeypatch.setitem(house_service.deductions, "charge-7", done)
        monkeypatch.setitem(house_service.held, ("acme", "ann"), 0)
        with serving_thread(house_service.app, port := free_port()):
            url = f"http://127.0.0.1:{port}"
            asyncio.run(keep(JOURNAL, [charge(Deducted("tx-left"), Lost("x"))], realm=url))
            options = ("--token", "house-secret", "--contract", "house_credits:HouseCredits")
            unheard = run("recover", *options[:2], "--within", "0.5", CREDITS=url)
            finished = run("recover", *options, CREDITS=url)
        assert (unheard.code, f"{url} answers 404" in unheard.err, "--contract" in unheard.err) == (3, True, True)
        assert (finished.code, house_service.held["acme", "ann"]) == (0, 10)

    @pytest.mark.slow
    def test_what_the_living_hold_is_left_to_them(self, run: Any, service: str) -> None:
        """Not a charge of a running app is touched; that is no reason for cron to call."""
        left_by_the_dead(service)

        async def main() -> None:
            journal = SqliteJournal(JOURNAL.with_name("other"))
            await journal.start(service)
            young = replace(charge(opened_at=time.time()), owner=journal.owner)
            await journal.open(young)
            for path in JOURNAL.iterdir():
                path.rename(JOURNAL.with_name("other") / path.name.replace("-0", "-1"))
            done = await asyncio.to_thread(
                run,
                "recover",
                "--json",
                JOURNAL="other",
                CREDITS=service,
                TOKEN="admins",
            )
            document = json.loads(done.out)
            assert (done.code, document["left_count"], document["with_living_processes"]) == (0, 0, 1)
            assert document["final"] == {"settled": 2, "voided": 1}
            assert await journal.write(young, step(young, Unknown("x"), now=0), durable=True)
            await journal.close()

        asyncio.run(main())

    @pytest.mark.slow
    def test_charge_that_becomes_disputed_is_for_a_person(self, run: Any, service: str) -> None:
        """Exit code 3, and `explain` tells why."""
        record = charge(Deducted("no-such-transaction"), Lost("x"), request_id="req-1")
        asyncio.run(keep(JOURNAL, [record], realm=service))
        where = {"CREDITS": service, "TOKEN": "admins"}
        done = run("recover", **where)
        assert done.code == 3
        assert done.out.startswith("Now final: 1 disputed. 0 credits went back.")
        assert "HTTP 404 not-found" in run("explain", "req-1", **where).out

    @pytest.mark.slow
    def test_app_killed_in_the_middle_of_a_request(self, run: Any, service: str, tmp_path: Path) -> None:
        """kill -9 with a request under way; recover gives it back without starting the app."""
        port = free_port()
        app = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "tests.real.app:app", "--port", str(port)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
                "METERED_BILLING_CREDITS": service,
                "METERED_BILLING_TOKEN": "admins",
                "METERED_BILLING_JOURNAL": str(tmp_path / JOURNAL),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        headers = {"Authorization": "Bearer admins", "Idempotency-Key": "grant-pool"}
        grant = {"tenant_id": "acme", "amount": 100, "reason": "test"}
        assert httpx.post(f"{service}/v1/grants", json=grant, headers=headers, trust_env=False, verify=False).is_success
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=0.5, verify=False) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.get("/up")
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            with pytest.raises(httpx.ReadTimeout):
                client.post("/work?seconds=60", headers={"X-Request-ID": "req-7"})
        while "deducted" not in run("charges", "list", "--unsettled").out:
            assert time.monotonic() < deadline
        assert "is being served" in run("explain", "req-7").out
        where = {"CREDITS": service, "TOKEN": "admins"}
        assert "With living processes, and left to them: 1." in run("recover", "--within", "2", **where).out
        app.send_signal(signal.SIGKILL)
        app.wait()
        assert run("charges", "list", "--unsettled").code == 3
        assert "10 credits went back" in run("recover", **where).out
        assert "paid nothing: all 10 credits came back" in run("explain", "req-7", **where).out
        assert run("reconcile", **where).out.startswith("0 differences: 1 charges and 2 transactions")

    @pytest.mark.slow
    def test_journal_on_postgresql(self, run: Any, service: str, pg_url: str) -> None:
        """A process that died is known as such when its lease has run out; reconcile and explain read it, too."""
        record = deducted(service, charge(request_id="req-1", account=ANN))

        async def die() -> None:
            journal = PostgresJournal(pg_url)
            await journal.start(service)
            await journal.open(replace(record, owner=journal.owner))
            await journal.close()  # gives the place up, as an expired lease would

        asyncio.run(die())
        where = {"CREDITS": service, "TOKEN": "admins", "JOURNAL": pg_url}
        assert run("charges", "list", "--unsettled", JOURNAL=pg_url).code == 3
        done = run("recover", **where)
        assert (done.code, done.out) == (0, "Now final: 1 settled. 10 credits went back.\nNothing is left.\n")
        assert run("reconcile", **where).code == 0
        assert "paid nothing" in run("explain", "req-1", **where).out
        unknown = run("explain", "req-9", JOURNAL=pg_url)
        assert unknown.code == 1
        assert "postgresql://" in unknown.err
        assert "@" not in unknown.err
