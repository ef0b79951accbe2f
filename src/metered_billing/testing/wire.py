"""The wire between an app and its credits service: it keeps what goes over it, and does to it what was planned.

Whatever carries the bytes (respx, or a server on a socket) asks here what becomes of each request, has the service
answer what is to be answered, and hands back what comes of it.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

from metered_billing.credits.contract import read_json
from metered_billing.errors import TYPE_PREFIX
from metered_billing.testing.faults import FAULTS, Fault, Kind, Operation, Plan, Silence

Headers = Mapping[str, str]

BATCH, DEDUCTIONS, VOIDS = "/v1/batch", "/v1/deductions", "/v1/voids"

_REFUNDS = re.compile(r"/v1/deductions/([^/]+)/refunds")


@dataclass(frozen=True, slots=True)
class Request:
    """What was sent to the service.

    Attributes:
        target: The path, with its query.
        headers: By name, in lower case.
    """

    method: str
    target: str
    # The token is among them.
    headers: Headers = field(repr=False)
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass(frozen=True, slots=True)
class Response:
    """What the service answers."""

    status: int
    headers: Headers
    body: bytes


@dataclass(slots=True)
class Call:
    """One operation that was asked for, and what came of it.

    Attributes:
        key: Its idempotency key; a charge's id is that of its deduction and of its void.
        tenant_id: Whose account it names; None for a refund, which names a transaction.
        amount: Credits; None for a void.
        fault: What went wrong with it.
        batch: How many operations came in its HTTP call.
        status: What was answered; None: nothing was.
        replayed: Whether the service said that it had done this before.
        late: It is a copy that arrived after all else; nobody heard its answer.
    """

    operation: Operation
    key: str
    tenant_id: str | None
    user_id: str | None
    amount: int | None
    transaction_id: str | None
    batch: int
    fault: Fault | None = None
    status: int | None = None
    replayed: bool = False
    late: bool = False

    def __str__(self) -> str:
        amount = "" if self.amount is None else f" {self.amount}"
        came = "no answer" if self.status is None else f"{self.status}{', replayed' if self.replayed else ''}"
        of_batch = f", in a batch of {self.batch}" if self.batch > 1 else ""
        wrong = f" [{self.fault}]" if self.fault else " [arrived late]" if self.late else ""
        return f"{self.operation}{amount} {self.key}: {came}{of_batch}{wrong}"


class Unanswered(Exception):
    """The call gets no answer.

    Attributes:
        how: How that looks.
    """

    def __init__(self, how: Silence) -> None:
        super().__init__(how)
        self.how = how


class Fate:
    """What becomes of one request.

    Attributes:
        request: What the service is to answer; None: it never sees any of it.
        declines: Deductions of it that the service must decline.
    """

    def __init__(self, request: Request, calls: Sequence[Call], operations: Sequence[Mapping[str, Any]]) -> None:
        self._calls = calls
        self._operations = operations
        kinds = [FAULTS[call.fault] if call.fault else FAULTS["ok"] for call in calls]
        self._kinds: Sequence[Kind] = kinds
        self._silence = kinds[0].silence if kinds else None  # of one, and so of all
        self.again = any(kind.again for kind in kinds)
        self.declines = [
            operation for call, operation in zip(calls, operations, strict=True) if call.fault == "insufficient"
        ]
        self.request = self._shortened(request)

    def _shortened(self, request: Request) -> Request | None:
        """The request without what is not to be done."""
        if all(kind.done for kind in self._kinds):
            return request
        left = [operation for operation, kind in zip(self._operations, self._kinds, strict=True) if kind.done]
        return replace(request, body=json.dumps({"operations": left}).encode()) if left else None

    def answer(self, response: Response | None) -> Response:
        """What the app gets.

        Args:
            response: What the service has answered to `request`.

        Raises:
            Unanswered: Nothing.
        """
        if self._silence is not None:
            raise Unanswered(self._silence)
        if not self._calls:
            return response or Response(404, {}, b"")
        if not self._batched:
            return self._single(self._calls[0], self._kinds[0], response)
        if response is not None and response.status != 200:  # the service has refused the batch as a whole
            for call in self._calls:
                call.status = response.status
            return response
        results = _results(response)
        shown = [
            self._result(call, kind, next(results, None) if kind.done else None)
            for call, kind in zip(self._calls, self._kinds, strict=True)
        ]
        body = {"results": shown}
        return Response(200, {"content-type": "application/json"}, json.dumps(body).encode())

    @property
    def _batched(self) -> bool:
        return bool(self._operations) and "op" in self._operations[0]

    def _single(self, call: Call, kind: Kind, response: Response | None) -> Response:
        if kind.status is not None:
            call.status = kind.status
            return _broken(kind.status)
        if response is None:
            raise Unanswered("timeout")
        call.status = response.status
        call.replayed = response.headers.get("idempotent-replayed") == "true"
        return response

    def _result(self, call: Call, kind: Kind, result: Any) -> Any:
        if kind.status is not None:
            call.status = kind.status
            body = json.loads(_broken(kind.status).body) if kind.status >= 400 else "?"
            return {"status": kind.status, "body": body}
        if isinstance(result, dict):
            call.status, call.replayed = result.get("status"), result.get("replayed", False)
        return result


class Wire:
    """What goes to one credits service.

    Attributes:
        calls: Every operation that was asked for, in their order.
        plan: What is still to go wrong.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.plan = Plan()
        self._late: list[Request] = []
        self._lock = threading.Lock()

    def fate(self, request: Request) -> Fate:
        """What becomes of a request that has just been sent. It is kept.

        Raises:
            Unanswered: The service is down.
        """
        calls, operations = _read(request)
        down = self.plan.refuses()
        for call in calls:
            call.fault = "refused" if down else self.plan.take(call.operation)
            if call.fault and FAULTS[call.fault].silence is not None:
                # What breaks the connection breaks it for all that is in the call, and the rest meets nothing else.
                for other in calls:
                    other.fault = call.fault
                break
        with self._lock:
            self.calls += calls
        if down:
            raise Unanswered("refused")
        fate = Fate(request, calls, operations)
        if fate.again:
            with self._lock:
                self._late.append(request)
        return fate

    @property
    def has_late(self) -> bool:
        return bool(self._late)

    def late(self) -> list[Fate]:
        """What becomes of the requests that have yet to arrive, for the first or for the second time: it is done."""
        with self._lock:
            late, self._late = self._late, []
        fates = []
        for request in late:
            calls, operations = _read(request)
            for call in calls:
                call.late = True
            with self._lock:
                self.calls += calls
            fates.append(Fate(request, calls, operations))
        return fates


