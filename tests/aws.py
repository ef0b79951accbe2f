"""AWS on this machine: moto's server, and no way out of it by accident."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

REGION = "eu-central-1"


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The server's URL. It takes some seconds to import."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def findings(policy: str) -> list[str]:
    """What is wrong with a policy of IAM: unknown actions, resources that do not fit them, …"""
    with warnings.catch_warnings():
        # It has odd escapes in its source, and leaves files open.
        warnings.simplefilter("ignore")
        import parliament

        return [str(finding) for finding in parliament.analyze_policy_string(policy).findings]


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AWS be at this URL, whatever else this machine knows of AWS."""
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(Path("/nowhere")),
        "AWS_SHARED_CREDENTIALS_FILE": str(Path("/nowhere")),
        "NO_PROXY": "*",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_SSM"):
        monkeypatch.delenv(name, raising=False)
