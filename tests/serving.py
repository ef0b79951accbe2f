"""`metered-billing serve` in a process of its own, for tests that stop or kill it."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

TOKENS = "admins=admin,acmes=tenant:acme"


def free_port() -> int:
    """A port that nobody listens at, just now: below those that connections going out are given, one of them soon."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def start_service(
    directory: Path, database: str = "sqlite:///credits.db", *options: str, tokens: str = TOKENS
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start it in the directory, wait until it is well, kill it afterwards.

    Yields:
        The process and its URL.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    main = "from metered_billing.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", main, "serve", "--port", str(port), "--database", database, *options],
        cwd=directory,
        env={**os.environ, "METERED_BILLING_TOKENS": tokens},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _wait_until_well(process, url)
            yield process, url
        finally:
            process.kill()


def _wait_until_well(process: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"{url}/healthz", trust_env=False, verify=False).is_success:
                return
        except httpx.TransportError:
            if time.monotonic() > deadline or process.poll() is not None:
                process.kill()
                raise RuntimeError(f"the service did not start: {process.communicate()[1]}") from None
        time.sleep(0.05)
