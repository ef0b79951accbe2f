"""The reference credits service, on an event loop and a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from metered_billing.ledger import Deduct, Ledger
from metered_billing.ledger.rules import Stamp
from metered_billing.runtime import Runtime, one_thread
from metered_billing.testing.memory import decline, now_text
from metered_billing.testing.unsynced import connect_unsynced
from metered_billing.testing.wire import Request, Response

try:
    from metered_billing.service import Tokens, create_app
except ImportError as error:
    raise ImportError("the reference credits service needs: pip install 'metered-billing[service]'") from error

T = TypeVar("T")

WITHIN_S = 30.0


class ReferenceService:
    """A `Door`: `metered-billing serve`, on a ledger in a file.

    Args:
        directory: Where the ledger is kept.
        tokens: The scope of each token.
    """

    def __init__(self, directory: Path, tokens: Mapping[str, str]) -> None:
        self._executor = one_thread()  # a ledger keeps its own for as long as it may be used again
        self._runtime = Runtime(connect=connect_unsynced, executor=lambda: self._executor)
        self._ledger = Ledger(directory / "credits.db", self._runtime)
        self._transport = httpx.ASGITransport(create_app(self._ledger, Tokens(tokens)))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="metered-billing test service", daemon=True)
        self._thread.start()
        self.do(self._ledger.start())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WITHIN_S)

    def answer(self, request: Request) -> Response:
        return self.do(self.answer_here(request))

    async def answer_soon(self, request: Request) -> Response:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.answer_here(request), self._loop))

    def decline(self, operation: Mapping[str, Any]) -> None:
        self.do(self.decline_here(operation))

    def close(self) -> None:
        self.do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WITHIN_S)
        self._loop.close()
        self._executor.shutdown()

    # On the service's own loop.

    async def answer_here(self, request: Request) -> Response:
        sent = httpx.Request(
            request.method, f"http://service{request.target}", headers=dict(request.headers), content=request.body
        )
        response = await self._transport.handle_async_request(sent)
        return Response(response.status_code, dict(response.headers), await response.aread())

    async def decline_here(self, operation: Mapping[str, Any]) -> None:
        command = Deduct(**{name: value for name, value in operation.items() if name not in ("op", "traceparent")})
        stamp = Stamp(self._runtime.new_id(), now_text(self._runtime.now()))
        await self._ledger._engine.run(lambda books: decline(books, command, stamp), [command])

    async def _close(self) -> None:
        here = asyncio.current_task()
        left = [task for task in asyncio.all_tasks() if task is not here]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=WITHIN_S)
        await self._ledger.close()


@contextlib.contextmanager
def reference_service(directory: Path, tokens: Mapping[str, str]) -> Iterator[ReferenceService]:
    """It runs meanwhile."""
    service = ReferenceService(directory, tokens)
    try:
        yield service
    finally:
        service.close()