def _read(request: Request) -> tuple[list[Call], list[Mapping[str, Any]]]:
    """The operations that a request asks for: as they are kept, and as they were sent."""
    if request.method != "POST":
        return [], []
    body = read_json(request.body)
    if not isinstance(body, dict):
        return [], []
    key = request.headers.get("idempotency-key", "").strip('"')
    if request.path == BATCH:
        operations = body.get("operations")
        if not isinstance(operations, list) or not all(isinstance(each, dict) for each in operations):
            return [], []
        known = [each for each in operations if each.get("op") in ("deduct", "refund", "void")]
        if len(known) < len(operations):
            return [], []  # no app of ours sends such a thing: the service says what is wrong with it
        return [_call(each["op"], each, len(known)) for each in known], known
    if request.path == DEDUCTIONS:
        return [_call("deduct", {**body, "idempotency_key": key})], [{**body, "idempotency_key": key}]
    if request.path == VOIDS:
        return [_call("void", body)], [body]
    if refunds := _REFUNDS.fullmatch(request.path):
        asked = {**body, "idempotency_key": key, "transaction_id": unquote(refunds[1])}
        return [_call("refund", asked)], [asked]
    return [], []


def _call(operation: Operation, asked: Mapping[str, Any], batch: int = 1) -> Call:
    return Call(
        operation,
        str(asked.get("idempotency_key", "")),
        asked.get("tenant_id"),
        asked.get("user_id"),
        asked.get("amount"),
        asked.get("transaction_id"),
        batch,
    )


def _results(response: Response | None) -> Any:
    body = read_json(response.body) if response is not None else None
    return iter(body["results"] if isinstance(body, dict) and isinstance(body.get("results"), list) else ())


def _broken(status: int) -> Response:
    if status < 400:
        return Response(status, {"content-type": "application/json"}, b'{"transaction_id": ')
    name = "unauthorized" if status == 401 else "provoked-by-the-test"
    problem = {"type": TYPE_PREFIX + name, "title": "A fault", "status": status, "detail": "The test wanted it so."}
    return Response(status, {"content-type": "application/problem+json"}, json.dumps(problem).encode())
