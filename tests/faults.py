"""Faults between a client and the credits service: a transport that loses, breaks and repeats."""

import httpx


class Faulty(httpx.AsyncBaseTransport):
    """Sends to an ASGI app, but does to the next calls what it was told to.

    `faults` holds names, taken one a call: `ok`, `refused` (never sent), `lost request`, `lost reply` (done,
    then silence), `500 after` (done, then 500), `500` (not done), `late duplicate` (done, and once more later).
    """

    def __init__(self, app: httpx.ASGITransport) -> None:
        self._app = app
        self.faults: list[str] = []
        self.always: str = "ok"
        self.calls: list[httpx.Request] = []
        self.late: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.calls.append(request)
        fault = self.faults.pop(0) if self.faults else self.always
        if fault == "refused":
            raise httpx.ConnectError("refused", request=request)
        if fault == "lost request":
            raise httpx.ReadTimeout("nothing came", request=request)
        if fault == "500":
            return httpx.Response(500, request=request)
        response = await self._app.handle_async_request(request)
        if fault == "lost reply":
            await response.aclose()
            raise httpx.RemoteProtocolError("closed without a reply", request=request)
        if fault == "500 after":
            await response.aclose()
            return httpx.Response(500, request=request)
        if fault == "late duplicate":
            self.late.append(request)
        return response

    async def deliver_late(self) -> list[int]:
        """Let the copies arrive that were held back. Returns what was answered."""
        late, self.late = self.late, []
        return [(await self._app.handle_async_request(request)).status_code for request in late]
