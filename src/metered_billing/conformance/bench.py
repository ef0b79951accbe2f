"""An account to try a service on: every call that is made, what came, and what has to be given back.

The service is not trusted: any answer may be broken, late or missing, and may quote the token.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from metered_billing.charge import Account
from metered_billing.credits.contract import Reply, read_json

EXCERPT = 400
"""How much of a body a report shows, in characters."""

MAX_ANSWER_BYTES = 4 << 20
AT_ONCE = 10


class Broken(Exception):
    """A promise does not hold: what came instead, in words."""


class Lost(Broken):
    """It does not hold, and this service has nothing by which the library could help it: that is fatal."""


class NotTried(Exception):
    """The promise cannot be looked at here: why, in words. It is neither kept nor broken."""


class Misread(Broken):
    """The user's mapping raised, or read what is no answer: nothing is known of the service by that."""


class Prevented(NotTried):
    """It could be looked at here, and was not: so long nobody knows whether the service is fit for use."""


class Silent(Broken):
    """No answer, or none in time."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One call as a report shows it: no token, and bodies cut short. `status` is None where no answer came."""

    method: str
    path: str
    key: str | None
    sent: str
    status: int | None
    received: str


@dataclass(slots=True)
class Taken:
    """What one key may have taken: its transactions, so far as they were told, and their amounts."""

    account: Account
    amount: Any
    heard: bool = False
    transactions: dict[str, int] = field(default_factory=dict)

    def note(self, reply: Any) -> None:
        """Remember what an answer says was taken."""
        self.heard = True
        if isinstance(reply, dict) and (transaction := _written(reply.get("transaction_id"))):
            amount = reply.get("amount")
            self.transactions[transaction] = amount if type(amount) is int and amount > 0 else 1


