"""A credits service as many houses have one: its own paths, fields and errors; no voids, no batches, no list."""

import secrets
from typing import Any

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, PositiveInt

app = FastAPI()
held: dict[tuple[str, str | None], int] = {("acme", None): 1000, ("acme", "ann"): 13}  # by tenant and user
deductions: dict[str, dict[str, Any]] = {}  # by the reference that the caller gave
refunds: dict[str, dict[str, Any]] = {}  # by transaction: each is refunded once


class Deduction(BaseModel):
    tenantId: str
    userId: str | None = None
    credits: PositiveInt
    reference: str


class Refund(BaseModel):
    transactionId: str
    credits: PositiveInt
    reason: str


class Failed(Exception):
    def __init__(self, status: int, **body: Any) -> None:
        self.status, self.body = status, body


@app.exception_handler(Failed)
async def failed(request: Request, error: Failed) -> JSONResponse:
    return JSONResponse(error.body, error.status)


def check(key: str | None) -> None:
    if key is None or not secrets.compare_digest(key, "house-secret"):
        raise HTTPException(401)


@app.post("/api/credits/deduct")
async def deduct(body: Deduction, x_api_key: str | None = Header(None)) -> dict[str, Any]:
    check(x_api_key)
    who, done = (body.tenantId, body.userId), deductions.get(body.reference)
    if done is None:
        available = held.get(who, 0)
        if available < body.credits:
            raise Failed(409, error="INSUFFICIENT_CREDITS", available=available)
        held[who] = available - body.credits
        done = {"transactionId": f"tx-{len(deductions) + 1}", "who": who, "credits": body.credits}
        deductions[body.reference] = done
    elif (done["who"], done["credits"]) != (who, body.credits):
        raise Failed(409, error="REFERENCE_USED")
    return {"transactionId": done["transactionId"], "remainingCredits": held[who]}


@app.post("/api/credits/refund")
async def refund(body: Refund, x_api_key: str | None = Header(None)) -> dict[str, Any]:
    check(x_api_key)
    done = next((each for each in deductions.values() if each["transactionId"] == body.transactionId), None)
    if done is None:
        raise Failed(404, error="UNKNOWN_TRANSACTION")
    if before := refunds.get(body.transactionId):
        raise Failed(409, error="ALREADY_REFUNDED", **before)
    if body.credits > done["credits"]:
        raise Failed(409, error="TOO_MUCH")
    refunds[body.transactionId] = {"refundId": f"re-{len(refunds) + 1}", "credits": body.credits}
    held[done["who"]] += body.credits
    return {**refunds[body.transactionId], "remainingCredits": held[done["who"]]}


@app.get("/api/credits/balance")
async def balance(tenantId: str, userId: str | None = None, x_api_key: str | None = Header(None)) -> dict[str, int]:
    check(x_api_key)
    return {"credits": held.get((tenantId, userId), 0)}
