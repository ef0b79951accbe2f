"""A credits service for as long as a block lasts: in memory, the real one in process, or the real one on a socket."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from unittest import mock

from metered_billing.testing.apps import Apps
from metered_billing.testing.billing import Billing
from metered_billing.testing.door import Door
from metered_billing.testing.faults import Plan
from metered_billing.testing.memory import MemoryService
from metered_billing.testing.wire import Wire

HOST = "credits.test"
"""What apps call, where there is no socket: a name that there never is."""

TOKEN, ADMIN_TOKEN = "test-token", "test-admin-token"
TOKENS = {TOKEN: "*", ADMIN_TOKEN: "admin"}

ATTEMPT_TIMEOUT_S = 2.0
SOCKET_ATTEMPT_TIMEOUT_S = 0.5
"""What a call may take: on a socket, one that gets no answer really takes as long."""

Open = Callable[[Path], AbstractContextManager[Billing]]


class Opened:
    """A `Billing` for the time of a `with` block, or of an `async with` block on a running event loop.

    Args:
        directory: Where its files are kept; by default in a temporary one.
        strict: Whether the end of the block asks for `assert_all_met()`.
    """

    def __init__(self, open_it: Open, directory: Path | None, *, strict: bool = True) -> None:
        self._open = open_it
        self._directory = directory
        self._strict = strict
        self._stack = ExitStack()

    def __enter__(self) -> Billing:
        if _on_a_loop():
            raise RuntimeError("on a running event loop it is `async with`")
        return self._enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        with self._stack:
            if error is None and self._strict:
                self._billing.assert_all_met()

    async def __aenter__(self) -> Billing:
        return self._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        with self._stack:
            try:
                if error is None and self._strict:
                    await self._billing.settled()
                    self._billing.assert_all_met()
            finally:
                await self._billing.aclose()

    def _enter(self) -> Billing:
        with ExitStack() as stack:
            directory = self._directory
            if directory is None:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metered-billing-test-")))
            self._billing = stack.enter_context(self._open(directory))
            self._stack = stack.pop_all()
        return self._billing


def in_memory(directory: Path | None = None) -> Opened:
    """A service without files, threads and sockets, as the fixture `billing` is. Every HTTP client of this process
    that calls its host gets to it."""
    return Opened(open_in_memory, directory)


def in_process(directory: Path | None = None) -> Opened:
    """The reference service in this process, as the fixture `billing_service` is."""
    return Opened(open_in_process, directory)


def on_a_socket(directory: Path | None = None) -> Opened:
    """The reference service on a socket of this machine, as the fixture `billing_server` is."""
    return Opened(open_on_a_socket, directory)


@contextmanager
def open_in_memory(directory: Path) -> Iterator[Billing]:
    service = MemoryService(TOKENS)
    try:
        with _mocked(service, directory) as billing:
            yield billing
    finally:
        service.close()


@contextmanager
def open_in_process(directory: Path) -> Iterator[Billing]:
    from metered_billing.testing.service import reference_service

    with reference_service(directory, TOKENS) as service, _mocked(service, directory) as billing:
        yield billing


@contextmanager
def open_on_a_socket(directory: Path) -> Iterator[Billing]:
    from metered_billing.testing.server import serve
    from metered_billing.testing.service import reference_service

    wire = Wire()
    with (
        reference_service(directory, TOKENS) as service,
        serve(service, wire) as server,
        _billed(server.url, wire, service, directory, SOCKET_ATTEMPT_TIMEOUT_S) as apps,
    ):
        yield Billing(server.url, TOKEN, ADMIN_TOKEN, wire=wire, door=service, apps=apps, switch=server)


@contextmanager
def _mocked(service: Door, directory: Path) -> Iterator[Billing]:
    """What is reached by respx."""
    from metered_billing.testing.router import routed

    wire, url = Wire(), f"http://{HOST}"
    with routed(HOST, wire, service), _billed(url, wire, service, directory, ATTEMPT_TIMEOUT_S) as apps:
        yield Billing(url, TOKEN, ADMIN_TOKEN, wire=wire, door=service, apps=apps, switch=_Planned(wire.plan))


@contextmanager
def _billed(url: str, wire: Wire, service: Door, directory: Path, attempt_timeout_s: float) -> Iterator[Apps]:
    """Apps that are billed there: those of this process, and those that are told by their environment."""
    apps = Apps(url, TOKEN, directory, attempt_timeout_s)
    environment = {
        "METERED_BILLING_CREDITS": url,
        "METERED_BILLING_TOKEN": TOKEN,
        "METERED_BILLING_JOURNAL": str(apps.elsewhere),
    }
    with mock.patch.dict(os.environ, environment), apps.billed():
        yield apps


class _Planned:
    """A `Switch` where there is nothing to be switched off."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def check(self, fault: str) -> None:
        pass

    def down(self) -> None:
        self._plan.go_down()

    def up(self) -> None:
        pass


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
