"""The page of errors: what a client hears comes in its order, and what a developer hears is what is raised."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from starlette.types import ASGIApp

import metered_billing
from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, SqlCredits, metered, names, settled
from metered_billing.errors import TYPE_PREFIX
from metered_billing.journal.sqlite import SqliteJournal

from .pages import DOCS, Page, code, table

PAGE = Page(DOCS / "reference" / "errors.md")


class Faults:
    """An app to whose one request everything applies that is wrong. Each `mend` takes the first of it away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ledger = SqlCredits(directory / "credits.db")
        self.answer = httpx.Response(400)
        self.wrong = list(range(1, 15))
        self._bad_place = directory / "a file, no directory"
        self._bad_place.touch()
        self._middleware: list[MeteredBillingMiddleware] = []

    def mend(self) -> None:
        self.wrong.pop(0)

    def is_wrong(self, row: int) -> bool:
        return row in self.wrong

    def app(self) -> ASGIApp:
        """With the middleware that it has by now."""
        app = FastAPI()

        @app.get("/work")
        @metered(cost=self._cost, price=self._price, account=self._account, max_units=5)
        async def work(n: int) -> None:
            raise HTTPException(418)

        if self.is_wrong(2):
            return app
        self._middleware.append(MeteredBillingMiddleware(app, credits=self._credits(), journal=self._journal()))
        return self._middleware[-1]

    async def end(self) -> None:
        """Leave no journal open, and no refund or void under way."""
        for middleware in self._middleware:
            await middleware.biller.drain(0)
        await self.ledger.aclose()

    def _cost(self, n: int) -> Any:
        if self.is_wrong(3):
            raise HTTPException(451)
        if self.is_wrong(4):
            return "ten"
        return 10 if self.is_wrong(5) else 1

    def _price(self) -> int:
        return 1

    def _account(self) -> Any:
        if self.is_wrong(6):
            raise HTTPException(403)
        if self.is_wrong(7):
            return "acme"
        return None if self.is_wrong(8) else Account("acme")

    def _journal(self) -> Any:
        if self.is_wrong(9):
            return self._bad_place
        journal = SqliteJournal(self.directory / "journal")
        if self.is_wrong(10):
            _break(journal)
        return journal

    def _credits(self) -> Any:
        if not (self.is_wrong(11) or self.is_wrong(12)):
            return self.ledger
        status = 400 if self.is_wrong(11) else 500
        transport = httpx.MockTransport(lambda _: httpx.Response(status))
        return HttpCredits("http://credits", transport=transport, attempts=1)


def _break(journal: SqliteJournal) -> None:
    """From here on it takes no more charges."""

    def full(_: Any) -> Any:
        raise metered_billing.journal.JournalError("the disk is full")

    journal.open = full  # type: ignore[assignment,method-assign]


async def test_what_a_client_hears_comes_in_the_order_of_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is wrong at first. Row by row it is mended, and the answer is the next one; so is what is logged."""
    caplog.set_level("INFO", logger="metered_billing")
    faults = Faults(tmp_path)
    for row in table(PAGE, "What a client of a metered route hears"):
        if row[0] == "14":
            await faults.ledger.grant("acme", None, amount=1, reason="test", idempotency_key="grant")
        caplog.clear()
        status, name = await ask(faults.app(), "?n=many" if faults.is_wrong(1) else "?n=1")
        await settled()
        assert str(status) in row[1].replace("any", OWN.get(row[0], "")), row
        assert name == (code(row[2]) or [""])[0], row
        logged = [record.getMessage().split()[0] for record in caplog.records if record.name == "metered_billing"]
        assert [event for event in logged if event not in BACKGROUND] == code(row[5]), row
        faults.mend()
    assert faults.wrong == []
    assert await faults.ledger.balance("acme", None) == 1
    await faults.end()


OWN = {"3": "451", "6": "403", "14": "418"}
"""The statuses that the app itself answers in these rows."""

BACKGROUND = {"credits.voided", "credits.postponed", "charge.recovered"}
"""What is logged of the void that follows, sooner or later."""


async def ask(app: ASGIApp, query: str) -> tuple[int, str]:
    """The answer's status, and its problem's name where it is one of ours."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        answer = await client.get(f"/work{query}")
    kind = str(answer.json().get("type", ""))
    return answer.status_code, kind.removeprefix(TYPE_PREFIX) if kind.startswith(TYPE_PREFIX) else ""


def test_events_that_are_told_of_are_logged() -> None:
    """Also for what never becomes an error."""
    known = {value for name, value in vars(names).items() if name.startswith("LOG_")}
    rows = table(PAGE, "What never becomes an error")
    assert rows
    assert {code(row[3])[0] for row in rows} <= known


async def route() -> None: ...


@pytest.mark.parametrize(
    "row",
    [*table(PAGE, "When the app is written"), *table(PAGE, "When the app starts")],
    ids=lambda row: code(row[0])[0],
)
def test_what_a_developer_hears_is_what_is_raised(
    row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of each row raises that, and says so."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("METERED_BILLING")]:
        monkeypatch.delenv(name)
    kinds: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}
    names: dict[str, Callable[..., Any]] = {name: getattr(metered_billing, name) for name in metered_billing.__all__}
    with pytest.raises(kinds[code(row[1])[0]]) as raised:
        eval(code(row[0])[0], {**names, "route": route, "app": FastAPI()})
    assert type(raised.value).__name__ == code(row[1])[0]
    assert code(row[2])[0] in str(raised.value)
