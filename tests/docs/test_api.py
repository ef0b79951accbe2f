"""The credits API's page: its examples are made to the real service, in order."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import httpx

from metered_billing.ledger import Ledger
from metered_billing.ledger.answers import REFUSALS
from metered_billing.runtime import Runtime
from metered_billing.service import Tokens, create_app
from metered_billing.service.problems import _ALL

from .pages import DOCS, UPDATE, Block, Page, code, table

PAGE = DOCS / "reference" / "credits-api.md"

SHOWN = ("content-type", "idempotent-replayed", "www-authenticate", "retry-after")
"""The headers that the page shows: those that the contract is about."""


def clock() -> Iterator[float]:
    """A second passes between two commands."""
    return map(float, count(1_772_357_400))


def ids() -> Iterator[str]:
    return (f"01980a5e-7c1e-7000-8000-{number:012d}" for number in count(1))


async def test_examples_are_what_the_service_answers(tmp_path: Path) -> None:
    """Each request, and the answer below it, byte for byte but for white space."""
    times, names = clock(), ids()
    ledger = Ledger(tmp_path / "credits.db", Runtime(now=lambda: next(times), new_id=lambda: next(names)))
    tokens = Tokens.of_lines(
        "admin-token admin\napp-token *\nother-tenants-token tenant:other\nexpired-token expires=2026-01-01 *"
    )
    transport = httpx.ASGITransport(create_app(ledger, tokens, runtime=Runtime(now=lambda: 1_772_357_400.0)))
    page = Page(PAGE)
    examples = [block for block in page.blocks if block.language == "http"]
    assert len(examples) % 2 == 0
    async with httpx.AsyncClient(transport=transport, base_url="http://credits") as client:
        for request, answer in zip(examples[::2], examples[1::2], strict=True):
            real = shown(await client.send(built(client, request)))
            if UPDATE and answer.text != real:
                page.replace(answer, real)
            assert answer.text == real, request.text
    await ledger.close()


def built(client: httpx.AsyncClient, block: Block) -> httpx.Request:
    head, _, body = block.text.partition("\n\n")
    line, *headers = head.strip().splitlines()
    method, path = line.split(" ")
    fields = dict(header.split(": ", 1) for header in headers)
    if body:
        fields["Content-Type"] = "application/json"
    return client.build_request(method, path, headers=fields, content=body.encode() or None)


def shown(answer: httpx.Response) -> str:
    """An answer as the page has it."""
    head = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"]
    head += [f"{name}: {answer.headers[name]}" for name in SHOWN if name in answer.headers]
    text = json.dumps(answer.json(), ensure_ascii=False)
    if len(text) > 110:
        text = json.dumps(answer.json(), ensure_ascii=False, indent=2)
    return "\n".join([*head, "", text, ""])


APP, OTHER = "app-token", "other-tenants-token"


async def test_errors_come_in_the_order_of_the_page(tmp_path: Path) -> None:
    """Of two that apply to a request, the one that is listed first is the answer."""
    ledger = Ledger(tmp_path / "credits.db")
    tokens = Tokens({"admin-token": "admin", APP: "*", OTHER: "tenant:other"})
    transport = httpx.ASGITransport(create_app(ledger, tokens, max_body_bytes=1000))
    once = Runtime(monotonic=lambda: 0.0)
    limited = httpx.ASGITransport(create_app(ledger, tokens, max_body_bytes=1000, max_calls_per_s=1, runtime=once))
    order = [code(row[2])[0] for row in table(Page(PAGE), "Errors")]
    seen: list[str] = []
    async with httpx.AsyncClient(transport=transport, base_url="http://credits") as client:

        async def ask(
            path: str,
            body: object,
            key: str | None = "k",
            token: str = APP,
            method: str = "POST",
            through: httpx.AsyncClient = client,
        ) -> str:
            """The name of the problem, or an empty text."""
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            if key is not None:
                headers["Idempotency-Key"] = key
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await through.request(method, path, content=content, headers=headers)
            name = str(answer.json().get("type", "")).removeprefix("urn:metered-billing:")
            seen.append(name)
            return name

        grant = {"tenant_id": "acme", "amount": 10, "reason": "test"}
        await ask("/v1/grants", grant, "grant", "admin-token")
        await ask("/v1/deductions", {"tenant_id": "acme", "amount": 5}, "done")
        await ask("/v1/deductions", {"tenant_id": "acme", "amount": 2}, "voided")
        await ask("/v1/voids", {"tenant_id": "acme", "idempotency_key": "voided"}, None)
        page = (await client.get("/v1/transactions?tenant_id=acme", headers={"Authorization": f"Bearer {APP}"})).json()
        voided = page["items"][0]["transaction_id"]
        done = page["items"][-2]["transaction_id"]
        assert seen == ["", "", "", ""]
        seen.clear()
        huge = {"tenant_id": "acme", "amount": 1, "reason": "x" * 2000}
        refund = {"amount": 100, "reason": "test"}
        async with httpx.AsyncClient(transport=limited, base_url="http://credits") as crowd:
            await ask("/v1/deductions", huge, token="unknown", through=crowd)
            assert seen.pop() == "unauthorized"
            await ask("/v1/deductions", huge, token="unknown", through=crowd)
        await ask("/v1/deductions", huge, token="unknown")
        await ask("/v1/nothing", huge)
        await ask("/v1/nothing", {}, method="PUT")
        await ask("/v1/deductions", b"{", method="PUT")
        await ask("/v1/deductions", b"{", key=None)
        await ask("/v1/deductions", {"tenant_id": "acme", "amount": 0}, token=OTHER)
        await ask("/v1/deductions", {"tenant_id": "acme", "amount": 9}, "done", token=OTHER)
        await ask(f"/v1/deductions/{done}/refunds", refund, "done", token=OTHER)
        await ask(f"/v1/deductions/{voided}/refunds", refund, "done")
        await ask(f"/v1/deductions/{voided}/refunds", refund)
        await ask("/v1/deductions", {"tenant_id": "acme", "amount": 99}, "new")
        await ask(f"/v1/deductions/{done}/refunds", refund)
        await ask("/v1/grants", {**grant, "amount": 2**53 - 1}, token="admin-token")
    assert seen == order[: len(seen)]
    await ledger.close()


def test_every_error_is_on_the_page() -> None:
    """With its status; and none that there is not."""
    rows = table(Page(PAGE), "Errors")
    listed = {(code(row[2])[0], int(row[1])) for row in rows}
    made = {(name, status) for name, (status, _) in {**_ALL, **REFUSALS}.items()}
    assert listed == made | {("invalid-request", 400)}
