"""`charges` and `explain`: what stands in the journal."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from metered_billing.charge import Record, State
from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure
from metered_billing.cli.lookup import Looked, look_up
from metered_billing.cli.options import (
    ATTENTION,
    JOURNAL,
    AnyTenant,
    AnyUser,
    ContractName,
    CreditsUrl,
    Journal,
    Since,
    Token,
    load_contract,
    open_reader,
    read_since,
)
from metered_billing.explain import Story, as_document, moment, name_of, story_of
from metered_billing.journal import JournalError, NoJournal
from metered_billing.journal.reading import JournalReader, Seen, Wanted

TOLD = 100
"""How many charges of one request id are told."""

app = typer.Typer(help="The charges that stand in an app's journal.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_STYLES = {State.DISPUTED: "bold red", State.SETTLED: "", State.REFUNDING: "cyan", State.VOIDING: "magenta"}


@app.command(name="list")
def list_charges(
    state: Annotated[list[State] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    tenant: AnyTenant = None,
    user: AnyUser = None,
    request_id: Annotated[str | None, typer.Option(help="Only of this request.")] = None,
    unsettled: Annotated[bool, typer.Option("--unsettled", help="Only those that are not final.")] = False,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 50,
    journal: Journal = JOURNAL,
    as_json: AsJson = False,
) -> None:
    """List charges, newest first."""
    wanted = Wanted(
        name=request_id,
        states=frozenset(state) if state else None,
        unsettled=unsettled,
        tenant_id=tenant,
        user_id=user,
        since=read_since(since),
    )
    now = time.time()
    with looking_into(journal) as reader:
        charges: list[Seen] = []
        more = worrying = False
        # All that matches is judged, however much of it is shown.
        for seen in reader.charges(wanted):
            worrying = worrying or bool(seen.worry(now))
            more = len(charges) == limit
            if not more:
                charges.append(seen)
            elif worrying:
                break
        if as_json:
            terminal.say_json({"items": [_document(seen, now) for seen in charges], "more": more})
        elif charges:
            _show(charges, now, more=more)
        else:
            terminal.say("no such charges" if wanted != Wanted() else "no charges")
        unusable = complain_of(reader)
    if unusable or worrying:
        raise typer.Exit(ATTENTION)


@app.command()
def show(
    charge_id: Annotated[str, typer.Argument(help="Its id.")],
    journal: Journal = JOURNAL,
    as_json: AsJson = False,
) -> None:
    """Show one charge as it stands in the journal, whole."""
    now = time.time()
    with looking_into(journal) as reader:
        found = [seen for seen in reader.charges(Wanted(name=charge_id)) if seen.record.id == charge_id]
        unusable = complain_of(reader)
        if not found:
            raise _not_there(f"charge {charge_id}", reader)
    document = _document(found[0], now)
    if as_json:
        terminal.say_json(document)
    else:
        terminal.say_facts([(name, _in_a_line(value)) for name, value in document.items() if value not in (None, [])])
    if unusable or found[0].worry(now):
        raise typer.Exit(ATTENTION)


def explain(
    name: Annotated[str, typer.Argument(metavar="ID", help="A request's id, a charge's, or a transaction's.")],
    journal: Journal = JOURNAL,
    credits_url: CreditsUrl = None,
    token: Token = None,
    contract: ContractName = None,
    as_json: AsJson = False,
) -> None:
    """Tell a charge's whole story: what was asked, deducted, delivered and refunded, when, and why."""
    now = time.time()
    mapping = load_contract(contract)
    with looking_into(journal) as reader:
        # By the transaction only where nothing else has the name: it is in no index, and all is read for it.
        for wanted in (Wanted(name=name, oldest_first=True), Wanted(transaction_id=name, oldest_first=True)):
            found = list(islice(reader.charges(wanted), TOLD + 1))
            if found:
                break
        unusable, realms = complain_of(reader), set(reader.realms)
        if not found:
            raise _not_there(f"charge, no request and no transaction {name}", reader)
    told, more = found[:TOLD], len(found) > TOLD
    service: dict[str, Looked] = {}
    failure = None
    if credits_url:
        try:
            records = [seen.record for seen in told]
            service = asyncio.run(look_up(credits_url, token, mapping, records, realms))
        except Failure as error:  # what the journal has is told all the same
            failure = error
    if as_json:
        terminal.say_json({"items": [_told(seen, now, service) for seen in told], "more": more})
    else:
        for number, seen in enumerate(told):
            if number:
                terminal.say("")
            _tell(seen.record, story_of(seen.record, living=seen.living, now=now), service.get(seen.record.id))
        if more:
            terminal.say(f"\nThere are more charges of {name}: metered-billing charges list --request-id {name}")
    if failure is not None:
        raise failure
    if unusable or any(seen.worry(now) for seen in told) or any(looked.agrees is False for looked in service.values()):
        raise typer.Exit(ATTENTION)


