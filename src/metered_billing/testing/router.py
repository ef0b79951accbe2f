"""The wire by respx: each call of this process to the service's host gets here, whichever client makes it.

All other hosts are none of our business: what the test mocks itself stays mocked, what it does not goes where it would
go without us. respx asks its routers one after the other, and the first that answers, or passes on, decides; so this
one stands first, and passes on only where no other is left to be asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from metered_billing.testing.door import Door
from metered_billing.testing.wire import Request, Response, Unanswered, Wire

try:
    import respx
    from respx.mocks import HTTPCoreMocker
    from respx.models import AllMockedAssertionError, PassThrough
except ImportError as error:
    raise ImportError("the fixtures need respx: pip install 'metered-billing[testing]'") from error


class _Router(respx.Router):
    def __init__(self, host: str, wire: Wire, door: Door) -> None:
        super().__init__(assert_all_called=False)
        self._host = host
        self._wire = wire
        self._door = door

    def handler(self, request: httpx.Request) -> httpx.Response:
        self._check(request)
        try:
            fate = self._wire.fate(_request(request))
            for operation in fate.declines:
                self._door.decline(operation)
            answered = None if fate.request is None else self._door.answer(fate.request)
            return _response(fate.answer(answered))
        except Unanswered as silence:
            raise _error(silence, request) from None

    async def async_handler(self, request: httpx.Request) -> httpx.Response:
        self._check(request)
        try:
            fate = self._wire.fate(_request(request))
            for operation in fate.declines:
                self._door.decline(operation)
            answered = None if fate.request is None else await self._door.answer_soon(fate.request)
            return _response(fate.answer(answered))
        except Unanswered as silence:
            raise _error(silence, request) from None

    def _check(self, request: httpx.Request) -> None:
        if request.url.host == self._host:
            return
        if HTTPCoreMocker.routers[-1] is not self:
            raise AllMockedAssertionError(f"{request!r} is not for the credits service")
        raise PassThrough(f"{request!r} is not for the credits service", request=request, origin=respx.Route())


@contextmanager
def routed(host: str, wire: Wire, door: Door) -> Iterator[None]:
    """Answer all calls to this host meanwhile."""
    router = _Router(host, wire, door)
    HTTPCoreMocker.routers.insert(0, router)
    HTTPCoreMocker.start()
    try:
        yield
    finally:
        HTTPCoreMocker.unregister(router)
        HTTPCoreMocker.stop()


def _request(request: httpx.Request) -> Request:
    headers = {name.lower(): value for name, value in request.headers.items()}
    return Request(request.method, request.url.raw_path.decode("ascii"), headers, request.content)


def _response(response: Response) -> httpx.Response:
    return httpx.Response(response.status, headers=dict(response.headers), content=response.body)


def _error(silence: Unanswered, request: httpx.Request) -> Exception:
    if silence.how == "refused":
        return httpx.ConnectError("refused, as the test wants it", request=request)
    if silence.how == "timeout":
        return httpx.ReadTimeout("no answer, as the test wants it", request=request)
    return httpx.RemoteProtocolError("closed without an answer, as the test wants it", request=request)
