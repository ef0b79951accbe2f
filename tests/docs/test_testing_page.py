"""The page of the test kit, compared with the kit."""

import inspect
import re
from dataclasses import fields

import pytest_metered_billing
from metered_billing import testing
from metered_billing.testing import FAULTS, Billing, Call, Entry
from metered_billing.testing.strategies import faults

from .pages import DOCS, Page, code, table

PAGE = Page(DOCS / "reference" / "testing.md")


def test_faults_are_all_on_the_page() -> None:
    """What each happens to, whether it is done, and what it looks like."""
    shown = [(code(name)[0].strip('"'), code(to), done, says) for name, to, done, says in table(PAGE, "Faults")]
    assert shown == [(name, list(kind.only), "yes" if kind.done else "no", kind.says) for name, kind in FAULTS.items()]


def test_members_are_all_on_the_page() -> None:
    """As they are called, with their defaults."""
    shown = [signature for row in table(PAGE, "Billing") for signature in code(row[0])]
    public = {name for name in vars(Billing) if not name.startswith("_")} | {"url", "token", "admin_token"}
    assert {signature.partition("(")[0] for signature in shown} == public
    for signature in shown:
        name, _, parameters = signature.partition("(")
        if parameters:
            assert parameters == _signature(getattr(Billing, name)).removeprefix("(self, ").removeprefix("(self")


def test_fields_are_all_on_the_page() -> None:
    """Of entries and calls."""
    for kind in (Entry, Call):
        about = re.search(rf"^An? `{kind.__name__}` has .*?\n\n", PAGE.text, flags=re.M | re.S)
        assert about is not None
        named = set(code(about[0])) - {kind.__name__, "grant", "deduction", "refund", "void"}
        assert named == {field.name for field in fields(kind)}


def test_names_are_all_on_the_page() -> None:
    """Of the fixtures, and of what can be imported."""
    fixtures = {name for name in vars(pytest_metered_billing) if name.startswith("billing")}
    assert {code(row[0])[0] for row in table(PAGE, "Fixtures")} == fixtures
    for name in testing.__all__:
        assert re.search(rf"`{name}\b", PAGE.text), name
    assert f"strategies.faults{_signature(faults)}" in PAGE.text


def _signature(function: object) -> str:
    """Its parameters, without their types."""
    assert callable(function)
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)).replace("'", '"')
