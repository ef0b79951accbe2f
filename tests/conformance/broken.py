"""Services that break one promise each: the reference service behind a transport that does it wrong.

Each is called as what goes wrong. `Broken` sends on, and hands over what comes back; a breakage overrides
as little of it as it can.
"""

import asyncio
import json
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import httpx

from metered_billing.ledger import Ledger
from metered_billing.ledger.commands import Deduct, Grant
from metered_billing.service import Tokens, create_app

APP, ADMIN, ACME = "apps-own-token", "admins-own-token", "acmes-own-token"
TOKENS = {APP: "*", ADMIN: "admin", ACME: "tenant:acme"}

PROBLEM = {"content-type": "application/problem+json"}


class Service(httpx.AsyncBaseTransport):
    """The reference service, unbroken."""

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory / "credits.db")
        self._app = httpx.ASGITransport(create_app(self.ledger, Tokens(TOKENS)))
        self.calls: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.calls.append(f"{request.method} {request.url.path}")
        response = await self.answer(request)
        if not response.is_stream_consumed:
            return response
        # As from the network: a response that was made with its content has been read already.
        return httpx.Response(response.status_code, headers=response.headers, stream=httpx.ByteStream(response.content))

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """What a breakage overrides."""
        return await self.real(request)

    async def real(self, request: httpx.Request, **body: Any) -> httpx.Response:
        """The reference's answer to the request, or to it with these members of its body changed."""
        if body:
            request = again(request, {**sent(request), **body})
        response = await self._app.handle_async_request(request)
        await response.aread()
        return httpx.Response(response.status_code, headers=response.headers, content=response.content)

    async def take(self, request: httpx.Request, amount: int) -> None:
        """Credits out of the request's account, on the side."""
        body = sent(request)
        who = {"tenant_id": body["tenant_id"], "user_id": body.get("user_id")}
        await self.ledger.deduct(Deduct(idempotency_key=f"side-{uuid4()}", amount=amount, **who))

    async def give(self, request: httpx.Request, amount: int) -> None:
        """Credits into it, likewise."""
        if amount:
            body = sent(request)
            who = {"tenant_id": body["tenant_id"], "user_id": body.get("user_id")}
            await self.ledger.grant(Grant(idempotency_key=f"side-{uuid4()}", amount=amount, reason="side", **who))


def sent(request: httpx.Request) -> dict[str, Any]:
    try:
        body = json.loads(request.content or b"{}")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def again(request: httpx.Request, body: Any, **headers: str) -> httpx.Request:
    """The same request with another body, if one is given, and other headers."""
    kept = [(name, value) for name, value in request.headers.multi_items() if name != "content-length"]
    changed = httpx.Headers(kept)
    changed.update({name.replace("_", "-"): value for name, value in headers.items()})
    return httpx.Request(
        request.method,
        request.url,
        headers=changed,
        content=request.content if body is None else json.dumps(body).encode(),
    )


def said(response: httpx.Response, **changes: Any) -> httpx.Response:
    """The answer with these members of its body changed."""
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    return httpx.Response(response.status_code, headers=headers, json={**response.json(), **changes})


def is_deduction(request: httpx.Request) -> bool:
    return request.url.path == "/v1/deductions"


def is_refund(request: httpx.Request) -> bool:
    return request.url.path.endswith("/refunds")


def is_void(request: httpx.Request) -> bool:
    return request.url.path == "/v1/voids"


def is_batch(request: httpx.Request) -> bool:
    return request.url.path == "/v1/batch"


def answered(status: int, name: str = "", **more: Any) -> httpx.Response:
    if not name:
        return httpx.Response(status, json={"detail": "Not Found"})
    body = {"type": f"urn:metered-billing:{name}", "title": "No", "status": status, "detail": "no", **more}
    return httpx.Response(status, headers=PROBLEM, json=body)


