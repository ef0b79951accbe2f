"""The reference says what the code says: every name, every default, every row."""

import inspect
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import typer

import metered_billing
from metered_billing import HttpCredits, MeteredBillingMiddleware, Settings, SqlCredits, metered, testing
from metered_billing.charge import TRANSITIONS, Account, Record, State
from metered_billing.cli.commands import app as command_line
from metered_billing.conformance import CHECKS
from metered_billing.credits.contract import Contract, Reply
from metered_billing.errors import BillingError
from metered_billing.middleware import Exchange
from metered_billing.reconcile import KINDS
from metered_billing.settings import IN_SSM
from metered_billing.sources import CODE, DEFAULT, ENVIRONMENT, SSM

from .pages import DOCS, UPDATE, Page, code, table

sys.path.insert(0, str(DOCS))
import make_charge
import make_flow

REFERENCE = DOCS / "reference"


# charge.md


def test_charge_page_is_drawn_from_the_table() -> None:
    """`python docs/make_charge.py` would change nothing."""
    text = make_charge.PAGE.read_text(encoding="utf-8")
    made = make_charge.page(text)
    if UPDATE and made != text:
        make_charge.PAGE.write_text(made, encoding="utf-8")
    assert make_charge.PAGE.read_text(encoding="utf-8") == made


@pytest.mark.parametrize("script", [make_charge, make_flow], ids=["make_charge.py", "make_flow.py"])
def test_diagrams_are_drawn_from_the_code(script: Any) -> None:
    """The script would change nothing."""
    for name, drawn in script.pictures().items():
        picture = script.PICTURES / name
        if UPDATE:
            picture.write_text(drawn, encoding="utf-8")
        assert picture.read_text(encoding="utf-8") == drawn, f"python docs/{script.__name__}.py"


def test_diagrams_leave_no_transition_out() -> None:
    """The whole one has all, and its two halves have them together, each where it begins."""
    drawn = make_charge.pictures()
    halves = drawn["charge-deduction.svg"] + drawn["charge-refund.svg"]
    for text in (drawn["charge.svg"], halves):
        labels = Counter(re.findall(r'class="label" [^>]*>([^<]*)<', text))
        assert labels == Counter(occasion for row in TRANSITIONS.values() for occasion in row)


def test_charge_page_explains_every_state_and_occasion() -> None:
    """And none that there is not."""
    page = Page(REFERENCE / "charge.md")
    states = {row[0].strip("*") for row in table(page, "What the states mean")}
    assert states == {str(state) for state in State}
    occasions = {row[0] for row in table(page, "What happens")}
    assert occasions == {occasion for row in TRANSITIONS.values() for occasion in row}


# decorator.md


def parameters(callable_: Any) -> dict[str, str]:
    """Name and default, as the page writes them."""
    found = {}
    for parameter in inspect.signature(callable_).parameters.values():
        if parameter.name in ("self", "app", "runtime", "telemetry"):
            continue
        default = parameter.default
        found[parameter.name] = "" if default is inspect.Parameter.empty else repr(default).replace("'", '"')
    return found


def documented(page: Page, heading: str) -> dict[str, str]:
    return {code(row[0])[0]: (code(row[1]) or [""])[0] for row in table(page, heading)}


@pytest.mark.parametrize(
    ("heading", "callable_"),
    [
        ("metered", metered),
        ("MeteredBillingMiddleware", MeteredBillingMiddleware),
        ("HttpCredits", HttpCredits),
        ("SqlCredits", SqlCredits),
    ],
)
def test_parameters_and_defaults_are_on_the_page(heading: str, callable_: Any) -> None:
    """All of them, and no others."""
    assert documented(Page(REFERENCE / "decorator.md"), heading) == parameters(callable_)


def test_settings_are_on_the_page() -> None:
    """Each with its variable."""
    rows = table(Page(REFERENCE / "settings.md"), "What there is")
    prefix = Settings.model_config["env_prefix"]
    assert {code(row[0])[0] for row in rows} == {f"{prefix}{name.upper()}" for name in Settings.model_fields}
    assert {name for row in rows for name in code(row[1])} == IN_SSM
    assert {row[0] for row in table(Page(REFERENCE / "settings.md"), "Where they are looked for")} == {
        CODE,
        ENVIRONMENT,
        "`.env`",
        f"AWS {SSM}",
        DEFAULT,
    }
    assert Settings.model_fields["journal"].default in str(rows)


def kinds(kind: type[BillingError]) -> list[type[BillingError]]:
    return [kind, *(below for each in kind.__subclasses__() for below in kinds(each))]


def test_problems_are_on_the_page() -> None:
    """Every error's class, status and name."""
    rows = table(Page(REFERENCE / "decorator.md"), "Problems")
    shown = {code(row[2])[0]: (int(row[0]), code(row[1])[0]) for row in rows}
    assert shown == {
        kind.__name__: (kind.status, kind.name) for kind in kinds(BillingError) if kind is not BillingError
    }


