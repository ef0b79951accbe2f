"""An app's routes, wherever they are registered: what start-up checks, and what OpenAPI amends.

Starlette's routes, mounts and hosts are walked; so are FastAPI's included routers, which since FastAPI
0.137 keep their routes to themselves. FastAPI is not imported: what it has is recognised by its shape.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

METERED = "__metered__"
"""On a metered endpoint: its `Metered`."""

METERED_BY = "__metered_by__"
"""On the plain function under a metered endpoint: that endpoint."""

_METHODS = ("get", "head", "post", "put", "patch", "delete", "options")


class Metered(Protocol):
    """What start-up wants to know of a metered endpoint."""

    def check(self, account: Any) -> None:
        """Whether this middleware's account function can be called for it; a TypeError says why not."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """A route as an app has it.

    Attributes:
        app: The app whose `openapi` describes it.
        path: Below that app, as in its OpenAPI.
        endpoints: One, or an `HTTPEndpoint`'s by method.
        websocket: Whether it serves WebSockets.
    """

    app: Any
    path: str
    methods: frozenset[str]
    endpoints: tuple[Any, ...]
    websocket: bool


class Misregistered(TypeError):
    """A metered endpoint is registered so that it would run free."""


def routes_of(app: Any) -> Iterator[Route]:
    """All routes of an app, and of what is mounted in it."""
    seen: set[int] = set()

    def walk(app: Any, routes: Any, prefix: str) -> Iterator[Route]:
        for route in routes:
            contexts = getattr(route, "effective_route_contexts", None)
            if callable(contexts):  # a FastAPI router that was included
                own = [getattr(context, "starlette_route", None) or context for context in contexts()]
                yield from walk(app, own, prefix)
                continue
            endpoint = getattr(route, "endpoint", None)
            if endpoint is not None:
                path = getattr(route, "path_format", "")
                methods = getattr(route, "methods", None)
                # A WebSocket's route has no methods; nor has an HTTPEndpoint's, which is a class.
                websocket = methods is None and not inspect.isclass(endpoint)
                yield Route(app, prefix + path, frozenset(methods or ()), _endpoints(endpoint), websocket)
                continue
            mounted = unwrapped(getattr(route, "_base_app", None) or getattr(route, "app", None))
            if mounted is not None and id(mounted) not in seen:
                seen.add(id(mounted))
                inner = mounted if hasattr(mounted, "openapi") else app
                below = "" if inner is mounted else prefix + getattr(route, "path", "")
                yield from walk(inner, mounted.routes, below)

    app = unwrapped(app)
    if app is not None:
        seen.add(id(app))
        yield from walk(app, app.routes, "")


def unwrapped(app: Any) -> Any:
    """The app with routes inside of whatever middleware; None where there is none."""
    for _ in range(100):
        if app is None or hasattr(app, "routes"):
            return app
        app = getattr(app, "app", None)
    return None


def check(app: Any, account: Any) -> None:
    """Refuse what would run free, or could not be charged.

    Raises:
        Misregistered: `@metered` stands above the route's decorator, or on a WebSocket.
        TypeError: The middleware's `account` cannot be called for some route.
    """
    routes = list(routes_of(app))
    served = {id(endpoint) for route in routes for endpoint in route.endpoints}
    for route in routes:
        for endpoint in route.endpoints:
            name = getattr(endpoint, "__qualname__", repr(endpoint))
            metered = metered_of(endpoint)
            if metered is not None:
                if route.websocket:
                    raise Misregistered(f"{name}: a WebSocket cannot be metered, only a request can")
                metered.check(account)
                continue
            wrapper = _attributes(endpoint).get(METERED_BY)
            if wrapper is not None and id(wrapper) not in served:
                raise Misregistered(
                    f"{route.path} would run free: @metered stands above the route's decorator, so the route"
                    f" knows only the plain {name}. Write @metered below, next to the function:\n\n"
                    f'    @app.post("{route.path}")\n    @metered(…)\n    async def {name}(…): …'
                )


def metered_of(endpoint: Any) -> Metered | None:
    return cast("Metered | None", _attributes(endpoint).get(METERED))


def _attributes(endpoint: Any) -> Mapping[str, Any]:
    return getattr(endpoint, "__dict__", None) or {}


def _endpoints(endpoint: Any) -> tuple[Any, ...]:
    if not inspect.isclass(endpoint):
        return (endpoint,)
    return tuple(found for name in _METHODS if (found := getattr(endpoint, name, None)) is not None)
