"""A real nginx that runs the configuration of the docs, at ports and in a directory of the test's own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from tests.docs.pages import EXAMPLES
from tests.serving import free_port

CONF = EXAMPLES / "nginx.conf"


class NoNginx(Exception):
    """There is none on this machine."""


def program() -> str:
    """Where it is: of `make test`, else the machine's.

    Raises:
        NoNginx: There is none.
    """
    places = f"{Path(sys.prefix) / 'nginx' / 'usr' / 'sbin'}:/usr/sbin:/usr/local/sbin"
    found = shutil.which("nginx", path=places) or shutil.which("nginx")
    if found is None:
        raise NoNginx("no nginx here (make test fetches Debian's)")
    return found


class Nginx:
    """One, with its worker.

    Args:
        changes: What to put in place of a line's beginning (a directive and what follows it, to its semicolon).
    """

    def __init__(self, directory: Path, ports: Sequence[int], changes: Mapping[str, str] | None = None) -> None:
        self._program = program()
        self._directory = directory
        self._changes = changes or {}
        self._file = directory / "nginx.conf"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._write(ports)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def check(self) -> str:
        """What `nginx -t` says of the configuration.

        Raises:
            subprocess.CalledProcessError: It does not like it.
        """
        return subprocess.run([*self._command, "-t"], capture_output=True, text=True, check=True).stderr

    def start(self) -> None:
        self._process = subprocess.Popen([*self._command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                httpx.get(f"{self.url}/livez", trust_env=False, verify=False)
                return
            except httpx.TransportError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self._directory / "error.log").read_text()) from None
                time.sleep(0.02)

    def send_to(self, ports: Sequence[int]) -> None:
        """As an ingress does when endpoints come and go: a new configuration, and a reload.

        The old worker finishes what it has, the new one takes what comes.
        """
        self._write(ports)
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    @property
    def _command(self) -> list[str]:
        return [self._program, "-p", str(self._directory), "-c", str(self._file), "-e", f"{self._directory}/error.log"]

    def _write(self, ports: Sequence[int]) -> None:
        text = CONF.read_text(encoding="utf-8")
        changes = {
            "worker_processes": "1",
            "pid": f"{self._directory}/nginx.pid",
            "error_log": f"{self._directory}/error.log",
            "listen": f"127.0.0.1:{self.port}",
            **self._changes,
        }
        for directive, value in changes.items():
            text, count = re.subn(rf"(?m)^( *){directive} [^;]*;", rf"\g<1>{directive} {value};", text)
            assert count == 1, f"nginx.conf has {directive} {count} times"
        servers = "".join(f"        server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;\n" for port in ports)
        text, count = re.subn(r"(?m)(^ *server 127\.0\.0\.1:\d+.*\n)+", servers, text)
        assert count == 1
        # So that nothing is written where the machine's own keeps its things.
        paths = "".join(
            f"    {kind}_temp_path {self._directory}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = text.replace("http {\n", f"http {{\n{paths}", 1)
        if os.geteuid() == 0:
            text = f"user root;\n{text}"  # nobody, its own choice, may not look into a test's directory
        self._file.write_text(text, encoding="utf-8")
