"""One run: two app processes on one machine, the credits service on another, a few clients, and bad luck.

Everything of the project is real: middleware, decorator, biller, client, service, ledger and journal, on
real SQLite files. Only the clock, the wires and the edge of the disk are not. After a while all faults stop
and everything is started again; when nothing is left to do, the promises must hold, charge by charge
(`checks`).
"""

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import anyio.to_thread
import httpx
from opentelemetry.metrics import NoOpMeterProvider
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from metered_billing import HttpCredits, MeteredBillingMiddleware, names
from metered_billing.biller import JOURNAL_WITHIN_S, Biller
from metered_billing.charge import FINAL, Record, State
from metered_billing.credits.contract import Contract
from metered_billing.journal import JournalError, lock
from metered_billing.journal.sqlite import SqliteJournal
from metered_billing.ledger import Ledger, owner
from metered_billing.ledger.grouped import GroupedBooks
from metered_billing.ledger.rules import Remembered
from metered_billing.service import create_app
from metered_billing.service.tokens import Tokens
from metered_billing.telemetry import Telemetry
from tests.simulation.app import ACCOUNTS, ROUTES, Story, account_of, make_story
from tests.simulation.checks import check
from tests.simulation.disk import Disk
from tests.simulation.faults import Profile
from tests.simulation.loop import PROCESS, VirtualLoop
from tests.simulation.network import STRAY, Call, Network, Reply, Transport
from tests.simulation.processes import Dead, Machine, Process

DAY_S = 86_400.0

LOSE_OWNERSHIP = {"recovered by hand", "lock file removed", "I/O error after a commit"}
"""Faults in which a charge is taken from whoever sees to it."""

FULL = {"disk full", "disk full at commit", "I/O error at commit"}
"""Faults in which a charge whose request was cancelled meanwhile never came on record."""


class Violation(Exception):
    """A promise was broken."""


class Forgetful(Contract):
    """What a user writes whose service forgets the declined keys."""

    remembers_declines = False


class Listless(Forgetful):
    """Likewise, where there is no list of transactions either."""

    def transactions(self, tenant_id: str, user_id: str | None, cursor: str | None, limit: int) -> None:
        return None


@dataclass(frozen=True)
class ServiceKind:
    """What the credits service can do of what it should.

    Attributes:
        balance_first: It looks at the balance before it looks at the key, and so may decline what it has taken.
    """

    has_voids: bool
    remembers_declines: bool
    balance_first: bool
    has_batches: bool

    @classmethod
    def any(cls, random: Random, *, has_batches: bool) -> "ServiceKind":
        voids, declines = random.random() < 0.7, random.random() < 0.7
        return cls(voids, declines, voids and declines and random.random() < 0.25, has_batches)


