"""What people see: tables and sentences, with nothing in them that a terminal would obey."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Controls (C0, DEL, C1) would drive the terminal; marks of direction would show digits in another order.
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")

_STYLES = {"grant": "green", "deduction": "bold", "refund": "cyan", "void": "magenta"}

Entry = Mapping[str, Any]

SHOWN = frozenset({"id", "kind", "transaction_id", "user_id", "amount", "balance", "created_at"})
"""What an entry must have to be shown."""


def clean(text: object) -> str:
    """Text from elsewhere, with every character that a terminal would obey replaced by a question mark."""
    return _OBEYED.sub("?", str(text))


def say(sentence: str) -> None:
    """Print a sentence."""
    _console().print(Text(clean(sentence)), soft_wrap=True)


def complain(sentence: str) -> None:
    """Print a sentence where errors go."""
    Console(stderr=True).print(Text(f"metered-billing: {clean(sentence)}"), soft_wrap=True)


def note(sentence: str) -> None:
    """Print a sentence beside what a script reads from stdout."""
    Console(stderr=True).print(Text(clean(sentence)), soft_wrap=True)


def say_json(document: Any) -> None:
    """Print JSON, in ASCII, so that it too is obeyed by no terminal."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def account(tenant_id: str, user_id: str | None) -> str:
    """An account's name for people."""
    return f"{tenant_id} / {user_id}" if user_id else f"{tenant_id} (shared pool)"


def credits_in_words(amount: int) -> str:
    return f"{amount:,} credit" if amount == 1 else f"{amount:,} credits"


def say_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print a word and a text a line, the texts one below the other."""
    lines = [(clean(word), clean(text)) for word, text in facts]
    width = max((len(word) for word, _ in lines), default=0)
    for word, text in lines:
        _console().print(Text(f"{word:<{width}}  {text}"), soft_wrap=True)


def show(table: Table, note: str | None = None) -> None:
    """Print a table, and a note below it."""
    console = _console()
    console.print(table)
    if note is not None:
        console.print(Text(note, style="dim"))


def show_transactions(entries: Sequence[Entry], *, more: bool) -> None:
    """Print the entries, newest first, each deduction with what came back of it right below."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("when (UTC)", "what", "user"):
        table.add_column(column, no_wrap=True)
    for column in ("credits", "balance"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    table.add_column("transaction", no_wrap=True)
    for entry, below in arranged(entries):
        table.add_row(*_cells(entry, below), style=_STYLES.get(str(entry["kind"]), ""))
    show(table, "There are older ones: raise --limit." if more else None)


def arranged(entries: Sequence[Entry]) -> list[tuple[Entry, bool]]:
    """The entries as they are shown, and whether each stands below its deduction.

    What came back of a deduction that is not among the entries stands where it was.
    """
    deductions = {entry["id"] for entry in entries if entry["kind"] == "deduction"}
    below: dict[str, list[Entry]] = {}
    top: list[Entry] = []
    for entry in entries:
        if entry["kind"] in ("refund", "void") and entry["transaction_id"] in deductions:
            below.setdefault(entry["transaction_id"], []).insert(0, entry)
        else:
            top.append(entry)
    lines: list[tuple[Entry, bool]] = []
    for entry in top:
        lines.append((entry, False))
        if entry["kind"] == "deduction":
            lines += [(each, True) for each in below.get(entry["id"], [])]
    return lines


def _cells(entry: Entry, below: bool) -> Iterable[Text]:
    moment = str(entry["created_at"])[:19].replace("T", " ")
    kind = f"  └ {entry['kind']}" if below else entry["kind"]
    values = (
        moment,
        kind,
        entry["user_id"] or "-",
        f"{entry['amount']:+,}",
        f"{entry['balance']:,}",
        _why(entry),
        "" if below else entry["transaction_id"],
    )
    return [Text(clean(value)) for value in values]


def _why(entry: Entry) -> str:
    said = [str(entry["reason"])] if entry.get("reason") else []
    if items := entry.get("items"):
        shown = ", ".join(map(str, items[:5]))
        said.append(shown + (f" and {len(items) - 5} more" if len(items) > 5 else ""))
    if entry.get("request_id"):
        said.append(f"request {entry['request_id']}")
    said += [f"{key}={value}" for key, value in (entry.get("metadata") or {}).items()]
    return "; ".join(said)


def _console() -> Console:
    # In a pipe there is no width to fit: lines stay whole, for grep.
    return Console(width=None if sys.stdout.isatty() else 1_000)
