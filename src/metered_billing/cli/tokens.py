"""`metered-billing token`: the service's tokens, made, listed and revoked in a file that holds digests alone."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.cli.options import AsJson
from metered_billing.service.token_file import add_line, remove_token
from metered_billing.service.tokens import SCOPES, InvalidTokens, Token, Tokens, has_expired, moment, new_token

SOON_S = 14 * 86_400
"""A token with less left than this is to be rotated."""

app = typer.Typer(
    help="The service's tokens: make, list, revoke.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Option(help="The file that the service was given with --tokens-file.")]


@app.command()
def new(
    scope: Annotated[str, typer.Option(help=f"What it opens: {SCOPES}.")],
    expires: Annotated[
        str | None, typer.Option(help="When it opens nothing any more: 2027-01-01, or 2027-01-01T09:30:00Z.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Add it to this file, which the service reads; made where there is none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. Its secret goes to stdout, this once: it is kept nowhere."""
    try:
        secret, token, line = new_token(scope, expires)
    except ValueError as error:
        raise Failure(f"{error}.", 2) from None
    if token.expires_at is not None and has_expired(token, time.time()):
        raise Failure("--expires: that has been.", 2)
    if file is not None:
        try:
            add_line(file, line)
        except InvalidTokens as error:
            raise Failure(f"{error}.") from None
    if as_json:
        terminal.say_json({**_document(token), "secret": secret, "line": line})
        return
    terminal.say(secret)
    if file is None:
        terminal.note(f"token {token.id}. The service knows it by this line in its --tokens-file: {line}")
    else:
        terminal.note(f"token {token.id} is in {file}; the service reads it within a second")


@app.command("list")
def list_(file: File, as_json: AsJson = False) -> None:
    """List the tokens in a file, without their secrets."""
    try:
        tokens = list(Tokens.read(file))
    except InvalidTokens as error:
        raise Failure(f"{error}.") from None
    if as_json:
        terminal.say_json([_document(token) for token in tokens])
    elif not tokens:
        terminal.say("no tokens")
    else:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("token", "scope", "expires (UTC)", "kept as", "now"):
            table.add_column(column, no_wrap=True)
        for token in tokens:
            kept = "plain secret" if token.plain else "digest"
            cells = (token.id, token.scope, _expires(token) or "never", kept, _state(token))
            table.add_row(*(Text(terminal.clean(cell)) for cell in cells))
        terminal.show(table)


@app.command()
def revoke(
    token: Annotated[str, typer.Argument(help="Its id, as `token list` has it.")],
    file: File,
) -> None:
    """Take a token out of a file: from a second later on it opens nothing."""
    try:
        revoked = remove_token(file, token)
    except InvalidTokens as error:
        raise Failure(f"{error}.") from None
    terminal.say(f"token {revoked.id} ({revoked.scope}) is out of {file}; the service lets it in for a second at most")


def _expires(token: Token) -> str | None:
    return None if token.expires_at is None else moment(token.expires_at)


def _state(token: Token) -> str:
    now = time.time()
    if has_expired(token, now):
        return "expired"
    return "expires soon" if token.expires_at is not None and token.expires_at < now + SOON_S else "valid"


def _document(token: Token) -> dict[str, object]:
    return {
        "id": token.id,
        "scope": token.scope,
        "expires": _expires(token),
        "state": _state(token),
        "plain": token.plain,
    }
