"""Who tells whom what, from the top down."""

from collections.abc import Sequence
from dataclasses import dataclass

from .card import WIDTH, arrow, card, text

_STEP = 40


@dataclass(frozen=True)
class Tell:
    """An arrow from one to another; from one to itself, a note beside its line.

    Attributes:
        reply: Drawn with a dashed line.
    """

    teller: str
    told: str
    what: str
    reply: bool = False


@dataclass(frozen=True)
class Synced:
    """The one waits here until what it was told is on disk."""

    who: str
    what: str


def draw(title: str, who: Sequence[str], steps: Sequence[Tell | Synced]) -> str:
    """The picture.

    Args:
        title: What is read out instead of it.
        who: From left to right.
    """
    apart = WIDTH / len(who)
    at = {name: apart * (number + 0.5) for number, name in enumerate(who)}
    height = 90 + _STEP * len(steps)
    wide = min(apart - 16, 130)
    parts = []
    for name, x in at.items():
        parts += [
            f'<line class="line dashed" x1="{x:.0f}" y1="52" x2="{x:.0f}" y2="{height - 16}"/>',
            f'<rect class="box" x="{x - wide / 2:.0f}" y="16" width="{wide:.0f}" height="36" rx="6"/>',
            text(x, 39, name, "name"),
        ]
    for number, step in enumerate(steps):
        y = 96 + _STEP * number
        parts += _synced(at, step, y) if isinstance(step, Synced) else _tell(at, step, y)
    return card(height, title, parts)


def _tell(at: dict[str, float], step: Tell, y: float) -> list[str]:
    begin, end = at[step.teller], at[step.told]
    if begin == end:
        return [f'<circle class="tip" cx="{begin:.0f}" cy="{y:.0f}" r="4"/>', text(begin, y - 8, step.what, "label")]
    way = 1 if end > begin else -1
    return [
        arrow(begin + 2 * way, y, end - 2 * way, y, "dashed" if step.reply else ""),
        text((begin + end) / 2, y - 7, step.what, "label"),
    ]


def _synced(at: dict[str, float], step: Synced, y: float) -> list[str]:
    x = at[step.who]
    wide = 22 + 7 * len(step.what)
    return [
        f'<rect class="box synced" x="{x - wide / 2:.0f}" y="{y - 22:.0f}" width="{wide}" height="26" rx="4"/>',
        text(x, y - 5, step.what, "note"),
    ]
