"""The short way: what apps send all day, read and answered without the framework's machinery.

The routes say what the API is, and can answer everything. But nine tenths of what a deduction costs there is the
framework's, so what is plainly valid is decided here. Whatever is not goes on to the routes, with its body, and gets
their answer: no request is refused here, so that there are no two ways to refuse one.
"""

import json
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metered_billing.ledger import Command, Deduct, Ledger, LedgerError, Refund, Void
from metered_billing.service.bodies import MAX_OPERATIONS, MAX_TRACEPARENT_LENGTH, idempotency_key
from metered_billing.service.guard import ACCESS
from metered_billing.service.perform import NOWHERE, Asked, perform, perform_all, result_of
from metered_billing.service.problems import MEDIA_TYPE, Problem, problem_response, unanswered
from metered_billing.service.tokens import Access

BATCH, DEDUCTIONS, VOIDS = "/v1/batch", "/v1/deductions", "/v1/voids"

REPLAYED = "Idempotent-Replayed"

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


class ShortWay:
    """Answers what is plainly valid; passes on everything else."""

    def __init__(self, app: ASGIApp, *, ledger: Ledger) -> None:
        self.app = app
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if _may_be_short(scope) else ""
        if path not in (BATCH, VOIDS) and not path.startswith(DEDUCTIONS):
            await self.app(scope, receive, send)
            return
        try:
            body = await _whole(receive)
        except Problem as problem:
            await problem_response(problem)(scope, receive, send)
            return
        if body is None:
            return
        headers = Headers(scope=scope)
        try:
            asked = _read(path, body, headers, scope[ACCESS])
        except (ValueError, TypeError, KeyError, RecursionError):
            asked = None
        if asked is None:
            await self.app(scope, _again(body, receive), send)
        elif isinstance(asked, list):
            results = [result_of(answer) for answer in await perform_all(self._ledger, asked, headers)]
            await _answer(send, 200, {"results": results})
        else:
            try:
                answer = await perform(self._ledger, asked, headers)
            except LedgerError as error:
                await problem_response(unanswered(error))(scope, receive, send)
            else:
                await _answer(send, answer.status, answer.body, replayed=answer.replayed)


def _may_be_short(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and not scope.get("query_string")
        and (access := scope.get(ACCESS)) is not None
        and access.moves
        # Where a server's span has begun, it takes its name from the route.
        and "fastapi.telemetry" not in scope
        and not trace.get_current_span().get_span_context().is_valid
    )


def _read(path: str, body: bytes, headers: Headers, access: Access) -> Command | list[Asked] | None:
    """What is asked for; None (or one of many exceptions) if it is not plainly valid, and this token's to ask.

    Commands check what they are made of, no less strictly than `bodies`, and take no field that they do not know.
    """
    if headers.get("content-type") != "application/json":
        return None
    fields = json.loads(body)
    if type(fields) is not dict:
        return None
    if path == BATCH:
        operations = fields.pop("operations")
        if fields or type(operations) is not list or len(operations) > MAX_OPERATIONS:
            return None
        return [_operation(operation, access) for operation in operations]
    if path == VOIDS:
        return _covered(Void(**fields), access)
    key = idempotency_key(headers.getlist("idempotency-key"))
    if path == DEDUCTIONS:
        return _covered(Deduct(idempotency_key=key, **fields), access)
    transaction_id, _, rest = path.removeprefix(DEDUCTIONS + "/").partition("/")
    if rest != "refunds":
        return None
    return _refund(access, idempotency_key=key, transaction_id=transaction_id, **fields)


def _operation(fields: Any, access: Access) -> Asked:
    if type(fields) is not dict:
        raise ValueError
    op = fields.pop("op")
    traceparent = fields.pop("traceparent", None)
    carrier = NOWHERE
    if traceparent is not None:
        if type(traceparent) is not str or len(traceparent) > MAX_TRACEPARENT_LENGTH:
            raise ValueError
        carrier = {"traceparent": traceparent}
    if op == "deduct":
        return _covered(Deduct(**fields), access), carrier
    if op == "refund":
        return _refund(access, **fields), carrier
    if op == "void":
        return _covered(Void(**fields), access), carrier
    raise ValueError


def _covered(command: Deduct | Void, access: Access) -> Command:
    if not access.covers(command.tenant_id):
        raise ValueError
    return command


def _refund(access: Access, /, *, items: object = None, **fields: Any) -> Command:
    if items is None:
        return Refund(**fields, only_tenant=access.tenant_id)
    if type(items) is not list:
        raise ValueError
    return Refund(**fields, items=tuple(items), only_tenant=access.tenant_id)


async def _whole(receive: Receive) -> bytes | None:
    """The body; None if the client has left before its end."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        return bytes(message.get("body", b""))  # as it nearly always is
    parts = []
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
    return None


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once more; then what follows it."""
    read = False

    async def again() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, status: int, body: Mapping[str, Any], *, replayed: bool = False) -> None:
    content = _to_json(body).encode()
    media_type = b"application/json" if status < 300 else MEDIA_TYPE.encode()
    headers = [(b"content-length", str(len(content)).encode()), (b"content-type", media_type)]
    if replayed:
        headers.append((REPLAYED.lower().encode(), b"true"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})
