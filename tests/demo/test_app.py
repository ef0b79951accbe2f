"""The demo app over HTTP, with the real credits service in the same process."""

import asyncio
import base64
import importlib
import io
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

from examples.fastapi_app.users import User
from examples.fastapi_app.wallet import Wallet
from fastapi import FastAPI
from PIL import Image

from metered_billing import HttpCredits, MeteredBillingMiddleware, settled
from metered_billing.ledger import Grant, Ledger
from metered_billing.service import Tokens, create_app

pytestmark = pytest.mark.anyio

ALICE = {"Authorization": "Bearer demo"}


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


GOOD, TEXT = picture(), base64.b64encode(b"2 cups").decode()

ONE_OF_THREE_BROKEN = [
    {"id": "cup-1", "data": GOOD},
    {"id": "cup-2", "data": TEXT},
    {"id": "cup-3", "data": GOOD},
]


def products(images: list[dict[str, str]]) -> dict[str, Any]:
    return {"product_groups": [{"name": "Cup", "images": images}]}


@asynccontextmanager
async def lifespan_of(app: FastAPI) -> AsyncIterator[None]:
    """Start the app and shut it down, as a server does."""
    messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    answers: asyncio.Queue[Any] = asyncio.Queue()
    running = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, messages.get, answers.put))
    messages.put_nowait({"type": "lifespan.startup"})
    assert (await answers.get())["type"] == "lifespan.startup.complete"
    yield
    messages.put_nowait({"type": "lifespan.shutdown"})
    await running


class Demo:
    """The app, and what its credits service says."""

    def __init__(self, http: httpx.AsyncClient, ledger: Ledger) -> None:
        self.http = http
        self.ledger = ledger

    async def balance(self, user: str = "alice") -> int:
        await settled()
        return await self.ledger.balance("demo", user)

    async def entries(self, user: str = "alice") -> list[dict[str, Any]]:
        """What happened to a user's account, the latest first."""
        await settled()
        return list((await self.ledger.transactions("demo", user)).items)


@pytest.fixture
async def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Demo]:
    for name, value in {
        "METERED_BILLING_CREDITS": "http://credits",
        "METERED_BILLING_TOKEN": "secret",
        "METERED_BILLING_JOURNAL": str(tmp_path / "journal"),
        "METERED_BILLING_DEMO_IMAGES": str(tmp_path / "images"),
        "METERED_BILLING_DEMO_CUTOUT": "stub",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "examples.fastapi_app.app", raising=False)
    app = importlib.import_module("examples.fastapi_app.app").app

    ledger = Ledger(tmp_path / "credits.db")
    service = httpx.ASGITransport(create_app(ledger, Tokens({"secret": "tenant:demo"})))
    await ledger.start()
    for user, amount in (("alice", 100), ("poor", 3)):
        await ledger.grant(
            Grant(idempotency_key=user, tenant_id="demo", user_id=user, amount=amount, reason="to start with")
        )
    (middleware,) = (one for one in app.user_middleware if one.cls is MeteredBillingMiddleware)
    middleware.kwargs["credits"] = HttpCredits("http://credits", token="secret", transport=service)
    async with (
        lifespan_of(app),
        httpx.AsyncClient(
            transport=service, base_url="http://credits", headers={"Authorization": "Bearer secret"}
        ) as at_service,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http,
    ):
        app.state.wallet = Wallet(at_service)
        yield Demo(http, ledger)
    await ledger.close()


async def test_create_products_partial_failure_is_reported_and_refunded(demo: Demo) -> None:
    """Three pictures, one broken: three credits taken, one back, and the refund names the picture."""
    answer = await demo.http.post("/create-products", json=products(ONE_OF_THREE_BROKEN), headers=ALICE)
    assert answer.status_code == 200
    (product,) = answer.json()["products"]
    assert product["name"] == "Cup"
    first, failed, last = product["images"]
    assert failed == {"id": "cup-2", "status": "failed", "error": "not an image"}
    assert (first["id"], first["status"], last["id"]) == ("cup-1", "succeeded", "cup-3")
    assert set(first) == {"id", "status", "url"}
    assert answer.headers["Credits-Deducted"] == "3"
    assert answer.headers["Credits-Refunded"] == "1"
    assert answer.headers["Credits-Balance"] == "98"

    assert await demo.balance() == 98
    refund, deduction, _ = await demo.entries()
    assert (deduction["kind"], deduction["amount"]) == ("deduction", -3)
    assert (refund["kind"], refund["amount"], refund["items"]) == ("refund", 1, ["cup-2"])
    assert refund["transaction_id"] == deduction["id"] == answer.headers["Credits-Transaction-Id"]


async def test_batch_partial_failure_is_refunded_without_outcomes(demo: Demo) -> None:
    """A flat list of `results` is found by itself."""
    answer = await demo.http.post("/batch", json={"images": ONE_OF_THREE_BROKEN}, headers=ALICE)
    assert [result["status"] for result in answer.json()["results"]] == ["succeeded", "failed", "succeeded"]
    assert await demo.balance() == 98
    refund, *_ = await demo.entries()
    assert refund["items"] == ["cup-2"]


