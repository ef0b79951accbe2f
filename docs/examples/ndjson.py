"""Results that go out one by one, as NDJSON; each line says how its item went."""

import json
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from metered_billing import Account, MeteredBillingMiddleware, metered


class Pages(BaseModel):
    pages: list[str]


def one_each(body: Pages) -> dict[str, int]:
    return dict.fromkeys(body.pages, 1)


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))


@app.post("/read")
@metered(cost=one_each)
async def read(body: Pages) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for page in body.pages:
            status = "failed" if page.startswith("blank") else "succeeded"
            yield json.dumps({"id": page, "status": status}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")
