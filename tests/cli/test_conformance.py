"""`metered-billing conformance`, as people and machines run it."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from metered_billing.conformance import CHECKS
from tests.conformance import broken
from tests.conformance.broken import ADMIN, APP, Service

cli = pytest.importorskip("metered_billing.cli.conformance")


@pytest.fixture
def against(monkeypatch: pytest.MonkeyPatch, run: Any, tmp_path: Path) -> Any:
    """Run the command against a service of this kind, for the checks of these names alone."""
    real = cli.check_service

    def against(kind: type[Service], *arguments: str, checks: tuple[str, ...] = (), **environment: str) -> Any:
        wanted = [check for check in CHECKS if check.name in checks]
        service = kind(tmp_path)

        async def check_service(url: str, **options: Any) -> Any:
            try:
                return await real(url, transport=service, checks=wanted, **options)
            finally:
                await service.ledger.close()

        monkeypatch.setattr(cli, "check_service", check_service)
        return run("conformance", *arguments, **{"CREDITS": "http://credits", "TOKEN": APP, **environment})

    return against


class TestAskedWrongly:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ([], "--url URL"),
            (["--url", "http://credits"], "--token TOKEN"),
            (["--url", "http://credits", "--token", "not a token"], "visible ASCII"),
            (["--url", "http://credits", "--token", "töken"], "visible ASCII"),
            (["--url", "credits", "--token", "t", "--tenant", "acme"], "http://"),
            (["--url", "http://credits", "--token", "t"], "give an admin token, or a tenant"),
            (["--url", "http://credits", "--token", "t", "--tenant", "a\nb"], "control characters"),
        ],
    )
    def test_is_one_sentence(self, run: Any, arguments: list[str], sentence: str) -> None:
        """Exit code 2, nothing on stdout, and no token."""
        done = run("conformance", *arguments)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert sentence in done.err
        assert "töken" not in done.err
        assert "not a token" not in done.err


class TestContract:
    """`--contract`: a mapping of the user's own."""

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("house_credits", "write MODULE:CLASS"),
            ("no_such_module:Credits", "ModuleNotFoundError"),
            ("json:Credits", "AttributeError"),
            ("json:loads", "is no Contract"),
            ("mapping:Raises", "ValueError: not today"),
        ],
    )
    def test_that_is_none_is_one_sentence(self, run: Any, tmp_path: Path, name: str, sentence: str) -> None:
        """Exit code 2."""
        text = "class Raises:\n    def __init__(self):\n        raise ValueError('not today')\n"
        (tmp_path / "mapping.py").write_text(text)
        done = run("conformance", "--url", "http://credits", "--token", "t", "--contract", name)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert sentence in done.err

    def test_report_says_what_holds_and_what_happens(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Through the mapping alone; exit code 3."""
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "examples"))
        import house_service

        real = cli.check_service

        async def check_service(url: str, **options: Any) -> Any:
            return await real(url, transport=httpx.ASGITransport(house_service.app), **options)

        monkeypatch.setattr(cli, "check_service", check_service)
        monkeypatch.setitem(house_service.held, ("acme", None), 1000)
        done = run(
            *("conformance", "--url", "http://house", "--token", "house-secret", "--tenant", "acme"),
            *("--contract", "house_credits:HouseCredits"),
        )
        said = " ".join(done.out.split())
        assert done.code == 3
        assert "no answer to a deduction It is sent again under its key" in said
        assert "1. Paid first yes 2." in said
        assert "4. Nothing lost with limits: void-undoes, declines-remembered, find-by-key" in said
        assert "house-secret" not in done.out


class TestVerdict:
    def test_unreachable_service_is_one_sentence(self, against: Any) -> None:
        """Exit code 1, and no table."""
        done = against(broken.NobodyThere, ADMIN_TOKEN=ADMIN)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert "no answer: ConnectError" in done.err

    def test_fatal_breakage_is_told_with_its_cost(self, against: Any) -> None:
        """Exit code 1; what was tried, expected, what came, and what the library does."""
        done = against(broken.ChargesOnReplay, checks=("deduct-once", "healthz"), ADMIN_TOKEN=ADMIN)
        assert done.code == 1
        assert "deduct-once (fatal)" in done.out
        assert "the account then held 70 credits, which is 20 less than it should" in done.out
        assert "customers would pay twice" in " ".join(done.out.split())
        assert "Not usable: deduct-once." in done.out

    def test_limits_are_listed(self, against: Any) -> None:
        """Exit code 3; what was not tried is told apart."""
        done = against(broken.NoVoids, checks=("void-undoes", "tombstone", "healthz"), ADMIN_TOKEN=ADMIN)
        assert done.code == 3
        assert "tombstone: not tried: the service has no voids" in " ".join(done.out.split())
        assert "Usable with limits: void-undoes. 1 could not be tried." in done.out

    def test_conformant_service_is_told_in_a_line(self, against: Any) -> None:
        """Exit code 0, and whose credits were used."""
        done = against(Service, checks=("deduct-once", "healthz"), ADMIN_TOKEN=ADMIN)
        assert done.code == 0
        assert done.out.startswith("Using 100 credits granted to conformance-")
        assert done.out.endswith("Conformant: 2 of 2 promises hold.\n")
        assert (done.err, "not tried:" in done.out) == ("", False)

    def test_json_has_every_check_and_the_calls_of_broken_ones(self, against: Any) -> None:
        """One document on stdout, without a token."""
        done = against(broken.ChargesOnReplay, "--json", checks=("deduct-once", "healthz"), ADMIN_TOKEN=ADMIN)
        document = json.loads(done.out)
        assert (done.code, document["verdict"], document["credits_kept"]) == (1, "not usable", 0)
        assert document["promises"]["3. Once"] == "no: deduct-once"
        assert document["happens"] == {}
        first, second = document["checks"]
        assert (first["name"], first["outcome"], first["promise"]) == ("deduct-once", "broken", "3. Once")
        assert [each["status"] for each in first["exchanges"] if each["method"] == "POST"] == [201, 200, 200]
        assert (second["outcome"], second["came"], "exchanges" in second) == ("held", None, False)
        assert APP not in done.out
        assert ADMIN not in done.out

    def test_what_cut_the_checks_off_is_told_once(self, against: Any) -> None:
        """Exit code 1: what was not tried is not promised."""

        class Hangs(Service):
            async def answer(self, request: Any) -> Any:
                if broken.is_void(request):
                    raise httpx.ReadTimeout("nothing came")
                return await self.real(request)

        names = ("void-undoes", "void-same-answer", "void-before-arrival", "balance-told", "healthz")
        done = against(Hangs, checks=names, ADMIN_TOKEN=ADMIN)
        said = " ".join(done.out.split())
        assert "2 checks: not tried, because the service has stopped answering: balance-told, healthz" in said
        assert said.count("not tried,") == 1
        assert "Not known: 2 of 5 checks should have been tried, and were not." in said
        assert done.code == 1

    def test_what_could_not_be_given_back_is_told(self, against: Any, tmp_path: Path) -> None:
        """By number, with the account's name."""

        class Keeps(Service):
            async def answer(self, request: Any) -> Any:
                if broken.is_void(request) or broken.is_refund(request):
                    return broken.answered(500)
                return await self.real(request)

        done = against(Keeps, checks=("deduct-once",), ADMIN_TOKEN=ADMIN)
        assert "10 credits of conformance-" in done.out
        assert "could not be given back" in done.out
