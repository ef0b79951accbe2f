"""`make mutants`: whether the tests notice, wherever money is decided, that a line does something else.

Each mutant (`mutate.py`) is tried in a process of its own, forked when the tests have been collected: there
the changed function gets its new code, and the tests that run the changed line are run until one fails. What
works at import is tried on everything, imported afresh. A mutant that no test notices has to be in
`survivors.toml`, with the reason why that is all right; and what is written there has to survive.

    python -m tests.mutants [part of a mutant's name …]
"""

import argparse
import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import io
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NoReturn

import coverage
import pytest

from tests.mutants.mutate import Mutant, mutants_of

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "metered_billing"
SURVIVORS = Path(__file__).with_name("survivors.toml")

CONCLUDING = frozenset(
    f"Biller.{name}" for name in ("conclude", "release", "_begin_outcome", "_settle", "_told", "_tell", "_end")
)
SUBJECTS: dict[str, frozenset[str] | None] = {
    "charge.py": None,
    **{str(file.relative_to(SOURCE)): None for file in sorted((SOURCE / "outcomes").glob("*.py"))},
    "settler.py": None,
    "undoing.py": None,
    "biller.py": CONCLUDING,
}
"""The files that are changed, whole or these functions: of the biller what comes after the response."""

TESTS = {
    "charge.py": ["tests/test_charge.py"],
    "outcomes": ["tests/test_outcomes.py"],
    "settler.py": ["tests/test_settler.py", "tests/test_biller.py", "tests/test_inline.py"],
    "undoing.py": ["tests/test_settler.py"],
    "biller.py": ["tests/test_settler.py", "tests/test_biller.py"],
}
"""Which tests have to notice: a subject's own, so that it needs no other's to be safe."""

OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=native", "-m", "not slow",
           "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip

PATIENCE_S = 1.0
"""What one test may take beyond five times what it takes without the mutant, on a core of its own."""

AFRESH_S = 60.0
"""What all of a subject's tests may take, imports and all."""

BUSY = 30
"""How much longer it may take by the clock, where others are busy too."""


class Fork:
    """A child that runs `work`, and ends with the exit code that it returns, or by its alarm (`allow`)."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.scratch = tempfile.mkdtemp(prefix="mutant-")
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work)

    def _run(self, work: Callable[[], int]) -> NoReturn:
        code = 1
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
            os.environ["PYTEST_DEBUG_TEMPROOT"] = self.scratch
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            code = work()
        except BaseException:
            code = 1
        finally:
            os._exit(code)

    def ended(self) -> int | None:
        """Its exit code, negative where a signal ended it; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it has started and left behind
        shutil.rmtree(self.scratch, ignore_errors=True)
        return os.waitstatus_to_exitcode(status)


