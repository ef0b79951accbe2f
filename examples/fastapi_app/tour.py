"""What the demo shows: one request of ten pictures, and what it did to an account."""

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import httpx

from .desk.untraced import untraced
from .samples import sample_request
from .supervisor import CannotStart, Say

TENANT = "demo"


async def give(app_url: str, credits_url: str, admin_token: str, grants: Mapping[str, int], say: Say) -> None:
    """Grant the users what they start with, send the sample request as `tour`, and print its account.

    Args:
        grants: Credits by user; given once, however often the demo is started on its files.
    """
    headers = {"Authorization": f"Bearer {admin_token}", **untraced()}
    async with (
        httpx.AsyncClient(base_url=credits_url, headers=headers, trust_env=False) as service,
        httpx.AsyncClient(base_url=app_url, timeout=60, trust_env=False) as app,
    ):
        await _grant(service, grants)
        say("")
        say(_bold("Ten pictures, sent as the user `tour`, at one credit each; two of them are broken:"))
        try:
            await _send_samples(app, service, say)
        except httpx.HTTPError as error:
            say(f"  no answer ({type(error).__name__}): see .demo/*.log")


async def _grant(service: httpx.AsyncClient, grants: Mapping[str, int]) -> None:
    for user, amount in grants.items():
        answer = await service.post(
            "/v1/grants",
            json={"tenant_id": TENANT, "user_id": user, "amount": amount, "reason": "to start with"},
            headers={"Idempotency-Key": f"start:{user}"},
        )
        if not answer.is_success:
            raise CannotStart(f"No credits could be granted ({answer.status_code}): {answer.text}")


async def _send_samples(app: httpx.AsyncClient, service: httpx.AsyncClient, say: Say) -> None:
    answer = await app.post("/create-products", json=sample_request(), headers={"Authorization": "Bearer tour"})
    if answer.status_code != 200:
        say(f"  {answer.status_code}: {answer.text}")
        return
    for product in answer.json()["products"]:
        for image in product["images"]:
            good = image["status"] == "succeeded"
            outcome = _green("✓ cut out") if good else _red("✗ " + image["error"])
            say(f"  {product['name']:8} {image['id']:15} {outcome}{'  ' + image['url'] if good else ''}")
    await _show_account(service, answer.headers, say)


async def _show_account(service: httpx.AsyncClient, said: Mapping[str, str], say: Say) -> None:
    """What the request did to the account, as the service's books have it."""
    due = int(said.get("Credits-Refunded", "0"))
    refunded = 0
    # The refund goes out after the response: give it a moment.
    for _ in range(100):
        answer = await service.get(f"/v1/transactions/{said['Credits-Transaction-Id']}")
        deduction: dict[str, Any] = answer.raise_for_status().json()
        refunded = sum(refund["amount"] for refund in deduction["refunds"])
        if refunded >= due:
            break
        await asyncio.sleep(0.05)
    answer = await service.get("/v1/balance", params={"tenant_id": TENANT, "user_id": "tour"})
    balance = answer.raise_for_status().json()["balance"]
    items = [item for refund in deduction["refunds"] for item in refund["items"]]
    say("")
    say(f"  deducted {-deduction['amount']:4}  before the work began")
    say(f"  refunded {refunded:4}  {', '.join(items)}")
    say(f"  cost     {-deduction['amount'] - refunded:4}")
    say(f"  balance  {balance:4}")


def explain(app_port: int, credits_port: int, metrics_port: int, say: Say) -> None:
    """Say what to do next."""
    request = f"-H 'Content-Type: application/json' -d @.demo/request.json localhost:{app_port}/create-products"
    say("")
    say(f"Open {_bold(f'http://localhost:{app_port}/')}, and {_bold(f'http://localhost:{app_port}/traces')} for the")
    say("traces of every request; or in another shell, from this directory:")
    say("")
    say("  # alice has 100 credits; 10 are deducted and 2 refunded, so 92 are left")
    say(f"  curl -s -i -H 'Authorization: Bearer demo' {request}")
    say("")
    say("  # poor has 3: a 402, and nothing runs")
    say(f"  curl -s -i -H 'Authorization: Bearer poor' {request}")
    say("")
    say("Pull the plug, if you like: whatever is killed starts again, and no credit is lost.")
    say("  kill -9 $(cat .demo/app.pid)       kill -9 $(cat .demo/credits.pid)")
    say("")
    say(f"The credits service is on port {credits_port}. What alice was charged for:")
    say("  . .demo/env; .venv/bin/metered-billing transactions --tenant demo --user alice")
    say("")
    say(f"Metrics for Prometheus: localhost:{app_port}/metrics, localhost:{metrics_port}/metrics.")
    say("Logs: .demo/*.log. Ctrl-C stops both.")


def _bold(text: str) -> str:
    return _styled(1, text)


def _green(text: str) -> str:
    return _styled(32, text)


def _red(text: str) -> str:
    return _styled(31, text)


def _styled(code: int, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text
