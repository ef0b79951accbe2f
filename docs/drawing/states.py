"""The states of a charge and the ways between them, out of the library's own table of transitions."""

from collections.abc import Collection, Mapping

from metered_billing.charge import FINAL, TRANSITIONS, State

from .card import arrow, card, text

_WIDE, _HIGH = 128, 42

_PLACES: Mapping[State, tuple[int, int]] = {
    State.ABANDONED: (0, 0),
    State.OPENED: (1, 0),
    State.DECLINED: (2, 0),
    State.DEDUCTED: (0, 1),
    State.DISPUTED: (1, 1),
    State.VOIDING: (2, 1),
    State.SETTLED: (0, 2),
    State.REFUNDING: (1, 2),
    State.VOIDED: (2, 2),
}
"""Column and row: placed so that no way crosses another. A new state needs a place, or drawing fails."""

_COLOURS = {State.SETTLED: "good", State.DISPUTED: "person"}


def draw(title: str, begin: Collection[State], notes: Mapping[State, str]) -> str:
    """Every transition out of the states `begin`, and the states that it leads to.

    Args:
        title: What is read out instead of the picture.
        begin: Where the ways begin.
        notes: A line beside a state: above those of the first row, below the others.
    """
    ways = {
        (state, after): [occasion for occasion, to in occasions.items() if to is after]
        for state, occasions in TRANSITIONS.items()
        if state in begin
        for after in occasions.values()
    }
    shown = set(begin) | {after for _, after in ways}
    rows = [row for _, row in map(_PLACES.__getitem__, shown)]
    top, bottom = min(rows), max(rows)

    def centre(state: State) -> tuple[float, float]:
        column, row = _PLACES[state]
        return 110 + 320 * column, 60 + 20 * bool(notes) + 180 * (row - top)

    parts = []
    labels = []
    for (state, after), occasions in ways.items():
        (x1, y1), (x2, y2) = centre(state), centre(after)
        parts.append(arrow(*_edge(x1, y1, x2, y2), *_edge(x2, y2, x1, y1)))
        labels += [
            text((x1 + x2) / 2, (y1 + y2) / 2 + 5 + 18 * (line - (len(occasions) - 1) / 2), occasion, "label")
            for line, occasion in enumerate(occasions)
        ]
    for state in sorted(shown):
        x, y = centre(state)
        kind = _COLOURS.get(state, "idle") if state in FINAL else ""
        parts.append(
            f'<rect class="box {kind}" x="{x - _WIDE / 2:.0f}" y="{y - _HIGH / 2:.0f}" width="{_WIDE}"'
            f' height="{_HIGH}" rx="{_HIGH / 2 if state in FINAL else 6:.0f}"/>'
        )
        parts.append(text(x, y + 5, state, "name"))
        if state in notes:
            # Where no way passes.
            beside = -_HIGH / 2 - 9 if _PLACES[state][1] == top else _HIGH / 2 + 18
            labels.append(text(x, y + beside, notes[state], "note"))
    return card(120 + 180 * (bottom - top) + 40 * bool(notes), title, parts + labels)


def _edge(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float]:
    """Where the way from the first box to the second leaves the first."""
    shares = [half / abs(way) for half, way in ((_WIDE / 2, x2 - x1), (_HIGH / 2, y2 - y1)) if way]
    return x1 + min(shares) * (x2 - x1), y1 + min(shares) * (y2 - y1)
