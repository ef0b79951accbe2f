"""What happened, drawn: requests a second in all, and below it each replica's share of them and its life."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.plot import WIDTH, svg, text
from tests.rolling.kubelet import Replica

STEP_S = 0.5
LEFT, RIGHT, ROW = 110, 30, 46


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request ended, which replica answered it, and how; None: not at all."""

    at: float
    replica: str
    status: int | None


def picture(began: float, answers: Sequence[Answer], deployments: Sequence[Sequence[Replica]]) -> str:
    """As an SVG.

    Args:
        began: When the load began; what came before is cut off.
    """
    ended = max(answer.at for answer in answers)
    steps = int((ended - began) / STEP_S) + 1

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(at - began, 0) / (steps * STEP_S), 1)

    def bars(top: float, found: Sequence[Answer], most: int, kind: str) -> list[str]:
        counts = Counter(int((answer.at - began) / STEP_S) for answer in found)
        width = x(began + STEP_S) - LEFT
        return [
            f'<rect class="{kind}" x="{LEFT + width * step:.1f}" y="{top + (ROW - 10) * (1 - count / most):.1f}"'
            f' width="{max(width - 1, 1):.1f}" height="{(ROW - 10) * count / most:.1f}"/>'
            for step, count in sorted(counts.items())
        ]

    most = max(Counter(int((answer.at - began) / STEP_S) for answer in answers).values())
    failed = sum(answer.status != 200 for answer in answers)
    title = "Both Deployments restarted under load"
    parts = [
        text(24, 34, title, "title"),
        text(24, 54, f"{len(answers):,} requests, {failed} failed; most: {most / STEP_S:,.0f} a second", "note"),
        text(LEFT - 12, 100, "all", "value", "end"),
        *bars(70, answers, most, "ours"),
    ]
    y = 70.0 + ROW + 10
    for replicas in reversed(deployments):
        for replica in replicas:
            parts.append(text(LEFT - 12, y + 22, replica.name, anchor="end"))
            born, end = x(replica.at["started"]), x(replica.at.get("gone", ended))
            parts.append(
                f'<rect class="track" x="{born:.1f}" y="{y:.0f}" width="{end - born:.1f}" height="{ROW - 10}"/>'
            )
            own = [answer for answer in answers if answer.replica == replica.name]
            parts += bars(y, own, most, "ours")
            for what, kind in (("ready", "other"), ("deleted", "hand"), ("signalled", "hand")):
                if began <= replica.at.get(what, 0) <= ended:
                    at = x(replica.at[what])
                    parts.append(f'<rect class="{kind}" x="{at:.1f}" y="{y - 3:.0f}" width="2" height="{ROW - 4}"/>')
            y += ROW
        y += 10
    note = "grey: its life; a grey stroke: ready; two orange ones: deleted (preStop begins), then SIGTERM"
    parts += [text(LEFT, y + 12, "0 s", "tick"), text(WIDTH - RIGHT, y + 12, f"{ended - began:.0f} s", "tick", "end")]
    parts.append(text(WIDTH / 2, y + 12, note, "note", "middle"))
    return svg(y + 30, title, parts)
