"""`reconcile`: the journal against the service's transactions."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from metered_billing.charge import Record
from metered_billing.cli import terminal, textfile
from metered_billing.cli.charges import looking_into
from metered_billing.cli.failure import Failure
from metered_billing.cli.lookup import entries_of, entries_since
from metered_billing.cli.options import ATTENTION, JOURNAL, AnyTenant, CreditsUrl, Journal, Since, Token, read_since
from metered_billing.cli.repair import Lost, Repairs, is_repairable
from metered_billing.cli.source import Source, open_source
from metered_billing.explain import moment, timestamp
from metered_billing.journal.reading import Seen, Wanted
from metered_billing.reconcile import (
    MARGIN_S,
    SLACK_S,
    Difference,
    Entry,
    Worksheet,
    compare,
    made_at,
    unknown,
)
from metered_billing.settler import KEEP_AT_MOST, KEEP_S

LISTED = 1_000
"""How many of a kind are looked at twice and listed; the others are counted."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass
class Report:
    """What was compared, and what came of it.

    Attributes:
        journal: Where it is, without a password.
        began_at: When the comparison was begun.
        known_since: Since when every deduction has to be in the journal; None: it has no charges.
        others: Deductions of other apps or journals, counted only with `--shared`.
        attention: Charges for somebody to see to, and why.
        repairable: What `--repair` has not tried yet, and can do something about: some of it, where there is much.
        repairs: What it has done; None: it was not asked to.
    """

    journal: str = ""
    began_at: float = 0.0
    known_since: float | None = None
    tenants: int = 0
    charges: int = 0
    entries: int = 0
    pending: int = 0
    others: int = 0
    difference_count: int = 0
    differences: list[Difference] = field(default_factory=list)
    attention_count: int = 0
    attention: list[tuple[Record, str]] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    realms: set[str] = field(default_factory=set)
    repairable: list[Lost] = field(default_factory=list)
    repairs: Repairs | None = None

    def differs(self, difference: Difference) -> None:
        self.difference_count += 1
        if len(self.differences) < LISTED:
            self.differences.append(difference)

    def worries(self, record: Record, why: str) -> None:
        self.attention_count += 1
        if len(self.attention) < LISTED:
            self.attention.append((record, why))