class Bench:
    """Calls of the credits API on one account; each is kept for the report.

    Args:
        client: Of the service's URL.
        account: Whose credits are used.
        prefix: What every key begins with: no two runs may share one.
        timeout_s: What one call may take in all.
        foreign_token: A token of another tenant, which must not reach this account.
        auth: The header in which tokens go, and what stands in front of them there.

    Attributes:
        lacks: What the service is known not to have: `voids`, `batch`, `transactions`.
        gives_back: Whether anything that was taken has ever come back.
    """

    lacks: frozenset[str] = frozenset()

    def __init__(
        self,
        client: httpx.AsyncClient,
        account: Account,
        *,
        prefix: str,
        token: str,
        admin_token: str | None = None,
        foreign_token: str | None = None,
        timeout_s: float = 5.0,
        auth: tuple[str, str] = ("Authorization", "Bearer "),
    ) -> None:
        self._auth = auth
        self.account = account
        self.prefix = prefix
        self.token = token
        self.admin_token = admin_token
        self.foreign_token = foreign_token
        self.gives_back = False
        self.exchanges: list[Exchange] = []
        self._client = client
        self._timeout_s = timeout_s
        self._taken: dict[tuple[str, str], Taken] = {}
        self._keys = 0
        self._secrets = [secret for secret in (token, admin_token, foreign_token) if secret]

    # The calls.

    def new_key(self) -> str:
        self._keys += 1
        return f"{self.prefix}-{self._keys}"

    async def deduct(self, amount: Any, key: str, *, account: Account | None = None, **more: Any) -> Reply:
        """`POST /v1/deductions`. `more`: further fields, or `token` and `headers` of the call."""
        call, body = split(more)
        whose = account or self.account
        taken = self._taken.setdefault((whose.tenant_id, key), Taken(whose, amount))
        reply = await self.call("POST", "/v1/deductions", {**_body(whose), "amount": amount, **body}, key, **call)
        taken.note(reply.body)
        return reply

    async def refund(self, transaction_id: str, amount: int, key: str, **more: Any) -> Reply:
        """`POST /v1/deductions/{transaction_id}/refunds`."""
        call, body = split(more)
        path = f"/v1/deductions/{quote(transaction_id, safe='')}/refunds"
        return await self.call("POST", path, {"amount": amount, "reason": "conformance", **body}, key, **call)

    async def void(self, key: str, *, account: Account | None = None, **more: Any) -> Reply:
        """`POST /v1/voids`."""
        call, body = split(more)
        return await self.call(
            "POST", "/v1/voids", {**_body(account or self.account), "idempotency_key": key, **body}, **call
        )

    async def batch(self, operations: Sequence[Mapping[str, Any]], **call: Any) -> Reply:
        """`POST /v1/batch`."""
        taken = [self._expect(operation) for operation in operations]
        reply = await self.call("POST", "/v1/batch", {"operations": operations}, **call)
        for each, result in zip(taken, results(reply), strict=False):
            if each is not None:
                each.note(result.body)
        return reply

    def _expect(self, operation: Mapping[str, Any]) -> Taken | None:
        if operation["op"] != "deduct":
            return None
        key = (operation["tenant_id"], operation["idempotency_key"])
        return self._taken.setdefault(key, Taken(self.account, operation["amount"]))

    def operation(self, op: str, key: str, **fields: Any) -> dict[str, Any]:
        """One of a batch's."""
        return {"op": op, "idempotency_key": key, **({} if op == "refund" else _body(self.account)), **fields}

    async def balance(self) -> int:
        """What the account holds, by `GET /v1/balance`.

        Raises:
            Broken: That is not told.
        """
        reply = await self.ask_balance()
        balance = number(reply, "balance")
        if reply.status != 200 or balance is None:
            raise Broken(f"GET /v1/balance was answered {reply}, without a balance")
        return balance

    async def ask_balance(self, **call: Any) -> Reply:
        """`GET /v1/balance` of the account."""
        return await self.call("GET", "/v1/balance", params=_body(self.account), **call)

    async def transactions(self, limit: int = 50, cursor: str | None = None, **call: Any) -> Reply:
        """`GET /v1/transactions` of the account."""
        params = {**_body(self.account), "limit": str(limit)} | ({} if cursor is None else {"cursor": cursor})
        return await self.call("GET", "/v1/transactions", params=params, **call)

    async def grant(self, amount: int) -> Reply:
        """`POST /v1/grants`, with the admin token."""
        body = {**_body(self.account), "amount": amount, "reason": "conformance"}
        return await self.call("POST", "/v1/grants", body, self.new_key(), token=self.admin_token)

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str | None = None,
        *,
        params: Mapping[str, str] | None = None,
        content: bytes | None = None,
        token: str | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Any call, kept for the report.

        Args:
            content: The body in bytes, where it is not to be JSON.
            token: Empty: the run's own; None: none at all.

        Raises:
            Silent: No answer came.
        """
        sent = content if body is None else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        all_headers = {"Accept": "application/json, application/problem+json", "Accept-Encoding": "identity"}
        all_headers |= {"User-Agent": "metered-billing-conformance"}
        if sent is not None:
            all_headers["Content-Type"] = "application/json"
        if key is not None:
            all_headers["Idempotency-Key"] = key
        bearer = self.token if token == "" else token
        if bearer is not None:
            name, scheme = self._auth
            all_headers[name] = scheme + bearer
        status, text = None, ""
        try:
            async with asyncio.timeout(self._timeout_s):
                status, reply_headers, received = await self._send(
                    method, path, sent, params, {**all_headers, **(headers or {})}
                )
            text = received.decode(errors="replace")
        except TimeoutError:
            text = f"no answer within {self._timeout_s:g} s"
            raise Silent(f"{method} {self._short(path)}: {text}") from None
        except httpx.HTTPError as error:
            text = f"no answer: {type(error).__name__}"
            raise Silent(f"{method} {self._short(path)}: {text}") from None
        finally:
            where = path if not params else f"{path}?{httpx.QueryParams(params)}"
            shown = "" if sent is None else sent.decode(errors="replace")
            self.exchanges.append(
                Exchange(
                    method, self._short(where), key and self._short(key), self._short(shown), status, self._short(text)
                )
            )
        return Reply(status, reply_headers, read_json(received))

    async def _send(
        self, method: str, path: str, sent: bytes | None, params: Mapping[str, str] | None, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        # The path goes as it is: httpx would undo what was quoted in it.
        url = self._client.base_url
        url = url.copy_with(raw_path=url.raw_path.rstrip(b"/") + path.encode())
        request = httpx.Request(method, url, content=sent, params=params, headers=dict(headers))
        response = await self._client.send(request, stream=True)
        try:
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > MAX_ANSWER_BYTES:
                    raise httpx.RemoteProtocolError("the answer has no end")
            return response.status_code, response.headers, bytes(received)
        finally:
            await response.aclose()

    def _short(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "(token)")
        return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}… ({len(text):,} characters)"

    # Giving back.

    async def give_back(self, balance: int) -> int:
        """Undo whatever was taken since the last time, until the account holds `balance` again.

        Returns:
            What it holds more than that, in credits; less than nothing where not all could be given back.
        """
        taken, self._taken = self._taken, {}
        exchanges, self.exchanges = self.exchanges, []
        try:
            lowest = balance
            if not self.gives_back:
                with contextlib.suppress(Broken):
                    lowest = await self.balance()
            for keys in _some(list(taken), AT_ONCE):
                # Every key: also one that was not heard of, and of which a copy may be under way.
                await asyncio.gather(*(self._void_quietly(key, taken[tenant, key]) for tenant, key in keys))
            held = await self.balance()
            for (_, key), what in taken.items():
                for transaction_id, amount in what.transactions.items():
                    if held < balance and what.account == self.account:
                        back = min(amount, balance - held)
                        held = await self._refund_quietly(transaction_id, back, f"{key}:back-{len(self.exchanges)}")
            self.gives_back = self.gives_back or held > lowest
            return held - balance
        finally:
            self.exchanges = exchanges

    async def _void_quietly(self, key: str, taken: Taken) -> None:
        with contextlib.suppress(Broken):
            reply = await self.void(key.strip('"'), account=taken.account)
            if reply.status not in (200, 201) and not taken.heard:
                # As the library does: what comes back can be refunded.
                taken.note((await self._deduct_again(taken, key)).body)

    async def _deduct_again(self, taken: Taken, key: str) -> Reply:
        return await self.call("POST", "/v1/deductions", {**_body(taken.account), "amount": taken.amount}, key)

    async def _refund_quietly(self, transaction_id: str, amount: int, key: str) -> int:
        with contextlib.suppress(Broken):
            await self.refund(transaction_id, amount, key)
        return await self.balance()


def number(reply: Reply, name: str) -> int | None:
    """A whole number of the body; None where there is none."""
    value = reply.body.get(name) if isinstance(reply.body, dict) else None
    return value if type(value) is int else None


def results(reply: Reply) -> list[Reply]:
    """A batch's results, as if each had come alone; none where they cannot be read."""
    found = reply.body.get("results") if isinstance(reply.body, dict) else None
    if reply.status != 200 or not isinstance(found, list):
        return []
    kind = {"content-type": "application/problem+json"}  # a result has no headers: its body alone can say what it is
    return [
        Reply(each["status"], kind, each.get("body"))
        for each in found
        if isinstance(each, dict) and type(each.get("status")) is int
    ]


def text(reply: Reply, name: str) -> str | None:
    """A string of the body; None where there is none, or one that cannot be sent back."""
    return _written(reply.body.get(name)) if isinstance(reply.body, dict) else None


def _written(value: Any) -> str | None:
    # Lone surrogates, which JSON can smuggle in, cannot be sent back.
    return value if isinstance(value, str) and value.isprintable() else None


def _body(account: Account) -> dict[str, str]:
    return {"tenant_id": account.tenant_id} | ({} if account.user_id is None else {"user_id": account.user_id})


def split(more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    call: dict[str, Any] = {name: more.pop(name) for name in ("token", "headers") if name in more}
    return call, more


def _some(keys: list[tuple[str, str]], size: int) -> list[list[tuple[str, str]]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]