@contextmanager
def looking_into(journal: str) -> Iterator[JournalReader]:
    """The journal, open for reading.

    Raises:
        Failure: It is not there, or cannot be read.
    """
    try:
        with open_reader(journal) as reader:
            yield reader
    except NoJournal as error:
        raise Failure(f"{error}. Say where the app's journal is: --journal, or METERED_BILLING_JOURNAL.") from None
    except JournalError as error:
        raise Failure(f"{error}.") from None


def complain_of(reader: JournalReader) -> bool:
    """Say what could not be read, where errors go. Returns whether there was something."""
    for name, why in reader.unusable.items():
        terminal.complain(f"{name}: {why}")
    return bool(reader.unusable)


def _not_there(what: str, reader: JournalReader) -> Failure:
    beyond = " But not all of it could be read." if reader.unusable else ""
    return Failure(
        f"There is no {what} in the journal {reader.place}."
        f" It keeps final charges for 7 days, and the latest 100,000.{beyond}"
    )


# What is shown.


def _document(seen: Seen, now: float) -> dict[str, Any]:
    return {**as_document(seen.record, living=seen.living), "attention": seen.worry(now)}


def _told(seen: Seen, now: float, service: dict[str, Looked]) -> dict[str, Any]:
    story = story_of(seen.record, living=seen.living, now=now)
    document = {**_document(seen, now), "story": [story.summary, *_lines(story)]}
    if (looked := service.get(seen.record.id)) is not None:
        document["service"] = looked.to_json()
    return document


def _lines(story: Story) -> list[str]:
    return [
        *(f"{name}: {text}" for name, text in story.facts),
        *(f"{moment(at)} {word}: {text}" for at, word, text in story.events),
        *(f"{name}: {text}" for name, text in story.outcome),
    ]


def _tell(record: Record, story: Story, looked: Looked | None) -> None:
    terminal.say(f"Charge {record.id}, {record.state}: {story.summary}")
    terminal.say("")
    terminal.say_facts(story.facts)
    terminal.say("")
    terminal.say_facts([(f"{moment(at)}  {word}", text) for at, word, text in story.events])
    terminal.say("")
    outcome = list(story.outcome)
    if looked is not None:
        outcome.append(("service", looked.says))
    terminal.say_facts(outcome)


def _show(charges: list[Seen], now: float, *, more: bool) -> None:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("opened (UTC)", "state", "account"):
        table.add_column(column, no_wrap=True)
    for column in ("credits", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("charge", no_wrap=True)
    table.add_column("request", no_wrap=True)
    table.add_column("why", overflow="fold")
    for seen in charges:
        table.add_row(*_cells(seen, now), style=_STYLES.get(seen.record.state, ""))
    terminal.show(table, "There are older ones: raise --limit." if more else None)


def _cells(seen: Seen, now: float) -> list[Text]:
    record = seen.record
    known = record.final or record.state is State.REFUNDING
    why = "; ".join(filter(None, (record.reason, seen.worry(now))))
    values = (
        moment(record.opened_at),
        record.state,
        name_of(record.account),
        f"{record.amount_credits:,}",
        f"{record.kept_credits:,}" if known else "",
        record.id,
        record.request_id or "-",
        why,
    )
    return [Text(terminal.clean(value)) for value in values]


def _in_a_line(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_in_a_line, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={one}" for key, one in value.items())
    return str(value)
