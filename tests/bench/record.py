"""What was measured, with where and when: kept in .bench/last.json, so that it can be told again."""

import datetime
import importlib.metadata
import json
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.compare import Results, Run
from tests.bench.processes import ROOT
from tests.bench.rows import Row
from tests.bench.variants import Level

PLACE = ROOT / ".bench" / "last.json"
PACKAGES = (
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "httpx",
    "aiohttp",
    "tenacity",
    "pybreaker",
    "opentelemetry-sdk",
    "structlog",
)


PEERS = ("slowapi", "gringotts-api", "x402")


@dataclass
class Record:
    """The last figures of each part.

    Args:
        how: Of each part: the seed, the rounds, when.
    """

    machine: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    peers: list[Run] = field(default_factory=list)

    @property
    def results(self) -> Results:
        """Of the comparison of apps."""
        return Results(self.runs)

    def measured(self, part: str, how: str) -> None:
        """That part has been measured just now, here."""
        self.machine = machine()
        if part == "peers":
            how += "".join(f", {name} {importlib.metadata.version(name)}" for name in PEERS)
        self.how[part] = f"{how}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}"

    def save(self, place: Path = PLACE) -> None:
        """For another time."""
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, place: Path = PLACE) -> "Record":
        """The last one; an empty one where there is none."""
        if not place.exists():
            return cls()
        found: dict[str, Any] = json.loads(place.read_text())
        runs, peers = (
            [Run(**{**run, "level": Level(**run["level"]), "others": tuple(run["others"])}) for run in found.pop(part)]
            for part in ("runs", "peers")
        )
        rows = {part: [Row(**row) for row in rows] for part, rows in found.pop("rows").items()}
        return cls(runs=runs, rows=rows, peers=peers, **found)


def machine() -> dict[str, str]:
    """What the figures depend on, apart from the code."""
    cpu = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "disk": f"4 KiB appended and synced in {sync_ms():.2f} ms",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def sync_ms() -> float:
    """What the disk takes to make something durable: what full durability costs at the least."""
    times = []
    with tempfile.NamedTemporaryFile(dir=PLACE.parent) as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3