def reconcile(
    journal: Journal = JOURNAL,
    credits_url: CreditsUrl = None,
    token: Token = None,
    tenant: AnyTenant = None,
    since: Since = None,
    shared: Annotated[
        bool,
        typer.Option("--shared", help="Other apps or journals charge these tenants too: count what is not ours."),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Give back what the service has lost: refunds and voids, under the keys they had."
        ),
    ] = False,
    metrics: Annotated[
        Path | None, typer.Option(help="Write the numbers to this file, for Prometheus: a textfile collector's.")
    ] = None,
    contract: Annotated[str | None, typer.Option(hidden=True, help="Refused: a mapping has no such list.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the journal with the service's transactions, both ways. Moves nothing by itself; the app may serve."""
    if contract is not None:
        raise Failure(
            "--contract: a mapping has no list of all transactions in the credits API's words, which this compares."
            " Compare your service's records with `metered-billing charges list --json`, by transaction id;"
            " `metered-billing explain --contract` looks for single charges.",
            2,
        )
    if not credits_url:
        raise Failure("Say where the credits are: --credits URL, or METERED_BILLING_CREDITS.", 2)
    report = asyncio.run(
        _reconcile(journal, credits_url, token, tenant, read_since(since), shared=shared, repair=repair)
    )
    for name, why in report.unusable.items():
        terminal.complain(f"{name}: {why}")
    if as_json:
        terminal.say_json(_document(report))
    else:
        _show(report)
    # What was read in part only is no answer: then the file grows old, which shows.
    if metrics is not None and not report.unusable:
        textfile.write(metrics, report.journal, _numbers(report))
    if report.difference_count or report.attention_count or report.unusable:
        raise typer.Exit(ATTENTION)


async def _reconcile(
    journal: str, url: str, token: str | None, tenant: str | None, since: float | None, *, shared: bool, repair: bool
) -> Report:
    repairs = Repairs(journal, url, token) if repair else None
    while True:
        report = await _compare(journal, url, token, tenant, since, shared=shared, repairs=repairs)
        if repairs is None or not report.repairable:
            return report
        await repairs.make(report.repairable)


async def _compare(
    journal: str,
    url: str,
    token: str | None,
    tenant: str | None,
    since: float | None,
    *,
    shared: bool,
    repairs: Repairs | None,
) -> Report:
    now = time.time()
    report = Report(began_at=now, repairs=repairs)
    with Worksheet() as sheet:
        # The order is what makes it right while an app serves: see `metered_billing.reconcile`.
        with looking_into(journal) as reader:
            report.journal = _whole(reader.place)
            complete = reader.complete_since(now - KEEP_S + MARGIN_S, KEEP_AT_MOST)
            # A journal that lost its disk has nothing; what to expect of it, only a person can say.
            bounds = [bound for bound in (complete, since) if bound is not None]
            report.known_since = max(bounds, default=None)
            for seen in reader.charges(Wanted(tenant_id=tenant, since=since)):
                sheet.add_charge(seen.record)
                _note(report, seen, now)
            report.unusable |= reader.unusable
            report.realms |= set(reader.realms)
        async with open_source(url, token) as source:
            await _read_service(sheet, source, report, tenant)
            await _look_twice(sheet, source, report)
        _look_for_unknown(sheet, journal, report, shared=shared)
        report.charges, report.entries = sheet.counts()
    return report


def _whole(place: str) -> str:
    """A directory as it is called from everywhere."""
    return place if "://" in place else str(Path(place).absolute())


def _note(report: Report, seen: Seen, now: float) -> None:
    if not seen.record.final:
        report.pending += 1
    if (why := seen.worry(now)) is not None:
        report.worries(seen.record, why)


async def _read_service(sheet: Worksheet, source: Source, report: Report, tenant: str | None) -> None:
    tenants = dict(sheet.tenants())
    if tenant is not None:
        tenants.setdefault(tenant, None)
    report.tenants = len(tenants)
    for tenant_id, oldest in tenants.items():
        bounds = [bound for bound in (oldest, report.known_since) if bound is not None]
        if not bounds:
            continue
        async for entry in entries_since(source, tenant_id, None, min(bounds) - SLACK_S):
            if entry.kind != "grant":
                sheet.add_entry(entry)


async def _look_twice(sheet: Worksheet, source: Source, report: Report) -> None:
    """Ask the service for each transaction that differs: a clock that is far off may have hidden it."""
    for number, (record, entries) in enumerate(sheet.differing()):
        lost = _may_be_repaired(report, record, compare(record, entries), entries)
        names = {entry.transaction_id for entry in entries} | {record.transaction_id or ""} - {""}
        if number < LISTED or lost:
            found = {entry.id: entry for entry in entries}
            for name in sorted(names):
                found |= {entry.id: entry for entry in await entries_of(source, name)}
            entries = list(found.values())
        difference = compare(record, entries)
        if difference is not None:
            report.differs(difference)
            if lost and is_repairable(difference, entries):
                report.repairable.append((record, names))


def _may_be_repaired(report: Report, record: Record, difference: Difference | None, entries: list[Entry]) -> bool:
    if report.repairs is not None and record.id in report.repairs.tried:
        return False
    return len(report.repairable) < LISTED and is_repairable(difference, entries)


def _look_for_unknown(sheet: Worksheet, journal: str, report: Report, *, shared: bool) -> None:
    """Deductions that the journal knows nothing of, although it would have to."""
    if report.known_since is None:
        return
    with looking_into(journal) as reader:
        # What it has forgotten meanwhile.
        complete = reader.complete_since(time.time() - KEEP_S + MARGIN_S, KEEP_AT_MOST)
        known_since = max(report.known_since, complete or report.known_since)
        for entry in sheet.unknown():
            made = made_at(entry)
            if made is not None and made < known_since:
                continue
            # Made since the journal was read first: then it is known by now.
            found = reader.charges(Wanted(name=entry.idempotency_key, tenant_id=entry.tenant_id))
            if any(seen.record.id == entry.idempotency_key for seen in found):
                continue
            if shared:
                report.others += 1
            else:
                report.differs(unknown(entry))


# What is shown.


def _numbers(report: Report) -> dict[str, float]:
    return {
        textfile.DIFFERENCES: report.difference_count,
        textfile.ATTENTION: report.attention_count,
        textfile.CHARGES: report.charges,
        textfile.TRANSACTIONS: report.entries,
        textfile.TIMESTAMP: round(report.began_at, 3),
    }


def _document(report: Report) -> dict[str, Any]:
    return {
        "known_since": None if report.known_since is None else timestamp(report.known_since),
        "tenants": report.tenants,
        "charges": report.charges,
        "transactions": report.entries,
        "pending": report.pending,
        "of_others": report.others,
        "difference_count": report.difference_count,
        "differences": [asdict(difference) for difference in report.differences],
        "attention_count": report.attention_count,
        "attention": [
            {
                "charge_id": record.id,
                "tenant_id": record.account.tenant_id,
                "user_id": record.account.user_id,
                "state": str(record.state),
                "amount": record.amount_credits,
                "opened_at": timestamp(record.opened_at),
                "reason": record.reason,
                "why": why,
            }
            for record, why in report.attention
        ],
        "unusable": report.unusable,
        **({} if report.repairs is None else _repaired(report.repairs)),
    }


def _repaired(repairs: Repairs) -> dict[str, Any]:
    return {"repaired_count": repairs.charges, "repaired_credits": repairs.back, "not_repaired": repairs.failed}


def _show(report: Report) -> None:
    if report.repairs is not None:
        terminal.say(report.repairs.says)
        for charge_id, why in report.repairs.failed.items():
            terminal.complain(f"{charge_id} could not be repaired: {why}")
    if report.differences:
        _table(
            ("charge", "tenant", "user", "credits", "difference"),
            (
                (one.charge_id, one.tenant_id, one.user_id or "-", f"{one.credits:+,}", f"{one.kind}: {one.says}")
                for one in report.differences
            ),
            report.difference_count,
        )
    if report.attention:
        _table(
            ("charge", "tenant", "user", "state", "why"),
            (
                (
                    record.id,
                    record.account.tenant_id,
                    record.account.user_id or "-",
                    record.state,
                    "; ".join(filter(None, (record.reason, why))),
                )
                for record, why in report.attention
            ),
            report.attention_count,
        )
    known = "" if report.known_since is None else f" since {moment(report.known_since)}"
    compared = f"{report.charges:,} charges and {report.entries:,} transactions of {report.tenants:,} tenants{known}"
    terminal.say(f"{report.difference_count:,} differences: {compared}")
    if report.pending or report.attention_count or report.others:
        others = f", {report.others:,} deductions of others" if report.others else ""
        terminal.say(f"{report.pending:,} pending, {report.attention_count:,} for somebody to see to{others}")
    if any(one.kind == "unknown deduction" for one in report.differences):
        terminal.say("Do other apps or journals charge these tenants? Then --shared counts what is not this journal's.")
    if report.repairable and report.repairs is None:
        terminal.say("What is not refunded or not undone, --repair gives back, under the keys that it had.")
    if report.difference_count and report.realms:
        terminal.say(f"This journal's charges were made at {', '.join(sorted(report.realms))}.")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]], count: int) -> None:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1], justify="right" if column == "credits" else "left")
    for row in rows:
        table.add_row(*(Text(terminal.clean(value)) for value in row))
    terminal.show(table, f"{count - LISTED:,} more" if count > LISTED else None)
    terminal.say("")
