"""Functions whose arguments are chosen by name from an endpoint's, as pytest chooses fixtures."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Scope

from metered_billing.outcomes.paid import described

REQUEST = "request"

_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature, its annotations evaluated where they can be.

    With `from __future__ import annotations` they are strings, and several FastAPI versions look them up
    where a wrapper stands rather than where the function does.
    """
    try:
        return inspect.signature(fn, eval_str=True)
    except NameError:  # a name imported under TYPE_CHECKING
        return inspect.signature(fn)


def name_of(fn: object) -> str:
    """What a function is called, for errors and for people."""
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))


class Offer:
    """What an endpoint offers: its parameters, by name, and its request.

    Args:
        endpoint: The function under the decorator.
    """

    def __init__(self, endpoint: Callable[..., Any]) -> None:
        self.name = name_of(endpoint)
        self.signature: inspect.Signature = signature_of(endpoint)
        parameters = [parameter for parameter in self.signature.parameters.values() if parameter.kind in _NAMED]
        self.names: list[str] = [parameter.name for parameter in parameters]
        self.defaults: dict[str, Any] = {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not inspect.Parameter.empty
        }
        self.request_name: str | None = next((p.name for p in parameters if is_kind(p.annotation, Request)), None)

    def in_words(self) -> str:
        """What there is to choose from, for errors."""
        return f"this route offers: {', '.join([*self.names, *([] if REQUEST in self.names else [REQUEST])])}"

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], scope: Scope) -> "Bound":
        """The arguments of one call.

        Args:
            scope: Of the request, where the endpoint takes none.
        """
        if args or (self.defaults and self.defaults.keys() - kwargs.keys()):
            kwargs = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        return Bound(self.request_name, kwargs, scope)


class Bound:
    """One call of an endpoint: its arguments by name, and its request, made when it is first asked for."""

    __slots__ = ("_request", "_request_name", "_scope", "arguments")

    def __init__(self, request_name: str | None, arguments: Mapping[str, Any], scope: Scope) -> None:
        self.arguments: Mapping[str, Any] = arguments
        self._request_name = request_name
        self._scope = scope
        self._request: Request | None = None

    @property
    def request(self) -> Request:
        """The endpoint's own request where it takes one, else one of headers, path and state: its body is gone."""
        if self._request is None:
            own = None if self._request_name is None else self.arguments.get(self._request_name)
            if own is None:
                own = next((value for value in self.arguments.values() if isinstance(value, Request)), None)
            self._request = own if isinstance(own, Request) else Request(self._scope, _gone)
        return self._request


async def _gone() -> Message:
    raise RuntimeError("the framework has read this request's body already: name the endpoint's own argument instead")


class Chooser:
    """A function of ours to call (`cost`, `price`, `account`, `outcomes`), with the arguments it names.

    Args:
        what: Which of them it is, for errors.
        fn: Sync or async.
        offer: What it may choose from. `request` is always there.
        returned: Its first parameter is what the endpoint returned, whatever its name.

    Raises:
        TypeError: It cannot be called, or names what the endpoint has not.
    """

    def __init__(self, what: str, fn: Callable[..., Any], offer: Offer, *, returned: bool = False) -> None:
        self._fn = fn
        self._offer = offer
        self._returned = returned
        # By which names its arguments are called here, and where they come from: None is the request.
        self._positional: list[str | None] = []
        self._keywords: list[tuple[str, str | None]] = []
        try:
            parameters = list(signature_of(fn).parameters.values())
        except (TypeError, ValueError) as error:
            if not callable(fn):
                raise TypeError(f"{what} must be a function; this is {described(fn)}") from None
            raise TypeError(f"{what}={name_of(fn)}: its parameters cannot be read; wrap it in a function") from error
        if returned:
            if not parameters or parameters[0].kind not in (*_NAMED[:2], inspect.Parameter.VAR_POSITIONAL):
                raise TypeError(
                    f"{what}={name_of(fn)} must take what the route returned as its first parameter. Further ones are"
                    f" chosen by name; {offer.in_words()}"
                )
            parameters = parameters[1:]
        for parameter in parameters:
            self._choose(what, parameter)

    def _choose(self, what: str, parameter: inspect.Parameter) -> None:
        if parameter.kind not in _NAMED:
            return  # *args and **kwargs name nothing
        name = parameter.name
        source: str | None = None
        if name in self._offer.names:
            source = name
        elif name == REQUEST or is_kind(parameter.annotation, Request):
            pass
        elif parameter.default is not inspect.Parameter.empty:
            return
        else:
            near = difflib.get_close_matches(name, [*self._offer.names, REQUEST], 1)
            raise TypeError(
                f"{what} asks for {name!r}, which {self._offer.name} has not{f': {near[0]!r}?' if near else '.'}"
                f" Its parameters are chosen by name; {self._offer.in_words()}"
            )
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            self._positional.append(source)
        else:
            self._keywords.append((name, source))

    def __call__(self, call: Bound, returned: Any = None) -> Any:
        """Call it with this request's arguments; whatever it raises passes. An async one returns an awaitable."""
        given = call.arguments
        keywords = {name: call.request if source is None else given[source] for name, source in self._keywords}
        if not self._positional and not self._returned:
            return self._fn(**keywords)
        positional = [call.request if source is None else given[source] for source in self._positional]
        return self._fn(*([returned] if self._returned else ()), *positional, **keywords)


def is_kind(annotation: Any, kind: type) -> bool:
    """Whether an annotation is that class, below it, or `Annotated` with it."""
    annotation = getattr(annotation, "__origin__", annotation)
    return isinstance(annotation, type) and issubclass(annotation, kind)
