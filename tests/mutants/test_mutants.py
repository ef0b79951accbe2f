"""The mutants themselves: what is changed, that the change takes effect, and that what is written down is so."""

import textwrap
import time
from pathlib import Path

import pytest

from metered_billing.charge import Account, Record
from tests.mutants.__main__ import Fork, every_mutant, install, written_down
from tests.mutants.mutate import mutants_of


def changes(tmp_path: Path, source: str) -> list[str]:
    """The names of the source's mutants."""
    file = tmp_path / "sums.py"
    file.write_text(textwrap.dedent(source))
    mutants = mutants_of(file, "sums.py")
    for mutant in mutants:
        mutant.code()
    return [mutant.name.removeprefix("sums.py") for mutant in mutants]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("LIMIT: int = 3", [": LIMIT: int = 3 → LIMIT: int = 4"]),
        ("FINAL = {State.SETTLED, A}", ["= {A}", "= {State.SETTLED}", "= {State.VOIDED, A}"]),
        ("NEXT = {'a': A}", [": NEXT = {'a': A} → NEXT = {}", ": NEXT = {'a': A} → NEXT = {'': A}"]),
        ("Answer = Yes | No", []),
        ("__slots__ = ('a',)", []),
        ("def f(n: int) -> bool:\n    'Doc.'\n    return n < 5", ["return n <= 5", "return n < 6", "return"]),
        ("def f():\n    return a and b", ["→ return", "→ return a", "→ return b"]),
        ("def f():\n    if a == b: g()", ["if True: ...", "if False: ...", "g() → pass"]),
        ("def f():\n    log.log('a', b)", [" f: log.log('a', b) → pass"]),
        ("async def f():\n    await shield(a)", ["→ pass", "await a", "await shield(None)"]),
        ("def f():\n    with lock: pass", ["if True: ..."]),
        ("def f():\n    try: g()\n    finally: pass", ["try: ... finally: ... → if True: ...", "g() → pass"]),
        ("def f():\n    a += 1", ["a = 1", "a -= 1", "a += 2"]),
        ("class A:\n    @property\n    def f(self): return 'x'", [" A.f: return 'x' → return", " → return ''"]),
    ],
)
def test_mutants_of_a_source_are_its_single_changes(tmp_path: Path, source: str, expected: list[str]) -> None:
    """Each thing that could be otherwise is so in one mutant, and what nobody runs is in none."""
    found = changes(tmp_path, source)
    assert len(found) == len(expected)
    assert all(any(part in name for name in found) for part in expected), found


def test_mutants_of_the_same_statement_twice_have_two_names(tmp_path: Path) -> None:
    """A reason is written for one of them, not for both."""
    found = changes(tmp_path, "def f():\n    g()\n    g()")
    assert found == [" f: g() → pass", " f: g() → pass (2)"]


def test_mutants_of_a_long_statement_are_named_by_what_differs(tmp_path: Path) -> None:
    """A name stays short enough to be read, and does not change with the far end of a table."""
    found = changes(tmp_path, f"TABLE = { ({f'k{n}': 'v' for n in range(50)}) }")
    assert all(len(name) < 250 for name in found)
    assert len(set(found)) == 150


def test_installed_mutant_does_something_else() -> None:
    """The new code runs wherever the function is known; else no test could notice it."""
    record = Record(id="c1", account=Account("t1"), amount_credits=10, units=10, opened_at=100.0)
    mutant = next(mutant for mutant in every_mutant(["charge.py Record.refund_key"]) if mutant.change.endswith("''"))

    def changed() -> int:
        install(mutant)
        return 0 if record.refund_key == "" else 1

    fork = Fork(changed)
    while (code := fork.ended()) is None:
        time.sleep(0.01)
    assert code == 0
    assert record.refund_key == "c1:refund"


def test_written_down_survivors_are_mutants_and_have_a_reason() -> None:
    """No reason outlives the line that it was written for."""
    reasons = written_down()
    assert not set(reasons) - {mutant.name for mutant in every_mutant()}
    assert all(len(why) > 20 for why in reasons.values())
