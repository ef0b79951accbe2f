"""One metered request, and what it leaves in the logs and in the trace."""

import asyncio
import logging
import sys
from typing import Any

import httpx
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from metered_billing import Account, MeteredBillingMiddleware, SqlCredits, metered, settled

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
logging.getLogger("httpx").setLevel(logging.WARNING)


def line(span: ReadableSpan) -> str:
    """Our spans; FastAPI has its own."""
    if not span.name.startswith("metered_billing"):
        return ""
    return f"span {span.name} {dict(span.attributes or {})}\n"


tracers = TracerProvider()
tracers.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=line)))
trace.set_tracer_provider(tracers)

ledger = SqlCredits("credits.db")
app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits=ledger, account=lambda: Account("acme", "ann"))


@app.post("/work")
@metered(cost=2)
async def work() -> dict[str, Any]:
    return {"results": [{"status": "ok"}, {"status": "failed"}]}


async def main() -> None:
    await ledger.grant("acme", "ann", amount=10, reason="demo", idempotency_key="demo")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        await client.post("/work", headers={"X-Request-ID": "req-1"})
    await settled()
    await ledger.aclose()


asyncio.run(main())
