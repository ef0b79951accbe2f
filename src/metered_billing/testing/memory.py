"""A credits service in memory: the ledger's own rules and rows, without a file, a thread or a framework.

It answers at once, from any thread and on any event loop. What an app may send is a matter of the ledger's commands;
the words of its refusals are plainer than the reference service's.
"""

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote

from metered_billing.ledger import Answer, Command, Deduct, Grant, Refund, Void
from metered_billing.ledger.answers import problem
from metered_billing.ledger.books import SCHEMA, SqliteBooks
from metered_billing.ledger.rows import entry_body
from metered_billing.ledger.rules import Books, Held, Stamp, decide
from metered_billing.runtime import Runtime
from metered_billing.schemas import prepare_sqlite
from metered_billing.testing.wire import BATCH, DEDUCTIONS, VOIDS, Request, Response

_REFUNDS = re.compile(r"/v1/deductions/([^/]+)/refunds")
_TRANSACTION = re.compile(r"/v1/transactions/([^/]+)")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')

Query = Mapping[str, str]
Body = Mapping[str, Any]


class MemoryService:
    """A `Door`.

    Args:
        tokens: What each token may do: `admin`, `*`, or `tenant:ID`.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._tokens = tokens
        self._runtime = Runtime()
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        prepare_sqlite(self._connection, SCHEMA)

    def answer(self, request: Request) -> Response:
        """What the service answers."""
        if request.path == "/healthz":
            return _json(200, {"status": "ok"})
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        scope = self._tokens.get(secret) if scheme.lower() == "bearer" else None
        if scope is None:
            return _problem(401, "unauthorized", "Send a token that this service knows.")
        try:
            return self._routed(request, scope)
        except _Refused as refused:
            return refused.response
        except (ValueError, TypeError, KeyError) as error:
            return _invalid(str(error))

    async def answer_soon(self, request: Request) -> Response:
        return self.answer(request)

    def decline(self, operation: Mapping[str, Any]) -> None:
        fields = {name: value for name, value in operation.items() if name not in ("op", "traceparent")}
        with self._lock:
            self._run([command := Deduct(**fields)], lambda books: decline(books, command, self._stamp()))

    def close(self) -> None:
        self._connection.close()

    def _routed(self, request: Request, scope: str) -> Response:
        path = request.path
        if request.method == "GET":
            query = {name: values[-1] for name, values in parse_qs(request.target.partition("?")[2], True).items()}
            return self._read(path, query, scope)
        if request.method != "POST":
            return _problem(405, "method-not-allowed", "Method Not Allowed")
        body = _object(request.body)
        if path == BATCH:
            return self._batch(body, scope)
        if path == VOIDS:
            return _answered(self._decide(_allowed(scope, Void(**body))))
        refunds = _REFUNDS.fullmatch(path)
        if path not in (DEDUCTIONS, "/v1/grants") and refunds is None:
            return _problem(404, "no-such-route", "Not Found")
        key = _key(request.headers.get("idempotency-key", ""))
        if refunds is not None:
            command = _refund(scope, {**body, "idempotency_key": key, "transaction_id": unquote(refunds[1])})
            return _answered(self._decide(command))
        if path == DEDUCTIONS:
            return _answered(self._decide(_allowed(scope, Deduct(**body, idempotency_key=key))))
        if scope != "admin":
            return _problem(403, "forbidden", "Granting credits needs an admin token.")
        return _answered(self._decide(Grant(**body, idempotency_key=key)))

    def _batch(self, body: Body, scope: str) -> Response:
        operations = body["operations"]
        if not isinstance(operations, list) or len(operations) > 1000 or len(body) > 1:
            raise ValueError("operations must be a list of at most 1000")
        return _json(200, {"results": [self._result(operation, scope) for operation in operations]})

    def _result(self, operation: Any, scope: str) -> dict[str, Any]:
        try:
            answer = self._decide(_command(dict(operation), scope))
        except _Refused as refused:
            return {"status": refused.response.status, "body": json.loads(refused.response.body)}
        except (ValueError, TypeError, KeyError) as error:
            return {"status": 422, "body": json.loads(_invalid(str(error)).body)}
        replayed = {"replayed": True} if answer.replayed else {}
        return {"status": answer.status, "body": dict(answer.body), **replayed}

    def _read(self, path: str, query: Query, scope: str) -> Response:
        if (one := _TRANSACTION.fullmatch(path)) is not None:
            return self._transaction(unquote(one[1]), scope)
        if path not in ("/v1/balance", "/v1/transactions"):
            return _problem(404, "no-such-route", "Not Found")
        tenant_id, user_id = query["tenant_id"], query.get("user_id")
        _covered(scope, tenant_id)
        with self._lock:
            books = SqliteBooks(self._connection)
            if path == "/v1/balance":
                return _json(200, {"balance": books.held(tenant_id, user_id or None).balance})
            limit = int(query.get("limit", "50"))
            before = books.position(tenant_id, query["cursor"]) if "cursor" in query else None
            if not 1 <= limit <= 1000 or (before is None and "cursor" in query):
                raise ValueError("limit must be 1 to 1000, and cursor one that this service gave out")
            found = books.page(tenant_id, user_id, before, limit + 1)
        page = found[:limit]
        next_cursor = page[-1].id if len(found) > limit else None
        return _json(200, {"items": [entry_body(entry) for entry in page], "next_cursor": next_cursor})

    def _transaction(self, transaction_id: str, scope: str) -> Response:
        with self._lock:
            books = SqliteBooks(self._connection)
            entry = books.entry(transaction_id)
            if entry is None or scope not in ("admin", "*", f"tenant:{entry.tenant_id}"):
                return _problem(404, "not-found", "There is no transaction with this id.")
            returns = [entry_body(each) for each in books.returns(entry.id)]
        return _json(200, {**entry_body(entry), "refunds": returns})

    def _decide(self, command: Command) -> Answer:
        with self._lock:
            return self._run([command], lambda books: decide(books, command, self._stamp()))

    def _run(self, commands: Sequence[Command], work: Callable[[Books], Answer]) -> Answer:
        self._connection.execute("BEGIN")
        try:
            books = SqliteBooks(self._connection, commands)
            answer = work(books)
            books.flush()
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return answer

    def _stamp(self) -> Stamp:
        return Stamp(self._runtime.new_id(), now_text(self._runtime.now()))


def decline(books: Books, command: Deduct, stamp: Stamp) -> Answer:
    """Decide it as if the account held nothing: a decline is remembered, as every answer is."""
    held = books.held(command.tenant_id, command.user_id)
    books.hold(command.tenant_id, command.user_id, Held(0, held.granted))
    answer = decide(books, command, stamp)
    books.hold(command.tenant_id, command.user_id, held)
    return answer


class _Refused(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


def _command(fields: dict[str, Any], scope: str) -> Command:
    """An operation of a batch."""
    op = fields.pop("op", None)
    fields.pop("traceparent", None)
    if op == "refund":
        return _refund(scope, fields)
    if op in ("deduct", "void"):
        return _allowed(scope, Deduct(**fields) if op == "deduct" else Void(**fields))
    raise ValueError("op must be deduct, refund or void")


def _refund(scope: str, fields: Body) -> Refund:
    only = scope.removeprefix("tenant:") if scope.startswith("tenant:") else None
    return Refund(**{**fields, "items": tuple(fields.get("items") or ())}, only_tenant=only)


def _allowed(scope: str, command: Deduct | Void) -> Deduct | Void:
    _covered(scope, command.tenant_id)
    return command


def _covered(scope: str, tenant_id: str) -> None:
    if scope not in ("admin", "*", f"tenant:{tenant_id}"):
        raise _Refused(_problem(403, "forbidden", "This token is for another tenant."))


def _key(header: str) -> str:
    quoted = _QUOTED.fullmatch(header)
    return re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise _Refused(_problem(400, "invalid-request", "The body cannot be read as JSON in UTF-8.")) from None
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body


def _answered(answer: Answer) -> Response:
    response = _json(answer.status, answer.body)
    replayed = {"idempotent-replayed": "true"} if answer.replayed else {}
    return Response(response.status, {**response.headers, **replayed}, response.body)


def _invalid(why: str) -> Response:
    return _problem(422, "invalid-request", f"{why}.", errors=[{"field": "body", "message": why}])


def _problem(status: int, name: str, detail: str, **extra: Any) -> Response:
    return _json(status, problem(name, status, detail, detail, **extra))


def _json(status: int, body: Body) -> Response:
    kind = "application/json" if status < 300 else "application/problem+json"
    return Response(status, {"content-type": kind}, json.dumps(body).encode())


def now_text(at: float) -> str:
    """A time in RFC 3339, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
