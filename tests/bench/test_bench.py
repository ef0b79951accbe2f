"""The bench's arithmetic: a wrong sum would make a slow thing look fast."""

import asyncio
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import page
from tests.bench.compare import Results, Run
from tests.bench.load import ITEMS, Load, request_bytes
from tests.bench.record import Record
from tests.bench.report import goal_rows, table
from tests.bench.rows import GOALS, Row, goal_lines, ratio
from tests.bench.variants import BY_NAME, Level

AT_64 = Level(64)


def a_run(variant: str, number: int, per_second: float, app_us: float = 100.0, void: str = "") -> Run:
    return Run(
        variant=variant,
        level=AT_64,
        round=number,
        per_second=per_second,
        p50_ms=1.0,
        p99_ms=2.0,
        app_us=app_us,
        loop_us=app_us,
        service_us=0.0,
        load_us=0.0,
        app_busy=1.0,
        service_busy=0.0,
        load_busy=0.0,
        others=(0.0, 0.0),
        settled_s=0.0,
        spans=0.0,
        garbage=0.0,
        void=void,
    )


def test_ratio_is_the_median_of_each_rounds_own() -> None:
    """A slow round slows both, so they are compared within it; a round that lacks one of them says nothing."""
    rounds = ((100, 50), (10, 6), (1000, 700))
    runs = [a_run("bare", number, bare) for number, (bare, _) in enumerate(rounds)]
    runs += [a_run("ours-journal", number, ours) for number, (_, ours) in enumerate(rounds)]
    runs.append(a_run("ours-journal", 99, 10**6))
    assert Results(runs).ratio("ours-journal", "bare", AT_64) == pytest.approx(0.6)


def test_run_whose_books_are_wrong_counts_for_nothing() -> None:
    """And the table says so."""
    results = Results([a_run("bare", 1, 100), a_run("ours-journal", 1, 90, void="the books are off by +1 credits")])
    assert results.ratio("ours-journal", "bare", AT_64) is None
    assert "void" in table(results, [BY_NAME["bare"], BY_NAME["ours-journal"]], AT_64)


def test_metering_costs_what_it_adds_to_the_bare_route() -> None:
    """Goal 6 compares what is added, not the whole request."""
    runs = [a_run("bare", 1, 1, 165), a_run("plain", 1, 1, 2165), a_run("ours-journal", 1, 1, 265)]
    assert {row.goal: row.value for row in goal_rows(Results(runs))}["6"] == pytest.approx(100 / 2000)


def test_goal_is_judged_by_its_worst_row() -> None:
    """Two engines serve goal 10; the slower decides. Where less is better, the most does."""
    lines = {line[0]: line for line in goal_lines([Row("a", 1.1, "x", goal="10"), Row("b", 0.95, "x", goal="10")])}
    assert lines["10"][-2:] == ["0.95", "least"]
    lines = {line[0]: line for line in goal_lines([Row("a", 1.0, "x", goal="7"), Row("b", 1.2, "x", goal="7")])}
    assert lines["7"][-2:] == ["1.2", "missed"]
    assert lines["1"][-1] == "not measured"


def test_row_for_a_goal_that_is_none_is_refused() -> None:
    """A slip in a key would leave the goal unmeasured without a word."""
    with pytest.raises(ValueError, match="no goal 99"):
        goal_lines([Row("a", 1, "x", goal="99")])


def test_aim_is_never_easier_than_least() -> None:
    """For each goal, in its own direction."""
    for goal in GOALS:
        assert goal.reached(goal.aim) == "aim"
        assert goal.reached(goal.least) == "least"


def test_ratios_read_well() -> None:
    """Small ones as a fraction."""
    assert [ratio(value) for value in (1 / 15, 0.6, 1.034, 12, 12.34)] == ["1/15", "0.6", "1.03", "12", "12.3"]


