"""The routes of the credits API, version 1. Each turns a request into one call of the ledger, and back."""

from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from metered_billing.ledger import Command, Ledger
from metered_billing.ledger.answers import Answer
from metered_billing.ledger.store import MAX_PAGE
from metered_billing.service import answers, bodies
from metered_billing.service.batch import results
from metered_billing.service.guard import ACCESS
from metered_billing.service.health import Health
from metered_billing.service.perform import perform
from metered_billing.service.problems import (
    MAX_FIELD_LENGTH,
    READS_ONLY,
    ProblemResponse,
    documented,
    forbidden,
    invalid,
    not_found,
    unauthorized,
)
from metered_billing.service.short import REPLAYED
from metered_billing.service.tokens import Access

_bearer = HTTPBearer(auto_error=False, description="A token that the service was started with.")


async def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


async def _access(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> Access:
    # The guard has looked already; this holds should the app ever be mounted where the guard is not.
    access: Access | None = request.scope.get(ACCESS)
    if access is None:
        raise unauthorized()
    return access


async def _key(
    request: Request,
    idempotency_key: Annotated[
        str,
        Header(
            alias="Idempotency-Key",
            description="1 to 255 visible ASCII characters, bare or as the IETF draft's quoted string. "
            "The same key again gets the same answer, and moves nothing.",
            examples=["01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10"],
            # For the description alone: `bodies.idempotency_key` decides, and says why.
            json_schema_extra={"pattern": bodies.KEY_HEADER},
        ),
    ],
) -> str:
    try:
        return bodies.idempotency_key(request.headers.getlist("idempotency-key"))
    except ValueError as error:
        raise invalid([{"field": "Idempotency-Key", "message": str(error)}]) from None


TheLedger = Annotated[Ledger, Depends(_ledger)]
TheAccess = Annotated[Access, Depends(_access)]
TheKey = Annotated[str, Depends(_key)]
TenantId = Annotated[bodies.Id, Query()]
UserId = Annotated[
    str | None, Query(pattern=r"^[^\x00-\x1f\x7f]{0,255}$", description="Empty: the tenant's shared pool.")
]
TransactionId = Annotated[bodies.Id, Path()]

_COMMON = (
    (401, "unauthorized", "there is no token, it has expired, or the service does not know it."),
    (429, "rate-limited", "too many calls; nothing was done, and `Retry-After` says when to repeat it."),
    (422, "invalid-request", "`errors` names each field that is wrong, and why."),
    (503, "ledger-unavailable", "the ledger gives no answer; repeat the request under the same key."),
    (503, "overloaded", "too many calls are under way; nothing was done."),
)
_BODY = (
    (400, "invalid-request", "the body is not JSON in UTF-8."),
    (413, "body-too-large", "1 MiB, and for a batch 8 MiB, is the most."),
)
_TENANT = ((403, "forbidden", "the token is for another tenant, or may only read."),)
_MOVES = ((403, "forbidden", "the token may only read."),)
_REUSED = ((422, "idempotency-key-reused", "the key was used with another payload or operation."),)
_VOIDED = ((409, "charge-voided", "the deduction was voided."),)
_UNKNOWN = ((404, "not-found", "there is no such transaction, or not for this token."),)

_LINKS = {
    "refund": {
        "operationId": "refund_v1_deductions__transaction_id__refunds_post",
        "parameters": {"transaction_id": "$response.body#/transaction_id"},
        "description": "Gives credits of this deduction back.",
    },
    "show": {
        "operationId": "transaction_v1_transactions__transaction_id__get",
        "parameters": {"transaction_id": "$response.body#/transaction_id"},
        "description": "Shows the entry that this made.",
    },
}
"""From an answer to the calls that go on from it."""

_REPLAY_HEADER = {REPLAYED: {"schema": {"type": "string", "enum": ["true"]}, "description": "A replay."}}


def _answers(model: type, replay: bool = True, *links: str) -> dict[int | str, dict[str, Any]]:
    if not replay:
        return {200: {"model": model, "description": "Done."}}
    linked = {"links": {link: _LINKS[link] for link in links}}
    return {
        200: {
            "model": model,
            "description": "Done before, under this key: the same answer.",
            "headers": _REPLAY_HEADER,
            **linked,
        },
        201: {"model": model, "description": "Done.", **linked},
    }


async def _known_parameters(request: Request) -> None:
    """Refuse what would be ignored: a misspelt `user_id` shows the whole tenant, and one of a POST is in the body."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    sent = Counter(name for name, _ in request.query_params.multi_items())
    errors = [
        {
            "field": name[:MAX_FIELD_LENGTH],
            "message": "This parameter must be sent once" if name in known else "There is no such parameter",
        }
        for name, times in sent.items()
        if times > 1 or name not in known
    ]
    if errors:
        raise invalid(errors)


router = APIRouter(redirect_slashes=False)
api = APIRouter(redirect_slashes=False, dependencies=[Depends(_known_parameters)])


@api.post(
    "/v1/deductions",
    summary="Deduct",
    status_code=201,
    responses=_answers(answers.TransactionAnswer, True, "refund", "show")
    | documented(
        *_COMMON,
        *_BODY,
        *_TENANT,
        *_REUSED,
        *_VOIDED,
        (402, "insufficient-credits", "the account holds too little, and nothing was taken. Remembered."),
    ),
)
async def deduct(
    body: bodies.DeductionBody, key: TheKey, access: TheAccess, ledger: TheLedger, request: Request
) -> Response:
    """Take credits from an account, at most once a key. A refusal (402) is remembered under the key too."""
    _require_moves(access)
    _require_tenant(access, body.tenant_id)
    return await _perform(ledger, body.command(key), request)


@api.post(
    "/v1/deductions/{transaction_id}/refunds",
    summary="Refund",
    status_code=201,
    responses=_answers(answers.RefundAnswer, True, "show")
    | documented(
        *_COMMON,
        *_BODY,
        *_MOVES,
        *_REUSED,
        *_VOIDED,
        *_UNKNOWN,
        (422, "refund-exceeds-deduction", "all its refunds together would exceed the deduction."),
    ),
)
async def refund(
    transaction_id: TransactionId,
    body: bodies.RefundBody,
    key: TheKey,
    access: TheAccess,
    ledger: TheLedger,
    request: Request,
) -> Response:
    """Give credits of a deduction back to its account, at most once a key."""
    _require_moves(access)
    return await _perform(ledger, body.command(key, transaction_id, access.tenant_id), request)


@api.post(
    "/v1/voids",
    summary="Void",
    responses=_answers(answers.VoidAnswer, replay=False) | documented(*_COMMON, *_BODY, *_TENANT, *_REUSED),
)
async def void(body: bodies.VoidBody, access: TheAccess, ledger: TheLedger, request: Request) -> Response:
    """Undo the deduction that has this key, whether it happened or not; should it still arrive: refuse it.

    What earlier refunds left is given back. Again: the same answer, and nothing moves.
    """
    _require_moves(access)
    _require_tenant(access, body.tenant_id)
    return await _perform(ledger, body.command(), request)


@api.post(
    "/v1/grants",
    summary="Grant",
    status_code=201,
    responses=_answers(answers.TransactionAnswer, True, "show")
    | documented(
        *_COMMON,
        *_BODY,
        *_REUSED,
        (403, "forbidden", "the token may not grant."),
        (422, "grant-too-large", "an account can be granted 2^53-1 credits in its life."),
    ),
)
async def grant(
    body: bodies.GrantBody, key: TheKey, access: TheAccess, ledger: TheLedger, request: Request
) -> Response:
    """Put credits into an account, at most once a key. Needs an admin token."""
    if not access.grants:
        raise forbidden("Granting credits needs an admin token.")
    return await _perform(ledger, body.command(key), request)


@api.get(
    "/v1/balance",
    summary="Balance",
    response_model=answers.BalanceAnswer,
    responses=documented(*_COMMON, *_TENANT),
)
async def balance(tenant_id: TenantId, access: TheAccess, ledger: TheLedger, user_id: UserId = None) -> Response:
    """What an account holds, in credits."""
    _require_tenant(access, tenant_id)
    return JSONResponse({"balance": await ledger.balance(tenant_id, user_id or None)})


@api.get(
    "/v1/transactions",
    summary="List transactions",
    response_model=answers.PageAnswer,
    responses=documented(*_COMMON, *_TENANT),
)
async def transactions(
    tenant_id: TenantId,
    access: TheAccess,
    ledger: TheLedger,
    user_id: UserId = None,
    cursor: Annotated[str | None, Query(description="A page's `next_cursor`.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
) -> Response:
    """A tenant's entries, newest first. Without `user_id`: of all its accounts."""
    _require_tenant(access, tenant_id)
    try:
        page = await ledger.transactions(tenant_id, user_id, cursor=cursor, limit=limit)
    except ValueError as error:
        raise invalid([{"field": "cursor", "message": str(error)}]) from None
    return JSONResponse({"items": page.items, "next_cursor": page.next_cursor})


@api.get(
    "/v1/transactions/{transaction_id}",
    summary="Show a transaction",
    response_model=answers.EntryWithRefunds,
    responses=documented(*_COMMON, *_UNKNOWN),
)
async def transaction(transaction_id: TransactionId, access: TheAccess, ledger: TheLedger) -> Response:
    """One entry, with its refunds."""
    entry = await ledger.transaction(transaction_id, only_tenant=access.tenant_id)
    if entry is None:
        raise not_found()
    return JSONResponse(entry)


@api.post(
    "/v1/batch",
    summary="Batch",
    response_model=answers.BatchAnswer,
    responses=documented(*_COMMON, *_BODY),
)
async def batch(body: bodies.BatchBody, access: TheAccess, ledger: TheLedger, request: Request) -> Response:
    """Up to 1,000 deductions, refunds and voids, in one commit. Each stands alone, with its own status."""
    return JSONResponse({"results": await results(ledger, access, body.operations, request.headers)})


@router.get(
    "/healthz",
    summary="Health",
    response_model=answers.Health,
    responses=documented((503, "ledger-unavailable", "the ledger gives no answer.")),
)
async def healthz(request: Request) -> Response:
    """Whether the service can read its ledger, now or a quarter of a second ago. Needs no token."""
    health: Health = request.app.state.health
    await health.check()
    return JSONResponse({"status": "ok"})


@router.get("/livez", summary="Liveness", response_model=answers.Health)
async def livez() -> Response:
    """Whether this process answers at all, whatever its ledger does. Needs no token."""
    return JSONResponse({"status": "ok"})


router.include_router(api)


async def _perform(ledger: Ledger, command: Command, request: Request) -> Response:
    return _response(await perform(ledger, command, request.headers))


def _response(answer: Answer) -> Response:
    headers = {REPLAYED: "true"} if answer.replayed else None
    kind = JSONResponse if answer.done else ProblemResponse
    return kind(dict(answer.body), answer.status, headers)


def _require_moves(access: Access) -> None:
    if not access.moves:
        raise forbidden(READS_ONLY)


def _require_tenant(access: Access, tenant_id: str) -> None:
    if not access.covers(tenant_id):
        raise forbidden()
