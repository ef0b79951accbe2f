"""Three prices that are numbers: flat, a number of rows, and seconds of which fewer may be delivered."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, metered


class Rows(BaseModel):
    rows: list[int]


class Text(BaseModel):
    text: str
    max_seconds: int = 60


def number_of_rows(body: Rows) -> int:
    return len(body.rows)


def seconds_asked_for(body: Text) -> int:
    return body.max_seconds


def seconds_delivered(returned: dict[str, Any]) -> int:
    """The first parameter is what the route returned."""
    return int(returned["seconds"])


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))


@app.post("/report")
@metered(cost=5)
async def report() -> dict[str, str]:
    return {"report": "all is well"}


@app.post("/rows")
@metered(cost=number_of_rows, price=2)
async def check_rows(body: Rows) -> dict[str, Any]:
    return {"results": [{"status": "ok" if row >= 0 else "failed"} for row in body.rows]}


@app.post("/speech")
@metered(cost=seconds_asked_for, outcomes=seconds_delivered)
def speak(body: Text) -> dict[str, Any]:
    return {"audio": "…", "seconds": min(len(body.text) // 10, body.max_seconds)}
