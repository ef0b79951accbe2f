"""Two pictures, in SVG and by hand: they follow the reader's light or dark colours."""

import math
from collections.abc import Sequence
from html import escape

STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 16px; }
  .note, .tick { fill: #59636e; font-size: 12px; }
  .value { font-weight: 600; }
  .group { fill: #59636e; font-weight: 600; font-size: 13px; }
  .back { fill: #ffffff; }
  .track { fill: #f0f2f5; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .ours { fill: #0f7b6c; stroke: #0f7b6c; }
  .hand { fill: #d2691e; stroke: #d2691e; }
  .other { fill: #8c959f; stroke: #8c959f; }
  .line { fill: none; stroke-width: 3; stroke-linejoin: round; stroke-linecap: round; }
  text.ours, text.hand, text.other { stroke: none; font-weight: 600; font-size: 13px; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note, .tick, .group { fill: #9198a1; }
    .back { fill: #0d1117; }
    .track { fill: #1c2129; }
    .grid { stroke: #30363d; }
    .ours { fill: #2dd4bf; stroke: #2dd4bf; }
    .hand { fill: #f0883e; stroke: #f0883e; }
    .other { fill: #8b949e; stroke: #8b949e; }
    .line { fill: none; }
  }
"""

WIDTH = 860


def svg(height: float, title: str, parts: Sequence[str]) -> str:
    """A picture of these parts."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title, quote=True)}">\n<style>{STYLE}</style>\n'
        f'<rect class="back" width="{WIDTH}" height="{height:.0f}" rx="8"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    """One line of it."""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(what)}</text>'


def bars(title: str, note: str, groups: Sequence[tuple[str, Sequence[tuple[str, str, float]]]]) -> str:
    """Shares of one, as bars in groups; each bar has a label, a kind ("ours", "hand", "other") and a share."""
    left, right, row = 380, 70, 30
    parts = [text(24, 34, title, "title"), text(24, 54, note, "note")]
    y = 66.0
    for group, shares in groups:
        y += 30
        parts.append(text(24, y, group, "group"))
        y += 8
        for label, kind, share in shares:
            length = (WIDTH - left - right) * min(share, 1)
            parts += [
                text(left - 12, y + 19, label, anchor="end"),
                f'<rect class="track" x="{left}" y="{y + 4:.0f}" width="{WIDTH - left - right}" height="22" rx="3"/>',
                f'<rect class="{kind}" x="{left}" y="{y + 4:.0f}" width="{max(length, 1):.1f}" height="22" rx="3"/>',
                text(left + length + 8, y + 20, f"{share:.2f}", "value"),
            ]
            y += row
    return svg(y + 20, title, parts)


def lines(title: str, note: str, levels: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """A line a series over the levels; the scale is logarithmic, for they are factors apart."""
    left, right, top, bottom, height = 76, 210, 84, 58, 430
    values = [value for _, _, points in series for value in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(index: int) -> float:
        return left + (WIDTH - left - right) * (index / max(len(levels) - 1, 1))

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (math.log10(value) - low) / max(high - low, 1))

    parts = [text(24, 34, title, "title"), text(24, 54, note, "note")]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" y1="{at:.0f}" x2="{WIDTH - right}" y2="{at:.0f}"/>')
        parts.append(text(left - 10, at + 4, f"{10**power:,}", "tick", "end"))
    parts += [text(x(index), height - bottom + 22, level, "tick", "middle") for index, level in enumerate(levels)]
    parts.append(text(x(0), height - 14, "requests at once", "note"))
    ends = _apart([y(points[-1]) for _, _, points in series], 18)
    for (label, kind, points), end in zip(series, ends, strict=True):
        path = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(points))
        parts.append(f'<polyline class="line {kind}" points="{path}" style="fill:none"/>')
        parts += [
            f'<circle class="{kind}" cx="{x(index):.1f}" cy="{y(value):.1f}" r="4"/>'
            for index, value in enumerate(points)
        ]
        parts.append(text(WIDTH - right + 14, end + 5, label, kind))
    return svg(height, title, parts)


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The same places, moved so far that their labels do not cover each other."""
    moved = [0.0] * len(places)
    last = -math.inf
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        last = moved[index] = max(places[index], last + least)
    return moved
