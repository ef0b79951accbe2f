"""`metered-billing check-config`: what is set, from where, and whether it works. It changes and moves nothing."""

import asyncio
import email.utils
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import httpx
import typer
from rich.table import Table
from rich.text import Text

from metered_billing.charge import Account
from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.cli.options import ContractName, is_number, load_contract, open_reader
from metered_billing.commits import ConnectionLost
from metered_billing.credits.contract import Contract, Reply, read_json
from metered_billing.credits.http import HttpCredits
from metered_billing.credits.token import checked_header
from metered_billing.journal import JournalError
from metered_billing.ledger.places import POSTGRES, sqlite_path
from metered_billing.runtime import Runtime
from metered_billing.schemas import Schema
from metered_billing.settings import SQLITE, Settings
from metered_billing.sources import InvalidSettings
from metered_billing.telemetry import Telemetry

NOBODY = "metered-billing-check-config"
"""A tenant that nobody has: only its balance is asked for."""

SKEW_S = 60.0
"""How far the service's clock may be from ours without a word."""

_SECRET = "a secret"  # noqa: S105 - what is shown instead of one

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Result(StrEnum):
    """Of a check."""

    OK = "ok"
    LOOK = "look"
    WRONG = "wrong"


_STYLES = {Result.OK: "green", Result.LOOK: "bold yellow", Result.WRONG: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what came of it, and what to do where that is not well."""

    what: str
    result: Result
    said: str
    do: str = ""


def check_config(
    timeout: Annotated[
        float, typer.Option(min=0.1, max=60, callback=is_number, help="What one look may take, in seconds.")
    ] = 5.0,
    contract: ContractName = None,
    as_json: AsJson = False,
) -> None:
    """Say what is set, from where, and whether credits, token and journal work. For the app's own environment."""
    mapping = load_contract(contract)
    try:
        settings = Settings()
    except (InvalidSettings, ImportError) as error:
        _say([], [Check("settings", Result.WRONG, f"{error}")], as_json=as_json)
        raise typer.Exit(1) from None
    checks = [*_credits(settings, mapping, timeout), *_journal(settings)]
    _say(_settings(settings), checks, as_json=as_json)
    if any(check.result is Result.WRONG for check in checks):
        raise typer.Exit(1)


# What is set.


def _settings(settings: Settings) -> list[dict[str, Any]]:
    """Each with its value, as far as that may be shown, and its source."""
    return [
        {"setting": name, "value": _shown(name, getattr(settings, name)), "from": source}
        for name, source in settings.sources.items()
    ]


def _shown(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if name == "token":
        return f"{_SECRET} of {len(value.get_secret_value())} characters"
    text = str(value)
    if text.startswith(POSTGRES):
        return _without_password(text)
    # Nobody knows what stands in a URL that is none.
    plain = text.startswith((SQLITE, "http://", "https://")) or ":" not in text
    return text if plain and "@" not in text else _SECRET


def _without_password(url: str) -> str:
    try:
        from metered_billing.postgres import _parameters, place

        return place(_parameters(url))
    except (ImportError, ValueError):
        return _SECRET


# Credits and token.


def _credits(settings: Settings, contract: Contract | None, timeout_s: float) -> Iterator[Check]:
    if settings.credits is None:
        yield Check(
            "credits",
            Result.LOOK,
            "not set: then the app must say in code where they are, and it is not tried here",
            "set METERED_BILLING_CREDITS, or say credits=… in code",
        )
        return
    try:
        client = settings.open_credits(None, Runtime(), Telemetry())
    except (ValueError, ImportError, OSError) as error:
        yield Check("settings", Result.WRONG, str(error))
        return
    if isinstance(client, HttpCredits):
        yield from asyncio.run(_ask(client.realm, settings, contract or Contract(), timeout_s))
    elif settings.credits.startswith(POSTGRES):
        yield _tables("credits", settings.credits)
    else:
        yield _ledger(sqlite_path(settings.credits))


async def _ask(url: str, settings: Settings, contract: Contract, timeout_s: float) -> list[Check]:
    token = None if settings.token is None else settings.token.get_secret_value()
    headers = {}
    if token is not None:
        name, scheme = checked_header(contract.auth_header, contract.auth_scheme)
        headers[name.decode()] = scheme.decode() + token
    tls = httpx.create_ssl_context(verify=url.startswith("https:"))
    client = httpx.AsyncClient(base_url=url, timeout=timeout_s, trust_env=False, verify=tls)
    async with client:
        try:
            # The whole of it: httpx's own limit is for each read.
            async with asyncio.timeout(timeout_s):
                answer = await client.get("/healthz")
        except (httpx.HTTPError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            return [
                Check(
                    "credits", Result.WRONG, f"{url} cannot be reached: {why}", "start the service, or correct its URL"
                )
            ]
        checks = [_health(url, answer, mapped=type(contract) is not Contract), *_clock(answer)]
        try:
            call = contract.balance(Account(NOBODY))
        except Exception as error:
            return [*checks, _mapping_raised(error)]
        try:
            async with asyncio.timeout(timeout_s):
                answer = await client.request(
                    call.method,
                    call.path,
                    params=dict(call.params or {}),
                    headers={**(call.headers or {}), **headers},
                    json=call.body,
                )
        except (httpx.HTTPError, TimeoutError) as error:
            return [
                *checks,
                Check("token", Result.WRONG, f"it could not be tried: {str(error) or type(error).__name__}"),
            ]
    return [*checks, _token(token, contract, Reply(answer.status_code, answer.headers, read_json(answer.content)))]


def _health(url: str, answer: httpx.Response, *, mapped: bool = False) -> Check:
    if answer.is_success or (mapped and not answer.is_server_error):  # of another shape: it need not have that path
        return Check("credits", Result.OK, f"{url} answers")
    if answer.is_server_error:
        return Check("credits", Result.WRONG, f"{url} answers {answer.status_code}", "look at the service")
    said = f"{url} answers, but not to /healthz ({answer.status_code})"
    return Check("credits", Result.LOOK, said, "is it the service's URL, without /v1?")


def _clock(answer: httpx.Response) -> Iterator[Check]:
    with suppress(KeyError, ValueError, TypeError):
        skew_s = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
        if abs(skew_s) > SKEW_S:
            yield Check("clock", Result.LOOK, f"the service's is {skew_s:+.0f} s from this one", "set the clocks right")


def _token(token: str | None, contract: Contract, reply: Reply) -> Check:
    where = "METERED_BILLING_TOKEN, or the parameter token in SSM"
    if reply.status == 401:
        said = "none is set, and the service wants one" if token is None else "the service does not accept it (401)"
        return Check("token", Result.WRONG, said, f"set the right one: {where}")
    sent = "none is needed" if token is None else "accepted"
    try:
        balance = contract.read_balance(reply)
    except Exception as error:
        return _mapping_raised(error)
    if balance is not None:
        return Check("token", Result.OK, f"{sent}, and sees every tenant")
    if reply.status == 403 and reply.problem is not None:
        return Check("token", Result.OK, f"{sent}, and does not see every tenant")
    said = f"not known: the service answers {reply} when it is asked for the balance of a tenant that nobody has"
    if type(contract) is not Contract:
        return Check("token", Result.LOOK, said, "try it on an account: metered-billing conformance --contract")
    wrong = "correct its URL, which goes without /v1, or name the app's mapping with --contract"
    return Check("token", Result.LOOK, said, wrong if reply.status == 404 else "")


def _mapping_raised(error: Exception) -> Check:
    return Check("token", Result.LOOK, f"not known: the mapping raised {type(error).__name__}: {error}", "mend it")


def _ledger(file: Path) -> Check:
    # Not opened: it has one owner, who may be at work.
    if not file.exists():
        return _to_be_made("credits", "the ledger", file)
    if os.access(file, os.R_OK | os.W_OK) and os.access(file.parent, os.W_OK | os.X_OK):
        return Check("credits", Result.OK, f"the ledger {file} may be written")
    return Check("credits", Result.WRONG, f"the ledger {file} may not be written", "give the app's user the right to")


# The journal.


def _journal(settings: Settings) -> Iterator[Check]:
    try:
        settings.open_journal(None, Runtime(), Telemetry())
    except (ValueError, ImportError) as error:
        yield Check("settings", Result.WRONG, str(error))
        return
    if settings.journal.startswith(POSTGRES):
        yield (tables := _tables("journal", settings.journal))
        if tables.result is Result.OK and (settings.credits or "").startswith(("http://", "https://")):
            yield from _ledger_beside(settings.journal)
        return
    directory = Path(unquote(settings.journal.removeprefix(SQLITE)))
    if not directory.exists():
        yield _to_be_made("journal", "the directory", directory)
    elif not directory.is_dir():
        yield Check("journal", Result.WRONG, f"{directory} is no directory", "name another, or remove it")
    elif not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        yield Check("journal", Result.WRONG, f"{directory} may not be written", "give the app's user the right to")
    else:
        yield Check("journal", Result.OK, f"the directory {directory} may be written")
        with _failures() as found, open_reader(settings.journal) as reader:
            found += [Check("journal", Result.LOOK, f"{name}: {why}") for name, why in reader.unusable.items()]
        yield from found


def _ledger_beside(url: str) -> Iterator[Check]:
    """What the app's role may do to a service's ledger, which the schema is shared with by mistake."""
    from metered_billing.postgres import DatabaseError, may_insert

    with suppress(ConnectionLost, DatabaseError):  # it was reached just now
        if may_insert(url, "entries"):
            yield Check(
                "journal",
                Result.LOOK,
                "a ledger is in the same database, and this role may write to it: the app can give anybody credits",
                "give the journal a database of its own",
            )


@contextmanager
def _failures() -> Iterator[list[Check]]:
    found: list[Check] = []
    try:
        yield found
    except (JournalError, Failure) as error:
        found.append(Check("journal", Result.WRONG, str(error)))


def _to_be_made(what: str, thing: str, path: Path) -> Check:
    above = next(each for each in path.absolute().parents if each.exists())
    # A ledger's directory is not made for it.
    if os.access(above, os.W_OK | os.X_OK) and (what == "journal" or above == path.absolute().parent):
        return Check(what, Result.OK, f"{thing} {path} is not there yet, and will be made")
    return Check(
        what, Result.WRONG, f"{thing} {path} is not there, and cannot be made in {above}", "make it, or name another"
    )


def _tables(what: str, url: str) -> Check:
    """A database: reached, and of which version."""
    from metered_billing.postgres import DatabaseError, first_line, version_of

    schema, shown = _schema(what), _without_password(url)
    try:
        found = version_of(url, schema)
    except ConnectionLost as error:
        return Check(what, Result.WRONG, str(error), "start the database, or correct the URL")
    except DatabaseError as error:
        return Check(what, Result.WRONG, f"{shown}: {first_line(error)}")
    if found is None:
        say = f"{shown} shows this role no tables for the {schema.what}, and this role may not make them"
        do = "run `metered-billing migrate` with a role that may, and grant this one its rights on them"
        return Check(what, Result.WRONG, say, do)
    if found == 0:
        return Check(what, Result.OK, f"{shown} is reached; the {schema.what}'s tables will be made")
    if found == schema.version:
        return Check(what, Result.OK, f"{shown} is reached; the {schema.what}'s tables are of version {found}")
    do = "run `metered-billing migrate`" if found < schema.version else "upgrade metered-billing here"
    say = f"{shown}: the {schema.what}'s tables are of version {found}, this release needs {schema.version}"
    return Check(what, Result.WRONG, say, do)


def _schema(what: str) -> Schema:
    # Only here: both need the driver.
    if what == "credits":
        from metered_billing.ledger.postgres_books import SCHEMA as LEDGER

        return LEDGER
    from metered_billing.journal.postgres import SCHEMA as JOURNAL

    return JOURNAL


# What people see.


def _say(settings: list[dict[str, Any]], checks: list[Check], *, as_json: bool) -> None:
    well = not any(check.result is Result.WRONG for check in checks)
    if as_json:
        shown = [{"what": each.what, "result": each.result, "said": each.said, "do": each.do} for each in checks]
        terminal.say_json({"ok": well, "settings": settings, "checks": shown})
        return
    if settings:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("setting", "from", "value"):
            table.add_column(column, overflow="fold")
        for each in settings:
            cells = (each["setting"], each["from"], each["value"] or "not set")
            table.add_row(*(Text(terminal.clean(cell)) for cell in cells))
        terminal.show(table)
        terminal.say("")
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        said = check.said + (f". To do: {check.do}" if check.do and check.result is not Result.OK else "")
        cells = (Text(check.result, style=_STYLES[check.result]), Text(check.what), Text(terminal.clean(said)))
        table.add_row(*cells)
    terminal.show(table)