class World:
    """A run of one seed.

    Args:
        inline: Whether the apps settle inline: then nothing of theirs goes on between requests, and somebody else
            has to see to what they could not settle.
    """

    def __init__(self, seed: int, directory: Path, *, inline: bool = False) -> None:
        self.seed = seed
        self.inline = inline
        self.directory = directory
        self.random = Random(seed)
        self.loop = VirtualLoop()
        self.trace: list[tuple[Any, ...]] = []
        self.problems: list[str] = []
        self.coverage: Counter[tuple[str, str]] = Counter()
        self.profile = Profile(self.random)
        self.chaos = True
        self.disk = Disk(self)
        self.network = Network(self)
        # By a random source of its own: what batches change, they change only where there are some.
        batches = Random(f"batches of {seed}")
        self.batching = batches.random() < 0.8
        self.deductions_at_once = batches.choice((1, 1, 2))
        self.has_list = Random(f"list of {seed}").random() < 0.5
        # In some runs clients come in crowds, all in one moment: so many crowds.
        self.crowds = batches.choice((0, 1, 2, 3)) if self.batching else 0
        self.service_kind = ServiceKind.any(self.random, has_batches=batches.random() < 0.8)
        if not self.service_kind.remembers_declines:
            self.profile.dwell_on(self.random, "request late", "duplicate")
        elif self.service_kind.balance_first:
            self.profile.dwell_on(self.random, "reply lost", "5xx after", "reset after the request")
            # It would decline the very first answer of what the other copy has just taken: nobody could tell.
            self.profile.drop("duplicate")
        elif not self.service_kind.has_voids:
            self.profile.dwell_on(self.random, "stray proxy before", "stray proxy after", "reply lost")
        if self.crowds > 1 and self.service_kind.has_batches:
            self.profile.dwell_on(batches, "stray proxy after", "refused")
        if LOSE_OWNERSHIP & self.profile.rates.keys():
            self.profile.dwell_on(self.random, "slow", "recovered by hand", "lock file removed")
        # Charges are held on a lease, which may run out while a request is at one; or by the lock on a file.
        self.leased = Random(f"lease of {seed}").random() < 0.5
        if not self.leased:
            self.profile.drop("recovered by hand")
        self.machines = (Machine(self, "app machine"), Machine(self, "service machine"))
        self.apps: dict[str, Process] = {}
        self.service: Process | None = None
        self.dead: list[Process] = []
        self.stories: dict[str, Story] = {}
        # In some runs all accounts run dry again and again, and are topped up.
        self.tight = self.random.random() < (0.3 if self.service_kind.remembers_declines else 0.7)
        self.stray = self.random.sample(STRAY, self.random.choice((1, 2, 4, len(STRAY))))
        self.lasts_s = self.random.choice((10.0, 20.0, 60.0, 120.0))
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        # What was seen, to judge by.
        self.states: dict[str, State] = {}
        self.deducted: set[str] = set()
        self.declined: set[str] = set()
        self.voided: set[str] = set()
        self.heard_402: set[str] = set()
        self.outcomes: dict[str, Record] = {}
        self.unwritten: set[str] = set()
        self.meddled: set[str] = set()
        self.refusing: set[str] = set()
        self.refused: set[str] = set()
        self.late_within_s = 3 * 3600.0 if self.service_kind.remembers_declines else 240.0

    # For all parts.

    def note(self, who: str, *what: Any) -> None:
        self.trace.append((round(self.loop.clock_s, 6), who, *what))

    def problem(self, what: str) -> None:
        self.note("PROBLEM", what)
        self.problems.append(what)

    def new_id(self) -> str:
        return f"id-{next(self._ids):08}"

    def outside(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call something as the world, whoever asks for it."""
        token = PROCESS.set(None)
        try:
            return call(*args)
        finally:
            PROCESS.reset(token)

    def strikes(self, kind: str, process: Process | None = None) -> bool:
        """Whether this fault happens here and now."""
        rate = self.profile.rates.get(kind)
        if rate is None or not self.chaos or self.random.random() >= rate:
            return False
        self.note(process.name if process else "world", "is struck by", kind)
        if kind.startswith("disk") or kind.startswith("I/O"):
            self.struck(kind, process)
        return True

    def struck(self, kind: str, process: Process | None) -> None:
        """Count a fault, under the states of the charges that it struck."""
        states = {
            str(self.states.get(story.charge_id or "", "requested"))
            for story in self.stories.values()
            if process is not None and story.process is process and story.ended_at is None
        }
        where = "service" if process is not None and process.machine is self.machines[1] else "idle"
        for state in sorted(states) or (where,):
            self.coverage[kind, state] += 1

    def late_s(self) -> float:
        """When a late copy arrives: seconds, minutes or hours."""
        return self.random.uniform(0.0, min(self.random.choice((5.0, 60.0, 600.0, 3 * 3600.0)), self.late_within_s))

    def fault_of_call(self, process: Process, call: Call) -> str | None:
        if not self.chaos:
            return None
        fault = self.profile.of_call(self.random)
        if self.loop.clock_s < self.network.partitioned_until:
            fault = self.random.choice(("refused", "request lost", "no connection in time"))
            self.coverage["partition", call.operation] += 1
        elif self.strikes("token rejected", process):
            fault = "token rejected"
        elif call.operation in ("refund", "void") and (
            call.charge_id in self.refusing or self.strikes("refused for good", process)
        ):
            self.refusing.add(call.charge_id)
            self.refused.add(call.charge_id)
            fault = "refused for good"
        if fault is not None:
            self.coverage[fault, call.operation] += 1
        return fault

    def refuse_parts(self, process: Process, call: Call) -> Call:
        """In a batch, too, the service refuses some of what is to be given back for good."""
        if self.chaos:
            for part in call.parts:
                if part.operation != "deduct" and (
                    part.charge_id in self.refusing or self.strikes("refused for good", process)
                ):
                    self.refusing.add(part.charge_id)
                    self.refused.add(part.charge_id)
                    call = replace(call, refused=call.refused | {part.charge_id})
        return call

    # What is seen.

    def route_runs(self, story: Story, charge: Any) -> None:
        """A route runs: then its deduction stands in the ledger, now."""
        story.charge_id = charge.id
        story.ran += 1
        self.note(story.id, "runs", charge.id)
        if self.strikes("support voids", story.process):
            self.later(story.takes_s / 2, lambda: self.begin(self._support_voids((story, charge.id)), "support"))
        if charge.id not in self.deducted:
            self.problem(f"{story.id} ran before its deduction was confirmed")
        if charge.id in self.voided and charge.id not in self.meddled:
            self.problem(f"{story.id} ran although its deduction had been voided")

    def answered(self, call: Call, reply: Reply) -> None:
        """The service has answered a call: whatever becomes of the reply, it is done."""
        self.note("service", call.operation or call.path, call.charge_id, reply.status)
        if call.operation == "deduct" and reply.status in (200, 201):
            self.deducted.add(call.charge_id)
        elif call.operation == "deduct" and reply.status == 402:
            self.declined.add(call.charge_id)
        elif call.operation == "void" and reply.status == 200:
            self.voided.add(call.charge_id)
        if reply.status >= 500 and not self.profile.rates and call.operation not in ("void", "batch"):
            self.problem(f"the service answered {reply.status}")

    def heard(self, call: Call, status: int) -> None:
        """An app has got an answer, be it from the service or from whoever stands in between."""
        if call.operation == "deduct" and status == 402:
            self.heard_402.add(call.charge_id)
        if status == 200:
            self.heard_402 |= self.declined.intersection(part.charge_id for part in call.parts)

    def logged(self, process: Process, event: str, record: Record | None, error: BaseException | None) -> None:
        if error is not None and _is_dead(error):
            return
        self.note(process.name, event, record.id if record else "", repr(error) if error else "")
        # Recovery says so of a journal that fails too.
        never_opened = record is not None and record.state is State.OPENED and FULL & self.profile.rates.keys()
        if event == names.LOG_OWNERSHIP_LOST and not never_opened and not LOSE_OWNERSHIP & self.profile.rates.keys():
            self.problem(f"{process.name} has lost {record.id if record else '?'}, and nobody can have taken it")
        if event == names.LOG_BUG and not isinstance(error, JournalError):
            self.problem(f"{process.name} says {event}: {error!r}")

    def buried(self, process: Process) -> None:
        """A process has died: its clients see that, and somebody starts it again."""
        self.dead.append(process)
        for story in self.stories.values():
            if story.process is process and story.ended_at is None:
                story.killed_at = story.ended_at = self.loop.clock_s
        if process is self.service:
            self.service = None
        elif self.apps.get(process.name) is process:
            del self.apps[process.name]
        # In quiet, too: a start that began before may fail by what it had met by then.
        if self.chaos or not (process.stopping or self.afterwards):
            self.later(self.random.choice((0.2, 2.0, 15.0, 40.0)), lambda: self.start(process.name))

    # Processes.

    def later(self, after_s: float, call: Callable[[], Any]) -> None:
        self.outside(self.loop.call_later, after_s, call)

    def begin(self, work: Any, name: str) -> asyncio.Task[Any]:
        """A task of the world's."""
        task: asyncio.Task[Any] = self.outside(lambda: self.loop.create_task(work, name=name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start(self, name: str) -> None:
        if name == "service":
            if self.service is None:
                self.service = process = Process(self, name, self.machines[1])
                process.spawn(self._run_service(process), name)
        elif name not in self.apps:
            self.apps[name] = process = Process(self, name, self.machines[0])
            process.spawn(self._run_app(process), name)

    async def _run_service(self, process: Process) -> None:
        process.journal = ledger = Ledger(self.directory / "credits.db", process.runtime)
        process.app = SERVICE
        try:
            await ledger.start()
        except Exception as error:
            self.note(process.name, "does not start", repr(error))
            process.exit()
            return
        process.ready = True
        self.note(process.name, "is up")
        self._light_fuse(process)

    async def _run_app(self, process: Process) -> None:
        process.app = app_of(self, process)
        to_app: asyncio.Queue[Any] = asyncio.Queue()
        from_app: asyncio.Queue[Any] = asyncio.Queue()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        process.lifespan = to_app  # type: ignore[attr-defined]
        to_app.put_nowait({"type": "lifespan.startup"})
        running = self.loop.create_task(process.app(scope, to_app.get, from_app.put), name=process.name)
        answer = await from_app.get()
        if answer["type"] != "lifespan.startup.complete":
            self.note(process.name, "does not start", answer.get("message", "").strip().rpartition("\n")[2])
            with contextlib.suppress(Exception):
                await running
            process.exit()
            return
        process.ready = True
        self.note(process.name, "is up")
        self._light_fuse(process)
        answer = await from_app.get()
        with contextlib.suppress(Exception):
            await running
        process.exit()

    def _light_fuse(self, process: Process) -> None:
        if self.strikes("killed between two steps"):
            why = "killed between two steps"
            # A fuse may burn longer than the chaos lasts.
            process.after_steps(self.random.randrange(4000), lambda: process.kill(why) if self.chaos else None)

    async def stop(self, process: Process, patience_s: float) -> None:
        """Stop an app process as uvicorn does: wait for requests, cancel them, then shut down."""
        if process.stopping or not process.ready:
            return
        process.stopping, process.ready = True, False
        self.note(process.name, "is told to stop")
        running = [story for story in self.stories.values() if story.process is process and story.ended_at is None]
        until = self.loop.clock_s + patience_s
        while any(story.ended_at is None for story in running) and self.loop.clock_s < until:
            await asyncio.sleep(0.1)
        for story in running:
            self.cancel(story)
        if process.alive:
            process.run(process.lifespan.put_nowait, {"type": "lifespan.shutdown"})  # type: ignore[attr-defined]
        await process.died.wait()

    # Requests.

    async def request(self, story: Story) -> None:
        ready = [process for _, process in sorted(self.apps.items()) if process.ready]
        if not ready:
            return
        process = self.random.choice(ready)
        self._begin(story, process)
        within_s = story.takes_s + self.random.choice((0.02, 0.5, 4.0))
        if self.strikes("client leaves"):
            self.later(self.random.uniform(0.0, within_s), lambda: self.leave(story))
        if self.strikes("cancelled"):
            if self.random.random() < 0.5:
                self.later(self.random.uniform(0.0, within_s), lambda: self.cancel(story))
            else:
                process.after_steps(self.random.randrange(150), lambda: self.cancel(story))

    def _begin(self, story: Story, process: Process) -> None:
        story.process, story.began_at = process, self.loop.clock_s
        story.task = process.spawn(self._serve(story, process), story.id)

        def ended(_: object) -> None:  # not within the task: it may be cancelled before its first step
            if process.alive:
                story.ended_at = self.loop.clock_s
                self.note(story.id, "ends", story.status, "complete" if story.completed else "incomplete")
                if self.inline and self.chaos and not process.stopping:
                    self._rests(story, process)

        process.run(story.task.add_done_callback, ended)

    def _rests(self, story: Story, process: Process) -> None:
        """Where the last request under way is over, nothing goes on.

        Unless somebody recovers by hand, one was cancelled while it settled, and has left that to its task, or a task
        that was told to end waits for a disk that hangs.
        """
        ours = [each for each in self.stories.values() if each.process is process]
        others = any(each.ended_at is None or (each.task is not None and each.task.cancelling()) for each in ours)
        [here] = process.biller._settler._loops.values()
        busy = here.recovering or any(task.cancelling() for task in here.tasks)
        if process.biller.started and not others and not busy:
            self.problem(f"{story.id} is over, and {process.name} does not rest")

    def leave(self, story: Story) -> None:
        if story.ended_at is None:
            self.note(story.id, "leaves")
            self.struck("client leaves", story.process)
            story.left_at = self.loop.clock_s
            story.left.set()

    def cancel(self, story: Story) -> None:
        if story.task is not None and story.ended_at is None:
            self.note(story.id, "is cancelled")
            self.struck("cancelled", story.process)
            story.cancelled_at = self.loop.clock_s
            story.task.cancel()

    async def _serve(self, story: Story, process: Process) -> None:
        """One request, as a server has it."""
        unread = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            if unread:
                return unread.pop()
            await story.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            process.check()
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last:
                self._about_to_complete(story)
            if story.left_at is not None:
                if story.spec_version == "2.4":
                    raise OSError("the client has left")
                return
            if message["type"] == "http.response.start":
                story.status, story.headers = message["status"], dict(message["headers"])
            else:
                story.body += message.get("body", b"")
                story.lines = story.body.count(b"\n\n" if story.kind == "events" else b"\n")
            if last:
                story.completed = True
                story.last_at = self.loop.clock_s
                if self.strikes("cancelled"):
                    self.outside(self.loop.call_soon, self.cancel, story)
            await asyncio.sleep(story.send_s)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": story.spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": f"/{story.kind.replace(' ', '-')}",
            "raw_path": b"",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"app"), (b"x-request-id", story.id.encode())],
            "client": ("10.0.0.2", 1),
            "server": ("app", 80),
            "state": {},
        }
        self.note(story.id, story.kind, process.name, f"{story.amount} credits", story.account)
        try:
            await process.app(scope, receive, send)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            if (
                process.alive
                and story.kind not in ("raises", "broken stream")
                and not isinstance(error, OSError | ClientDisconnect)
            ):
                self.problem(f"{story.id} raised {error!r}")

    def _about_to_complete(self, story: Story) -> None:
        """The last byte goes out: by now the outcome is on record, or the journal has failed loudly."""
        charge_id = story.charge_id
        known = charge_id in self.outcomes or charge_id in self.unwritten
        # A 500 that the framework gives outside of the middleware says nothing that could be on record.
        if story.ran and not known and story.kind != "raises":
            self.problem(f"{story.id} is answered before its outcome is on record")

    # One run.

    async def main(self) -> None:
        self.loop.set_exception_handler(self._unhandled)
        self.start("service")
        self.start("app-1")
        self.start("app-2")
        await self._grants()
        number = self.random.choice((4, 8, 12))
        for index in range(number):
            story = make_story(index, self.random, self.lasts_s)
            if self.crowds:
                story.starts_at -= story.starts_at % (self.lasts_s / self.crowds)
            self.stories[story.id] = story
            self.later(story.starts_at, lambda story=story: self.begin(self.request(story), story.id))  # type: ignore[misc]
        self._plan()
        await asyncio.sleep(self.lasts_s)
        await self._quiet()

    async def _grants(self) -> None:
        chaos, self.chaos = self.chaos, False
        while self.service is None or not self.service.ready:
            await asyncio.sleep(0.01)
        for account in ACCOUNTS:
            await self.grant(account, self.random.choice((1, 3, 5) if self.tight else (5, 20, 60, 200)))
        self.chaos = chaos

    async def grant(self, account: Any, amount: int) -> None:
        body = {"tenant_id": account.tenant_id, "user_id": account.user_id, "amount": amount, "reason": "paid"}
        with contextlib.suppress(ConnectionError):
            await self.network.ask("POST", "/v1/grants", body, f"grant-{next(self._ids)}")

    def _plan(self) -> None:
        """What befalls the machines and their people, at random times."""
        random, rates = self.random, self.profile.rates
        occasions: dict[str, Callable[[], Any]] = {
            "killed between two steps": lambda: self._kill_one("killed between two steps"),
            "power loss": lambda: random.choice(self.machines).lose_power(),
            "stopped": self._stop_one,
            "recovered by hand": self._recover_by_hand,
            "lock file removed": self._remove_lock,
            "clock jumps": self._jump,
            "partition": self._partition,
            "support voids": lambda: self.begin(self._support_voids(), "support"),
            "support refunds": lambda: self.begin(self._support_refunds(), "support"),
        }
        for kind, call in occasions.items():
            if kind in rates:
                for _ in range(random.randint(1, 4)):
                    self.later(random.uniform(0.0, self.lasts_s), call)
        for _ in range(random.randint(8, 20) if self.tight else random.randrange(3)):
            account, amount = random.choice(ACCOUNTS), random.choice((5, 10, 50))
            self.later(
                random.uniform(0.0, self.lasts_s),
                lambda account=account, amount=amount: self.begin(self.grant(account, amount), "grant"),  # type: ignore[misc]
            )

    def _kill_one(self, why: str) -> None:
        processes = [process for machine in self.machines for process in machine.processes]
        if processes and self.chaos:
            process = self.random.choice(processes)
            process.after_steps(self.random.randrange(200), lambda: process.kill(why) if self.chaos else None)

    def _stop_one(self) -> None:
        process = self._ready_one()
        if process is not None and self.chaos:
            self.struck("stopped", process)
            self.begin(self.stop(process, self.random.choice((0.0, 1.0, 10.0))), "stop")

    def deduction_goes_out(self, process: Process) -> None:
        """The moment at which it does most harm if somebody else takes the charge."""
        after_s = self.random.choice((0.0, 0.01, 0.05, 0.5, 2.0))
        if self.strikes("recovered by hand", process):
            self.later(after_s, lambda: self._recover_by_hand(process))
        if self.strikes("lock file removed", process):
            self.later(after_s, lambda: self._remove_lock(process))

    def call_goes_out(self, process: Process) -> None:
        """Between a call and its answer is where a death leaves most unknown."""
        after_s = self.random.choice((0.0, 0.001, 0.01, 0.05, 0.5))
        if self.strikes("killed during a call", process):
            self.later(after_s, lambda: process.kill("killed during a call") if self.chaos else None)
        service = self.service
        if service is not None and self.strikes("service killed during a call", service):
            self.later(after_s, lambda: service.kill("service killed during a call") if self.chaos else None)

    def _recover_by_hand(self, process: Process | None = None) -> None:
        """Somebody has a process recover what it finds, running requests included: a second biller on one journal."""
        process = process or self._ready_one()
        if process is not None and process.ready and self.chaos:
            self.struck("recovered by hand", process)
            credits, telemetry = process.biller._credits, process.biller._telemetry  # noqa: A001
            # As from another process: one that were told of the same journal would know what requests are at.
            journal: Any = _Elsewhere(process.journal)
            biller = Biller(credits, journal, runtime=process.runtime, telemetry=telemetry)
            process.spawn(_quietly(biller.recover), "recovery by hand")

    def _remove_lock(self, process: Process | None = None) -> None:
        """A cleaner of old files removes a lock in use; somebody else takes the file for a dead process's."""
        process = process or self._ready_one()
        if process is None or not process.ready or not self.chaos or process.machine is not self.machines[0]:
            return
        self.struck("lock file removed", process)
        for held in process.locks:
            held.path.unlink(missing_ok=True)
        for other in self.apps.values():
            if other is not process and other.ready:
                other.spawn(_quietly(other.biller.recover), "recovery")

    def _ready_one(self) -> Process | None:
        ready = [process for _, process in sorted(self.apps.items()) if process.ready]
        return self.random.choice(ready) if ready else None

    def _jump(self) -> None:
        if self.chaos:
            machine = self.random.choice(self.machines)
            off_s = self.random.uniform(-1.0, 1.0) * self.random.choice((5.0, 300.0, 3 * 3600.0))
            if not self.service_kind.remembers_declines:
                off_s = -abs(off_s)
            machine.clock_off_s += off_s
            self.note(machine.name, "clock jumps by", off_s)
            self.coverage["clock jumps", "forward" if off_s > 0 else "backward"] += 1

    def _partition(self) -> None:
        if self.chaos:
            self.network.partitioned_until = self.loop.clock_s + self.random.choice((2.0, 10.0, 60.0))
            self.note("network", "is cut until", self.network.partitioned_until)

    async def _support_voids(self, charge: "tuple[Story, str] | None" = None) -> None:
        """Somebody at the service voids a charge by hand."""
        charge = charge or self._some_charge()
        if charge is None or not self.chaos or self.service is None or not self.service.ready:
            return
        story, charge_id = charge
        self.meddled.add(charge_id)
        self.coverage["support voids", str(self.states.get(charge_id))] += 1
        body = {"idempotency_key": charge_id, "tenant_id": story.account.tenant_id, "user_id": story.account.user_id}
        with contextlib.suppress(ConnectionError):
            await self.network.ask("POST", "/v1/voids", body)

    async def _support_refunds(self) -> None:
        """Somebody at the service gives all of a charge back by hand."""
        charge = self._some_charge()
        if charge is None or not self.chaos:
            return
        story, charge_id = charge
        self.meddled.add(charge_id)
        self.coverage["support refunds", str(self.states.get(charge_id))] += 1
        entry = await self.entry(story, charge_id)
        if entry is not None:
            with contextlib.suppress(ConnectionError):
                await self.network.ask(
                    "POST",
                    f"/v1/deductions/{entry['transaction_id']}/refunds",
                    {"amount": story.amount, "reason": "by hand"},
                    f"{charge_id}:by-hand",
                )

    def _some_charge(self) -> tuple[Story, str] | None:
        found = [
            (story, story.charge_id)
            for story in self.stories.values()
            if story.charge_id is not None and story.charge_id in self.deducted
        ]
        # Rather one that is not over: there it makes a difference.
        found = [(story, charge_id) for story, charge_id in found if self.states[charge_id] not in FINAL] or found
        return self.random.choice(found) if found and self.service is not None and self.service.ready else None

    async def entry(self, story: Story, charge_id: str) -> dict[str, Any] | None:
        with contextlib.suppress(ConnectionError):
            for entry in await self.entries(story.account.tenant_id):
                if entry["kind"] == "deduction" and entry["idempotency_key"] == charge_id:
                    return entry
        return None

    async def entries(self, tenant_id: str) -> list[dict[str, Any]]:
        """All of a tenant's entries, oldest first."""
        reply = await self.network.ask("GET", f"/v1/transactions?tenant_id={tenant_id}&limit=1000")
        if reply.status != 200:
            raise ConnectionError(reply.status)
        items: list[dict[str, Any]] = json.loads(reply.body)["items"]
        return items[::-1]

    # Quiet.

    async def _quiet(self) -> None:
        """All faults stop, everything is started again, and has the time that it needs."""
        self.note("world", "is quiet from now on")
        self.chaos = False
        self.network.partitioned_until = 0.0
        self.refusing.clear()
        while self._tasks - {asyncio.current_task()}:
            await asyncio.sleep(1.0)
        await self._come_to_rest()
        for name, process in sorted(self.apps.items()):
            # Also one that has lost its lock, and says so at each request.
            await self.stop(process, 200.0)
            self.start(name)
        await self._come_to_rest()
        self._look_every(10.0)
        await self._probes()
        await self._until(self._settled, 3600.0)
        await self._check()

    async def _come_to_rest(self) -> None:
        await self._all_up()
        # Until the breakers have closed, and recovery has looked at every file.
        await asyncio.sleep(25.0)
        await self._until(self._settled, 2 * DAY_S)
        if self.network.under_way:
            self._look_every(600.0)
            await self._until(lambda: _done(not self.network.under_way), DAY_S)

    async def _all_up(self) -> None:
        for name in ("service", "app-1", "app-2"):
            self.start(name)
        await self._until(
            lambda: _done(
                self.service is not None
                and self.service.ready
                and len(self.apps) == 2
                and all(process.ready for process in self.apps.values())
            ),
            600.0,
        )

    async def _until(self, check: Callable[[], Awaitable[bool]], within_s: float) -> None:
        began = self.loop.clock_s
        while not await check():
            waited_s = self.loop.clock_s - began
            if waited_s > within_s:
                self.problem(f"not settled after {waited_s:.0f} quiet seconds: {await self._unsettled()}")
                return
            self._look_every(10.0 if waited_s < 120.0 else 300.0)
            await asyncio.sleep(1.0 if waited_s < 30.0 else 30.0)

    def _look_every(self, interval_s: float) -> None:
        """Let recovery look less often, so that hours do not take long."""
        for process in self.apps.values():
            if process.biller is not None:
                process.biller._settler._recover_every_s = interval_s

    async def _settled(self) -> bool:
        return not await self._unsettled()

    async def _unsettled(self) -> dict[str, Any]:
        running = [story.id for story in self.stories.values() if story.process is not None and story.ended_at is None]
        found: dict[str, Any] = {"running": running} if running else {}
        for name, process in self.apps.items():
            if not process.ready:
                found[name] = "down"
                continue
            if self.inline:  # as a schedule does
                await process.spawn(_quietly(process.biller.recover), "recovery by a schedule")
            unsettled = await process.spawn(process.journal.unsettled(0.0), "unsettled")
            if unsettled or process.biller._settler._live:
                found[name] = (unsettled, dict(process.biller._settler._live))
        return found

    async def _probes(self) -> None:
        """Now that nothing fails, requests must be served as if nothing ever had."""
        for index, name in enumerate(sorted(self.apps)):
            story = make_story(900 + index, self.random, 0.0)
            story.kind, story.takes_s = "number", 0.0
            self.stories[story.id] = story
            await self.grant(story.account, 100)
            self._begin(story, self.apps[name])
            await self._until(lambda story=story: _done(story.ended_at is not None), 60.0)  # type: ignore[misc]
            if story.status != 200:
                self.problem(f"{story.id} is answered {story.status} although nothing fails any more")

    async def _check(self) -> None:

        entries = [entry for tenant in ("acme", "zeta") for entry in await self.entries(tenant)]
        balances = {}
        for account in ACCOUNTS:
            user = "" if account.user_id is None else f"&user_id={account.user_id}"
            reply = await self.network.ask("GET", f"/v1/balance?tenant_id={account.tenant_id}{user}")
            balances[account] = json.loads(reply.body)["balance"]
        for _, process in sorted(self.apps.items()):
            if process.biller._settler._live:
                self.problem(f"{process.name} still sees to {process.biller._settler._live}")
            if process.journal.unusable:
                self.problem(f"{process.name} cannot use {dict(process.journal.unusable)}")
            await self.stop(process, 1.0)
        check(self, entries, balances)

    def _unhandled(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.afterwards and not (error is not None and _is_dead(error)):
            self.problem(f"unhandled: {context.get('message')} {error!r}")

    afterwards = False


async def _quietly(work: Callable[[], Awaitable[Any]]) -> None:
    """What somebody else does by the way: if it fails, that is their trouble."""
    with contextlib.suppress(Exception):
        await work()


async def _done(value: bool) -> bool:
    return value


def _is_dead(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Dead):
            return True
        error = error.__cause__ or error.__context__
    return False


class WatchedJournal(SqliteJournal):
    """The real journal, and what it said of each write."""

    def __init__(self, world: World, process: Process, telemetry: Telemetry) -> None:
        super().__init__(world.directory / "journal", runtime=process.runtime, telemetry=telemetry)
        self._world = world

    def open(self, record: Record) -> Awaitable[None]:
        self._world.states[record.id] = record.state
        if (story := self._world.stories.get(record.request_id or "")) is not None:
            story.charge_id = record.id
        return super().open(record)

    def write(self, before: Record, after: Record, *, durable: bool) -> Awaitable[bool]:
        written = super().write(before, after, durable=durable)
        return _Once(self._watch(written, before, after))

    def holds(self, record: Record) -> bool:
        return not self._world.leased and super().holds(record)

    async def _watch(self, written: Awaitable[bool], before: Record, after: Record) -> bool:
        world, outcome = self._world, before.state is State.DEDUCTED
        # Beyond this the response goes out without.
        timer = world.loop.call_later(JOURNAL_WITHIN_S, world.unwritten.add, after.id) if outcome else None
        try:
            won = await written
        except Exception:
            if outcome:
                world.unwritten.add(after.id)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if won:
            world.states[after.id] = after.state
            if outcome:
                world.outcomes.setdefault(after.id, after)
        elif outcome:
            world.unwritten.add(after.id)
        world.note("journal", after.id, f"{before.state} to {after.state}", won)
        return won


class _Elsewhere:
    """A journal, as another process has it."""

    def __init__(self, journal: Any) -> None:
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)


