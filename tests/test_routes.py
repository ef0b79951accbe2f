"""Finding an app's routes, wherever they are registered."""

from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Host, Mount, Route
from starlette.staticfiles import StaticFiles

from metered_billing.problems import document
from metered_billing.routes import routes_of, unwrapped


async def work() -> None: ...


class Work(HTTPEndpoint):
    async def get(self, request: Any) -> None: ...
    async def post(self, request: Any) -> None: ...


def found(app: Any) -> set[tuple[str, Any]]:
    return {(route.path, endpoint) for route in routes_of(app) for endpoint in route.endpoints}


def test_routes_of_starlette_with_mounts_and_hosts() -> None:
    """Mounts are walked, with middleware around them or not; so are hosts."""
    inner = Starlette(routes=[Route("/inner", Work)])
    app = Starlette(
        routes=[
            Route("/work", work),
            Mount("/a", app=inner, middleware=[Middleware(GZipMiddleware)]),
            Mount("/b", routes=[Route("/list", work)]),
            Mount("/static", app=StaticFiles(directory=".")),
            Host("example.org", app=Starlette(routes=[Route("/host", work)])),
        ]
    )
    assert found(app) == {
        ("/work", work),
        ("/a/inner", Work.get),
        ("/a/inner", Work.post),
        ("/b/list", work),
        ("/host", work),
    }


def test_routes_of_fastapi_with_included_routers() -> None:
    """They keep their routes to themselves, and their prefixes with them."""
    deep, router, app = APIRouter(), APIRouter(prefix="/router"), FastAPI(openapi_url=None)
    deep.get("/deep/{n}")(work)
    router.include_router(deep, prefix="/mid")
    router.mount("/mount", Starlette(routes=[Route("/x", work)]))
    app.include_router(router, prefix="/v1")
    assert ("/v1/router/mid/deep/{n}", work) in found(app)


def test_routes_of_an_app_that_mounts_itself_end() -> None:
    """Round in circles is round once."""
    app = Starlette()
    app.mount("/again", app)
    app.mount("/twice", app)
    assert found(app) == set()


def test_routes_of_what_has_none() -> None:
    """An ASGI function is no router."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None: ...

    assert found(asgi) == set()
    assert unwrapped(GZipMiddleware(asgi)) is None


def test_unwrapped_gives_up_on_a_circle() -> None:
    """A middleware whose app is itself is nobody's router."""

    class Circle:
        @property
        def app(self) -> Any:
            return self

    assert unwrapped(Circle()) is None


def test_document_wraps_once() -> None:
    """However often an app is started."""
    app = FastAPI()
    document(app)
    once = app.openapi
    document(app)
    assert app.openapi is once
    assert app.openapi() is app.openapi()
