"""`make bench`: the whole comparison; or parts of it, while something is being made faster.

    make bench                                                  all of it, about half an hour
    python -m tests.bench --quick                               one round of bare, plain and ours at 64
    python -m tests.bench --profile ours-journal --concurrency 64
    python -m tests.bench --variants bare,ours-journal --concurrency 64 --rounds 5
    python -m tests.bench --only start                          apps, calls, journal, ledger or start
    python -m tests.bench --write                               all of it, and into the docs
    python -m tests.bench --again --write                       nothing but what .bench/last.json has, into the docs

The app is pinned to core 0; load and credits service to core 1. Two benches on one machine take turns, run by run.
"""

import argparse
import asyncio
import contextlib
import importlib
import pstats
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench import page
from tests.bench.compare import NEAR, Bench, Results, compare, compare_near, line, pin_load
from tests.bench.processes import ROOT
from tests.bench.record import Record
from tests.bench.report import table
from tests.bench.rows import Row
from tests.bench.variants import BY_NAME, LEVELS, PEERS, VARIANTS, Level, Variant

QUICK = ("bare", "plain", "ours-journal")
PARTS = ("apps", "calls", "journal", "ledger", "start")


def say(text: str) -> None:
    print(f"· {text}", flush=True)


@contextlib.contextmanager
def places() -> Iterator[tuple[Path, Path]]:
    """A directory on the disk, for /tmp may be in memory, and one in memory."""
    home = ROOT / ".bench"
    home.mkdir(exist_ok=True)
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=home) as on_disk,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="metered-billing-") as in_memory,
    ):
        yield Path(on_disk), Path(in_memory)


async def apps(
    variants: Sequence[Variant], levels: Sequence[Level], options: argparse.Namespace, record: Record
) -> None:
    """The comparison of apps."""
    how = f"seed {options.seed}, {options.rounds} rounds of {options.seconds:g} s"
    say(f"{len(variants)} apps at {len(levels)} levels: {how}")
    with places() as (on_disk, in_memory):
        bench = Bench(on_disk, in_memory)
        try:
            await bench.start(variants)
            results = await compare(bench, variants, levels, options.rounds, options.seconds, options.seed, say)
            if Level(64) in levels and set(NEAR) <= {variant.name for variant in variants}:
                results = Results([*results.runs, *await compare_near(bench, 2 * options.rounds, say)])
        finally:
            bench.stop()
    print()
    for level in levels:
        print(f"{level}\n\n{table(results, variants, level)}")
    if options.peers:
        record.peers = list(results.runs)
    else:
        record.runs = list(results.runs)
    record.measured("peers" if options.peers else "apps", how)


async def start(options: argparse.Namespace) -> list[Row]:
    """Imports, start-up, memory."""
    from tests.bench import start as part

    with places() as (on_disk, in_memory):
        return await part.measure(on_disk, in_memory, quick=options.quick, say=say)


def alone(name: str, quick: bool) -> list[Row]:
    """The journal, the ledger or the calls, without an app around it."""
    rows: list[Row] = importlib.import_module(f"tests.bench.{name}").measure(quick=quick)
    return rows


async def profile(variant: Variant, level: Level, seconds: float, sort: Sequence[str]) -> None:
    """Where the event loop's thread of an app spends its time, by cProfile."""
    with places() as (on_disk, in_memory):
        path = on_disk / "profile"
        bench = Bench(on_disk, in_memory, path)
        try:
            await bench.start([variant])
            process = bench.app(variant.name)
            run = await bench.run(variant, level, seconds, at_start=lambda: process.signal(signal.SIGUSR1))
            process.signal(signal.SIGUSR2)
            while not path.exists():
                await asyncio.sleep(0.05)
        finally:
            bench.stop()
        say(f"under the profiler: {line(run)}")
        for order in sort:
            pstats.Stats(str(path)).sort_stats(order).print_stats(45)
        shutil.copy(path, ROOT / ".bench" / f"{variant.name}.prof")
        say(f"more of it: python -m pstats .bench/{variant.name}.prof")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true", help="one round of a few, at 64")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--variants", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--peers", action="store_true", help="others' packages, which `make bench-peers` installs")
    parser.add_argument("--concurrency", type=int, help="this level only")
    parser.add_argument("--slow", action="store_true", help="with a handler of 20 ms")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--profile", choices=sorted(BY_NAME), help="profile one app instead")
    parser.add_argument("--write", action="store_true", help="put the figures into the docs")
    parser.add_argument("--again", action="store_true", help="measure nothing: show the last figures")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def main() -> None:
    options = arguments()
    try:
        import uvloop
    except ImportError:
        sys.exit("The bench has an environment of its own: `make bench`, or .venv-bench/bin/python -m tests.bench …")
    if warning := pin_load():
        say(warning)
    record = Record.load()
    part_of_apps = (
        options.quick or options.variants or options.concurrency or options.slow or options.profile or options.peers
    )
    parts = [options.only] if options.only else ["apps"] if part_of_apps else list(PARTS)
    level = Level(options.concurrency or 64, options.slow)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.profile:
            runner.run(profile(BY_NAME[options.profile], level, options.seconds, ("tottime", "cumtime")))
            return
        for part in [] if options.again else parts:
            if part == "apps":
                names = (
                    options.variants.split(",")
                    if options.variants
                    else QUICK
                    if options.quick
                    else [v.name for v in VARIANTS]
                )
                if options.peers:
                    names = ["bare", "bare-traced", "base", "ours-journal", *(peer.name for peer in PEERS)]
                variants = [v for v in BY_NAME.values() if v.name in names]
                levels = [level] if options.quick or options.concurrency or options.slow or options.peers else LEVELS
                runner.run(apps(variants, levels, options, record))
            else:
                rows = runner.run(start(options)) if part == "start" else alone(part, options.quick)
                record.rows[part] = rows
                record.measured(part, f"{'quick, ' if options.quick else ''}seed {options.seed}")
                print(f"\n{page.row_table(rows)}")
    if not options.again and (options.peers or not part_of_apps):
        record.save()
    if not options.peers:
        print(page.goals(page.all_rows(record), whole=not part_of_apps))
    if options.write:
        page.write(record)
        say(f"written: {page.PAGE.relative_to(ROOT)}, and the pictures")
    if void := [run for run in (*record.runs, *record.peers) if run.void]:
        sys.exit("\n".join(f"✗ {line(run)}" for run in void))


if __name__ == "__main__":
    main()
