"""Errors as RFC 9457 problems, whatever went wrong; and their part of the OpenAPI document."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from metered_billing.errors import TYPE_PREFIX
from metered_billing.ledger import LedgerError, LedgerUnavailable
from metered_billing.ledger.answers import REFUSALS, Answer, problem

_log = logging.getLogger("metered_billing.service")

MEDIA_TYPE = "application/problem+json"

MAX_ERRORS = 20
"""The most fields that one answer complains about."""

MAX_FIELD_LENGTH = 200

_TITLES: Mapping[str, tuple[int, str]] = {
    "unauthorized": (401, "Unauthorized"),
    "forbidden": (403, "Forbidden"),
    # Not `not-found`, which is a refund's answer: a client must not take a wrong address for a refusal.
    "no-such-route": (404, "No such route"),
    "method-not-allowed": (405, "Method not allowed"),
    "body-too-large": (413, "Body too large"),
    "invalid-request": (422, "Invalid request"),
    "rate-limited": (429, "Too many requests"),
    "overloaded": (503, "Overloaded"),
    "internal-error": (500, "Internal error"),
    "ledger-unavailable": (503, "Ledger unavailable"),
}

_BY_STATUS = {status: name for name, (status, _) in _TITLES.items()}

# The ledger's refusals are problems too.
_ALL = {**REFUSALS, **_TITLES}


class Problem(HTTPException):
    """A request that gets a problem for an answer.

    FastAPI's exception, not Starlette's: while FastAPI reads a body, it takes any other for a broken body.

    Args:
        name: One of `_ALL`.
        status: Where it is another than the name's own.
        extra: Further members of the document.
    """

    def __init__(
        self,
        name: str,
        detail: str,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        own_status, title = _ALL[name]
        status = status or own_status
        super().__init__(status, detail, dict(headers) if headers else None)
        self.name = name
        self.document = problem(name, status, title, detail, **extra)

    @property
    def answer(self) -> Answer:
        """As the answer to one operation of a batch."""
        return Answer(self.status_code, self.document)


class ProblemResponse(JSONResponse):
    """A problem document. ASCII only, for what a client sent may be quoted in it, lone surrogates too."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def invalid(errors: Sequence[Mapping[str, str]]) -> Problem:
    """422 `invalid-request`, naming the fields.

    Args:
        errors: `{field, message}` each.
    """
    listed = [dict(error) for error in errors[:MAX_ERRORS]]
    detail = "; ".join(f"{error['field']}: {error['message']}" for error in listed[:3])
    return Problem("invalid-request", f"{detail}.", errors=listed)


def unauthorized(
    why: str = "Send a token that this service knows: Authorization: Bearer TOKEN.", error: str | None = None
) -> Problem:
    """401.

    Args:
        error: RFC 6750's word for what is wrong with the token.
    """
    challenge = "Bearer" if error is None else f'Bearer error="{error}"'
    return Problem("unauthorized", why, headers={"WWW-Authenticate": challenge})


READS_ONLY = "This token may only read."


def forbidden(why: str = "This token is for another tenant.") -> Problem:
    return Problem("forbidden", why)


def not_found() -> Problem:
    return Problem("not-found", "There is no transaction with this id.")


def unanswered(error: LedgerError) -> Problem:
    """503 or 500: the client has to take the operation as unknown. The reason stays in our log."""
    _log.error("ledger gives no answer: %s", error)
    if isinstance(error, LedgerUnavailable):
        return Problem(
            "ledger-unavailable",
            "The ledger gives no answer at the moment. Repeat the request under the same key.",
            headers={"Retry-After": "1"},
        )
    return Problem("internal-error", "The ledger contradicts itself; nothing was written.")


def fields(errors: Sequence[Any]) -> list[dict[str, str]]:
    """Pydantic's errors as `{field, message}`.

    A field is its path, dotted, without the path's first part: where it was sent, or the kind of operation.
    """
    return [{"field": _field(error["loc"][1:]), "message": _message(error)} for error in errors]


def handle_problems(app: FastAPI) -> None:
    """Make every error of the app a problem."""

    async def on_problem(request: Request, error: Exception) -> ProblemResponse:
        if not isinstance(error, StarletteHTTPException):
            raise error
        return problem_response(_as_problem(error))

    async def on_invalid(request: Request, error: Exception) -> ProblemResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        errors = error.errors()
        if any(each["type"] == "json_invalid" for each in errors):
            return problem_response(_malformed())
        return problem_response(invalid(fields(errors)))

    async def on_ledger(request: Request, error: Exception) -> ProblemResponse:
        if not isinstance(error, LedgerError):
            raise error
        return problem_response(unanswered(error))

    async def on_bug(request: Request, error: Exception) -> ProblemResponse:
        return problem_response(Problem("internal-error", "Something went wrong here; see the log."))

    app.add_exception_handler(StarletteHTTPException, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(LedgerError, on_ledger)
    app.add_exception_handler(Exception, on_bug)


def problem_response(error: Problem) -> ProblemResponse:
    return ProblemResponse(error.document, error.status_code, headers=error.headers)


def documented(*described: tuple[int, str, str]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: (status, problem name, when it happens), several of one status allowed."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status, name, when in described:
        response = responses.setdefault(
            status,
            {"description": "", "content": {MEDIA_TYPE: {"schema": _SCHEMA, "examples": {}}}},
        )
        response["description"] = f"{response['description']} `{name}`: {when}".strip()
        _, title = _ALL[name]
        response["content"][MEDIA_TYPE]["examples"][name] = {
            "value": problem(name, status, title, when, **_EXTRA.get(name, {}))
        }
    return responses


_EXTRA: Mapping[str, Mapping[str, Any]] = {
    "insufficient-credits": {"required": 10, "balance": 7},
    "invalid-request": {"errors": [{"field": "amount", "message": "Input should be a valid integer"}]},
}

_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "description": "An RFC 9457 problem.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "pattern": f"^{TYPE_PREFIX}"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}


def _as_problem(error: StarletteHTTPException) -> Problem:
    if isinstance(error, Problem):
        return error
    if error.status_code == 400:
        # FastAPI's word for a body that json.loads gave up on: too deep, or a number too long.
        return _malformed()
    name = _BY_STATUS.get(error.status_code)
    if name is None:
        name = "internal-error" if error.status_code >= 500 else "invalid-request"
    return Problem(name, str(error.detail), headers=error.headers)


def _malformed() -> Problem:
    why = "The body cannot be read as JSON in UTF-8."
    return Problem("invalid-request", why, status=400, errors=[{"field": "body", "message": why}])


def _field(path: Sequence[Any]) -> str:
    return ".".join(str(part) for part in path)[:MAX_FIELD_LENGTH] or "body"


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] in ("model_attributes_type", "dict_type"):
        return "Input should be a JSON object"
    return str(error["msg"]).removeprefix("Value error, ")
