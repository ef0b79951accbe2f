"""The smallest app, without us or with us; for how long it takes to start.

python -m tests.bench.first without|with PORT
"""

import os
import sys

import uvicorn
from fastapi import FastAPI


def without(app: FastAPI) -> None:
    """One route."""

    @app.post("/create")
    async def create() -> dict[str, bool]:
        return {"made": True}


def with_us(app: FastAPI) -> None:
    """The same, metered."""
    from pydantic import SecretStr

    from metered_billing import Account, MeteredBillingMiddleware, Settings, metered

    token = SecretStr(os.environ["BENCH_TOKEN"])
    settings = Settings(credits=os.environ["BENCH_CREDITS"], token=token, journal=os.environ["BENCH_JOURNAL"])
    account = Account(os.environ["BENCH_TENANT"])
    app.add_middleware(MeteredBillingMiddleware, account=lambda: account, settings=settings)

    @app.post("/create")
    @metered(cost=1)
    async def create() -> dict[str, bool]:
        return {"made": True}


if __name__ == "__main__":
    first = FastAPI()
    {"without": without, "with": with_us}[sys.argv[1]](first)
    uvicorn.run(first, port=int(sys.argv[2]), loop="uvloop", http="httptools", log_level="warning", access_log=False)
