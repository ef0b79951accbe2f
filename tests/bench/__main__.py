"""`make bench`: the whole comparison; or parts of it, while something is being made faster.

make bench                                                  all of it
python -m tests.bench --quick                               one round of bare, plain and ours at 64
python -m tests.bench --profile ours-journal --concurrency 64
python -m tests.bench --variants bare,ours-journal --concurrency 64 --rounds 5
"""

import argparse
import asyncio
import contextlib
import pstats
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench import app, report
from tests.bench.compare import Bench, compare, line, pin_load
from tests.bench.processes import ROOT
from tests.bench.rows import Row, goal_lines, markdown
from tests.bench.variants import BY_NAME, LEVELS, VARIANTS, Level, Variant

QUICK = ("bare", "plain", "ours-journal")


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
        tempfile.TemporaryDirectory(
            dir=memory if memory.is_dir() else None, prefix="metered-billing-bench-"
        ) as in_memory,
    ):
        yield Path(on_disk), Path(in_memory)


async def apps(variants: Sequence[Variant], levels: Sequence[Level], options: argparse.Namespace) -> list[Row]:
    """The comparison of apps."""
    if warning := pin_load():
        say(warning)
    shape = f"{len(variants)} apps, {len(levels)} levels, {options.rounds} rounds of {options.seconds} s"
    say(f"seed {options.seed}: {shape}")
    with places() as (on_disk, in_memory):
        bench = Bench(on_disk, in_memory)
        try:
            await bench.start(variants)
            results = await compare(bench, variants, levels, options.rounds, options.seconds, options.seed, say)
        finally:
            bench.stop()
    print()
    for level in levels:
        print(f"{level} at a time\n\n{report.table(results, variants, level)}")
    return report.goal_rows(results)


async def profile(variant: Variant, level: Level, seconds: float, sort: Sequence[str]) -> None:
    """Where the event loop's thread of an app spends its time, by cProfile."""
    pin_load()
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true", help="one round of a few, at 64")
    parser.add_argument("--variants", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--concurrency", type=int, help="this level only")
    parser.add_argument("--slow", action="store_true", help="with a handler of 20 ms")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--profile", choices=sorted(BY_NAME), help="profile one app instead")
    options = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        sys.exit("The bench has an environment of its own: `make bench`, or .venv-bench/bin/python -m tests.bench …")
    run = asyncio.Runner(loop_factory=uvloop.new_event_loop).run
    if options.profile:
        level = Level(options.concurrency or 64, options.slow)
        run(profile(BY_NAME[options.profile], level, options.seconds, ("tottime", "cumtime")))
        return
    options.rounds = options.rounds or (1 if options.quick else 3)
    names = options.variants.split(",") if options.variants else QUICK if options.quick else list(BY_NAME)
    variants = [v for v in VARIANTS if v.name in names and (not v.lean or app.lean_transport() is not None)]
    levels = [level for level in LEVELS if not options.slow or level.slow]
    if options.concurrency or options.quick:
        levels = [Level(options.concurrency or 64, options.slow)]
    rows = run(apps(variants, levels, options))
    print(markdown(["goal", "", "at least", "aim", "measured", ""], goal_lines(rows)))


if __name__ == "__main__":
    main()
