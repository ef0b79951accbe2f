"""What Kubernetes does with a Deployment, on plain processes: the commands, probes and patience are the manifest's.

A new replica is started first. It gets requests when its readiness probe says so. Then an old one is deleted: soon
nobody sends it anything new, its preStop passes, it gets SIGTERM, and after its grace period SIGKILL.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.deploy.kubernetes import Document, Workload
from tests.serving import free_port

MAIN = "from metered_billing.cli import main; main()"


@dataclass
class Replica:
    """A pod.

    Attributes:
        at: When it was started, ready, deleted, signalled, gone; on the monotonic clock.
    """

    name: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]
    ready: bool = False
    deleted: bool = False
    at: dict[str, float] = field(default_factory=dict)

    def mark(self, what: str) -> None:
        self.at[what] = time.monotonic()


class Deployment:
    """So many replicas of a workload.

    Args:
        local: What to put in place of the manifest's own hosts, files and modules, in options and variables.
        environment: What the manifest takes from Secrets, and what a replica of ours needs besides.
        publish: Told the ports that requests are to be sent to, whenever they change.
        pace: 1 waits as the manifest says; less is for those in a hurry.
    """

    def __init__(
        self,
        workload: Workload,
        directory: Path,
        *,
        local: Mapping[str, str],
        environment: Mapping[str, str],
        publish: Callable[[Sequence[int]], None],
        pace: float,
    ) -> None:
        self.workload = workload
        self.all: list[Replica] = []
        self.faults: list[str] = []
        self._directory = directory
        self._local = local
        self._environment = environment
        self._publish = publish
        self._pace = pace
        self._published: list[int] = []
        self._watches: list[asyncio.Task[None]] = []
        # One for all, for making one costs more than all its probes. Each has a connection of its own, as a kubelet's.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._prober = httpx.AsyncClient(trust_env=False, limits=limits, verify=False)

    @property
    def replicas(self) -> list[Replica]:
        return [each for each in self.all if not each.deleted]

    async def scale_up(self) -> None:
        await asyncio.gather(*(self._start() for _ in range(self.workload.document["spec"]["replicas"])))

    async def restart(self) -> None:
        """`kubectl rollout restart`: maxSurge 1, maxUnavailable 0."""
        for old in self.replicas:
            await self._start()
            await self._delete(old)

    async def stop(self) -> None:
        """All of it, at the end."""
        for each in self.all:
            each.deleted = True
        for watch in self._watches:
            watch.cancel()
        await self._prober.aclose()
        for each in self.all:
            each.process.terminate()
        await asyncio.gather(*(self._gone(each, 20) for each in self.all))

    async def _start(self) -> Replica:
        name, port = f"{self.workload.name}-{len(self.all) + 1}", free_port()
        log = self._directory / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self._to_local(word, port) for word in self._command()],
                env={**os.environ, **self._variables(port), "REPLICA": name},
                stdout=output,
                stderr=output,
            )
        replica = Replica(name, port, log, process)
        replica.mark("started")
        self.all.append(replica)
        await self._until(replica, "startup")
        await self._until(replica, "readiness")
        self._is_ready(replica, True)
        replica.mark("ready")
        self._watches.append(asyncio.create_task(self._watch(replica)))
        return replica

    async def _delete(self, old: Replica) -> None:
        old.mark("deleted")
        old.deleted = True
        pre_stop_s = self.workload.pre_stop_s * self._pace
        # The news that it goes takes a while to reach those who send requests: that is what preStop is for.
        await asyncio.sleep(pre_stop_s / 2)
        self._tell()
        await asyncio.sleep(pre_stop_s / 2)
        old.mark("signalled")
        old.process.send_signal(signal.SIGTERM)
        if not await self._gone(old, self.workload.grace_s - self.workload.pre_stop_s):
            self.faults.append(f"{old.name}: was killed at the end of its grace period")
        elif old.process.returncode not in (0, -signal.SIGTERM):
            self.faults.append(f"{old.name}: ended with {old.process.returncode}")
        old.mark("gone")

    async def _gone(self, replica: Replica, within_s: float) -> bool:
        try:
            await asyncio.to_thread(replica.process.wait, within_s)
        except subprocess.TimeoutExpired:
            replica.process.kill()
            replica.process.wait()
            return False
        return True

    # Probes.

    async def _until(self, replica: Replica, which: str) -> None:
        # The startup probe's patience is for both: a replica that never gets ready holds up the roll, not a test.
        startup = self.workload.probe("startup")
        deadline = time.monotonic() + startup["failureThreshold"] * startup["periodSeconds"]
        while replica.process.poll() is None and time.monotonic() < deadline:
            if await self._probe(replica, which):
                return
            await asyncio.sleep(max(self.workload.probe(which)["periodSeconds"] * self._pace, 0.3))
        raise RuntimeError(f"{replica.name}: {which} failed\n{replica.log.read_text()[-3000:]}")

    async def _watch(self, replica: Replica) -> None:
        """As the kubelet does until the pod is deleted."""
        failed = {"readiness": 0, "liveness": 0}
        while not replica.deleted:
            for which in failed:
                probe = self.workload.probe(which)
                good = await self._probe(replica, which)
                failed[which] = 0 if good or replica.deleted else failed[which] + 1
                if which == "readiness" and (good or failed[which] >= probe["failureThreshold"]):
                    self._is_ready(replica, good)
                elif failed[which] == probe["failureThreshold"]:
                    self.faults.append(f"{replica.name}: would have been restarted, for its liveness probe failed")
            # In a hurry too: probing costs the processor what replicas need to start.
            await asyncio.sleep(max(self.workload.probe("readiness")["periodSeconds"] * self._pace, 1.0))

    async def _probe(self, replica: Replica, which: str) -> bool:
        url = f"http://127.0.0.1:{replica.port}{self.workload.path(which)}"
        with contextlib.suppress(httpx.HTTPError):
            timeout_s = self.workload.probe(which).get("timeoutSeconds", 1)
            return (await self._prober.get(url, timeout=timeout_s)).is_success
        return False

    def _is_ready(self, replica: Replica, ready: bool) -> None:
        replica.ready = ready
        self._tell()

    def _tell(self) -> None:
        ports = [each.port for each in self.replicas if each.ready]
        if ports != self._published:
            self._published = ports
            self._publish(ports)

    # The manifest on this machine.

    def _command(self) -> list[str]:
        return program(self.workload.command)

    def _to_local(self, text: str, port: int) -> str:
        for theirs, ours in {**self._local, f"--port={self.workload.option('port')}": f"--port={port}"}.items():
            text = text.replace(theirs, ours)
        return text

    def _variables(self, port: int) -> dict[str, str]:
        given = {
            variable["name"]: self._to_local(variable["value"], port)
            for variable in self.workload.container["env"]
            if "value" in variable
        }
        secret = {variable["name"] for variable in self.workload.container["env"] if "valueFrom" in variable}
        assert secret <= self._environment.keys() | {"PGPASSWORD"}, secret
        return {**given, **self._environment}


def program(words: Sequence[str]) -> list[str]:
    """A command of a container, by the Python that runs the tests."""
    own = ["-m", "uvicorn"] if words[0] == "uvicorn" else ["-c", MAIN]
    return [sys.executable, *own, *words[1:]]


def job(documents: Sequence[Document], local: Mapping[str, str]) -> list[str]:
    """Run the manifest's Job to its end. Returns what it said."""
    (found,) = [each for each in documents if each["kind"] == "Job"]
    said = []
    for container in found["spec"]["template"]["spec"]["containers"]:
        words = program([str(word) for word in container["command"]])
        for theirs, ours in local.items():
            words = [word.replace(theirs, ours) for word in words]
        said.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
    return said
