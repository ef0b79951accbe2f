"""An app whose metrics Prometheus scrapes at /metrics."""

from fastapi import FastAPI, Response
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from metered_billing import Account, MeteredBillingMiddleware, metered

metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, account=lambda: Account("acme", "ann"))


@app.get("/metrics", include_in_schema=False)
def show_metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.post("/work")
@metered(cost=2)
async def work() -> dict[str, list[dict[str, str]]]:
    return {"results": [{"status": "ok"}, {"status": "failed"}]}