async def test_create_products_without_images_is_free(demo: Demo) -> None:
    """Nothing asked, nothing paid."""
    answer = await demo.http.post("/create-products", json=products([]), headers=ALICE)
    assert answer.json() == {"products": [{"name": "Cup", "images": []}]}
    assert answer.headers["Credits-Deducted"] == "0"
    assert [entry["kind"] for entry in await demo.entries()] == ["grant"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nobody"},
        {"Authorization": "Bearer "},
        {"Authorization": "demo"},
        {"Authorization": "Basic ZGVtbzo="},
        {"Authorization": "Bearer d\xe9mo"},
    ],
)
@pytest.mark.parametrize("path", ["/create-products", "/batch", "/me"])
async def test_routes_without_a_users_token_are_401(demo: Demo, path: str, headers: dict[str, str]) -> None:
    """Nobody is charged, and nobody's account is shown, without a token."""
    body: dict[str, list[str]] = {"images": [], "product_groups": []}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    method, json = ("GET", None) if path == "/me" else ("POST", body)
    answer = await demo.http.request(method, path, json=json, headers=encoded)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_create_products_id_twice_is_422_and_free(demo: Demo) -> None:
    """It is refused before anything is charged, and does not throw the pictures back."""
    twice = [{"id": "cup-1", "data": GOOD}, {"id": "cup-1", "data": GOOD}]
    answer = await demo.http.post("/create-products", json=products(twice), headers=ALICE)
    assert answer.status_code == 422
    assert "'cup-1' stands twice" in answer.text
    assert GOOD not in answer.text
    assert await demo.balance() == 100


async def test_create_products_no_base64_fails_that_image_alone(demo: Demo) -> None:
    """A broken picture never fails the request, however it is broken."""
    images = [{"id": "cup-1", "data": "näh!"}, {"id": "cup-2", "data": ""}, {"id": "cup-3", "data": GOOD}]
    answer = await demo.http.post("/create-products", json=products(images), headers=ALICE)
    (product,) = answer.json()["products"]
    assert [image.get("error") for image in product["images"]] == ["not base64", "not an image", None]
    assert await demo.balance() == 99


async def test_create_products_too_few_credits_is_402(demo: Demo) -> None:
    """Who has 3 cannot have 4 pictures cut out, and keeps the 3."""
    images = [{"id": str(number), "data": GOOD} for number in range(4)]
    answer = await demo.http.post("/create-products", json=products(images), headers={"Authorization": "Bearer poor"})
    assert answer.status_code == 402
    problem = answer.json()
    assert (problem["required"], problem["balance"], problem["shortfall"]) == (4, 3, 1)
    assert await demo.balance("poor") == 3


async def test_images_results_alone_are_served(demo: Demo) -> None:
    """A result can be fetched; no other file can."""
    answer = await demo.http.post("/batch", json={"images": ONE_OF_THREE_BROKEN}, headers=ALICE)
    image = await demo.http.get(answer.json()["results"][0]["url"])
    assert (image.status_code, image.headers["Content-Type"]) == (200, "image/png")
    for name in ("..%2f..%2fcredits.db", "%2e%2e", "credits.db", "0" * 32 + ".png", "%00"):
        assert (await demo.http.get(f"/images/{name}")).status_code == 404


async def test_me_own_account_alone(demo: Demo) -> None:
    """A user sees what they have and what became of it, and nobody else's."""
    await demo.http.post("/batch", json={"images": ONE_OF_THREE_BROKEN}, headers=ALICE)
    await settled()
    alice = (await demo.http.get("/me", headers=ALICE)).json()
    assert alice["account"] == {"tenant_id": "demo", "user_id": "alice"}
    assert alice["balance"] == 98
    assert [entry["kind"] for entry in alice["transactions"]] == ["refund", "deduction", "grant"]
    poor = (await demo.http.get("/me", headers={"Authorization": "Bearer poor"})).json()
    assert (poor["balance"], len(poor["transactions"])) == (3, 1)


async def test_me_service_down_is_503(demo: Demo) -> None:
    """An account that cannot be read is not shown as empty."""

    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    transport = demo.http._transport
    assert isinstance(transport, httpx.ASGITransport)
    async with httpx.AsyncClient(transport=httpx.MockTransport(down), base_url="http://credits") as nobody:
        transport.app.state.wallet = Wallet(nobody)  # type: ignore[attr-defined]
        answer = await demo.http.get("/me", headers=ALICE)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0


async def test_wallet_refund_in_between_is_never_listed_and_not_counted() -> None:
    """Whoever sees a refund in the list sees it in the balance too."""
    asked = 0

    def service(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        arrived = asked > 1  # between the two questions
        if request.url.path == "/v1/balance":
            return httpx.Response(200, json={"balance": 92 if arrived else 90})
        return httpx.Response(200, json={"items": [{"kind": "refund"}] if arrived else [], "next_cursor": None})

    async with httpx.AsyncClient(transport=httpx.MockTransport(service), base_url="http://credits") as client:
        statement = await Wallet(client).statement(User(tenant_id="demo", user_id="alice"))
    assert statement.balance == 92 or not statement.transactions


async def test_index_page_loads_nothing_from_elsewhere(demo: Demo) -> None:
    """The page works offline: no address but our own stands in it, and its policy forbids others."""
    page = await demo.http.get("/")
    assert "Use the samples" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
