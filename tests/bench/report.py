"""What is told of the comparison: a table for each level, and a row for each goal."""

from collections.abc import Sequence

from tests.bench.compare import Results
from tests.bench.rows import Row, markdown
from tests.bench.variants import Level, Variant

HEAD = ("", "tracing", "requests/s", "of bare", "p50 ms", "p99 ms", "app µs", "service µs", "busy", "spans")
"""CPU is a request's; `busy` is how much of its core the app used, and of the other core service and load together."""


def table(results: Results, variants: Sequence[Variant], level: Level) -> str:
    """The variants at one level."""
    lines = []
    results = results.rounds
    for variant in variants:
        tracing = "on" if variant.tracing else "off"
        cell = results.cell(variant.name, level)
        if not any(run.variant == variant.name for run in results.runs):
            continue
        if cell is None:
            lines.append([variant.title, tracing, "void", *[""] * (len(HEAD) - 3)])
            continue
        share = results.ratio(variant.name, "bare-traced" if variant.tracing else "bare", level)
        void = f" ({len(cell.voids)} void)" if cell.voids else ""
        lines.append(
            [
                variant.title + void,
                tracing,
                f"{cell.median('per_second'):,.0f}",
                "" if share is None else f"{share:.2f}",
                f"{cell.median('p50_ms'):.2f}",
                f"{cell.median('p99_ms'):.2f}",
                f"{cell.median('app_us'):,.0f}",
                f"{cell.median('service_us'):,.0f}",
                f"{cell.median('app_busy'):.0%}, {cell.median('service_busy') + cell.median('load_busy'):.0%}",
                f"{cell.median('spans'):.1f}" if variant.tracing else "",
            ]
        )
    return markdown(HEAD, lines)


def goal_rows(results: Results) -> list[Row]:
    """What the comparison says of the goals; of those that it has measured."""
    near, results = results.near, results.rounds
    at_1, at_64, at_256, slow = Level(1), Level(64), Level(256), Level(64, slow=True)
    found = {
        "1": results.ratio("ours-journal", "plain", at_64),
        "2 httpx": results.ratio("ours-spans", "hand-httpx", at_64),
        "2 aiohttp": results.ratio("ours-spans", "hand-aiohttp", at_64),
        "3 off": results.ratio("ours-journal", "bare", at_64),
        "3 on": results.ratio("ours-spans", "bare-traced", at_64),
        "4": results.ratio("ours-journal", "plain", at_256),
        "5": results.ratio("ours-spans", "hand-httpx", at_1, "p50_ms"),
        "6": results.of_rounds(
            ("ours-journal", "bare", "plain"), at_64, "app_us", lambda ours, bare, plain: (ours - bare) / (plain - bare)
        ),
        "7": near.ratio("ours-unmetered", "bare", at_64, "app_us"),
        "11": results.ratio("ours-journal", "bare", slow),
    }
    return [Row(key, value, "x", goal=key) for key, value in found.items() if value is not None]