class _Once:
    """A coroutine to be awaited, or not at all: of a dead process, some never begin."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def __await__(self) -> Any:
        return (yield from self._work.__await__())

    def __del__(self) -> None:
        self._work.close()


class WatchedTelemetry(Telemetry):
    """Instead of logging, it tells the world."""

    def __init__(self, world: World, process: Process) -> None:
        # OpenTelemetry's global proxy keeps every instrument that was ever asked for, in case a provider comes.
        super().__init__(meter_provider=NoOpMeterProvider(), clock=world.loop.time)
        self._world = world
        self._process = process

    def log(self, event: str, record: Record | None = None, **fields: Any) -> None:
        self._world.logged(self._process, event, record, fields.get("exc_info"))


def app_of(world: World, process: Process) -> Starlette:
    """A process's app: as a user writes it, but for what comes in from the world."""
    telemetry = WatchedTelemetry(world, process)
    process.journal = WatchedJournal(world, process, telemetry)
    kind = world.service_kind
    credits = HttpCredits(  # noqa: A001
        "http://credits",
        token="app",
        contract=None if kind.remembers_declines else Forgetful() if world.has_list else Listless(),
        transport=Transport(world, process),
        batching=world.batching,
        runtime=process.runtime,
        telemetry=telemetry,
    )
    credits._deductions_at_once = world.deductions_at_once
    options: dict[str, Any] = {
        "credits": credits,
        "journal": process.journal,
        "account": account_of,
        "runtime": process.runtime,
        "telemetry": telemetry,
        "settle": "inline" if world.inline else "background",
    }

    def middleware(app: ASGIApp) -> ASGIApp:
        made = MeteredBillingMiddleware(app, **options)
        process.biller = made.biller
        return made

    return Starlette(routes=ROUTES, middleware=[Middleware(middleware)])


