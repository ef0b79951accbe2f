"""Settings: what was not given in code comes from the environment, and becomes a client and a journal here."""

import re
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from metered_billing.credits import Credits
from metered_billing.credits.contract import Contract
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.sql import SqlCredits
from metered_billing.journal import Journal
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger.places import POSTGRES
from metered_billing.runtime import Runtime
from metered_billing.telemetry import Telemetry

SQLITE = "sqlite:///"


class Settings(BaseSettings):
    """What the middleware needs to know, each from `METERED_BILLING_<NAME>` where it is not given.

    Attributes:
        credits: Where credits are kept: `http(s)://…`, `sqlite:///credits.db` for a ledger in this process, or
            `postgresql://…` for one that several processes share.
        token: The credits service's bearer token.
        journal: The directory of the journal (a path, or `sqlite:///DIRECTORY`), or `postgresql://…`.
        settle: When refunds and voids go out: in the "background", or "inline", before the request is over.
    """

    model_config = SettingsConfigDict(env_prefix="METERED_BILLING_", extra="ignore", frozen=True)

    credits: str | None = None
    token: SecretStr | None = None
    journal: str = "metered-billing-journal"
    settle: Literal["background", "inline"] = "background"


def open_credits(
    url: str,
    token: SecretStr | None,
    runtime: Runtime,
    telemetry: Telemetry,
    *,
    contract: Contract | None = None,
) -> Credits:
    """The client that a URL asks for; nothing is connected yet.

    Args:
        contract: For a service of another shape, over HTTP.

    Raises:
        ValueError: It is not a URL that credits can be had from.
        ImportError: PostgreSQL, without `metered-billing[postgres]`.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return HttpCredits(url, token=token, contract=contract, runtime=runtime, telemetry=telemetry)
    if contract is not None:
        raise ValueError("a contract is for credits at an http(s):// URL")
    if url.startswith((SQLITE, *POSTGRES)):
        return SqlCredits(url, runtime=runtime, telemetry=telemetry)
    raise ValueError(
        "credits must be an http(s)://, sqlite:/// or postgresql:// URL, or a client such as HttpCredits; "
        f"this is {_kind(url)}"
    )


def open_journal(place: str | Path, runtime: Runtime, telemetry: Telemetry) -> Journal:
    """The journal that a path or URL asks for; nothing is opened yet.

    Raises:
        ValueError: It is not a place that a journal can be kept in.
        ImportError: PostgreSQL, without `metered-billing[postgres]`.
    """
    if isinstance(place, Path):
        return SqliteJournal(place, runtime=runtime, telemetry=telemetry)
    if place.startswith(SQLITE):
        return SqliteJournal(unquote(place.removeprefix(SQLITE)), runtime=runtime, telemetry=telemetry)
    if place.startswith(POSTGRES):
        # Only here: it needs a driver that apps with a directory need not have.
        from metered_billing.journal.postgres import PostgresJournal

        return PostgresJournal(place, runtime=runtime, telemetry=telemetry)
    if looks_like_a_url(place) or not place:
        raise ValueError(
            f"journal must be a directory, or a sqlite:///DIRECTORY or postgresql:// URL; this is {_kind(place)}"
        )
    return SqliteJournal(place, runtime=runtime, telemetry=telemetry)


def looks_like_a_url(place: str) -> bool:
    """Whether it was meant for one: with a slash too few it is no directory, and may hold a password."""
    return "://" in place or place.lower().startswith(("postgres:", "postgresql:", "sqlite:", "http:", "https:"))


def _kind(url: str) -> str:
    # Only the scheme: the rest may hold a password.
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
    return f"a {scheme[0]}:// URL" if scheme else "no URL"