class ChargesOnReplay(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and response.status_code == 200:
            await self.take(request, sent(request)["amount"])
        return response


class NewTransactionPerReplay(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and response.status_code == 200:
            return said(response, transaction_id=str(uuid4()))
        return response


class LooksAtTheBalanceFirst(Service):
    """And at the key afterwards: a replay is declined where the first has taken what there was."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        body = sent(request)
        amount, tenant_id = body.get("amount"), body.get("tenant_id")
        if is_deduction(request) and type(amount) is int and isinstance(tenant_id, str):
            held = await self.ledger.balance(tenant_id, body.get("user_id"))
            if held < amount:
                return answered(402, "insufficient-credits", required=amount, balance=held)
        return await self.real(request)


class LooksAtTheBalanceFirstAndHasNoVoids(LooksAtTheBalanceFirst):
    """So that nothing undoes what went wrong."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        return answered(404) if is_void(request) else await super().answer(request)


class ForgetsKeys(Service):
    """Every deduction is a new one."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_deduction(request) and "idempotency-key" in request.headers:
            request = again(request, None, idempotency_key=str(uuid4()))
        return await self.real(request)


class TakesOtherPayloadForReplay(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and "idempotency-key-reused" in response.text:
            return httpx.Response(200, json={"transaction_id": "t", "amount": sent(request)["amount"], "balance": 1})
        return response


class RacesOnCopies(Service):
    """Copies that arrive while the first is under way are taken once more."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._under_way: dict[str, int] = {}

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if not is_deduction(request):
            return await self.real(request)
        key = request.headers.get("idempotency-key", "")
        self._under_way[key] = self._under_way.get(key, 0) + 1
        await asyncio.sleep(0)
        if self._under_way[key] > 1 and len(self._under_way) == 1:
            await self.take(request, sent(request)["amount"])
        try:
            return await self.real(request)
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]


class ConfirmsWhatIsDeclined(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and response.status_code == 402:
            body = {"transaction_id": str(uuid4()), "amount": sent(request)["amount"], "balance": 0}
            return httpx.Response(200, json=body)
        return response


class Overdraws(Service):
    """Looks at the balance before it takes, with time in between: what many see, all take."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._under_way = 0

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if not is_deduction(request):
            return await self.real(request)
        self._under_way += 1
        try:
            await asyncio.sleep(0)
            many = self._under_way > 20
            response = await self.real(request)
        finally:
            self._under_way -= 1
        if many and response.status_code == 402:
            body = {"transaction_id": str(uuid4()), "amount": sent(request)["amount"], "balance": -3}
            return httpx.Response(201, json=body)
        return response


class FallsBackToThePool(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and response.status_code == 402 and sent(request).get("user_id"):
            return await self.real(again(request, {**sent(request), "user_id": None}, idempotency_key=str(uuid4())))
        return response


class RefundsOnReplay(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_refund(request):
            request = again(request, None, idempotency_key=str(uuid4()))
        return await self.real(request)


class RefundsToThePool(Service):
    """What comes back does not come to the account: it confirms, and moves nothing."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_refund(request) and sent(request).get("amount", 0) > 0:
            return httpx.Response(201, json={"refund_id": "r", "amount": sent(request)["amount"], "balance": 1})
        return await self.real(request)


class RefundsTooMuch(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_refund(request) and "refund-exceeds-deduction" in response.text:
            return httpx.Response(201, json={"refund_id": "r", "amount": sent(request)["amount"], "balance": 1})
        return response


class ConfirmsUnknownRefunds(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_refund(request) and response.status_code == 404:
            return httpx.Response(200, json={"refund_id": "r", "amount": sent(request)["amount"], "balance": 1})
        return response


class ForgetsKeysOfWhatIsUndone(Service):
    """A deduction that was refunded or voided is deleted, and its key with it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._undone: set[str] = set()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get("idempotency-key", "")
        if is_deduction(request) and key in self._undone:
            request = again(request, None, idempotency_key=f"{key}-again-{uuid4()}"[:255])
        response = await self.real(request)
        if is_void(request) and response.is_success and response.json()["refunded"] > 0:
            self._undone.add(sent(request)["idempotency_key"])
        if is_refund(request) and response.is_success and response.json()["amount"] == 10:
            transaction = await self.ledger.transaction(response.json()["transaction_id"])
            assert transaction is not None
            self._undone.add(transaction["idempotency_key"])
        return response


class SharesKeysAcrossTenants(Service):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._answers: dict[str, httpx.Response] = {}

    async def answer(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get("idempotency-key", "")
        if is_deduction(request) and key in self._answers and sent(request)["tenant_id"].endswith("-other"):
            first = self._answers[key]
            return httpx.Response(200, json=first.json())
        response = await self.real(request)
        if is_deduction(request) and response.is_success:
            self._answers.setdefault(key, response)
        return response


class TakesNegativeAmounts(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and sent(request).get("amount") == -1:
            return httpx.Response(201, json={"transaction_id": str(uuid4()), "amount": -1, "balance": 101})
        return response


class AsksNoToken(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/grants":
            return await self.real(request)
        return await self.real(again(request, None, authorization=f"Bearer {APP}"))


class LetsForeignersIn(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") == f"Bearer {ACME}":
            request = again(request, None, authorization=f"Bearer {APP}")
        return await self.real(request)


class NoVoids(Service):
    status: ClassVar[int] = 404

    async def answer(self, request: httpx.Request) -> httpx.Response:
        return answered(self.status) if is_void(request) else await self.real(request)


class NoVoids405(NoVoids):
    status = 405


class NoVoids501(NoVoids):
    status = 501


class VoidsGiveTwice(Service):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._voided: set[str] = set()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_void(request) and response.is_success:
            body = sent(request)
            if body["idempotency_key"] in self._voided:
                await self.give(request, response.json()["refunded"])
            self._voided.add(body["idempotency_key"])
        return response


class VoidsTellNothingTheSecondTime(Service):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._voided: set[str] = set()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_void(request) and response.is_success:
            key = sent(request)["idempotency_key"]
            if key in self._voided:
                return said(response, refunded=0)
            self._voided.add(key)
        return response


class VoidsOnlyWhatItKnows(Service):
    """A void of a key that was never seen is 404."""

    name: ClassVar[str] = ""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_void(request):
            body = sent(request)
            page = await self.ledger.transactions(body["tenant_id"], body.get("user_id"), limit=1000)
            if body["idempotency_key"] not in {entry["idempotency_key"] for entry in page.items}:
                return answered(404, self.name)
        return await self.real(request)


class NoTombstones(VoidsOnlyWhatItKnows):
    """It says that it has voided what it has not seen, and keeps nothing of it."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await super().answer(request)
        if is_void(request) and response.status_code == 404:
            return httpx.Response(200, json={"status": "voided", "refunded": 0})
        return response


class VoidsForgetPartialRefunds(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_void(request) and response.is_success and response.json()["refunded"] == 6:
            return said(response, refunded=10)
        return response


class RefundsWhatIsVoided(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_refund(request) and "charge-voided" in response.text:
            return httpx.Response(201, json={"refund_id": "r", "amount": sent(request)["amount"], "balance": 1})
        return response


class VoidsForAnybody(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_void(request):
            return await self.real(request, user_id=None)
        return await self.real(request)


class ForgetsDeclines(Service):
    """A key that was declined may be tried again."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._declined: dict[str, int] = {}

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_void(request):
            key = sent(request).get("idempotency_key", "")
            return await self.real(request, idempotency_key=self._current(key))
        if not is_deduction(request) or "idempotency-key" not in request.headers:
            return await self.real(request)
        key = request.headers["idempotency-key"]
        response = await self.real(again(request, None, idempotency_key=self._current(key)))
        if response.status_code == 402:
            self._declined[key] = self._declined.get(key, 0) + 1
        return response

    def _current(self, key: str) -> str:
        number = self._declined.get(key, 0)
        return key if not number else f"{key}-try-{number}"


class NoBatch(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        return answered(404) if is_batch(request) else await self.real(request)


class BatchInAnyOrder(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_batch(request) and response.status_code == 200:
            return said(response, results=response.json()["results"][::-1])
        return response


class BatchAllOrNothing(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_batch(request) and '"status":422' in response.text:
            return answered(422, "invalid-request")
        return response


class BatchHasKeysOfItsOwn(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        operations = sent(request).get("operations")
        if is_batch(request) and isinstance(operations, list):
            renamed = [
                {**each, "idempotency_key": f"b-{each['idempotency_key']}"} if each.get("op") == "deduct" else each
                for each in operations
            ]
            return await self.real(request, operations=renamed)
        return await self.real(request)


class BatchOfDeductionsOnly(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        operations = sent(request).get("operations")
        if is_batch(request) and isinstance(operations, list) and any(each["op"] == "void" for each in operations):
            return answered(422, "invalid-request")
        return response


class BatchHidesReplays(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_batch(request) and response.status_code == 200:
            results = [
                {name: value for name, value in each.items() if name != "replayed"}
                for each in response.json()["results"]
            ]
            return said(response, results=results)
        return response


class BatchWithoutEnd(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        operations = sent(request).get("operations")
        if is_batch(request) and isinstance(operations, list) and len(operations) > 1000:
            return httpx.Response(200, json={"results": []})
        return response


class BatchTakesAnything(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_batch(request) and not isinstance(sent(request).get("operations"), list):
            return httpx.Response(200, json={"results": []})
        return await self.real(request)


class NoList(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        return answered(404) if request.url.path == "/v1/transactions" else await self.real(request)


class OldestFirst(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if request.url.path == "/v1/transactions" and response.is_success:
            return said(response, items=response.json()["items"][::-1])
        return response


class PagesWithoutCursor(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if request.url.path == "/v1/transactions" and response.is_success:
            return said(response, next_cursor=None)
        return response


class HidesRefunds(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if request.url.path.startswith("/v1/transactions/") and response.is_success:
            return said(response, refunds=[])
        return response


class TellsWrongBalances(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_refund(request) and response.is_success:
            return said(response, balance=response.json()["balance"] + 1)
        return response


class DeclinesWithoutAWord(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        return httpx.Response(402) if response.status_code == 402 else response


class NumbersItsUsers(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and response.status_code in (200, 201):
            return httpx.Response(response.status_code, json={**response.json(), "user_id": 0})
        return response


class HidesReplays(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if is_deduction(request) and response.status_code == 200:
            return httpx.Response(201, json=response.json())
        return response


class _Nameless(Service):
    """A problem of this name comes as JSON of the service's own."""

    name: ClassVar[str]

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if f"urn:metered-billing:{self.name}" in response.text and not is_batch(request):
            return httpx.Response(response.status_code, json={"error": "no"})
        return response


class NamelessUnauthorized(_Nameless):
    name = "unauthorized"


class NamelessNotFound(_Nameless):
    name = "not-found"


class NamelessKeyReused(_Nameless):
    name = "idempotency-key-reused"


class NamelessRefundExceeds(_Nameless):
    name = "refund-exceeds-deduction"


class NamelessVoided(_Nameless):
    name = "charge-voided"


class NamelessInvalid(_Nameless):
    name = "invalid-request"


class IgnoresWhatItDoesNotKnow(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_deduction(request) and "user_idd" in sent(request):
            return await self.real(again(request, {k: v for k, v in sent(request).items() if k != "user_idd"}))
        return await self.real(request)


class QuotesBelongToTheKey(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get("idempotency-key", "")
        if key.startswith('"'):
            request = again(request, None, idempotency_key="quoted-" + key.strip('"'))
        return await self.real(request)


class AsciiOnly(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if any(byte > 0x7F for byte in request.content) or b"\\u" in request.content:
            return answered(422, "invalid-request")
        return await self.real(request)


class SmallRefundsOnly(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_refund(request) and len(request.content) > 65_536:
            return answered(413, "body-too-large")
        return await self.real(request)


class TakesAnySize(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_deduction(request) and len(request.content) > 1 << 20:
            return await self.real(request, metadata={})
        return await self.real(request)


class ChokesOnTraces(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(500) if "traceparent" in request.headers else await self.real(request)


class ChokesOnOddTraces(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(500) if request.headers.get("traceparent") == "nonsense" else await self.real(request)


class RefusesSecondRefund(Service):
    """A refund again is an error, though it was done."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        return answered(409) if is_refund(request) and response.status_code == 200 else response


class CrashesOnOddAmounts(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        return httpx.Response(500) if is_deduction(request) and response.status_code == 422 else response


class DeclinesBy400(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        return answered(400) if response.status_code == 402 else response


class NoHealth(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        return answered(404) if request.url.path == "/healthz" else await self.real(request)


class HtmlErrors(Service):
    """A proxy in front of it has pages of its own for errors."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if response.status_code >= 400:
            html = f"<html><body><h1>{response.status_code}</h1></body></html>"
            return httpx.Response(response.status_code, html=html)
        return response


class HangsOnRefunds(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if is_refund(request):
            await asyncio.Event().wait()
        return await self.real(request)


class HangsAfterAWhile(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if len(self.calls) > 60:
            await asyncio.Event().wait()
        return await self.real(request)


class Trickles(Service):
    """Answers byte by byte, without end: no single read ever takes long."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/balance":
            return await self.real(request)

        class Stream(httpx.AsyncByteStream):
            async def __aiter__(self) -> Any:
                while True:
                    await asyncio.sleep(0.001)
                    yield b" "

        return httpx.Response(200, stream=Stream())


class NoService(Service):
    """Any website."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, html="<html>Welcome</html>")


class NobodyThere(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)


class EchoesTokens(Service):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = await self.real(request)
        if response.status_code == 402:
            return httpx.Response(402, text=f"declined: {request.headers['authorization']}")
        return response
