"""docs/explanation/performance.md: what stands between its marks, and its pictures, from what was measured."""

from collections.abc import Iterable

from tests.bench import plot
from tests.bench.compare import Results
from tests.bench.processes import ROOT
from tests.bench.record import Record
from tests.bench.report import goal_rows, table
from tests.bench.rows import Row, goal_lines, markdown
from tests.bench.variants import BY_NAME, LEVELS, VARIANTS, Level

PAGE = ROOT / "docs" / "explanation" / "performance.md"
PICTURES = ROOT / "docs" / "pictures"
BEGIN = "<!-- measured by tests/bench: begin -->\n"
END = "<!-- measured by tests/bench: end -->\n"

GROUPS = (
    ("tracing off", "bare", ("plain", "base", "ours-journal", "frozen-journal", "lean-journal", "ours-unmetered")),
    ("tracing on, in the bare route too", "bare-traced", ("hand-httpx", "hand-aiohttp", "ours-spans", "lean-spans")),
)
SERIES = (
    ("bare", "bare route", "other"),
    ("ours-journal", "ours", "ours"),
    ("plain", "by hand: httpx", "hand"),
)
TITLES = {"calls": "The calls", "journal": "The journal", "ledger": "The ledger", "start": "Start and memory"}


def page(text: str, measured: str) -> str:
    """The page, with something else between its marks.

    Raises:
        ValueError: They are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has lost its marks")
    return f"{before}{BEGIN}\n{measured}\n{END}{after}"


def write(record: Record) -> None:
    """The page and the pictures."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), measured(record)), encoding="utf-8")
    for name, picture in pictures(record.results).items():
        (PICTURES / name).write_text(picture, encoding="utf-8")


def all_rows(record: Record) -> list[Row]:
    """Those of the comparison, and those of the other parts."""
    return goal_rows(record.results) + [row for rows in record.rows.values() for row in rows]


def measured(record: Record) -> str:
    """What stands between the marks."""
    parts = []
    if record.runs:
        parts += [
            "### One request, ten items\n",
            "![Throughput as a share of the bare route, 64 requests at once](../pictures/bench-share.svg)\n",
            "![Requests a second by how many are sent at once](../pictures/bench-concurrency.svg)\n",
        ]
        for level in LEVELS:
            if any(run.level == level for run in record.runs):
                command = f"python -m tests.bench --only apps --concurrency {level.concurrency}"
                parts += [
                    f"**{level}** (`{command}{' --slow' if level.slow else ''}`)\n",
                    table(record.results, VARIANTS, level),
                ]
    if record.peers:
        variants = [BY_NAME[name] for name in dict.fromkeys(run.variant for run in record.peers)]
        variants.sort(key=list(BY_NAME.values()).index)
        parts += ["### Others, 64 at once\n", "`make bench-peers`\n", table(Results(record.peers), variants, Level(64))]
    for name, rows in record.rows.items():
        parts += [f"### {TITLES.get(name, name)}\n", f"`python -m tests.bench --only {name}`\n", row_table(rows)]
    parts += ["### Machine and versions\n", where(record)]
    return "\n".join(parts)


def goals(rows: Iterable[Row], whole: bool = True) -> str:
    """The table of goals; or of those that were measured."""
    lines = [line for line in goal_lines(rows) if whole or line[4]]
    return markdown(["goal", "what", "at least", "aim", "measured", "reached"], lines, "llrrrl")


def row_table(rows: Iterable[Row]) -> str:
    """Rows of a part, as they are."""
    return markdown(
        ["what", "", "", "against"],
        [
            [row.what, f"{row.value:,.0f}" if row.value >= 100 else f"{row.value:.3g}", row.unit, row.baseline]
            for row in rows
        ],
        "lrll",
    )


def where(record: Record) -> str:
    """The machine, the versions, and how each part was run."""
    lines = [[name, what] for name, what in record.machine.items()]
    lines += [[TITLES.get(part, part), how] for part, how in record.how.items()]
    return markdown(["", ""], lines, "ll")


def pictures(results: Results) -> dict[str, str]:
    """By file name; only what has been measured."""
    found = {}
    results = results.rounds
    groups = []
    for title, base, names in GROUPS:
        shares = []
        for name in names:
            share = results.ratio(name, base, Level(64))
            if share is not None:
                kind = (
                    "ours"
                    if name.startswith(("ours", "lean", "frozen"))
                    else "hand"
                    if "hand" in BY_NAME[name].title
                    else "other"
                )
                shares.append((BY_NAME[name].title, kind, share))
        if shares:
            groups.append((title, shares))
    if groups:
        found["bench-share.svg"] = plot.bars(
            "How much of the bare route's throughput is left",
            "64 requests at once of ten items each, one in ten with a refund; the bare route is 1",
            groups,
        )
    levels = [level for level in LEVELS if not level.slow and results.cell("bare", level)]
    series = []
    for name, title, kind in SERIES:
        cells = [cell for level in levels if (cell := results.cell(name, level))]
        if levels and len(cells) == len(levels):
            series.append((title, kind, [cell.median("per_second") for cell in cells]))
    if series:
        found["bench-concurrency.svg"] = plot.lines(
            "Requests a second",
            "one core for the app; tracing off",
            [str(level.concurrency) for level in levels],
            series,
        )
    return found
