"""Options that several commands have, and how their texts are read."""

import importlib
import math
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer
from pydantic import SecretStr

from metered_billing.cli.failure import Failure
from metered_billing.credits.contract import Contract
from metered_billing.journal.reading import JournalReader, SqliteReader
from metered_billing.ledger.places import POSTGRES
from metered_billing.settings import SQLITE, Settings, looks_like_a_url
from metered_billing.sources import InvalidSettings

ATTENTION = 3
"""The exit code of a command that did what it was asked for, and found what somebody has to see to."""

JOURNAL = str(Settings.model_fields["journal"].default)


def _looked_for(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    """What is neither said nor in the environment is looked for where the app looks: in `.env`, and in AWS SSM."""
    if ctx.resilient_parsing or _said(ctx, param.name) != "DEFAULT":
        return value
    if param.name == "token" and _said(ctx, "credits_url") == "COMMANDLINE":
        return None  # it is for the app's credits, and not for whatever else somebody names
    settings: Settings | None = ctx.meta.get(__name__)
    if settings is None:
        try:
            settings = ctx.meta[__name__] = Settings()
        except InvalidSettings as error:
            raise Failure(f"{error}.", 2) from None
        except ImportError as error:
            raise Failure(f"{error}.") from None
    if param.name == "token":
        return None if settings.token is None else settings.token.get_secret_value()
    return settings.journal if param.name == "journal" else settings.credits


def _said(ctx: typer.Context, name: str | None) -> str:
    source = ctx.get_parameter_source(name or "")
    return "DEFAULT" if source is None else source.name


CreditsUrl = Annotated[
    str | None,
    typer.Option(
        "--credits",
        envvar="METERED_BILLING_CREDITS",
        callback=_looked_for,
        help="A running service (http://127.0.0.1:8080), a ledger that none has open (sqlite:///credits.db), or "
        "one that they share (postgresql://…).",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="METERED_BILLING_TOKEN", callback=_looked_for, help="The service's token; grants need an admin's."
    ),
]
Tenant = Annotated[str, typer.Option(help="Whose account.")]
User = Annotated[str | None, typer.Option(help="The tenant's user; without one, its shared pool.")]
AnyUser = Annotated[str | None, typer.Option(help="Only this user's; without one, all of the tenant's.")]
ContractName = Annotated[
    str | None,
    typer.Option(
        "--contract",
        metavar="MODULE:CLASS",
        help="Your own mapping, for a service of another shape; found from where you are.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the credits API has it.")]


def is_number(value: float) -> float:
    """A callback for options with bounds, which NaN is neither below nor above."""
    if math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


Journal = Annotated[
    str,
    typer.Option(
        envvar="METERED_BILLING_JOURNAL",
        callback=_looked_for,
        help="The app's journal: a directory, or postgresql://…",
    ),
]
AnyTenant = Annotated[str | None, typer.Option(help="Only this tenant's.")]
Since = Annotated[
    str | None, typer.Option(help="Only what was opened since: 30m, 24h, 7d, 2026-11-25, 2026-11-25T09:30:00Z.")
]

_AGO = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def read_since(text: str | None, *, now: float | None = None) -> float | None:
    """Seconds since the epoch.

    Raises:
        Failure: It is no time.
    """
    if text is None:
        return None
    if ago := _AGO.fullmatch(text):
        return (time.time() if now is None else now) - int(ago[1]) * _SECONDS[ago[2]]
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Failure("--since: write 30m, 24h, 7d, 2026-11-25 or 2026-11-25T09:30:00Z.", 2) from None


def load_contract(name: str | None) -> Contract | None:
    """A user's own mapping, by the name of its module and class; modules are found as `python -m` finds them.

    Raises:
        Failure: There is none.
    """
    if name is None:
        return None
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise Failure("--contract: write MODULE:CLASS, as in own_credits:OwnCredits.", 2)
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        contract = found() if isinstance(found, type) else found
    except Exception as error:
        raise Failure(f"--contract: {name} cannot be loaded: {type(error).__name__}: {error}.", 2) from None
    if not isinstance(contract, Contract):
        raise Failure(f"--contract: {name} is no Contract of metered_billing.credits.contract.", 2)
    return contract


def open_reader(place: str) -> JournalReader:
    """A journal, to be looked into.

    Raises:
        Failure: It is not a place that a journal can be kept in.
    """
    if place.startswith(POSTGRES):
        return _open_postgres(place)
    if place.startswith(SQLITE):
        place = unquote(place.removeprefix(SQLITE))
    if looks_like_a_url(place) or not place:
        raise Failure("--journal: a directory, or a sqlite:///DIRECTORY or postgresql:// URL.", 2)
    return SqliteReader(place)


def _open_postgres(url: str) -> JournalReader:
    try:
        from metered_billing.journal.reading_postgres import PostgresReader
    except ImportError as error:
        raise Failure(f"{error}.") from None
    try:
        return PostgresReader(url)
    except ValueError as error:
        raise Failure(f"--journal: {error}.", 2) from None


def secret(token: str | None) -> SecretStr | None:
    """A token that does not show in texts."""
    return None if token is None else SecretStr(token)
