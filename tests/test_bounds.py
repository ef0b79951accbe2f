"""Numbers that somebody sets: refused where they are said, with their name and what is allowed."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from metered_billing import HttpCredits, MeteredBillingMiddleware, metered
from metered_billing.bounds import number, whole
from metered_billing.conformance import check_service
from metered_billing.credits.token import RotatingToken
from metered_billing.ledger import Ledger
from metered_billing.recovery import recover
from metered_billing.service import Tokens, create_app
from metered_billing.service.limits import Load

URL = "http://credits.internal"

PUBLIC: tuple[Callable[..., Any], ...] = (
    MeteredBillingMiddleware,
    HttpCredits,
    RotatingToken,
    metered,
    recover,
    check_service,
    create_app,
    Load,
)
"""Whatever users give numbers to."""

GIVEN: dict[Any, tuple[Any, ...]] = {
    MeteredBillingMiddleware: (Starlette(),),
    HttpCredits: (URL,),
    RotatingToken: (lambda: "t",),
    metered: (1,),
    check_service: (URL,),
    create_app: (Ledger("sqlite:///none.db"), Tokens({"t": "*"})),
}

NEVER: tuple[object, ...] = (math.nan, math.inf, -math.inf, -1, True, "5", 1e300, 10**5000)
"""What no number that somebody sets can be."""


def numbers() -> Iterator[Any]:
    for call in PUBLIC:
        for name, parameter in inspect.signature(call).parameters.items():
            if parameter.annotation in (int, float, float | None):
                yield pytest.param(call, name, id=f"{call.__name__}-{name}")


def give(call: Callable[..., Any], name: str, value: object) -> None:
    # Without a loop: where a server runs, the middleware says it when the app starts.
    more = {"token": "t"} if call is check_service else {}
    answer = call(*GIVEN.get(call, ()), **more, **{name: value})
    if inspect.iscoroutine(answer):
        asyncio.run(answer)


def refused(call: Callable[..., Any], name: str, value: object) -> str:
    """What it says of the value."""
    with pytest.raises(ValueError) as refusal:
        give(call, name, value)
    return str(refusal.value)


@pytest.mark.parametrize(("call", "name"), list(numbers()))
def test_number_that_cannot_be_right(
    call: Callable[..., Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinities, what is negative, absurd or of another type: whichever public option it is given for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METERED_BILLING_CREDITS", "sqlite:///credits.db")
    called = "the rate" if name == "max_calls_per_s" else name
    for value in NEVER:
        said = refused(call, name, value)
        assert said.startswith(f"{called} must be "), said
    assert not list(tmp_path.iterdir())


def test_every_room_is_asked() -> None:
    """So that the test above looks at something: the options that there are."""
    found = {parameter.id for parameter in numbers()}
    assert {
        "MeteredBillingMiddleware-settle_timeout_s",
        "MeteredBillingMiddleware-max_body_bytes",
        "HttpCredits-breaker_failures",
        "HttpCredits-max_waiting",
        "RotatingToken-ttl_s",
        "metered-max_units",
        "recover-within_s",
        "create_app-max_calls_per_s",
        "Load-max_bytes",
    } <= found


@pytest.mark.parametrize("name", ["timeout_s", "attempt_timeout_s", "attempts", "breaker_failures", "max_connections"])
def test_limit_of_nothing(name: str) -> None:
    """0 would let nothing through."""
    assert "; this is 0" in refused(HttpCredits, name, 0)


def test_bounds_are_inclusive() -> None:
    """The most is allowed, and 0 where it means something; an int will do for a float."""
    assert whole("x", 1) == 1
    assert whole("x", 7, most=7) == 7
    assert number("x", 7, most=7) == 7
    assert number("x", 0, most=7, zero=True) == 0
    with pytest.raises(ValueError, match=r"^x must be above 0, and 7 at the most; this is 0\.0$"):
        number("x", 0.0, most=7)
    with pytest.raises(ValueError, match=r"^x must be from 0 to 7; this is 7\.5$"):
        number("x", 7.5, most=7, zero=True)
    with pytest.raises(ValueError, match=r"^x must be a whole number from 0 to 7; this is 2\.0$"):
        whole("x", 2.0, least=0, most=7)


def test_what_stands_in_its_place_is_not_shown() -> None:
    """A token that has slipped into the wrong argument is a secret still."""
    with pytest.raises(ValueError, match=r"; this is str$"):
        number("timeout_s", "s3cr3t", most=7)


@pytest.mark.parametrize(
    "arguments",
    [
        ("recover", "--within", "nan"),
        ("recover", "--within", "inf"),
        ("conformance", "--timeout", "nan"),
        ("check-config", "--timeout", "nan"),
        ("serve", "--rate", "nan"),
        ("serve", "--rate", "inf"),
    ],
    ids=" ".join,
)
def test_option_that_is_no_number(arguments: tuple[str, ...], run: Any) -> None:
    """A command refuses it as it refuses whatever is asked for wrongly."""
    said = run(*arguments, CREDITS="sqlite:///none.db", TOKENS="0123456789abcdef=admin")
    assert said.code == 2
    assert arguments[-2] in said.err
