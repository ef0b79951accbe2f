"""The docs' probes: ready is who has been able to charge, and stays so."""

import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from tests.docs.pages import EXAMPLES


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("probes")
    sys.modules.pop("probes", None)


@pytest.fixture
async def service(tmp_path: Path, probes: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FastAPI]:
    """A credits service, which is where the probes' client ends up."""
    ledger = Ledger(tmp_path / "credits.db")
    app = create_app(ledger, Tokens({"all": "*", "acmes": "tenant:acme"}))
    client = httpx.AsyncClient

    def in_process(**options: Any) -> httpx.AsyncClient:
        return client(**options, transport=httpx.ASGITransport(app))

    monkeypatch.setattr(probes, "httpx", _Patched(in_process))
    yield app
    await ledger.close()


class _Patched:
    """httpx, but for its client."""

    TransportError, InvalidURL = httpx.TransportError, httpx.InvalidURL

    def __init__(self, client: Any) -> None:
        self.AsyncClient = client


async def ask(router: Any, *paths: str) -> list[tuple[int, str]]:
    app = FastAPI()
    app.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pod") as kubelet:
        answers = [await kubelet.get(path) for path in paths]
    return [(answer.status_code, answer.json()) for answer in answers]


@pytest.mark.parametrize(
    ("url", "token", "why"),
    [
        ("http://127.0.0.1:1", "all", "ConnectError"),
        ("nonsense", "all", "UnsupportedProtocol"),
    ],
)
async def test_wrong_address_is_never_ready(probes: Any, url: str, token: str, why: str) -> None:
    """It lives all the same: a restart would mend nothing."""
    answers = await ask(probes.probes(url, token), "/readyz", "/livez")
    assert answers == [(503, f"cannot charge: {why}"), (200, "lives")]


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("path", "token", "why"),
    [("", "rotated", "HTTP 401"), ("", "acmes", "HTTP 403"), ("/wrong", "all", "HTTP 404")],
)
async def test_wrong_token_is_never_ready(probes: Any, path: str, token: str, why: str) -> None:
    """So that a release with it stays out of the rotation. No answer shows the token."""
    assert await ask(probes.probes(f"http://credits{path}", token), "/readyz") == [(503, f"cannot charge: {why}")]


async def test_who_was_ready_once_stays_so(service: FastAPI, probes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is the same for all: none is taken out for it. And nothing was moved, nor asked again."""
    router = probes.probes("http://credits/", "acmes", tenant_id="acme")
    assert await ask(router, "/readyz") == [(200, "ready")]
    monkeypatch.setattr(probes, "_asked", None)
    assert await ask(router, "/readyz", "/readyz") == [(200, "ready")] * 2
    assert (await service.state.ledger.transactions("acme")).items == ()
