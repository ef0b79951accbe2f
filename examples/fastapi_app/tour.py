"""What the demo shows: one request of ten pictures, and what it did to an account."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from .samples import sample_request
from .supervisor import CannotStart, Say

TENANT = "demo"


@dataclass(frozen=True)
class Tokens:
    """This run's secrets at the credits service: the app's, for its tenant, and ours, which may grant."""

    app: str = field(repr=False)
    admin: str = field(repr=False)


async def grant(http: httpx.AsyncClient, credits_url: str, tokens: Tokens, amounts: Mapping[str, int]) -> None:
    """Give each user the credits they start with; once, however often the demo is started on its files."""
    for user, amount in amounts.items():
        answer = await http.post(
            f"{credits_url}/v1/grants",
            json={"tenant_id": TENANT, "user_id": user, "amount": amount, "reason": "to start with"},
            headers={"Authorization": f"Bearer {tokens.admin}", "Idempotency-Key": f"start:{user}"},
        )
        if not answer.is_success:
            raise CannotStart(f"No credits could be granted ({answer.status_code}): {answer.text}")


async def show(http: httpx.AsyncClient, app_url: str, credits_url: str, tokens: Tokens, say: Say) -> None:
    """Send the sample request as the user `tour`, and print its account."""
    say("")
    say(_bold("Ten pictures, sent as the user `tour`, at one credit each; two of them are broken:"))
    try:
        answer = await http.post(
            f"{app_url}/create-products", json=sample_request(), headers={"Authorization": "Bearer tour"}
        )
        if answer.status_code != 200:
            say(f"  {answer.status_code}: {answer.text}")
            return
        _show_pictures(answer.json(), say)
        _show_account(await _account(http, credits_url, tokens, answer.headers), say)
    except httpx.HTTPError as error:
        say(f"  no answer ({type(error).__name__}): see .demo/*.log")


def _show_pictures(body: dict[str, Any], say: Say) -> None:
    for product in body["products"]:
        for image in product["images"]:
            good = image["status"] == "succeeded"
            outcome = _green("✓ cut out") if good else _red("✗ " + image["error"])
            say(f"  {product['name']:8} {image['id']:15} {outcome}{'  ' + image['url'] if good else ''}")


def _show_account(account: "Account", say: Say) -> None:
    say("")
    say(f"  deducted {account.deducted:4}  before the work began")
    say(f"  refunded {account.refunded:4}  {', '.join(account.items)}")
    say(f"  cost     {account.deducted - account.refunded:4}")
    say(f"  balance  {account.balance:4}")


def explain(app_port: int, credits_port: int, say: Say) -> None:
    """Say what to do next."""
    request = f"-H 'Content-Type: application/json' -d @.demo/request.json localhost:{app_port}/create-products"
    say("")
    say(f"Open {_bold(f'http://localhost:{app_port}/')}, or in another shell, from this directory:")
    say("")
    say("  # alice has 100 credits; 10 are deducted and 2 refunded, so 92 are left")
    say(f"  curl -s -i -H 'Authorization: Bearer demo' {request}")
    say("")
    say("  # poor has 3: a 402, and nothing runs")
    say(f"  curl -s -i -H 'Authorization: Bearer poor' {request}")
    say("")
    say("Pull the plug, if you like: whatever is killed starts again, and no credit is lost.")
    say("  kill -9 $(cat .demo/app.pid)       kill -9 $(cat .demo/credits.pid)")
    say(f"The credits service is on port {credits_port} (its secrets: .demo/env); logs: .demo/*.log.")
    say("Ctrl-C stops both.")


@dataclass(frozen=True)
class Account:
    """What one request did, in credits, as the service's books have it."""

    deducted: int
    refunded: int
    items: list[str]
    balance: int


async def _account(http: httpx.AsyncClient, credits_url: str, tokens: Tokens, said: Mapping[str, str]) -> Account:
    transaction, due = said["Credits-Transaction-Id"], int(said.get("Credits-Refunded", "0"))
    headers = {"Authorization": f"Bearer {tokens.admin}"}
    # The refund goes out after the response: give it a moment.
    for _ in range(50):
        answer = await http.get(f"{credits_url}/v1/transactions/{transaction}", headers=headers)
        entry: dict[str, Any] = answer.raise_for_status().json()
        refunds = entry["refunds"]
        if sum(refund["amount"] for refund in refunds) >= due:
            break
        await anyio.sleep(0.1)
    answer = await http.get(
        f"{credits_url}/v1/balance", params={"tenant_id": TENANT, "user_id": "tour"}, headers=headers
    )
    return Account(
        deducted=abs(entry["amount"]),
        refunded=sum(refund["amount"] for refund in refunds),
        items=[item for refund in refunds for item in refund.get("items") or ()],
        balance=answer.raise_for_status().json()["balance"],
    )


def _bold(text: str) -> str:
    return _styled(1, text)


def _green(text: str) -> str:
    return _styled(32, text)


def _red(text: str) -> str:
    return _styled(31, text)


def _styled(code: int, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text
