"""What it costs before the first request and after the last: imports, start-up, memory."""

import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.compare import APP_CORE, Bench
from tests.bench.processes import ROOT, TENANT, TOKEN, alone, ask, pin, rss_kib
from tests.bench.rows import Row
from tests.bench.variants import BY_NAME, Level
from tests.serving import free_port

IMPORTS = (
    ("starlette, httpx", "import starlette.applications, httpx"),
    ("metered_billing", "import metered_billing"),
    ("fastapi, httpx", "import fastapi, httpx"),
    ("fastapi, httpx, metered_billing", "import fastapi, httpx, metered_billing"),
)
_SELF_US = re.compile(r"^import time:\s+(\d+) \|", flags=re.M)


def import_ms(code: str) -> float:
    """What `python -X importtime` adds up to, less what an empty program takes."""
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    return sum(map(int, _SELF_US.findall(run.stderr))) / 1000


def first_answer_ms(kind: str, environment: dict[str, str]) -> float:
    """From the start of the process to its first answer, which is 200."""
    port = free_port()
    request = b"POST /create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.first", kind, str(port)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: pin(APP_CORE),
    ) as process:
        try:
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                        connection.sendall(request)
                        answer = connection.recv(65536)
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None or time.perf_counter() > begun + 30:
                        raise RuntimeError(f"the app {kind} us did not start") from None
                    time.sleep(0.002)
            took_ms = (time.perf_counter() - begun) * 1e3
        finally:
            process.terminate()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the app {kind} us answered {answer[:200]!r}")
    return took_ms


async def measure(on_disk: Path, in_memory: Path, *, quick: bool, say: Callable[[str], None]) -> list[Row]:
    """All of it."""
    times = 3 if quick else 9
    rows = []
    with alone():
        nothing = statistics.median(import_ms("pass") for _ in range(times))
        # In turns: what disturbs one of them disturbs the others.
        samples = [[import_ms(code) for _, code in IMPORTS] for _ in range(times)]
    ms = [statistics.median(column) - nothing for column in zip(*samples, strict=True)]
    say("imports: " + ", ".join(f"{name} {value:.0f} ms" for (name, _), value in zip(IMPORTS, ms, strict=True)))
    rows.append(Row("import metered_billing", ms[1], "ms", f"starlette and httpx alone: {ms[0]:.0f} ms"))
    rows.append(Row("what it adds to fastapi and httpx", ms[3] - ms[2], "ms", f"those alone: {ms[2]:.0f} ms"))

    bench = Bench(on_disk, in_memory)
    variants = [BY_NAME["bare"], BY_NAME["ours-journal"]]
    try:
        await bench.start(variants)
        ask(bench.service.url + "/v1/grants", {"tenant_id": TENANT, "amount": 10**6, "reason": "bench"}, "first")
        environment = {"BENCH_CREDITS": bench.service.url, "BENCH_TOKEN": TOKEN, "BENCH_TENANT": TENANT}
        answers: dict[str, list[float]] = {"without": [], "with": []}
        with alone():
            for _ in range(times):
                for kind, found in answers.items():
                    environment["BENCH_JOURNAL"] = str(on_disk / "journal-first")
                    found.append(await asyncio.to_thread(first_answer_ms, kind, environment))
        without, with_us = (statistics.median(found) for found in answers.values())
        say(f"to the first answer: {without:.0f} ms without us, {with_us:.0f} ms with us")
        rows.append(Row("from start to first metered answer", with_us, "ms", f"without us: {without:.0f} ms"))
        rows += [await _memory(bench, name, quick, say) for name in ("bare", "ours-journal")]
    finally:
        bench.stop()
    return rows


async def _memory(bench: Bench, name: str, quick: bool, say: Callable[[str], None]) -> Row:
    """By how much an app grows from 20,000 requests on, settled each time: its caches are full by then."""
    variant, pid = BY_NAME[name], bench.app(name).pid

    async def requests(many: int) -> int:
        done = 0
        while done < many:
            run = await bench.run(variant, Level(64), 1.0)
            if run.void:
                raise RuntimeError(f"{name}: {run.void}")
            done += round(run.per_second * 1.7)
        return done

    await requests(500 if quick else 20_000)
    before = rss_kib(pid)
    many = await requests(2_000 if quick else 20_000)
    grown = (rss_kib(pid) - before) / many * 10_000
    say(f"{name}: {grown:+.0f} KiB in 10,000 requests, {before / 1024:.0f} MiB before")
    what = "charges, settled" if variant.bills else "requests to the bare route"
    return Row(f"memory for 10,000 {what}", grown, "KiB", f"of {before / 1024:.0f} MiB")