class _LedgerOfProcess:
    """The one service app serves every service process: each call finds its own ledger."""

    def __getattr__(self, name: str) -> Any:
        process = PROCESS.get()
        if process is None:
            raise LookupError("no process")
        return getattr(process.journal, name)


SERVICE = create_app(_LedgerOfProcess(), Tokens({"app": "*", "admin": "admin"}))  # type: ignore[arg-type]


# What makes one process of the system many of ours.


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """No threads, locks that die with their process, and a service that can forget."""
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        stack.enter_context(replaced(anyio.to_thread, "run_sync", _at_once))
        stack.enter_context(replaced(httpx, "create_ssl_context", lambda **_: None))
        take, acquire, remember = lock.FileLock.take.__func__, owner.OwnerLock.acquire, GroupedBooks.remember  # type: ignore[attr-defined]

        def take_ours(cls: Any, path: Path) -> Any:
            process = PROCESS.get()
            if process is not None:
                process.check()
            taken = take(cls, path)
            if taken is not None and process is not None:
                process.locks.append(taken)
            return taken

        def acquire_ours(self: Any) -> None:
            acquire(self)
            process = PROCESS.get()
            if process is not None and self not in process.locks:
                process.locks.append(self)

        def remember_or_not(self: Any, tenant_id: str, key: str, what: Remembered) -> None:
            process = PROCESS.get()
            if process is None or what.status != 402 or process.world.service_kind.remembers_declines:
                remember(self, tenant_id, key, what)

        stack.enter_context(replaced(lock.FileLock, "take", classmethod(take_ours)))
        stack.enter_context(replaced(owner.OwnerLock, "acquire", acquire_ours))
        stack.enter_context(replaced(GroupedBooks, "remember", remember_or_not))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something else in an attribute's place for a while."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


