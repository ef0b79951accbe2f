"""The comparison of apps: what each run is, and what is made of many."""

import asyncio
import dataclasses
import gc
import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import ITEMS, USERS, Load
from tests.bench.processes import TENANT, TOKEN, Process, alone, ask, busy_s, cpu_s, go_first, main_thread_cpu_s, pin
from tests.bench.variants import BY_NAME, Level, Variant

APP_CORE, LOAD_CORE = 0, 1
WARM_UP_S = 0.7
GRANTED = 10**9
SETTLED_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one variant.

    Args:
        app_us: CPU of the app's process a request, of which `loop_us` on the event loop's thread.
        service_us: CPU of the credits service a request.
        garbage: Objects a request that only the cyclic garbage collector could free.
        others: What others used of the app's core and of the load's, as a share.
        void: Why it does not count, or "".
    """

    variant: str
    level: Level
    round: int
    per_second: float
    p50_ms: float
    p99_ms: float
    app_us: float
    loop_us: float
    service_us: float
    load_us: float
    app_busy: float
    service_busy: float
    load_busy: float
    others: tuple[float, float]
    settled_s: float
    spans: float
    garbage: float
    void: str = ""


class Bench:
    """The processes, kept up and idle between runs."""

    def __init__(self, directory: Path, memory: Path, profile: Path | None = None) -> None:
        self._directory = directory
        self._memory = memory
        self._profile = profile
        self._facilitator: Process | None = None
        self._apps: dict[str, Process] = {}
        self._tenants: dict[str, str] = {}
        self._headers: dict[str, list[dict[str, str]]] = {}
        self._spent: dict[str, int] = defaultdict(int)
        self._runs = 0

    async def start(self, variants: Sequence[Variant]) -> None:
        """Start the service, and an app for each variant."""
        database = f"sqlite:///{self._directory}/credits.db"
        self.service = Process(
            "service", database, LOAD_CORE, self._directory, {"METERED_BILLING_TOKENS": f"{TOKEN}=admin"}
        )
        await self.service.up("/healthz")
        if BY_NAME["peer-x402"] in variants:
            self._facilitator = Process("facilitator", "stub", LOAD_CORE, self._directory, {})
            await self._facilitator.up("/supported")
        for variant in variants:
            self._tenants[variant.name] = f"{TENANT}-{variant.name}"
            await self._start(variant)
            for user in range(USERS):
                self._ask(
                    "/v1/grants",
                    {
                        "tenant_id": self._tenants[variant.name],
                        "user_id": f"user-{user}",
                        "amount": GRANTED,
                        "reason": "bench",
                    },
                )

    async def _start(self, variant: Variant) -> None:
        place = self._memory if variant.journal == "memory" else self._directory
        environment = {
            "BENCH_CREDITS": self.service.url,
            "BENCH_TOKEN": TOKEN,
            "BENCH_TENANT": self._tenants[variant.name],
            "BENCH_JOURNAL": str(place / f"journal-{variant.name}"),
            "BENCH_FACILITATOR": "" if self._facilitator is None else self._facilitator.url,
            "BENCH_PROFILE": str(self._profile or ""),
        }
        self._apps[variant.name] = app = Process("app", variant.name, APP_CORE, self._directory, environment)
        await app.up("/stats")
        self._headers[variant.name] = await app.get("/headers")

    def stop(self) -> None:
        """All of them."""
        for process in (*self._apps.values(), self._facilitator, getattr(self, "service", None)):
            if process is not None:
                process.stop()

    async def renew(self, variant: Variant) -> None:
        """Its app in a new process."""
        self._apps[variant.name].stop()
        await self._start(variant)

    def app(self, name: str) -> Process:
        """A variant's process."""
        return self._apps[name]

    def _ask(self, path: str, body: dict[str, object] | None = None) -> dict[str, int]:
        answer: dict[str, int] = ask(self.service.url + path, body, "" if body is None else str(uuid.uuid4()))
        return answer

    async def run(
        self,
        variant: Variant,
        level: Level,
        seconds: float,
        number: int = 0,
        at_start: Callable[[], None] = lambda: None,
    ) -> Run:
        """Load it for a while, then look into the books."""
        with alone():
            return await self._run(variant, level, seconds, number, at_start)

    async def _run(
        self, variant: Variant, level: Level, seconds: float, number: int, at_start: Callable[[], None]
    ) -> Run:
        app, pid, service = self._apps[variant.name], self._apps[variant.name].pid, self.service.pid
        self._runs += 1
        load = Load(
            app.port, "/slow" if level.slow else "/create", level.concurrency, self._runs, self._headers[variant.name]
        )
        before = await app.get("/stats")
        gc.collect()
        gc.disable()
        await load.start()
        await asyncio.sleep(WARM_UP_S)
        at_start()
        begun = _Reading(pid, service, load)
        first = len(load.latencies_s)
        await asyncio.sleep(seconds)
        ended = _Reading(pid, service, load)
        latencies = sorted(load.latencies_s[first:]) or [0.0]
        await load.stop()
        gc.enable()
        stopped_at = time.monotonic()
        void = "; ".join(f"{times} x {what}" for what, times in load.errors.items())
        if variant.bills:
            self._spent[variant.name] += ITEMS * load.answered() - load.sent[True]
            void = void or await self._books(variant)
        elapsed = ended.at - begun.at
        requests = max(ended.answered - begun.answered, 1)
        app_s, service_s, load_s = ended.app - begun.app, ended.service - begun.service, ended.load - begun.load
        after = await app.get("/stats")
        spans, garbage = (after.get(each, 0) - before.get(each, 0) for each in ("spans", "garbage"))
        return Run(
            variant=variant.name,
            level=level,
            round=number,
            per_second=requests / elapsed,
            p50_ms=latencies[len(latencies) // 2] * 1e3,
            p99_ms=latencies[len(latencies) * 99 // 100] * 1e3,
            app_us=app_s / requests * 1e6,
            loop_us=(ended.loop - begun.loop) / requests * 1e6,
            service_us=service_s / requests * 1e6,
            load_us=load_s / requests * 1e6,
            app_busy=app_s / elapsed,
            service_busy=service_s / elapsed,
            load_busy=load_s / elapsed,
            others=(
                max(ended.cores[0] - begun.cores[0] - app_s, 0) / elapsed,
                max(ended.cores[1] - begun.cores[1] - service_s - load_s, 0) / elapsed,
            ),
            settled_s=time.monotonic() - stopped_at,
            spans=spans / max(load.answered(), 1),
            garbage=garbage / max(load.answered(), 1),
            void=void,
        )

    async def _books(self, variant: Variant) -> str:
        """What is wrong with them, once every refund has gone through; or ""."""
        expected = GRANTED * USERS - self._spent[variant.name]
        until = time.monotonic() + SETTLED_WITHIN_S
        while (balance := await asyncio.to_thread(self._balance, variant)) != expected:
            if time.monotonic() > until:
                self._spent[variant.name] += expected - balance
                return f"the books are off by {balance - expected:+} credits"
            await asyncio.sleep(0.05)
        return ""

    def _balance(self, variant: Variant) -> int:
        tenant = self._tenants[variant.name]
        return sum(self._ask(f"/v1/balance?tenant_id={tenant}&user_id=user-{user}")["balance"] for user in range(USERS))


class _Reading:
    """The clocks, at one moment."""

    def __init__(self, app: int, service: int, load: Load) -> None:
        self.at = time.perf_counter()
        self.answered = load.answered()
        self.app, self.loop, self.service = cpu_s(app), main_thread_cpu_s(app), cpu_s(service)
        self.load = time.process_time()
        self.cores = busy_s(APP_CORE), busy_s(LOAD_CORE)


@dataclass(frozen=True, slots=True)
class Cell:
    """A variant at a level: medians over the rounds; ratios are taken within each round."""

    variant: Variant
    level: Level
    runs: Sequence[Run]
    voids: Sequence[Run]

    def median(self, field: str) -> float:
        """Of a field of its runs."""
        values: list[float] = [getattr(run, field) for run in self.runs]
        return statistics.median(values)


class Results:
    """All the runs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs

    def cell(self, name: str, level: Level) -> Cell | None:
        """A variant at a level, or None where nothing of it counts."""
        found = [run for run in self.runs if (run.variant, run.level) == (name, level)]
        good = [run for run in found if not run.void]
        return Cell(BY_NAME[name], level, good, [run for run in found if run.void]) if good else None

    @property
    def rounds(self) -> "Results":
        """Without those of `compare_near`, whose rounds have numbers below 0."""
        return Results([run for run in self.runs if run.round >= 0])

    @property
    def near(self) -> "Results":
        """Those of `compare_near`; or, where there are none, all."""
        return Results([run for run in self.runs if run.round < 0] or self.runs)

    def ratio(self, name: str, other: str, level: Level, field: str = "per_second") -> float | None:
        """The median of the ratios of each round that has both."""
        return self.of_rounds((name, other), level, field, lambda one, two: one / two)

    def of_rounds(self, names: Sequence[str], level: Level, field: str, combine: Callable[..., float]) -> float | None:
        """The median of what `combine` makes of those variants' figures in each round that has all of them."""
        by_round: dict[int, dict[str, float]] = defaultdict(dict)
        for run in self.runs:
            if run.level == level and run.variant in names and not run.void:
                by_round[run.round][run.variant] = getattr(run, field)
        whole = [
            combine(*(found[name] for name in names)) for found in by_round.values() if len(found) == len(set(names))
        ]
        return statistics.median(whole) if whole else None


async def compare(
    bench: Bench,
    variants: Sequence[Variant],
    levels: Sequence[Level],
    rounds: int,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> Results:
    """Every variant at every level, `rounds` times, in random order within each level of each round."""
    rng = random.Random(seed)
    runs: list[Run] = []
    total = rounds * len(levels) * len(variants)
    begun = time.monotonic()
    for number in range(1, rounds + 1):
        for level in rng.sample(list(levels), len(levels)):
            for variant in rng.sample(list(variants), len(variants)):
                run = await bench.run(variant, level, seconds, number)
                runs.append(run)
                left_s = (time.monotonic() - begun) / len(runs) * (total - len(runs))
                say(f"round {number}/{rounds}, {int(left_s) // 60}:{int(left_s) % 60:02} left  {line(run)}")
    return Results(runs)


NEAR = ("bare", "ours-unmetered")
"""So near to each other that two processes of the same app differ by more: where things lie in memory is chance."""


async def compare_near(bench: Bench, rounds: int, say: Callable[[str], None]) -> list[Run]:
    """Those two at 64, many times: short runs, there and back, of new processes each time."""
    runs: list[Run] = []
    variants = [BY_NAME[name] for name in NEAR]
    for number in range(1, rounds + 1):
        for variant in variants:
            await bench.renew(variant)
        both = [await bench.run(variant, Level(64), 0.7, -number) for variant in (*variants, *reversed(variants))]
        for one, other in ((both[0], both[3]), (both[1], both[2])):
            runs.append(dataclasses.replace(one, app_us=(one.app_us + other.app_us) / 2, void=one.void or other.void))
        bare, ours = runs[-2:]
        say(f"an unmetered route, {number}/{rounds}: {ours.app_us:.1f} µs, bare {bare.app_us:.1f} µs")
    return runs


def line(run: Run) -> str:
    """A run, in short."""
    text = (
        f"{run.variant:15} {run.level!s:27} {run.per_second:6.0f}/s  p50 {run.p50_ms:7.2f} ms"
        f"  app {run.app_us:6.0f} µs (loop {run.loop_us:5.0f})  service {run.service_us:5.0f} µs"
        f"  busy: app {run.app_busy:4.0%}, service {run.service_busy:4.0%}, load {run.load_busy:4.0%},"
        f" others {run.others[0]:.0%} {run.others[1]:.0%}"
    )
    if run.garbage >= 0.5:
        text += f"  {run.garbage:.1f} garbage"
    if run.spans:
        text += f"  {run.spans:.1f} spans"
    return text + (f"  ✗ VOID: {run.void}" if run.void else "")


def pin_load() -> str:
    """Keep this process to the load's core. Returns what to say where there is none."""
    go_first()
    if pin(APP_CORE) and pin(LOAD_CORE):
        return ""
    return f"this machine lends us no core {APP_CORE} and {LOAD_CORE}: app and load share, and figures say little"
