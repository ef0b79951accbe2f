"""Two incidents to practise on: `killed` in the middle of a request, and a reader of outcomes that is `broken`."""

import asyncio
import logging
import os
import signal
import subprocess
import sys

import httpx
from fastapi import FastAPI

from metered_billing import Account, MeteredBillingMiddleware, metered, settled

logging.disable(logging.CRITICAL)  # this page is about the journal; your own app logs what happens

app = FastAPI()
app.add_middleware(MeteredBillingMiddleware, account=lambda: Account("acme", "ann"))


@app.post("/killed")
@metered(cost=10)
async def killed() -> None:
    await asyncio.sleep(0.1)  # at work
    os.kill(os.getpid(), signal.SIGKILL)  # the kernel out of memory, a node that goes away


def broken_reader(result: dict[str, int]) -> int:
    return result["deliverd"]  # a slip: nobody can tell what was delivered


@app.post("/broken")
@metered(cost=5, outcomes=broken_reader)
async def broken() -> dict[str, int]:
    return {"delivered": 5}


async def ask(what: str) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        await client.post(f"/{what}", headers={"X-Request-ID": f"req-{what}"})
    await settled()


if len(sys.argv) > 2:
    asyncio.run(ask(sys.argv[1]))
else:
    done = subprocess.run([sys.executable, __file__, sys.argv[1], "in a process of its own"], check=False)
    print("killed" if done.returncode == -signal.SIGKILL else "answered")
