"""`metered-billing conformance`: whether a service keeps the promises of the credits API, for people and machines."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.cli.options import ContractName, is_number, load_contract
from metered_billing.conformance import (
    CHECKS,
    GROUPS,
    PROMISES,
    CannotCheck,
    Outcome,
    Report,
    Result,
    Verdict,
    check_service,
    checks_of,
    promises,
    what_happens,
)

WIDTH = 100
_TOKEN = re.compile(r"[\x21-\x7e]+")


def conformance(
    url: Annotated[
        str | None,
        typer.Option(envvar="METERED_BILLING_CREDITS", help="The service: https://credits.internal"),
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="METERED_BILLING_TOKEN", help="The token that your app has.")
    ] = None,
    admin_token: Annotated[
        str | None,
        typer.Option(
            envvar="METERED_BILLING_ADMIN_TOKEN", help="Grants 100 credits to a fresh account for the checks."
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Use this tenant's account, and give all back; with an admin token: a fresh user of it."),
    ] = None,
    user: Annotated[str | None, typer.Option(help="The tenant's user; without one, its shared pool.")] = None,
    foreign_token: Annotated[
        str | None,
        typer.Option(envvar="METERED_BILLING_FOREIGN_TOKEN", help="A token of another tenant: it must not get in."),
    ] = None,
    contract: ContractName = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=60, callback=is_number, help="What one call may take, in seconds.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which promises of the credits API a service keeps, and what the library does without the others."""
    if not url or not token:
        raise Failure("Say which service, and the token that your app has: --url URL --token TOKEN.", 2)
    for secret in (token, admin_token, foreign_token):
        if secret is not None and not _TOKEN.fullmatch(secret):
            raise Failure("A token must be visible ASCII without spaces.", 2)
    mapping = load_contract(contract)
    with _progress(len(CHECKS if mapping is None else checks_of(mapping))) as advance:
        try:
            report = asyncio.run(
                check_service(
                    url,
                    token=token,
                    admin_token=admin_token,
                    tenant_id=tenant,
                    user_id=user,
                    foreign_token=foreign_token,
                    timeout_s=timeout,
                    on_start=lambda account, held: (
                        None if as_json else _announce(account, held, admin_token is not None, mapping is not None)
                    ),
                    on_result=advance,
                    contract=mapping,
                )
            )
        except CannotCheck as why:
            raise Failure(f"{why}.", 2 if why.asked_wrongly else 1) from None
    if as_json:
        holds = {f"{number}. {words}": said for number, words, said in promises(report)}
        terminal.say_json({**report.to_json(), "promises": holds, "happens": dict(what_happens(report))})
    else:
        _show(report)
    raise typer.Exit(report.exit_code)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Result], None]]:
    """A bar where errors go, as long as somebody looks at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda result: progress.update(task, advance=1, description=result.check.name)


def _announce(account: str, held: int, granted: bool, mapped: bool) -> None:
    if mapped:
        held_in_words = terminal.credits_in_words(held)
        terminal.say(f"Using, for moments, all {held_in_words} of {account}; what can be refunded is given back.")
    elif granted:
        terminal.say(f"Using {terminal.credits_in_words(held)} granted to {account}.")
    else:
        terminal.say(f"Using, for moments, all {terminal.credits_in_words(held)} of {account}; they are given back.")


def _show(report: Report) -> None:
    console = Console(width=WIDTH)
    console.print()
    console.print(_table(report))
    for result in report.broken:
        console.print()
        console.print(Text(f"{result.check.name}{' (fatal)' if result.check.fatal else ''}", style="bold red"))
        promise = result.check.promise
        lines = [("tried", result.check.tried), ("expected", result.check.expected), ("came", result.came)]
        if promise is not None:
            lines.append(("protects", f"promise {promise}, {PROMISES[promise].lower()}"))
        _print_lines(console, [*lines, ("without", result.check.without)])
    if report.not_tried:
        console.print()
        _print_lines(console, list(_not_tried(report)))
    if report.mapped or report.broken:
        _say_what_holds(console, report)
    console.print()
    console.print(Text(terminal.clean(_verdict(report)), style=_STYLES[report.verdict]), soft_wrap=True)
    if report.kept is None:
        terminal.say(f"What {report.account} holds now is not known: the service does not say.")
    elif report.kept > 0:
        terminal.say(f"{terminal.credits_in_words(report.kept)} of {report.account} could not be given back.")
    elif report.kept < 0:
        terminal.say(f"{report.account} holds {terminal.credits_in_words(-report.kept)} more than before.")


_STYLES = {
    Verdict.CONFORMANT: "bold green",
    Verdict.LIMITED: "bold yellow",
    Verdict.UNKNOWN: "bold red",
    Verdict.UNUSABLE: "bold red",
}


def _not_tried(report: Report) -> Iterator[tuple[str, str]]:
    """Each with its reason; what one reason cut off, together."""
    cut_off: dict[str, list[str]] = {}
    for result in report.not_tried:
        if result.prevented:
            cut_off.setdefault(result.came, []).append(result.check.name)
        else:
            yield f"{result.check.name}:", f"not tried: {result.came}"
    for came, names in cut_off.items():
        yield f"{len(names)} checks:", f"not tried, because {came}: {', '.join(names)}"


def _table(report: Report) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("checks")
    for column in (Outcome.HELD, Outcome.BROKEN, Outcome.NOT_TRIED):
        table.add_column(str(column), justify="right")
    for group, title in GROUPS.items():
        outcomes = [result.outcome for result in report.results if result.check.group == group]
        if not outcomes and report.mapped:
            continue  # only the credits API itself has these
        table.add_row(title, *(str(outcomes.count(outcome) or "") for outcome in Outcome))
    return table


def _say_what_holds(console: Console, report: Report) -> None:
    """What all of it comes to."""
    happens = list(what_happens(report))
    if happens and report.verdict is not Verdict.UNUSABLE:
        console.print()
        console.print(Text("What happens with this service", style="bold"))
        _print_lines(console, happens)
    console.print()
    console.print(Text("What the library promises with it", style="bold"))
    _print_lines(console, [(f"{number}. {words}", holds) for number, words, holds in promises(report)])


def _print_lines(console: Console, lines: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in lines:
        table.add_row(Text(name), Text(terminal.clean(said)))
    console.print(table)


def _verdict(report: Report) -> str:
    untried = len(report.not_tried)
    but = f" {untried} could not be tried." if untried else ""
    if report.verdict is Verdict.UNUSABLE:
        fatal = [result.check.name for result in report.broken if result.check.fatal]
        return f"Not usable: {', '.join(fatal)}.{but}"
    if report.verdict is Verdict.UNKNOWN:
        return (
            f"Not known: {len(report.prevented)} of {len(report.results)} checks should have been tried, and were not."
        )
    if report.verdict is Verdict.LIMITED:
        return f"Usable with limits: {', '.join(result.check.name for result in report.broken)}.{but}"
    return f"Conformant: {len(report.results) - untried} of {len(report.results)} promises hold.{but}"
