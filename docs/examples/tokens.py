"""A text model at a credit a token: in one piece, and as a stream of server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from metered_billing import Account, MeteredBillingMiddleware, metered


class Prompt(BaseModel):
    prompt: str
    max_tokens: int = Field(ge=1, le=1000)


def most_it_can_cost(body: Prompt) -> int:
    return body.max_tokens


def tokens_used(returned: dict[str, Any]) -> int:
    return int(returned["usage"]["completion_tokens"])


app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, credits="sqlite:///credits.db", account=lambda: Account("acme"))


@app.post("/complete")
@metered(cost=most_it_can_cost, outcomes=tokens_used)
async def complete(body: Prompt) -> dict[str, Any]:
    tokens = [token async for token in model(body)]
    return {"text": " ".join(tokens), "usage": {"completion_tokens": len(tokens)}}


@app.post("/stream")
@metered(cost=most_it_can_cost)
async def stream(body: Prompt) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        async for token in model(body):
            yield f"data: {json.dumps({'token': token, 'status': 'ok'})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def model(body: Prompt) -> AsyncIterator[str]:
    """A model that says what it was told."""
    for token in body.prompt.split()[: body.max_tokens]:
        yield token