def allow(seconds: float) -> None:
    """End this process if what follows is an endless loop (so long on its core), or waits for ever."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, BUSY * seconds)


class Trial:
    """Tries mutants, a few at a time, and keeps count."""

    def __init__(self, number: int, at_once: int) -> None:
        self.survivors: list[Mutant] = []
        self.hung = 0
        self.tried = 0
        self._number = number
        self._at_once = at_once
        self._running: list[tuple[Fork, Mutant, Callable[[Fork], None]]] = []
        self._began = self._said = time.monotonic()
        self._reasons = written_down()

    def submit(
        self,
        mutant: Mutant,
        work: Callable[[], int],
        over: Callable[[Fork], None] = lambda fork: None,
    ) -> None:
        while len(self._running) >= self._at_once:
            self._look()
        self._running.append((Fork(work), mutant, over))

    def finish(self) -> None:
        while self._running:
            self._look()

    def survived(self, mutant: Mutant) -> None:
        if mutant.name not in self._reasons:
            say(f"not noticed: {mutant.name}")
        self.survivors.append(mutant)
        self._count(0)

    def _look(self) -> None:
        time.sleep(0.002)
        for entry in list(self._running):
            fork, mutant, over = entry
            code = fork.ended()
            if code is None:
                continue
            self._running.remove(entry)
            over(fork)
            if code == 0:
                self.survived(mutant)
            else:
                self._count(code)

    def _count(self, code: int) -> None:
        self.tried += 1
        self.hung += code < 0
        if time.monotonic() - self._said > 10 or self.tried == self._number:
            self._said = time.monotonic()
            say(
                f"{self.tried} of {self._number} tried in {self._said - self._began:.0f} s: "
                f"{self.tried - len(self.survivors)} noticed ({self.hung} by hanging), {len(self.survivors)} not"
            )


def say(text: str) -> None:
    print(f"· {text}", file=sys.__stdout__, flush=True)


def tests_of(mutant: Mutant) -> list[str]:
    """The files of tests that have to notice this mutant."""
    return TESTS[mutant.where.split()[0].split("/")[0]]


# Mutants of functions.


class Collected:
    """A pytest plugin: when the tests are collected, it tries the mutants on them instead of running them."""

    def __init__(self, mutants: Sequence[Mutant], trial: Trial) -> None:
        self._mutants = mutants
        self._trial = trial
        self.failed: list[str] = []
        self._killers: dict[str | None, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        import hypothesis  # pytest wants to be there first

        # That an example fails is enough: no smaller one is looked for.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        # The same examples each time, or else a mutant survives today and not tomorrow.
        hypothesis.settings.register_profile(
            "mutants",
            hypothesis.settings.default,
            derandomize=True,
            database=None,
            phases=phases,
            report_multiple_bugs=False,
        )
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        gc.collect()
        gc.freeze()
        items = {item.nodeid: item for item in session.items}
        running, took_s = self._run_clean(items)
        for mutant in self._mutants:
            tests = sorted(
                {
                    test
                    for line in mutant.lines
                    for test in running[str(mutant.file)].get(line, ())
                    if test.partition("::")[0] in tests_of(mutant)
                },
                key=lambda test: (-self._killers[mutant.function][test], took_s[test]),
            )
            if not tests:
                self._trial.survived(mutant)
                continue
            self._trial.submit(
                mutant,
                lambda: self._try(mutant, [items[test] for test in tests], took_s),  # noqa: B023 - the fork runs it at once
                lambda fork, mutant=mutant: self._remember(mutant, fork),  # type: ignore[misc]
            )
        self._trial.finish()
        return True

    def _run_clean(self, items: dict[str, pytest.Item]) -> tuple[dict[str, dict[int, list[str]]], dict[str, float]]:
        """Run the tests as they are. Returns which run which line of which file, and how long each takes."""
        with tempfile.NamedTemporaryFile() as file:
            fork = Fork(lambda: self._measure(items, Path(file.name)))
            while (code := fork.ended()) is None:
                time.sleep(0.05)
            found = pickle.loads(Path(file.name).read_bytes() or pickle.dumps(None))
        if code != 0 or found is None:
            raise SystemExit(f"the tests fail without any mutant: {found or code}")
        return found  # type: ignore[no-any-return]

    def _measure(self, items: dict[str, pytest.Item], into: Path) -> int:
        measured = coverage.Coverage(data_file=None, config_file=False, include=[f"{SOURCE}/*"], messages=False)
        took_s = {}
        measured.start()
        for nodeid, item, following in _in_turn(list(items.values())):
            measured.switch_context(nodeid)
            began = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            took_s[nodeid] = time.process_time() - began
        measured.stop()
        data = measured.get_data()
        lines = {
            file: {line: [c for c in contexts if c] for line, contexts in data.contexts_by_lineno(file).items()}
            for file in data.measured_files()
        }
        into.write_bytes(pickle.dumps(self.failed or (lines, took_s)))
        return 1 if self.failed else 0

    def _try(self, mutant: Mutant, items: Sequence[pytest.Item], took_s: Mapping[str, float]) -> int:
        install(mutant)
        for nodeid, item, following in _in_turn(items):
            allow(PATIENCE_S + 5 * took_s[nodeid])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                Path(os.environ["PYTEST_DEBUG_TEMPROOT"]).with_suffix(".killer").write_text(nodeid)
                return 1
        return 0

    def _remember(self, mutant: Mutant, fork: Fork) -> None:
        """Try first, on the next mutant of this function, what has noticed this one."""
        file = Path(fork.scratch).with_suffix(".killer")
        if file.exists():
            self._killers[mutant.function][file.read_text()] += 1
            file.unlink()


def _in_turn(items: Sequence[pytest.Item]) -> Iterator[tuple[str, pytest.Item, pytest.Item | None]]:
    for item, following in zip(items, [*items[1:], None], strict=True):
        yield item.nodeid, item, following


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def install(mutant: Mutant) -> None:
    """Give the function its new code, wherever it is known by now."""
    found: Any = sys.modules[module_of(mutant.file)]
    for name in (mutant.function or "").split("."):
        found = inspect.getattr_static(found, name)
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, staticmethod | classmethod):
        found = found.__func__
    function = inspect.unwrap(found)
    if not isinstance(function, FunctionType):
        raise TypeError(f"{mutant.where} is no function")
    function.__code__ = next(code for code in _codes(mutant.code()) if code.co_qualname == mutant.function)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


# Mutants of what works at import.


class Changed(importlib.abc.MetaPathFinder):
    """Finds one module, as the mutant has it."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = module_of(mutant.file)
        self._file = str(mutant.file)
        self._code = mutant.code()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        code = self._code

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return code

        return importlib.util.spec_from_file_location(fullname, self._file, loader=Loader(fullname, self._file))


