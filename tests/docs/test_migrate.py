"""The programs of "Migrate from hand-written billing": they charge alike where all is well, and only there."""

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from metered_billing import settled
from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from tests.serving import free_port

from .pages import EXAMPLES
from .sandbox import serving_thread

pytestmark = pytest.mark.no_cover

PROGRAMS = ("resize_by_hand", "resize_metered", "resize_shadow", "resize_both")
TEN = [*"abcdefgh", "broken", "broken"]


@dataclass
class Service:
    """The reference service. What `fails` names is answered 500, once, and done unless it says "not done"."""

    directory: Path
    fails: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.directory / "credits.db")
        self._real = create_app(self.ledger, Tokens({"app": "*", "admin": "admin"}))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        what = scope.get("path", "").rpartition("/")[2]
        fails = what in self.fails
        if f"{what}, not done" in self.fails:
            self.fails.remove(f"{what}, not done")
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        self.fails.discard(what)

        async def answer(message: Any) -> None:
            await send({**message, "status": 500} if fails and message["type"] == "http.response.start" else message)

        await self._real(scope, receive, answer)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    service, port = Service(tmp_path), free_port()
    monkeypatch.setenv("METERED_BILLING_CREDITS", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("METERED_BILLING_TOKEN", "app")
    with serving_thread(service, port):
        yield service


@contextlib.asynccontextmanager
async def serving(program: str) -> AsyncIterator[httpx.AsyncClient]:
    """The program, new."""
    for name in PROGRAMS:
        sys.modules.pop(name, None)
    app = importlib.import_module(program).app
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://app") as client,
        app.router.lifespan_context(app),
    ):
        yield client


async def balance() -> int:
    """What ann holds, whatever is still under way having ended."""
    await settled()
    return int((await ask("GET", "/v1/balance?tenant_id=acme&user_id=ann"))["balance"])


async def ask(method: str, path: str, body: Any = None) -> Any:
    headers = {"Authorization": "Bearer admin", "Idempotency-Key": "grant"}
    url = os.environ["METERED_BILLING_CREDITS"]
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as client:
        return (await client.request(method, path, json=body)).raise_for_status().json()


@pytest.fixture
async def granted(service: Service) -> None:
    """100 credits for ann."""
    await ask("POST", "/v1/grants", {"tenant_id": "acme", "user_id": "ann", "amount": 100, "reason": "test"})


@pytest.mark.parametrize("program", ["resize_by_hand", "resize_metered"])
@pytest.mark.parametrize(
    ("pictures", "status", "left"),
    [
        (TEN, 200, 92),
        (["a", "bomb"], 500, 100),
        ([*"a" * 101], 402, 100),
    ],
)
async def test_both_charge_the_same(granted: None, program: str, pictures: list[str], status: int, left: int) -> None:
    """Where nothing is lost: success, a part that failed, an exception, too few credits."""
    async with serving(program) as client:
        answer = await client.post("/resize", json={"pictures": pictures})
        assert (answer.status_code, await balance()) == (status, left)


@pytest.mark.parametrize(
    ("program", "lost", "status", "left"),
    [
        # The refund is done, or is not, and the answer is lost: by hand the finished work is withheld.
        ("resize_by_hand", "refunds, not done", 500, 90),
        ("resize_metered", "refunds, not done", 200, 92),
        # The deduction is done, and its answer is lost: by hand nothing runs, and nothing comes back.
        ("resize_by_hand", "deductions", 500, 90),
        ("resize_metered", "deductions", 200, 92),
    ],
)
async def test_what_is_lost_by_hand(
    granted: None, service: Service, monkeypatch: pytest.MonkeyPatch, program: str, lost: str, status: int, left: int
) -> None:
    """One answer of the service: 500 instead of what it was."""
    monkeypatch.setattr("metered_billing.settler.FIRST_BACKOFF_S", 0.01)
    async with serving(program) as client:
        service.fails.add(lost)
        answer = await client.post("/resize", json={"pictures": TEN})
        async with asyncio.timeout(10):
            while await balance() != left:
                await asyncio.sleep(0.02)
    assert (answer.status_code, service.fails) == (status, set())


@pytest.mark.parametrize(("program", "left"), [("resize_by_hand", 90), ("resize_metered", 100)])
async def test_cancelled_request_is_lost_by_hand(
    granted: None, monkeypatch: pytest.MonkeyPatch, program: str, left: int
) -> None:
    """A cancellation is no `Exception`."""
    async with serving(program) as client:
        at_work = asyncio.Event()

        async def hangs(picture: str) -> None:
            at_work.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(sys.modules[program], "resized", hangs)
        request = asyncio.create_task(client.post("/resize", json={"pictures": TEN}))
        await asyncio.wait_for(at_work.wait(), 10)
        request.cancel()
        await asyncio.wait([request])
        assert await balance() == left


async def test_shadow_bills_beside_what_is_billed_by_hand(granted: None) -> None:
    """Customers pay once, by hand; the shadow ledger ends with the same."""
    async with serving("resize_shadow") as client:
        assert (await client.post("/resize", json={"pictures": TEN})).status_code == 200
        assert await balance() == 92
        shadow = sys.modules["resize_shadow"].shadow
        assert await shadow.balance("acme", "ann") == 1_000_000 - 8


async def test_no_request_is_billed_twice(granted: None) -> None:
    """One route is metered, another is by hand; one that were both is refused, and charges nothing."""
    async with serving("resize_both") as client:
        for path, body, status, left in (
            ("/resize", {"pictures": TEN}, 200, 92),
            ("/thumbnail", None, 200, 91),
            ("/both", None, 500, 91),
        ):
            answer = await client.post(path, json=body)
            assert (answer.status_code, await balance()) == (status, left), path
