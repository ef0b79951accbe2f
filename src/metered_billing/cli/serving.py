"""uvicorn, with bounds on what it takes from clients that it knows nothing of yet.

It bounds neither how long a client may take over a request nor, on httptools, how long a request's head may be. One
open connection costs a file descriptor, so a few thousand clients that say half a sentence would shut out all others.
"""

import logging
from typing import Any

import uvicorn

MAX_HEAD_BYTES = 256 << 10
"""What a request may have around its body: its head, its trailers, the framing of its chunks."""

HEAD_WITHIN_S = 10.0
"""How long a connection may have nothing to answer: a head is on its way, say, or what is left of a refused body."""

BODY_WITHIN_S = 30.0
"""How long a body may take, from its head on."""

_LOOK_EACH_TICKS = 10  # a second

_log = logging.getLogger("metered_billing.service")


def bounded_http() -> Any:
    """The protocol for `uvicorn.Config(http=…)`: on httptools where it is installed, else on h11, which has bounds."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Bounded(HttpToolsProtocol):
        _around_bytes = 0

        def data_received(self, data: bytes) -> None:
            self._around_bytes += len(data)
            super().data_received(data)
            if self._around_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

        def on_body(self, body: bytes) -> None:
            self._around_bytes -= len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._around_bytes = 0
            super().on_message_complete()

    return Bounded


class PatientServer(uvicorn.Server):
    """Closes the connections of clients that take too long over a request. Nothing of it has been done by then."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        # What each connection waits for, and since when: a count of looks.
        self._waits: dict[Any, tuple[object, bool, int]] = {}
        self._looks = 0

    async def on_tick(self, counter: int) -> bool:
        if counter % _LOOK_EACH_TICKS == 0:
            self._close_slow()
        return await super().on_tick(counter)

    def _close_slow(self) -> None:
        self._looks += 1
        waits: dict[Any, tuple[object, bool, int]] = {}
        for connection in list(self.server_state.connections):
            cycle: Any = getattr(connection, "cycle", None)
            in_body = cycle is not None and not cycle.response_complete
            if in_body and not cycle.more_body:
                continue  # it is us who take our time
            before = self._waits.get(connection)
            same = before is not None and before[:2] == (cycle, in_body)
            since = before[2] if before is not None and same else self._looks
            if self._looks - since < (BODY_WITHIN_S if in_body else HEAD_WITHIN_S):
                waits[connection] = (cycle, in_body, since)
            else:
                _log.info("a client took too long over a request; its connection was closed")
                connection.transport.abort()
        self._waits = waits