def run_afresh(mutant: Mutant) -> int:
    allow(AFRESH_S)
    for name in [name for name in sys.modules if name.split(".")[0] in ("metered_billing", "tests")]:
        del sys.modules[name]
    sys.meta_path.insert(0, Changed(mutant))
    return int(pytest.main([*OPTIONS, "-x", *tests_of(mutant)]))


# What is all right.


def written_down() -> dict[str, str]:
    """The mutants that may survive, and why."""
    entries = tomllib.loads(SURVIVORS.read_text())["survivors"]
    return {mutant: entry["why"] for entry in entries for mutant in entry["mutants"]}


def every_mutant(parts: Sequence[str] = ()) -> list[Mutant]:
    """All of them, or those that have one of `parts` in their name."""
    every = [mutant for name, only in SUBJECTS.items() for mutant in mutants_of(SOURCE / name, name, only)]
    return [mutant for mutant in every if not parts or any(part in mutant.name for part in parts)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("part", nargs="*", help="of a mutant's name: only these are tried")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 2)
    given = parser.parse_args()
    os.chdir(ROOT)
    mutants = every_mutant(given.part)
    say(f"{len(mutants)} mutants, {given.at_once} at a time")
    trial = Trial(len(mutants), given.at_once)
    collected = Collected([mutant for mutant in mutants if mutant.function], trial)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tests = sorted({test for mutant in mutants for test in tests_of(mutant)})
        code = pytest.main([*OPTIONS, *tests], plugins=[collected])
    if code != pytest.ExitCode.OK:
        say(printed.getvalue())
        return 1
    for mutant in mutants:
        if mutant.function is None:
            trial.submit(mutant, lambda: run_afresh(mutant))  # noqa: B023 - the fork runs it at once
    trial.finish()
    if trial.tried != len(mutants):
        say(f"only {trial.tried} of {len(mutants)} were tried")
        return 1
    return report(mutants, trial.survivors)


def report(mutants: Sequence[Mutant], survivors: Sequence[Mutant]) -> int:
    reasons = written_down()
    survived = {mutant.name for mutant in survivors}
    without = sorted(survived - set(reasons))
    noticed = sorted(mutant.name for mutant in mutants if mutant.name in reasons and mutant.name not in survived)
    for name in without:
        say(f"no test notices, and no reason is written down: {name}")
    for name in noticed:
        say(f"written down as a survivor, but a test notices: {name}")
    say(f"{len(survived)} of {len(mutants)} survive, {len(survived) - len(without)} of them with a written reason")
    return 1 if without or noticed else 0


if __name__ == "__main__":
    sys.exit(main())
