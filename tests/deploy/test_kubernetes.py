"""The manifest of the docs: it is what Kubernetes takes, and does what the page says."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from starlette.types import ASGIApp

from metered_billing import MeteredBillingMiddleware
from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app
from tests.deploy.kubernetes import MANIFEST, VERSIONS, Document, against_our_rules, against_the_schema, read, workloads
from tests.docs.pages import EXAMPLES


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, ASGIApp]]:
    """What the two Deployments serve: the app of the docs, and the credits service."""
    directory = tmp_path_factory.mktemp("apps")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setenv("METERED_BILLING_CREDITS", "http://127.0.0.1:1")
        patch.setenv("METERED_BILLING_TOKEN", "secret")
        patch.setenv("METERED_BILLING_JOURNAL", str(directory / "journal"))
        app = importlib.import_module(workloads(read())["app"].command[1].partition(":")[0]).app
        service = create_app(Ledger(directory / "credits.db"), Tokens({"secret": "*"}))
        yield {"app": app, "credits": service}
        for name in ("production", "probes"):
            sys.modules.pop(name, None)


def drain_timeout_s(app: ASGIApp) -> float:
    (middleware,) = [each for each in app.user_middleware if each.cls is MeteredBillingMiddleware]  # type: ignore[attr-defined]
    return float(middleware.kwargs["drain_timeout_s"])


@pytest.mark.parametrize("version", VERSIONS)
def test_manifest_is_what_kubernetes_takes(version: str) -> None:
    """By its schema, strictly."""
    assert [against_the_schema(document, version) for document in read()] == [None] * len(read())


@pytest.mark.parametrize(
    ("line", "broken", "found"),
    [
        ("terminationGracePeriodSeconds: 45", "terminationGracePeriodSecond: 45", "terminationGracePeriodSecond"),
        ("maxSurge: 1}", "maxSurge: [1]}", "spec.strategy.rollingUpdate.maxSurge"),
    ],
)
def test_manifest_that_kubernetes_would_not_take_is_found_out(line: str, broken: str, found: str) -> None:
    """A name that is misspelt; a value of another kind."""
    documents = read(MANIFEST.read_text(encoding="utf-8").replace(line, broken, 1))
    all_of_them = [against_the_schema(each, VERSIONS[-1]) for each in workloads_of(documents)]
    assert [found in why for why in all_of_them if why is not None] == [True]


def workloads_of(documents: list[Document]) -> list[Document]:
    return [each.document for each in workloads(documents).values()]


def test_manifest_keeps_our_rules(apps: Mapping[str, ASGIApp]) -> None:
    """By what its programs, its probes and its patience really are."""
    assert against_our_rules(read(), apps, drain_timeout_s(apps["app"])) == []


@pytest.mark.parametrize(
    ("line", "broken", "found"),
    [
        ("terminationGracePeriodSeconds: 45", "terminationGracePeriodSeconds: 30", "app: is killed after 30 s"),
        ("terminationGracePeriodSeconds: 30", "terminationGracePeriodSeconds: 20", "credits: is killed after 20 s"),
        ("maxUnavailable: 0", "maxUnavailable: 1", "credits: a restart leaves fewer than all"),
        ("path: /readyz", "path: /ready", "app: nothing answers its readiness probe"),
        ("path: /healthz", "path: /livez", "credits: is restarted for what others have"),
        ("timeoutSeconds: 3", "timeoutSeconds: 1", "credits: its readiness is given less time"),
        ("--port=8000", "--port=8001", "app: listens elsewhere than its port"),
        ("--tokens-file", "--token-file", "No such option: --token-file"),
        ("- serve", "- server", "there is no command"),
        ("--port=8080", "--port=99999", "less than or equal to 65535"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "migrate-1: its container may write"),
        ("runAsNonRoot: true", "runAsNonRoot: false", "migrate-1: may do too much"),
        ("limits: {memory: 256Mi}", "limits: {cpu: 1}", "migrate-1: needs nobody knows what"),
        ("valueFrom: {secretKeyRef: {name: app, key: token}}", "value: secret", "METERED_BILLING_TOKEN stands in"),
        ("selector: {app: app}", "selector: {app: apps}", "Service app: no pod has the labels"),
        ('uses-credits: "yes"}\n      ports', 'uses-credit: "yes"}\n      ports', "NetworkPolicy credits: no pod"),
    ],
)
def test_manifest_that_is_broken_is_found_out(apps: Mapping[str, ASGIApp], line: str, broken: str, found: str) -> None:
    """Each way to spoil it, and the words for it: else the check above would prove nothing."""
    text = MANIFEST.read_text(encoding="utf-8")
    assert line in text
    all_of_them = against_our_rules(read(text.replace(line, broken, 1)), apps, drain_timeout_s(apps["app"]))
    assert any(found in fault for fault in all_of_them), all_of_them


def test_secrets_of_the_manifest_are_those_that_the_page_makes() -> None:
    """Each of them, with all of its keys."""
    page = (Path(EXAMPLES).parent / "how-to" / "deploy-kubernetes.md").read_text(encoding="utf-8")
    for document in read():
        pod = document["spec"].get("template", {}).get("spec", {})
        named = [
            (variable["valueFrom"]["secretKeyRef"]["name"], variable["valueFrom"]["secretKeyRef"]["key"])
            for container in pod.get("containers", [])
            for variable in container["env"]
            if "valueFrom" in variable
        ]
        named += [
            (volume["secret"]["secretName"], item["key"])
            for volume in pod.get("volumes", [])
            if "secret" in volume
            for item in volume["secret"]["items"]
        ]
        for name, key in named:
            (made,) = [line for line in page.splitlines() if f"create secret generic {name} " in line]
            assert f"={key}=" in made or f"={key} " in f"{made} ", f"{name}: {key}"
