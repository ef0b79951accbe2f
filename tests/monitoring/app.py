"""An app that Prometheus watches, with a route for each thing that can go wrong with a charge."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from metered_billing import Account, HttpCredits, MeteredBillingMiddleware, Settings, metered

metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))

_settings = Settings()
# As the rules are hurried, so are the circuit and recovery: it reopens, and looks, several times a window.
_credits = HttpCredits(_settings.credits or "", token=_settings.token, attempts=1, breaker_reset_s=0.2)
RECOVER_EVERY_S = 0.4


class Hurried(MeteredBillingMiddleware):
    """Recovers twenty-five times as often."""

    def __init__(self, app: Any, /, **options: Any) -> None:
        super().__init__(app, **options)
        self.biller._settler._recover_every_s = RECOVER_EVERY_S


def account_of(request: Request) -> Account:
    """Whoever asks is believed."""
    return Account("acme", request.headers["x-user"])


app = FastAPI()
app.add_middleware(Hurried, credits=_credits, account=account_of)


@app.get("/up")
async def up() -> dict[str, bool]:
    return {"up": True}


@app.get("/metrics")
def show_metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.post("/work")
@metered(cost=10)
async def work(failed: int = 0, seconds: float = 0) -> dict[str, list[dict[str, str]]]:
    """Ten items, of which so many fail, after so many seconds."""
    await asyncio.sleep(seconds)
    return {"results": [{"status": "failed" if number < failed else "ok"} for number in range(10)]}


@app.post("/mismatch")
@metered(cost=10, outcomes="$.items[*]")
async def mismatch() -> dict[str, list[str]]:
    """Reports less than was paid for."""
    return {"items": ["ok"]}


def _broken_reader(result: dict[str, int]) -> int:
    return result["deliverd"]


@app.post("/disputed")
@metered(cost=10, outcomes=_broken_reader)
async def disputed() -> dict[str, int]:
    """Nobody can tell what it delivered."""
    return {"delivered": 10}
