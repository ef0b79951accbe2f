"""The commands: what each takes, does and prints."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from metered_billing.charge import MAX_AMOUNT
from metered_billing.cli import charges, terminal, tokens
from metered_billing.cli.backup import backup
from metered_billing.cli.check_config import check_config
from metered_billing.cli.conformance import conformance
from metered_billing.cli.failure import Failure
from metered_billing.cli.migrate import migrate
from metered_billing.cli.monitoring import monitoring
from metered_billing.cli.options import AnyUser, AsJson, CreditsUrl, Tenant, Token, User
from metered_billing.cli.reconcile import reconcile
from metered_billing.cli.recover import recover
from metered_billing.cli.serving import bounded_http
from metered_billing.cli.source import Document, Source, open_source
from metered_billing.cli.telemetry import Exports, Server
from metered_billing.ledger import Grant, Ledger, LedgerError
from metered_billing.ledger.store import MAX_PAGE
from metered_billing.runtime import new_uuid7
from metered_billing.service import InvalidTokens, create_app, open_tokens
from metered_billing.service.limits import MAX_CALLS, Load
from metered_billing.telemetry import Telemetry

_NO_SERVICE = "That is an answer, but not a credits service's."

GRACE_S = 10
"""How long a stopping service waits for its last answers to go out."""

app = typer.Typer(
    help="Credits, prepaid: a service that keeps them, and a look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(charges.app, name="charges")
app.add_typer(tokens.app, name="token")
app.command()(charges.explain)
app.command()(migrate)
app.command()(backup)
app.command()(conformance)
app.command()(check_config)
app.command()(recover)
app.command()(reconcile)
app.command()(monitoring)


@app.command()
def serve(
    database: Annotated[
        str, typer.Option(help="sqlite:///relative.db, sqlite:////absolute.db, or postgresql://user@host:port/database")
    ] = ("sqlite:///credits.db"),
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    tokens_file: Annotated[
        Path | None, typer.Option(help="A token a line, as `token new` makes them. Else METERED_BILLING_TOKENS.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="The most calls a second with one token, a batch being one; else unbounded.")
    ] = None,
    max_calls: Annotated[int, typer.Option(min=1, help="The most calls at the same time, of all tokens.")] = MAX_CALLS,
) -> None:
    """Run the credits service over a ledger. Stop it with Ctrl-C."""
    try:
        known = open_tokens(tokens_file)
        ledger = Ledger(database, committed=Telemetry().committed("ledger"))
    except InvalidTokens as error:
        raise Failure(f"{error}.", 2) from None
    except ValueError as error:
        raise Failure(f"--database: {error}.", 2) from None
    except ImportError as error:
        raise Failure(f"{error}.") from None
    try:
        service = create_app(ledger, known, max_calls_per_s=rate, load=Load(max_calls))
    except ValueError as error:
        raise Failure(f"--rate: {error}.", 2) from None
    exports = Exports()
    exports.set_up()
    config = uvicorn.Config(
        service,
        host=host,
        port=port,
        http=bounded_http(),
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
    )
    with (
        contextlib.suppress(KeyboardInterrupt),  # uvicorn has finished its work before it raises this
        asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,  # uvloop's, where it is installed
    ):
        runner.run(_serve(Server(config, exports), ledger))


async def _serve(server: uvicorn.Server, ledger: Ledger) -> None:
    try:
        # Before uvicorn does, so that a ledger in use is a sentence and not a traceback.
        await ledger.start()
    except LedgerError as error:
        raise Failure(f"{error}.") from None
    try:
        await server.serve()
    except SystemExit:  # uvicorn has said why
        raise Failure("The service did not start.") from None
    finally:
        await ledger.close()


@app.command()
def grant(
    amount: Annotated[int, typer.Argument(min=1, max=MAX_AMOUNT, help="Whole credits.")],
    tenant: Tenant,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the ledger.")],
    user: User = None,
    key: Annotated[
        str | None, typer.Option(help="The same key grants once. Without it, each run is a new grant.")
    ] = None,
    credits_url: CreditsUrl = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Put credits into an account."""
    # Not `or`: an empty key comes of a variable that is not set, and would grant each time.
    own_key = f"cli-{new_uuid7()}" if key is None else key
    try:
        command = Grant(idempotency_key=own_key, tenant_id=tenant, user_id=user, amount=amount, reason=reason)
    except ValueError as error:
        raise Failure(f"{error}.", 2) from None
    try:
        answer = _ask(
            credits_url,
            token,
            lambda source: source.grant(command),
            amount=int,
            balance=int,
        )
    except Failure as failure:
        if not failure.in_doubt:
            raise
        raise Failure(f"{failure} If in doubt, repeat it with --key {own_key}: that grants once.") from None
    if as_json:
        terminal.say_json(answer)
    else:
        held = terminal.credits_in_words(answer["balance"])
        granted = terminal.credits_in_words(answer["amount"])
        terminal.say(f"{terminal.account(tenant, user)}: {granted} granted, {held} now")


@app.command()
def balance(
    tenant: Tenant,
    user: User = None,
    credits_url: CreditsUrl = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Say what an account holds."""
    answer = _ask(credits_url, token, lambda source: source.balance(tenant, user), balance=int)
    if as_json:
        terminal.say_json(answer)
    else:
        held = terminal.credits_in_words(answer["balance"])
        terminal.say(f"{terminal.account(tenant, user)}: {held}")


@app.command()
def transactions(
    tenant: Tenant,
    user: AnyUser = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_PAGE)] = 50,
    credits_url: CreditsUrl = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List what moved, newest first, with the refunds below their deductions."""
    page = _ask(credits_url, token, lambda source: source.transactions(tenant, user, limit), items=list)
    if not all(isinstance(entry, dict) and entry.keys() >= terminal.SHOWN for entry in page["items"]):
        raise Failure(_NO_SERVICE)
    if as_json:
        terminal.say_json(page)
    elif page["items"]:
        terminal.show_transactions(page["items"], more=page.get("next_cursor") is not None)
    else:
        terminal.say(f"{tenant}: no transactions")


def _ask(
    url: str | None, token: str | None, question: Callable[[Source], Awaitable[Document]], **members: type
) -> Document:
    """Put the question where the credits are; the answer has at least these members, of these types."""
    if not url:
        raise Failure("Say where the credits are: --credits URL, or METERED_BILLING_CREDITS.", 2)

    async def ask() -> Document:
        async with open_source(url, token) as source:
            return await question(source)

    answer = asyncio.run(ask())
    if not all(isinstance(answer.get(name), kind) for name, kind in members.items()):
        raise Failure(_NO_SERVICE)
    return answer
