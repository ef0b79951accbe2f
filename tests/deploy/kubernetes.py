"""The manifest of the docs, read; and what is wrong with one: by Kubernetes' schema, and by rules of our own.

The schema knows that a grace period is a number. That it is long enough for what has to happen in it, that the
commands and their options exist, and that a probe's path is one that the program answers, it does not know.
"""

import asyncio
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import kubernetes_validate
import typer
import uvicorn
import yaml
from starlette.types import ASGIApp

from metered_billing.cli.commands import GRACE_S
from metered_billing.cli.commands import app as command_line
from metered_billing.cli.telemetry import FLUSH_WITHIN_S
from metered_billing.service import health
from tests.docs.pages import EXAMPLES

MANIFEST = EXAMPLES / "kubernetes.yaml"

VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""Kubernetes' own: the first whose `preStop: sleep` is there without being switched on, and the latest we know."""

MARGIN_S = 5
"""Of a grace period: from a signal until it is obeyed, on a node with other things to do."""

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """A Deployment with one container."""

    document: Document

    @property
    def name(self) -> str:
        return str(self.document["metadata"]["name"])

    @property
    def pod(self) -> Document:
        pod: Document = self.document["spec"]["template"]["spec"]
        return pod

    @cached_property
    def container(self) -> Document:
        container: Document
        (container,) = self.pod["containers"]
        return container

    @property
    def command(self) -> Sequence[str]:
        return [str(word) for word in self.container["command"]]

    @property
    def labels(self) -> Mapping[str, str]:
        labels: Mapping[str, str] = self.document["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def pre_stop_s(self) -> float:
        return float(self.container["lifecycle"]["preStop"]["sleep"]["seconds"])

    @property
    def grace_s(self) -> float:
        return float(self.pod["terminationGracePeriodSeconds"])

    def probe(self, which: str) -> Document:
        probe: Document = self.container[f"{which}Probe"]
        return probe

    def path(self, which: str) -> str:
        return str(self.probe(which)["httpGet"]["path"])

    def option(self, name: str) -> str:
        return next(word.partition("=")[2] for word in self.command if word.startswith(f"--{name}="))


def read(text: str | None = None) -> list[Document]:
    """The documents of a manifest; by default the docs' own."""
    return [each for each in yaml.safe_load_all(text or MANIFEST.read_text(encoding="utf-8")) if each]


def workloads(documents: Sequence[Document]) -> dict[str, Workload]:
    """Its Deployments, by name."""
    return {each["metadata"]["name"]: Workload(each) for each in documents if each["kind"] == "Deployment"}


def against_the_schema(document: Document, version: str) -> str | None:
    """Why Kubernetes would not take it."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


def against_our_rules(documents: Sequence[Document], apps: Mapping[str, ASGIApp], drain_timeout_s: float) -> list[str]:
    """What it would do wrong.

    Args:
        apps: What each Deployment serves.
        drain_timeout_s: The app's own.
    """
    found = workloads(documents)
    return [
        *(fault for each in found.values() for fault in _workload(each, apps[each.name])),
        *_stops(found, drain_timeout_s),
        *_pods(documents),
        *_selectors(documents),
    ]


def _workload(workload: Workload, app: ASGIApp) -> Iterator[str]:
    name, spec = workload.name, workload.document["spec"]
    if spec["replicas"] < 2 or spec["strategy"]["rollingUpdate"]["maxUnavailable"] != 0:
        yield f"{name}: a restart leaves fewer than all"
    ports = {each["name"]: each["containerPort"] for each in workload.container["ports"]}
    if str(ports["http"]) != workload.option("port") or workload.option("host") != "0.0.0.0":
        yield f"{name}: listens elsewhere than its port"
    for which in ("startup", "readiness", "liveness"):
        probe = workload.probe(which)
        if probe["httpGet"]["port"] != "http" or asyncio.run(_status(app, workload.path(which))) == 404:
            yield f"{name}: nothing answers its {which} probe"
    if workload.path("liveness") == workload.path("readiness"):
        yield f"{name}: is restarted for what others have"
    if workload.probe("readiness")["timeoutSeconds"] <= health.TIMEOUT_S:
        yield f"{name}: its readiness is given less time than it takes"


def _stops(found: Mapping[str, Workload], drain_timeout_s: float) -> Iterator[str]:
    """One after the other: preStop, uvicorn's patience with requests, then what the lifespan's end waits for."""
    app, credits = found["app"], found["credits"]  # noqa: A001
    for workload, needs_s in (
        (app, app.pre_stop_s + float(app.option("timeout-graceful-shutdown")) + drain_timeout_s),
        (credits, credits.pre_stop_s + GRACE_S + FLUSH_WITHIN_S),
    ):
        if workload.grace_s < needs_s + MARGIN_S:
            yield f"{workload.name}: is killed after {workload.grace_s:.0f} s, and may need {needs_s:.0f} s"


def _pods(documents: Sequence[Document]) -> Iterator[str]:
    for document in documents:
        if document["kind"] not in ("Deployment", "Job"):
            continue
        name, pod = document["metadata"]["name"], document["spec"]["template"]["spec"]
        security = pod["securityContext"]
        if not security.get("runAsNonRoot") or security["seccompProfile"]["type"] != "RuntimeDefault":
            yield f"{name}: may do too much"
        for container in pod["containers"]:
            yield from (f"{name}: {fault}" for fault in _container(container))


def _container(container: Document) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
        yield "its container may do too much"
    if not own.get("readOnlyRootFilesystem"):
        yield "its container may write where it is lost"
    if "memory" not in container["resources"]["limits"] or "cpu" not in container["resources"]["requests"]:
        yield "needs nobody knows what"
    for variable in container["env"]:
        if variable["name"] in ("PGPASSWORD", "METERED_BILLING_TOKEN") and "valueFrom" not in variable:
            yield f"{variable['name']} stands in the manifest"
    yield from _command([str(word) for word in container["command"]])


def _command(words: Sequence[str]) -> Iterator[str]:
    """A program and options that there are."""
    command: Any = {"uvicorn": uvicorn.main, "metered-billing": typer.main.get_command(command_line)}.get(words[0])
    rest = list(words[1:])
    while command is not None and getattr(command, "commands", None):
        command = command.commands.get(rest.pop(0))
    if command is None:
        yield f"there is no command {shlex.join(words)}"
        return
    try:
        command.make_context(words[0], rest, resilient_parsing=False)
    except Exception as error:
        yield f"{shlex.join(words)}: {getattr(error, 'message', error)}"


def _selectors(documents: Sequence[Document]) -> Iterator[str]:
    """What is to be found by labels is found by them."""
    pods = [each.labels for each in workloads(documents).values()]
    for document in documents:
        kind, spec = document["kind"], document["spec"]
        wanted = []
        if kind == "Service":
            wanted = [spec["selector"]]
        elif kind in ("Deployment", "PodDisruptionBudget"):
            wanted = [spec["selector"]["matchLabels"]]
        elif kind == "NetworkPolicy":
            peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
            wanted = [each["podSelector"]["matchLabels"] for each in (spec, *peers)]
        for labels in wanted:
            if not any(labels.items() <= pod.items() for pod in pods):
                yield f"{kind} {document['metadata']['name']}: no pod has the labels {dict(labels)}"


async def _status(app: ASGIApp, path: str) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pod") as kubelet:
        return (await kubelet.get(path)).status_code
