"""The apps that are compared, as the harness knows them; what is in them, `app` says."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """One app.

    Args:
        title: As the tables name it.
        build: The name of the function in `app` that makes it.
        bills: Whether credits move, so that the books can be checked.
        tracing: Whether an SDK's provider is set. FastAPI then emits spans of its own, in every app.
        logs: "" for none, "logging", or "structlog".
        metrics: Whether there is an SDK's meter provider.
        journal: "disk" or "memory" (a tmpfs); what else is said of ours stands in `app`.
        lean: On the lean transport.
        frozen: With `gc.freeze()` at the start: the garbage collector looks at no object of the app's own again.
    """

    name: str
    title: str
    build: str
    bills: bool = True
    tracing: bool = False
    logs: str = ""
    metrics: bool = False
    journal: str = ""
    lean: bool = False
    frozen: bool = False


VARIANTS = (
    Variant("bare", "bare route", "bare", bills=False),
    Variant("bare-traced", "bare route, tracing on", "bare", bills=False, tracing=True),
    Variant("base", "BaseHTTPMiddleware that does nothing", "base", bills=False),
    Variant("plain", "by hand: httpx", "by_hand_plain"),
    Variant(
        "hand-httpx", "by hand: httpx, retries, breaker, spans, log", "by_hand_httpx", tracing=True, logs="logging"
    ),
    Variant(
        "hand-aiohttp",
        "by hand: aiohttp, retries, breaker, spans, log",
        "by_hand_aiohttp",
        tracing=True,
        logs="logging",
    ),
    Variant("ours-unmetered", "ours: a route that is not metered", "unmetered", bills=False, journal="disk"),
    Variant("ours-memory", "ours: journal in memory (a tmpfs)", "ours", journal="memory"),
    Variant("ours-journal", "ours: journal, log", "ours", logs="logging", journal="disk"),
    Variant("ours-spans", "ours: journal, log, spans", "ours", tracing=True, logs="logging", journal="disk"),
    Variant(
        "ours-all",
        "ours: journal, structlog, spans, metrics",
        "ours",
        tracing=True,
        logs="structlog",
        metrics=True,
        journal="disk",
    ),
    Variant(
        "frozen-journal", "ours, with gc.freeze(): journal, log", "ours", logs="logging", journal="disk", frozen=True
    ),
    Variant("lean-journal", "ours, lean transport: journal, log", "ours", logs="logging", journal="disk", lean=True),
    Variant(
        "lean-spans",
        "ours, lean transport: journal, log, spans",
        "ours",
        tracing=True,
        logs="logging",
        journal="disk",
        lean=True,
    ),
)

PEERS = (
    Variant("peer-slowapi", "slowapi: a rate limit in memory", "slowapi", bills=False),
    Variant("peer-gringotts", "gringotts-api: credits in the app's SQLite file", "gringotts", bills=False),
    Variant("peer-x402", "x402: a payment a request, the facilitator a stub", "x402", bills=False),
)
"""Others' packages, on request: their books are not checked, for none keeps any that a refund would show in."""

BY_NAME = {variant.name: variant for variant in (*VARIANTS, *PEERS)}


@dataclass(frozen=True, slots=True)
class Level:
    """How hard an app is pressed: so many at once, and how long its handler sleeps."""

    concurrency: int
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.concurrency} at once{', handler of 20 ms' if self.slow else ''}"


LEVELS = (Level(1), Level(8), Level(64), Level(256), Level(64, slow=True))
