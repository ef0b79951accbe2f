"""Settings: what was not given in code is looked for elsewhere, and becomes a client and a journal here."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import unquote

from pydantic import Field, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from metered_billing.credits import Credits
from metered_billing.credits.contract import Contract
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.sql import SqlCredits
from metered_billing.credits.token import RotatingToken, TokenSource, TokenUnreadable, checked_token
from metered_billing.journal import Journal
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger.places import POSTGRES
from metered_billing.runtime import Runtime
from metered_billing.sources import (
    CODE,
    DEFAULT,
    PREFIX,
    SSM,
    Found,
    InvalidSettings,
    from_environment,
    from_file,
    from_ssm,
)
from metered_billing.ssm import Parameters, ParametersUnreadable
from metered_billing.telemetry import Telemetry

SQLITE = "sqlite:///"

IN_SSM = frozenset({"credits", "token", "journal"})

_ABSENT: Any = object()


def _settle_where_we_are() -> Literal["background", "inline"]:
    """On AWS Lambda nothing may be left for later, as a process is frozen between requests."""
    return "inline" if "AWS_LAMBDA_FUNCTION_NAME" in os.environ else "background"


class Settings(BaseSettings):
    """What the middleware needs to know.

    Each is looked for in this order: given here, the environment (`METERED_BILLING_<NAME>`), the file `.env` in the
    working directory, AWS SSM Parameter Store under `ssm_prefix`, the default. SSM is asked only where something is
    not found before; that blocks, for some seconds at the most.

    Attributes:
        credits: Where credits are kept: `http(s)://…`, `sqlite:///credits.db` for a ledger in this process, or
            `postgresql://…` for one that several processes share.
        token: The credits service's bearer token.
        journal: The directory of the journal (a path, or `sqlite:///DIRECTORY`), or `postgresql://…`.
        settle: When refunds and voids go out: in the "background", or "inline", before the request is over;
            the latter by itself on AWS Lambda.
        ssm_prefix: Where in SSM: `/metered-billing/prod` has the parameters `/metered-billing/prod/token` and so on.

    Raises:
        InvalidSettings: One cannot be right or cannot be read, or a name is no setting.
        ImportError: SSM, without `metered-billing[ssm]`.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    # Those of PostgreSQL may have a password.
    credits: str | None = Field(default=None, repr=False)
    token: SecretStr | None = None
    journal: str = Field(default="metered-billing-journal", repr=False)
    settle: Literal["background", "inline"] = Field(default_factory=_settle_where_we_are)
    ssm_prefix: str | None = None

    _found: Mapping[str, Found] = PrivateAttr(default_factory=dict)
    _parameters: Parameters | None = PrivateAttr(default=None)

    def __init__(
        self,
        *,
        credits: str | None = _ABSENT,  # noqa: A002 - the field's word
        token: SecretStr | None = _ABSENT,
        journal: str = _ABSENT,
        settle: Literal["background", "inline"] = _ABSENT,
        ssm_prefix: str | None = _ABSENT,
        _env_file: str | Path | None = ".env",
    ) -> None:
        values = (credits, token, journal, settle, ssm_prefix)
        settings = ("credits", "token", "journal", "settle", "ssm_prefix")
        given = zip(settings, values, strict=True)
        found = {name: Found(value, CODE, name) for name, value in given if value is not _ABSENT}
        variables = from_environment(settings, os.environ)
        file = {} if _env_file is None else from_file(settings, Path(_env_file))
        found = {**file, **variables, **found}
        parameters = None
        if "ssm_prefix" in found and found["ssm_prefix"].value is not None and not found.keys() >= IN_SSM:
            parameters = _parameters_at(found["ssm_prefix"])
            found = {**from_ssm(sorted(IN_SSM), parameters, found["ssm_prefix"].name), **found}
        try:
            super().__init__(**{name: each.value for name, each in found.items()})
        except ValidationError as error:
            # Not pydantic's own text, nor its cause: both may show the value.
            wrong = [(found[str(each["loc"][0])].name, each["msg"]) for each in error.errors(include_input=False)]
            raise InvalidSettings("; ".join(f"{name}: {why.lower()}" for name, why in wrong)) from None
        self._found = found
        self._parameters = parameters

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """None of pydantic's: they do not say which of them a value is from."""
        return (init_settings,)

    @property
    def sources(self) -> Mapping[str, str]:
        """Where each setting is from: `code`, `environment`, `.env`, `SSM` or `default`."""
        return {name: self._found[name].source if name in self._found else DEFAULT for name in type(self).model_fields}

    def token_source(
        self, runtime: Runtime | None = None, telemetry: Telemetry | None = None
    ) -> SecretStr | TokenSource | None:
        """The token, for an `HttpCredits`: where it is from SSM, it is read there again and again."""
        if self.sources["token"] != SSM or self._parameters is None:
            return self.token
        parameters = self._parameters

        def read() -> str | None:
            try:
                return parameters.read().get("token")
            except ParametersUnreadable as error:
                raise TokenUnreadable(str(error)) from None

        return RotatingToken(read, held=self.token, runtime=runtime, telemetry=telemetry)

    def open_credits(
        self,
        given: str | Credits | None,
        runtime: Runtime,
        telemetry: Telemetry,
        *,
        asked_by: str = "metered-billing",
    ) -> Credits:
        """The client that is given; or one for the URL that is given, or else was found, with the token that was found.

        Raises:
            ValueError, ImportError: As `open_credits`, and where there is none; `InvalidSettings` where it is not what
                was given that is wrong.
        """
        if given is not None and not isinstance(given, str):
            _is_client(given)
            return given
        if given is None and self.credits is None:
            raise ValueError(
                f"{asked_by} does not know where credits are kept: give it credits=…, or set METERED_BILLING_CREDITS"
                " (sqlite:///credits.db needs no service)"
            )
        with self._naming("token"):
            token = self.token_source(runtime, telemetry)
            checked_token(self.token)
        if given is not None:
            return open_credits(given, token, runtime, telemetry)
        with self._naming("credits"):
            return open_credits(self.credits or "", token, runtime, telemetry)

    def open_journal(self, given: str | Path | Journal | None, runtime: Runtime, telemetry: Telemetry) -> Journal:
        """The journal that is given; or the one at the place that is given, or else was found.

        Raises:
            ValueError, ImportError: Likewise.
        """
        if isinstance(given, str | Path):
            return open_journal(given, runtime, telemetry)
        if given is not None:
            return given
        with self._naming("journal"):
            return open_journal(self.journal, runtime, telemetry)

    @contextmanager
    def _naming(self, setting: str) -> Iterator[None]:
        """Say which setting it is, and from where, that something inside cannot do with."""
        try:
            yield
        except InvalidSettings:
            raise
        except ValueError as error:
            name = self._found[setting].name if setting in self._found else setting
            raise InvalidSettings(f"{name}: {error}") from None


def _parameters_at(prefix: Found) -> Parameters:
    try:
        return Parameters(str(prefix.value))
    except ValueError as error:
        raise InvalidSettings(f"{prefix.name}: {error}") from None


def open_credits(
    url: str,
    token: SecretStr | TokenSource | None,
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


def _is_client(given: object) -> None:
    if isinstance(given, type) or not callable(getattr(given, "deduct", None)):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        mapping = isinstance(given, Contract) or (isinstance(given, type) and issubclass(given, Contract))
        raise ValueError(
            f"credits must be a URL, or a client such as HttpCredits(…); this is {what}"
            + (": a mapping goes into HttpCredits(url, contract=…)" if mapping else "")
        )


def _kind(url: str) -> str:
    # Only the scheme: the rest may hold a password.
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
    return f"a {scheme[0]}:// URL" if scheme else "no URL"
