"""The page "What a crash leaves behind" says what the code does, and names tests that there are."""

import re

from metered_billing.charge import FINAL, TRANSITIONS, Account, Record, State, orphaned

from .pages import DOCS, ROOT, Page, table

PAGE = DOCS / "explanation" / "crash.md"


def test_every_state_is_on_the_page_and_none_that_there_is_not() -> None:
    """In the order of the code; for final ones there is nothing to do."""
    rows = table(Page(PAGE), "State by state")
    assert [row[0] for row in rows] == [str(state) for state in State]
    for row in rows:
        assert row[2].startswith("nothing") == (State(row[0]) in FINAL)


def test_what_recovery_puts_on_record_is_what_the_code_does() -> None:
    """`orphaned` says what is on record before a refund or void of a charge whose request has died."""
    for row in table(Page(PAGE), "State by state"):
        state = State(row[0])
        record = Record(id="c", account=Account("acme"), amount_credits=1, units=1, opened_at=0.0, state=state)
        event = orphaned(record)
        said = re.match(r"puts `(\w+)`", row[2])
        assert (event is None) == (said is None)
        if event is not None and said is not None:
            assert TRANSITIONS[state][event.occasion_for(record)] == said.group(1)


def test_tests_that_are_named_are_there() -> None:
    """Each row of the moments is proven by one."""
    rows = table(Page(PAGE), "Moment by moment")
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(rows) <= len(named)
    for file, test in named:
        assert re.search(rf"def {test}\(" if test else "def test_", (ROOT / file).read_text(encoding="utf-8")), test
