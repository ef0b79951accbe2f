"""`python -m tests.simulation SEEDS`: run seeds over all cores, tell what failed, and what was tried.

SEEDS is a number (so many, from 0), a range (`200-299`), or `seed:1234`: that one alone, with its trace.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from metered_billing.charge import TRANSITIONS
from tests.simulation.faults import KINDS
from tests.simulation.variants import SEEDS, VARIANTS
from tests.simulation.world import World, run

CHUNK = 20


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("seeds", nargs="?", default="1000", help="a number, a range such as 200-299, or seed:1234")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quiet", action="store_true", help="no trace of what failed")
    parser.add_argument("--broken", metavar="RULE", help="break one of variants.py: what comes of it?")
    options = parser.parse_args(arguments)
    seeds = seeds_of(options.seeds)
    if options.broken is not None:
        return broken(options.broken, seeds)
    if len(seeds) == 1:
        return alone(seeds[0], traced=not options.quiet)
    began = time.monotonic()

    def progress(done: int, failed: int) -> None:
        say(f"\r{done} of {len(seeds)} seeds, {failed} failed, {time.monotonic() - began:.0f} s", end="")

    failed, coverage = run_all(seeds, options.workers, progress)
    say("")
    for line in table(coverage):
        say(line)
    for seed, problems in failed[:20]:
        say(f"\nseed {seed}; its trace: make simulate SEEDS=seed:{seed}")
        for problem in problems[:5]:
            say(f"    {problem}")
    say(f"\n{len(seeds)} seeds in {time.monotonic() - began:.0f} s: {len(failed)} failed")
    untried = blind_to(coverage) if len(seeds) >= 1000 else []
    if untried:
        say(f"never tried: {', '.join(untried)}")
    return 1 if failed or untried else 0


def run_all(
    seeds: list[int], workers: int, progress: Callable[[int, int], None] = lambda done, failed: None
) -> tuple[list[tuple[int, list[str]]], Counter[tuple[str, str]]]:
    """Run the seeds in so many processes. Returns those that failed, each with what is wrong, and what struck where."""
    coverage: Counter[tuple[str, str]] = Counter()
    failed: list[tuple[int, list[str]]] = []
    done = 0
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawned) as pool:
        for found, struck in pool.map(run_some, [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]):
            done += min(CHUNK, len(seeds) - done)
            failed += found
            coverage += struck
            progress(done, len(failed))
    return failed, coverage


def blind_to(coverage: Counter[tuple[str, str]]) -> list[str]:
    """Faults that never struck, and rows of the table of states that never happened."""
    struck = {kind for kind, _ in coverage}
    rows = {row for rows in TRANSITIONS.values() for row in rows}
    return sorted({*KINDS, "batch"} - struck) + sorted(rows - {row for kind, row in coverage if kind == "transition"})


def seeds_of(text: str) -> list[int]:
    """The seeds that a text names: `1000` the first so many, `200-299` those, `seed:1234` that one."""
    if text.startswith("seed:"):
        return [int(text[5:])]
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else list(range(int(first)))


def run_some(seeds: list[int]) -> tuple[list[tuple[int, list[str]]], Counter[tuple[str, str]]]:
    """Run these, here; as `run_all`."""
    failed: list[tuple[int, list[str]]] = []
    coverage: Counter[tuple[str, str]] = Counter()
    for seed in seeds:
        world = run(seed)
        coverage += world.coverage
        if world.problems:
            failed.append((seed, world.problems))
    return failed, coverage


def alone(seed: int, *, traced: bool) -> int:
    """Run one seed, and show what happened in it."""
    world = run(seed)
    if traced:
        for line in trace_of(world):
            say(line)
    say(f"\nseed {seed}: {world.service_kind}, faults {world.profile.rates}")
    for problem in world.problems:
        say(f"    {problem}")
    say(f"{len(world.problems)} problems")
    return 1 if world.problems else 0


def broken(name: str, seeds: list[int]) -> int:
    """Break a rule on purpose, and show what comes of it. The seed that showed it the last time is tried first."""
    variant = next((variant for variant in VARIANTS if variant.name == name), None)
    if variant is None:
        say(f"no rule of that name; there are: {', '.join(variant.name for variant in VARIANTS)}")
        return 2
    say(f"the rule: {variant.breaks}")
    with variant.patch():
        found = next((world for world in map(run, [SEEDS.get(name, 0), *seeds]) if world.problems), None)
    if found is None:
        say(f"broken, and {len(seeds)} seeds do not show it")
        return 1
    say(f"broken: seed {found.seed} has {len(found.problems)} problems")
    for problem in found.problems[:5]:
        say(f"    {problem}")
    return 0


def trace_of(world: World) -> Iterator[str]:
    for at, who, *what in world.trace:
        said = " ".join(str(word) for word in what if word != "")
        yield f"{at:12.4f}  {who:16}  {said.replace(str(world.directory), '')}"


def table(coverage: Counter[tuple[str, str]]) -> Iterator[str]:
    """How often each fault struck, and at which state or in which operation."""
    for kind in (*KINDS, "transition", "batch"):
        found = sorted(((number, where) for (what, where), number in coverage.items() if what == kind), reverse=True)
        total = sum(number for number, _ in found)
        yield f"{kind:28}{total:8}  {', '.join(f'{where} {number}' for number, where in found)}"


def say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()
