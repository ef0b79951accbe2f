"""How a billing error is answered, and how OpenAPI tells of it: RFC 9457 problem details."""

import copy
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from metered_billing.errors import BillingError, CreditsUnavailable, InsufficientCredits
from metered_billing.routes import metered_of, routes_of

MEDIA_TYPE = "application/problem+json"


def answer(error: BillingError, scope: Scope) -> Response:
    """Raise the error, to be answered by the app's handler for it, or by ours.

    Raised and not returned, because the caller may be a dependency or another route, which would go on with a
    response as if it were a result, and run free.

    Returns:
        The response, where there are no exception handlers to be seen.

    Raises:
        BillingError: The same error.
    """
    handlers = scope.get("starlette.exception_handlers")
    if handlers is None:
        return _response(error)
    by_class, by_status = handlers
    if not _handled_by_the_app(error, by_class, by_status):
        by_class[type(error)] = _handle
    raise error


def _response(error: BillingError) -> Response:
    return JSONResponse(error.problem(), error.status_code, headers=error.headers, media_type=MEDIA_TYPE)


async def _handle(request: Request, error: BillingError) -> Response:
    return _response(error)


def _handled_by_the_app(error: BillingError, by_class: Mapping[Any, object], by_status: Mapping[int, object]) -> bool:
    handler = by_status.get(error.status_code)
    if handler is None:
        handler = next((by_class[kind] for kind in type(error).__mro__ if kind in by_class), None)
    # The frameworks bring handlers of their own for HTTPException, which would drop all but the detail.
    module = getattr(handler, "__module__", "") or ""
    return handler is not None and module.partition(".")[0] not in ("starlette", "fastapi")


def document(app: Any) -> None:
    """Let `app.openapi()`, and that of every app mounted in it, tell of 402 and 503 on metered routes.

    Changing `route.responses` is not enough: FastAPI has built its routes by then.
    """
    apps = {id(route.app): route.app for route in routes_of(app) if hasattr(route.app, "openapi")}
    for described in apps.values():
        if not hasattr(described.openapi, "__wrapped__"):
            described.openapi = _Documented(described)


class _Documented:
    """An app's `openapi`, with the answers of metered routes added to its result."""

    def __init__(self, app: Any) -> None:
        self.__wrapped__ = app.openapi
        self._app = app
        self._original: Any = None
        self._amended: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        original = self.__wrapped__()
        # FastAPI caches what it makes; ours is made anew when that is.
        if original is not self._original:
            self._original, self._amended = original, self._amend(copy.deepcopy(original))
        return self._amended

    def _amend(self, schema: dict[str, Any]) -> dict[str, Any]:
        for route in routes_of(self._app):
            if route.app is not self._app or not any(metered_of(endpoint) for endpoint in route.endpoints):
                continue
            operations = schema.get("paths", {}).get(route.path, {})
            for method in route.methods:
                operation = operations.get(method.lower())
                if operation is not None:
                    _add_answers(operation)
        return schema


def _add_answers(operation: dict[str, Any]) -> None:
    responses = operation.setdefault("responses", {})
    responses.setdefault("402", _answer(InsufficientCredits(10, 7)))
    unavailable = _answer(CreditsUnavailable(10))
    unavailable["headers"] = {
        "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}
    }
    responses.setdefault("503", unavailable)


def _answer(example: BillingError) -> dict[str, Any]:
    problem = example.problem()
    kinds = {str: "string", int: "integer"}
    return {
        "description": f"{example.title}; the request was not run, and nothing stays charged",
        "content": {
            MEDIA_TYPE: {
                "schema": {
                    "type": "object",
                    "properties": {
                        name: {"type": kinds[type(value)]}
                        if name in ("type", "title", "status", "detail")
                        else {"type": [kinds[type(value)], "null"]}
                        for name, value in problem.items()
                    },
                    "required": ["type", "title", "status", "detail"],
                },
                "example": problem,
            }
        },
    }
