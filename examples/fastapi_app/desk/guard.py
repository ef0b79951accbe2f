"""Who may press the switches: the demo's own page, and whoever sits at this machine. No other web site."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

Headers = Iterable[tuple[bytes, bytes]]

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_READING = frozenset({"GET", "HEAD"})


def problem(status: int, title: str, detail: str) -> JSONResponse:
    """An error, as RFC 9457 has it."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(body, status, media_type="application/problem+json")


def refusal(method: str, headers: Headers) -> JSONResponse | None:
    """Why this request to `/desk` is not answered; None where it is.

    A name that a stranger's DNS points here is a stranger's site. And a header of one's own cannot be sent to
    another site without asking it first (CORS preflight), which nobody here says yes to.
    """
    given = dict(headers)
    if not _is_here(given.get(b"host", b"").decode("latin-1")):
        return problem(421, "Misdirected request", "The desk answers at localhost and 127.0.0.1 alone.")
    if method not in _READING and given.get(b"x-demo") != b"1":
        return problem(403, "Forbidden", "Send the header `X-Demo: 1`: other sites cannot.")
    return None


def _is_here(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in _HERE
    except ValueError:
        return False
