"""A disk that is really full: a small file system of its own under the journal."""

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from metered_billing import MeteredBillingMiddleware, metered
from tests.stand import Stand, serving


class Disk:
    """A file system of 1 MiB, and a filler."""

    def __init__(self, directory: Path) -> None:
        self.journal = directory / "journal"
        self._filler = directory / "filler"

    def fill(self) -> None:
        """Leave no byte."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT)
        try:
            for size in (65_536, 4_096, 1):
                with contextlib.suppress(OSError):
                    while os.write(descriptor, b"x" * size):
                        pass
        finally:
            os.close(descriptor)

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield Disk(directory)
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture
async def client(bench: Stand, disk: Disk) -> AsyncIterator[httpx.AsyncClient]:
    """An app whose journal is on that disk. `/work?fill=1` fills it while the route runs."""

    @metered(cost=10)
    async def work(request: Request) -> JSONResponse:
        if "fill" in request.query_params:
            disk.fill()
        return JSONResponse({"results": [{"status": "ok"}] * 8 + [{"status": "failed"}] * 2})

    billing = Middleware(MeteredBillingMiddleware, **bench.options(journal=disk.journal))
    async with serving(Starlette(routes=[Route("/work", work, methods=["POST"])], middleware=[billing])) as client:
        yield client


async def test_charge_that_cannot_be_put_on_a_full_disk_is_503(
    bench: Stand, disk: Disk, client: httpx.AsyncClient
) -> None:
    """Nothing is charged and nothing runs; as soon as there is room, the next request is served."""
    assert (await client.post("/work")).status_code == 200
    disk.fill()
    for _ in range(3):
        assert (await client.post("/work")).status_code == 503
    assert await bench.moves() == [("deduction", -10), ("refund", 2)]
    disk.free()
    assert (await client.post("/work")).status_code == 200
    assert await bench.moves() == [("deduction", -10), ("refund", 2)] * 2


async def test_outcome_that_cannot_be_put_on_a_full_disk_refunds_all(
    bench: Stand, disk: Disk, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The work is safe: the response goes out, loudly; recovery gives everything back once there is room."""
    response = await client.post("/work?fill=1")
    assert (response.status_code, response.headers["credits-deducted"]) == (200, "10")
    assert await bench.balance() == 90
    assert "journal.failed" in caplog.text
    disk.free()
    app = client._transport.app  # type: ignore[attr-defined]
    billing = app.middleware_stack.app
    while not isinstance(billing, MeteredBillingMiddleware):
        billing = billing.app
    await billing.biller.recover()
    # That it was confirmed did not come on record either: on record it was opened.
    assert await bench.moves() == [("deduction", -10), ("void", 10)]
