"""The card that a diagram is drawn on, its colours, and lines of text on it."""

from collections.abc import Sequence
from html import escape

WIDTH = 860

_STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
  .back { fill: #ffffff; }
  .name { font-weight: 600; }
  .note { fill: #59636e; font-size: 12.5px; }
  .label { font-size: 13px; stroke: #ffffff; stroke-width: 6; paint-order: stroke; stroke-linejoin: round; }
  .box { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.5; }
  .line { fill: none; stroke: #8c959f; stroke-width: 1.5; }
  .tip { fill: #8c959f; }
  .dashed { stroke-dasharray: 5 4; }
  .good { fill: #dafbe1; stroke: #1a7f37; }
  .idle { fill: #eaeef2; stroke: #8c959f; }
  .person { fill: #fff1e5; stroke: #bc4c00; }
  .synced { fill: #ddf4ff; stroke: #0969da; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .back { fill: #0d1117; }
    .note { fill: #9198a1; }
    .label { stroke: #0d1117; }
    .box { fill: #161b22; stroke: #9198a1; }
    .good { fill: #12261e; stroke: #3fb950; }
    .idle { fill: #1c2129; stroke: #6e7681; }
    .person { fill: #2b1a0f; stroke: #f0883e; }
    .synced { fill: #0c2d4a; stroke: #4493f8; }
  }
"""


def card(height: float, title: str, parts: Sequence[str]) -> str:
    """The whole picture; `title` is what is read out instead of it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<rect class="back" width="{WIDTH}" height="{height:.0f}" rx="8"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "middle") -> str:
    """One line, on its base line."""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(what)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """A straight line whose tip touches its end."""
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    along_x, along_y = (x2 - x1) / length, (y2 - y1) / length
    back_x, back_y = x2 - 9 * along_x, y2 - 9 * along_y
    tip = (
        f"{x2:.1f},{y2:.1f} {back_x - 4 * along_y:.1f},{back_y + 4 * along_x:.1f}"
        f" {back_x + 4 * along_y:.1f},{back_y - 4 * along_x:.1f}"
    )
    return (
        f'<line class="line {kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{back_x:.1f}" y2="{back_y:.1f}"/>'
        f'<polygon class="tip" points="{tip}"/>'
    )
