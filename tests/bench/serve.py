"""One process of the bench: an app of a variant, or the credits service, under uvicorn on uvloop, pinned to a core.

python -m tests.bench.serve app VARIANT PORT CORE
python -m tests.bench.serve service DATABASE PORT CORE
"""

import asyncio
import cProfile
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import uvicorn

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from tests.bench import app as apps
from tests.bench.processes import pin
from tests.bench.variants import BY_NAME, Variant


def main(kind: str, what: str, port: int, core: int) -> None:
    """Serve until SIGTERM."""
    pin(core)
    if kind == "service":
        app = _service(what)
    elif kind == "facilitator":
        from tests.bench.peers import facilitator

        app = facilitator()
    else:
        app = apps.create_app(BY_NAME[what], _set_up(BY_NAME[what]))
        if BY_NAME[what].frozen:
            gc.collect()
            gc.freeze()
    config = uvicorn.Config(
        app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning", server_header=False
    )
    server = uvicorn.Server(config)
    profile = os.environ.get("BENCH_PROFILE")
    if profile:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_profiled(server, profile))
    else:
        server.run()


def _service(database: str) -> Any:
    return create_app(Ledger(database), Tokens.parse(os.environ["METERED_BILLING_TOKENS"]))


async def _profiled(server: uvicorn.Server, path: str) -> None:
    """From SIGUSR1 on, what the event loop's thread does is counted; SIGUSR2 writes it down."""
    profile = cProfile.Profile()

    def dump() -> None:
        profile.disable()
        profile.dump_stats(path + ".part")
        os.replace(path + ".part", path)  # noqa: PTH105 - it appears whole

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, profile.enable)
    loop.add_signal_handler(signal.SIGUSR2, dump)
    await server.serve()


def _garbage() -> dict[str, Any]:
    """How many objects only the cyclic collector could free, ever; and how often it looked at all there are."""
    generations = gc.get_stats()
    return {"garbage": sum(each["collected"] for each in generations), "full": generations[2]["collections"]}


def _set_up(variant: Variant) -> Callable[[], dict[str, Any]]:
    """What the app sets up for its telemetry. Returns what tells how much came out."""
    if variant.logs:
        handler = logging.FileHandler(os.devnull)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        logging.getLogger("httpx").setLevel(logging.WARNING)
    if variant.logs == "structlog":
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.WriteLoggerFactory(open(os.devnull, "w")),  # noqa: SIM115, PTH123
            cache_logger_on_first_use=True,
        )
    if variant.metrics:
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        metrics.set_meter_provider(MeterProvider([InMemoryMetricReader()]))
    if not variant.tracing:
        return _garbage
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Counting(SpanExporter):
        """Drops them: what a collector costs is no part of this."""

        spans = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.spans += len(spans)
            return SpanExportResult.SUCCESS

    exporter = Counting()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

    def stats() -> dict[str, Any]:
        provider.force_flush()
        return {"spans": exporter.spans, **_garbage()}

    return stats


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
