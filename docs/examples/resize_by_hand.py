"""Before: billing by hand, in the route."""

import os
from typing import Any
from uuid import uuid4

import httpx
from fastapi import FastAPI, HTTPException, Request
from resize_work import Pictures, Smalls, account_of, resized

app = FastAPI()


async def ask(path: str, body: dict[str, Any]) -> httpx.Response:
    token = {"Authorization": f"Bearer {os.environ['METERED_BILLING_TOKEN']}", "Idempotency-Key": str(uuid4())}
    async with httpx.AsyncClient(base_url=os.environ["METERED_BILLING_CREDITS"], headers=token, timeout=5) as client:
        return await client.post(path, json=body)


async def deduct(request: Request, amount: int) -> str:
    account = account_of(request)
    body = {"tenant_id": account.tenant_id, "user_id": account.user_id, "amount": amount}
    reply = await ask("/v1/deductions", body)
    if reply.status_code == 402:
        raise HTTPException(402, "Not enough credits")
    return str(reply.raise_for_status().json()["transaction_id"])


async def refund(transaction_id: str, amount: int) -> None:
    body = {"amount": amount, "reason": "failed"}
    (await ask(f"/v1/deductions/{transaction_id}/refunds", body)).raise_for_status()


@app.post("/resize")
async def resize(body: Pictures, request: Request) -> Smalls:
    transaction_id = await deduct(request, len(body.pictures))
    try:
        results = [await resized(picture) for picture in body.pictures]
    except Exception:
        await refund(transaction_id, len(body.pictures))
        raise
    failed = sum(result.status == "failed" for result in results)
    if failed:
        await refund(transaction_id, failed)
    return Smalls(results=results)
