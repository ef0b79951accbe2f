"""`recover`: what dead processes left, driven to its end without starting the app."""

import asyncio
from collections import Counter
from functools import partial
from typing import Annotated, Any

import typer
from opentelemetry.trace import Span

from metered_billing import names
from metered_billing.bounds import MONTH_S
from metered_billing.charge import Record
from metered_billing.cli import terminal
from metered_billing.cli.charges import looking_into
from metered_billing.cli.failure import Failure
from metered_billing.cli.options import (
    ATTENTION,
    JOURNAL,
    ContractName,
    CreditsUrl,
    Journal,
    Token,
    is_number,
    load_contract,
    secret,
)
from metered_billing.credits import Credits
from metered_billing.explain import as_document, in_words, moment, name_of
from metered_billing.journal import Journal as KeptJournal
from metered_billing.journal import JournalError
from metered_billing.journal.reading import Seen, Wanted
from metered_billing.ledger import LedgerError
from metered_billing.recovery import Recovery
from metered_billing.runtime import Runtime
from metered_billing.settings import open_credits, open_journal
from metered_billing.telemetry import Telemetry

LISTED = 100
"""How many of the charges that are left are named."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Watching(Telemetry):
    """Counts what the settler does, and remembers why something has to wait. Logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: Counter[str] = Counter()
        self.refunded = 0
        self.waits: dict[str, str] = {}
        self.troubles: dict[str, str] = {}

    def log(
        self,
        event: str,
        record: Record | None = None,
        *,
        span: Span | None = None,
        exc_info: BaseException | None = None,
        **fields: Any,
    ) -> None:
        if event in (names.LOG_SETTLED, names.LOG_VOIDED, names.LOG_DISPUTED) and record is not None:
            self.ended[str(record.state)] += 1
            self.waits.pop(record.id, None)
        if event in (names.LOG_REFUNDED, names.LOG_VOIDED):
            self.refunded += int(fields.get("refunded") or 0)
        if event == names.LOG_POSTPONED and record is not None and (record.id in self.waits or self._room()):
            self.waits[record.id] = str(fields.get("reason"))
        if event in (names.LOG_JOURNAL_FAILED, names.LOG_BUG):
            name = str(fields.get("unusable") or (record.id if record is not None else event))
            self.troubles[name] = str(fields.get("reason") or exc_info)

    def again(self, event: str, record: Record | None, *, reason: str) -> None:
        self.log(event, record, reason=reason)

    def _room(self) -> bool:
        return len(self.waits) < LISTED


def recover(
    journal: Journal = JOURNAL,
    credits_url: CreditsUrl = None,
    token: Token = None,
    contract: ContractName = None,
    within: Annotated[
        float, typer.Option(min=0, max=MONTH_S, callback=is_number, help="How many seconds to try, at the most.")
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Finish what dead processes left in the journal, when the app is not to be started."""
    if not credits_url:
        raise Failure("Say where the credits are: --credits URL, or METERED_BILLING_CREDITS.", 2)
    with looking_into(journal):
        pass  # a journal that is not there must not be made
    watching, runtime, mapping = Watching(), Runtime(), load_contract(contract)
    try:
        credits = open_credits(  # noqa: A001 - the field's word
            credits_url, secret(token), runtime, watching, contract=mapping
        )
        place = open_journal(journal, runtime, watching)
    except ValueError as error:
        raise Failure(f"{error}.", 2) from None
    except ImportError as error:
        raise Failure(f"{error}.") from None
    try:
        asyncio.run(_recover(journal, credits, place, watching, runtime, within))
    except (JournalError, LedgerError) as error:
        raise Failure(f"{error}.") from None
    except KeyboardInterrupt:
        raise Failure("Stopped. What is not done stays in the journal.") from None
    left, living = _what_is_left(journal)
    _say(watching, left, living, as_json=as_json)
    if mapping is None and any("HTTP 404" in _why(watching, seen) for seen in left):
        terminal.complain(f"{credits_url} answers 404. Where the app has a mapping for it, name that: --contract.")
    if left or watching.ended["disputed"] or watching.troubles:
        raise typer.Exit(ATTENTION)


async def _recover(
    where: str,
    credits: Credits,  # noqa: A002 - the field's word
    journal: KeptJournal,
    watching: Watching,
    runtime: Runtime,
    within_s: float,
) -> None:
    showing = asyncio.create_task(_show_progress(watching))
    try:
        await Recovery(credits, journal, runtime, watching, more=partial(_may_be_dead, where)).run(within_s)
    finally:
        showing.cancel()


def _may_be_dead(where: str, after_s: float) -> bool:
    """Whether somebody else's charges may still turn out to be a dead process's."""
    with looking_into(where) as reader:
        if after_s > reader.known_dead_after_s:
            return False
        return next(reader.charges(Wanted(unsettled=True)), None) is not None


async def _show_progress(watching: Watching) -> None:
    shown = 0
    while True:
        await asyncio.sleep(1)
        done = watching.ended.total()
        if done != shown:
            terminal.complain(f"{done:,} charges are final")
        shown = done


def _what_is_left(journal: str) -> tuple[list[Seen], int]:
    """Charges that nobody living has, and how many somebody living has."""
    left: list[Seen] = []
    living = 0
    with looking_into(journal) as reader:
        for seen in reader.charges(Wanted(unsettled=True, oldest_first=True)):
            if seen.living:
                living += 1
            else:
                left.append(seen)
    return left, living


def _say(watching: Watching, left: list[Seen], living: int, *, as_json: bool) -> None:
    for name, why in watching.troubles.items():
        terminal.complain(f"{name}: {why}")
    if as_json:
        terminal.say_json(
            {
                "final": dict(watching.ended),
                "refunded": watching.refunded,
                "left_count": len(left),
                "left": [
                    {**as_document(seen.record, living=False), "why": _why(watching, seen)} for seen in left[:LISTED]
                ],
                "with_living_processes": living,
                "troubles": watching.troubles,
            }
        )
        return
    ended = ", ".join(f"{count:,} {state}" for state, count in sorted(watching.ended.items()))
    if ended:
        terminal.say(f"Now final: {ended}. {in_words(watching.refunded)} went back.")
    if living:
        terminal.say(f"With living processes, and left to them: {living:,}.")
    for seen in left[:LISTED]:
        record = seen.record
        next_at = f"next at {moment(record.due_at)}" if record.tries else "not tried"
        terminal.say(
            f"{record.id}  {name_of(record.account)}  {record.state}  {in_words(record.amount_credits)}"
            f"  {record.tries:,} tries, {next_at}: {_why(watching, seen)}"
        )
    nothing = "Nothing else is left." if watching.troubles else "Nothing is left."
    terminal.say(f"Left: {len(left):,}. They stay in the journal." if left else nothing)


def _why(watching: Watching, seen: Seen) -> str:
    return watching.waits.get(seen.record.id, "there was no time, or it was made at other credits")