async def _at_once(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return call(*args)


@functools.cache
def _spare_what_is_there() -> None:
    gc.freeze()


def run(seed: int, *, inline: bool = False) -> World:
    """Run one seed. What went wrong stands in `problems` of what is returned."""
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="simulation-", dir=place))
    # What is collected, and when, must not depend on what ran before. What was there before the first run is spared.
    gc.collect()
    _spare_what_is_there()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with patched():
            world = World(seed, directory, inline=inline)
            asyncio.set_event_loop(None)
            main = world.loop.create_task(world.main(), name="world")
            try:
                world.loop.run_until_complete(main)
            except Exception as error:
                world.problem(f"the run ended with {error!r}")
                main.cancel()
            gc.collect()
            _bury(world)
            return world
    finally:
        if collecting:
            gc.enable()
        shutil.rmtree(directory, ignore_errors=True)


def _bury(world: World) -> None:
    """Let everything that is left come to an end without effect, so that nothing outlives the run."""
    world.afterwards = True
    world.loop.steps = 0
    world.chaos = False
    for process in [process for machine in world.machines for process in list(machine.processes)]:
        process.exit()
    for process in world.dead:
        process.steps = lambda: True  # type: ignore[method-assign]
        world.loop._ready.extend(process.grave)
        process.grave.clear()
    world.loop._scheduled.clear()
    for _ in range(20):
        left = sorted(asyncio.all_tasks(world.loop), key=hash)
        if not left:
            break
        for task in left:
            task.cancel()
        for _ in range(20):
            if world.loop._ready:
                world.loop.call_soon(world.loop.stop)
                world.loop.run_forever()
    for task in asyncio.all_tasks(world.loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    world.loop.close()