async def test_load_counts_what_was_answered() -> None:
    """Whole responses of 200, however they are cut up; and errors are no requests."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
            seen.append(head + await reader.readexactly(length))
            status = b"200 OK" if len(seen) % 7 else b"500 Oh"
            for piece in (b"HTTP/1.1 " + status + b"\r\ncontent-le", b"ngth: 2\r\n\r\n", b"{", b"}"):
                writer.write(piece)
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        load = Load(server.sockets[0].getsockname()[1], "/create", 3, seed=1)
        await load.start()
        while len(seen) < 60:
            await asyncio.sleep(0.001)
        await load.stop()
    assert load.answered() + load.errors["HTTP/1.1 500 Oh"] == len(seen)
    assert load.errors.keys() == {"HTTP/1.1 500 Oh"}
    broken = sum(b"broken" in request for request in seen)
    assert abs(broken - len(seen) / 10) <= 3
    assert len(load.latencies_s) == load.answered()


def test_request_has_ten_items_of_which_one_may_fail() -> None:
    """What the books are checked against."""
    for broken in (False, True):
        body = json.loads(request_bytes("/create", 1, broken).partition(b"\r\n\r\n")[2])
        assert len(body["items"]) == ITEMS
        assert [item["data"] for item in body["items"]].count("broken") == broken


def test_page_has_a_place_for_the_figures() -> None:
    """And its prose around them stays as it is."""
    text = page.PAGE.read_text(encoding="utf-8")
    before, after = text.partition(page.BEGIN)[0], text.partition(page.END)[2]
    assert page.page(text, "figures\n") == f"{before}{page.BEGIN}\nfigures\n\n{page.END}{after}"
    with pytest.raises(ValueError, match="marks"):
        page.page("no marks", "figures\n")


def test_measured_part_tells_every_level_goal_and_row() -> None:
    """With the command that measures it; and a picture each for shares and for levels."""
    record = Record(runs=[a_run("bare", 1, 5000), a_run("ours-journal", 1, 4000, 250), a_run("plain", 1, 300, 2e3)])
    record.rows["start"] = [Row("import metered_billing", 310.0, "ms", "starlette and httpx alone: 150 ms")]
    text = page.measured(record)
    assert "| ours: journal, log | off | 4,000 | 0.80 |" in text
    assert "python -m tests.bench --only apps --concurrency 64" in text
    assert "| import metered_billing | 310 | ms |" in text
    told = page.goals(page.all_rows(record))
    assert "| 3 off | 64 concurrent, tracing off in both: share of the bare route | 0.6 | 0.78 | 0.8 | aim |" in told
    pictures = page.pictures(record.results)
    assert set(pictures) == {"bench-share.svg", "bench-concurrency.svg"}
    for picture in pictures.values():
        ElementTree.fromstring(picture)


def test_figures_can_be_told_again(tmp_path: Path) -> None:
    """What is saved is what comes back."""
    record = Record({"disk": "fast"}, {"apps": "seed 1"}, [a_run("bare", 1, 5000.0)], {"start": [Row("a", 1.0, "ms")]})
    record.save(tmp_path / "last.json")
    assert Record.load(tmp_path / "last.json") == record
    assert Record.load(tmp_path / "none.json") == Record()


def test_near_apps_are_compared_by_runs_of_their_own() -> None:
    """Where there are some: they are many and short, and count for goal 7 alone."""
    runs = [a_run("bare", 1, 100, 100), a_run("ours-unmetered", 1, 50, 120)]
    assert {row.goal: row.value for row in goal_rows(Results(runs))}["7"] == pytest.approx(1.2)
    runs += [a_run("bare", -1, 10**6, 100), a_run("ours-unmetered", -1, 10**6, 101)]
    assert {row.goal: row.value for row in goal_rows(Results(runs))}["7"] == pytest.approx(1.01)
    assert "| 100 |" in table(Results(runs), [BY_NAME["bare"]], AT_64)