def test_response_headers_are_on_the_page() -> None:
    """Those that the middleware sends; the example exposes the same."""
    rows = table(Page(REFERENCE / "decorator.md"), "Response headers")
    source = inspect.getsource(sys.modules[Exchange.__module__])
    sent = set(re.findall(r'b"(credits-[a-z-]+)"', source))
    assert {code(row[0])[0].lower() for row in rows} == sent
    example = (DOCS / "examples" / "cors.py").read_text(encoding="utf-8").lower()
    assert all(f'"{header}"' in example for header in sent)


# api.md


def test_public_names_are_on_the_page() -> None:
    """All of them, the test kit's, and what a service with other paths and fields overrides."""
    shown = [name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", Page(REFERENCE / "api.md").text, re.M)]
    others = ["Contract", "Call", "Reply", "RotatingToken"]
    assert sorted(shown) == sorted([*metered_billing.__all__, *testing.__all__, *others])


# cli.md


def command_named(name: str) -> Any:
    found: Any = typer.main.get_command(command_line)
    for word in name.split():
        found = found.commands[word]
    return found


COMMANDS = [
    "serve",
    "token new",
    "token list",
    "token revoke",
    "grant",
    "balance",
    "transactions",
    "charges list",
    "charges show",
    "explain",
    "backup",
    "recover",
    "reconcile",
    "conformance",
    "check-config",
    "monitoring",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_on_the_page(command: str) -> None:
    """With their defaults and variables."""
    made = {
        option.opts[0]: (option.envvar or "", str(option.default) if option.default not in (None, False) else "")
        for option in command_named(command).params
        if option.opts[0].startswith("--") and option.opts[0] != "--help"
    }
    page = Page(REFERENCE / "cli.md")
    rows = table(page, command)
    shown = {code(row[0])[0]: ((code(row[2]) or [""])[0], (code(row[1]) or [""])[0]) for row in rows}
    assert shown == made


def test_kinds_of_differences_are_on_the_page() -> None:
    """Each with its meaning, word for word."""
    text = Page(REFERENCE / "cli.md").text
    shown = dict(re.findall(r"^\| `([a-z ]+)` \| ([^|]+) \|$", text.partition("| difference | it means |")[2], re.M))
    assert shown.keys() == KINDS.keys()
    assert all(shown[kind].startswith(meaning) for kind, meaning in KINDS.items())


# answers.md

RECORD = Record(
    id="01980a5e-7c1e-7b5a-9a55-0e9d5c3a1f10",
    account=Account("acme"),
    amount_credits=10,
    units=10,
    state=State.REFUNDING,
    opened_at=0,
    transaction_id="t1",
    refund_credits=2,
)

GOOD = {
    "deduction": {"transaction_id": "t1", "amount": 10, "balance": 90},
    "refund": {"refund_id": "r1", "transaction_id": "t1", "amount": 2, "balance": 92},
    "void": {"status": "voided", "refunded": 10},
}


def replies(cell: str, what: str) -> list[Reply]:
    """What the first column of a table names: statuses, or a status and a problem."""
    found = []
    for status in re.findall(r"\b\d{3}\b", cell):
        names = [name for name in code(cell) if re.fullmatch(r"[a-z]+(-[a-z]+)+", name)]
        if names:
            for name in names:
                body: Any = {"type": f"urn:metered-billing:{name}"}
                found.append(Reply(int(status), {"content-type": "application/problem+json"}, body))
        elif "problem" in cell:
            kind = {"type": "urn:metered-billing:not-found"}
            found.append(Reply(int(status), {"content-type": "application/problem+json"}, kind))
        else:
            found.append(Reply(int(status), {"content-type": "application/json"}, GOOD[what]))
    return found


@pytest.mark.parametrize(
    ("heading", "what", "read"),
    [
        ("To a deduction", "deduction", lambda reply: Contract().read_deduction(RECORD, reply)),
        ("To a refund", "refund", lambda reply: Contract().read_refund(RECORD, reply)),
        ("To a void", "void", lambda reply: Contract().read_void(replace(RECORD, state=State.VOIDING), reply)),
    ],
)
def test_answers_mean_what_the_page_says(heading: str, what: str, read: Any) -> None:
    """Each row of the table, read by the client."""
    for row in table(Page(REFERENCE / "answers.md"), heading):
        for reply in replies(row[0], what):
            answer = read(reply)
            meant = re.sub(r"(?<!^)(?=[A-Z])", " ", type(answer).__name__).lower()
            if getattr(answer, "misconfigured", False):
                meant = "our bug"
            assert row[1].strip("*") == meant, f"{heading}: {row[0]}: {answer}"


def test_what_a_service_may_lack_is_named_as_its_checks() -> None:
    """So that a report leads to the row."""
    checks = {check.name for check in CHECKS}
    named = [name for row in table(Page(REFERENCE / "answers.md"), "What a service may lack") for name in code(row[0])]
    assert len(named) == len(set(named))
    assert set(named) <= checks
