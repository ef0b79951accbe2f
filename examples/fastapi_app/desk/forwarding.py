"""The same spans, to the user's own backend, when one was named where the demo was started.

By the standard variables: `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT`, with
`…_HEADERS`; http/protobuf only. A backend that is down costs spans, and nothing else.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote, urlsplit

import httpx

MAX_BYTES = 16 << 20
"""What waits to be passed on; beyond it the oldest goes."""

TIMEOUT_S = 5.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Forwarder:
    """Passes OTLP bodies on, in order.

    Args:
        environment: As the demo was started in.
        transport: Instead of the network.
    """

    def __init__(self, environment: Mapping[str, str], *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._transport = transport
        self._endpoint = endpoint_in(environment)
        self._headers = headers_in(environment)
        self._waiting: deque[tuple[bytes, str]] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def shown(self) -> str | None:
        """Where to, without secrets."""
        return without_secrets(self._endpoint) if self._endpoint else None

    def start(self) -> None:
        """Begin, on this event loop; nothing where there is nowhere to pass to."""
        if self._endpoint:
            self._task = asyncio.ensure_future(self._run(self._endpoint))

    def put(self, body: bytes, encoding: str) -> None:
        """Pass this on, soon; it may be dropped."""
        if self._task is None:
            return
        self._waiting.append((body, encoding))
        self._bytes += len(body)
        while self._bytes > MAX_BYTES:
            self._bytes -= len(self._waiting.popleft()[0])
        self._idle.clear()
        self._news.set()

    async def stop(self, within_s: float = 1.0) -> None:
        """Pass on what waits, but not for long."""
        if self._task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, endpoint: str) -> None:
        pause_s = 0.0
        async with httpx.AsyncClient(timeout=TIMEOUT_S, transport=self._transport) as client:
            while True:
                await self._news.wait()
                while self._waiting:
                    body, encoding = self._waiting[0]
                    if not await self._send(client, endpoint, body, encoding):
                        pause_s = min(max(FIRST_PAUSE_S, pause_s * 2), LONGEST_PAUSE_S)
                        await asyncio.sleep(pause_s)
                        continue
                    pause_s = 0.0
                    # More may have come, and the oldest be gone, meanwhile.
                    if self._waiting and self._waiting[0][0] is body:
                        self._bytes -= len(self._waiting.popleft()[0])
                self._news.clear()
                self._idle.set()

    async def _send(self, client: httpx.AsyncClient, endpoint: str, body: bytes, encoding: str) -> bool:
        """Whether that is done with: taken, or refused for good."""
        headers = {**self._headers, "Content-Type": "application/x-protobuf"}
        if encoding:
            headers["Content-Encoding"] = encoding
        try:
            answer = await client.post(endpoint, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            return False
        # The answers that the specification has a client try again.
        return answer.status_code not in (429, 502, 503, 504)


def endpoint_in(environment: Mapping[str, str]) -> str | None:
    """Where traces are sent to; None where nowhere is named, or exporting is switched off."""
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none" or environment.get("OTEL_SDK_DISABLED") == "true":
        return None
    if own := environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return own
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return f"{base.rstrip('/')}/v1/traces" if base else None


def headers_in(environment: Mapping[str, str]) -> dict[str, str]:
    """`name=value,name=value`, with the values percent-encoded, as the specification has it."""
    text = environment.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or environment.get("OTEL_EXPORTER_OTLP_HEADERS", "")
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name.strip(): unquote(value.strip()) for name, _, value in pairs if name.strip() and value.strip()}


def without_secrets(url: str) -> str:
    """A URL without its user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
