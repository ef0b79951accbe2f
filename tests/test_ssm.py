"""Settings in AWS SSM Parameter Store: moto's server holds them, and counts who asks."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import botocore.endpoint
import httpx
import pytest
from botocore.exceptions import ConnectTimeoutError, CredentialRetrievalError, SSLError
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from metered_billing import MeteredBillingMiddleware, Settings, metered, settled
from metered_billing.ledger import Grant, Ledger
from metered_billing.runtime import Runtime
from metered_billing.service import Tokens, create_app
from metered_billing.sources import InvalidSettings
from metered_billing.ssm import ATTEMPTS, Parameters, ParametersUnreadable, _kind, _new_client
from metered_billing.telemetry import Telemetry
from tests import aws
from tests.docs.pages import DOCS
from tests.docs.sandbox import serving_thread
from tests.serving import free_port
from tests.stand import ANN, serving

DENIED = (
    "User: arn:aws:sts::123456789012:assumed-role/app/i-0abc is not authorized to perform: ssm:GetParametersByPath"
    " on resource: arn:aws:ssm:eu-west-1:123456789012:parameter/prod"
)


class Store:
    """Parameter Store, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0
        self._client = _new_client()

    def put(self, name: str, value: str, kind: str = "SecureString") -> None:
        self._client.put_parameter(Name=name, Value=value, Type=kind, Overwrite=True)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with aws.running() as url:
        yield url


@pytest.fixture
def store(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """It is empty, and the directory too."""
    from moto.ssm.responses import SimpleSystemManagerResponse as Responses

    monkeypatch.chdir(tmp_path)
    aws.use(moto, monkeypatch)
    httpx.post(f"{moto}/moto-api/reset", trust_env=False)
    store = Store()
    answer = Responses.get_parameters_by_path

    def counting(self: Any) -> Any:
        store.calls += 1
        return answer(self)

    monkeypatch.setattr(Responses, "get_parameters_by_path", counting)
    return store


class Odd:
    """An endpoint that answers as it is told to."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Odd]:
    """Waits between botocore's attempts take no time."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            there.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, body = there.answers.pop(0) if len(there.answers) > 1 else there.answers[0]
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/x-amz-json-1.1")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(botocore.endpoint.time, "sleep", lambda _: None)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        there = Odd(server.server_port)
        aws.use(there.url, monkeypatch)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield there
        server.shutdown()
        thread.join()


def parameter(name: str, value: str) -> dict[str, str]:
    return {"Name": name, "Value": value}


# One look.


def test_pages_are_read_to_their_end(odd: Odd) -> None:
    """A page may be empty and yet have a next one. All is asked for decrypted."""
    odd.answers = [
        (200, {"Parameters": [], "NextToken": "1"}),
        (200, {"Parameters": [parameter("/prod/token", "t")], "NextToken": "2"}),
        (200, {"Parameters": [parameter("/prod/credits", "c")]}),
    ]
    assert Parameters("/prod/").read() == {"token": "t", "credits": "c"}
    asked: dict[str, Any] = {"Path": "/prod", "WithDecryption": True}
    assert odd.asked == [asked, asked | {"NextToken": "1"}, asked | {"NextToken": "2"}]


def test_pages_without_an_end(odd: Odd) -> None:
    """Nobody waits for them."""
    odd.answers = [(200, {"Parameters": [], "NextToken": "1"})]
    with pytest.raises(ParametersUnreadable, match="have no end"):
        Parameters("/prod").read()


@pytest.mark.parametrize(
    ("answer", "asked", "says"),
    [
        (
            (400, {"__type": "AccessDeniedException", "Message": "hunter2"}),
            1,
            "AWS SSM answered AccessDeniedException: these AWS credentials need ssm:GetParametersByPath on /prod and",
        ),
        (
            (
                400,
                {"__type": "AccessDeniedException", "Message": f"{DENIED} because no identity-based policy: hunter2"},
            ),
            1,
            "AWS SSM answered AccessDeniedException: these AWS credentials need ssm:GetParametersByPath on /prod and"
            " /prod/*, and kms:Decrypt where a key of your own encrypts them."
            f" AWS says: {DENIED} because no identity-based policy",
        ),
        (
            (403, {"__type": "InvalidSignatureException", "Message": "x-amz-security-token:hunter2"}),
            1,
            "AWS SSM answered InvalidSignatureException: the AWS secret key is wrong, or this machine's clock",
        ),
        (
            (400, {"__type": "ExpiredTokenException", "Message": "The security token hunter2 is expired"}),
            1,
            "AWS SSM answered ExpiredTokenException: these AWS credentials have expired",
        ),
        (
            (400, {"__type": "ThrottlingException"}),
            ATTEMPTS,
            "AWS SSM answered ThrottlingException: too many ask at the same time",
        ),
        ((500, {"Message": "hunter2"}), ATTEMPTS, "AWS SSM answered 500"),
        ((200, {"Parameters": []}), 1, "there is no parameter under /prod/ in AWS SSM"),
    ],
)
def test_refusal_at_start_up_names_the_prefix_and_its_source(
    odd: Odd, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any], asked: int, says: str
) -> None:
    """And what to do; it was asked three times at the most."""
    odd.answers = [answer]
    monkeypatch.setenv("METERED_BILLING_SSM_PREFIX", "/prod")
    with pytest.raises(InvalidSettings) as error:
        Settings()
    assert str(error.value).startswith(f"METERED_BILLING_SSM_PREFIX in the environment: {says}")
    assert "hunter2" not in str(error.value)
    assert len(odd.asked) == asked


def test_unreachable(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of error is shown, and the host: the rest of a URL may have a password."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:hunter2@127.0.0.1:{(port := free_port())}/hunter2")
    with pytest.raises(ParametersUnreadable) as error:
        Parameters("/prod").read()
    assert str(error.value) == f"AWS SSM could not be asked (EndpointConnectionError: endpoint 127.0.0.1:{port})"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "hunter2")
    with pytest.raises(ParametersUnreadable) as error:
        Parameters("/prod").read()
    assert str(error.value) == "AWS SSM could not be asked (ValueError)"


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("AWS_REGION", "AWS SSM needs a region: set AWS_REGION"),
        ("AWS_ACCESS_KEY_ID", "there are no AWS credentials to ask SSM with"),
    ],
)
def test_what_aws_itself_lacks(odd: Odd, monkeypatch: pytest.MonkeyPatch, missing: str, says: str) -> None:
    """A sentence, not boto3's own."""
    monkeypatch.delenv(missing)
    with pytest.raises(ParametersUnreadable) as error:
        Parameters("/prod").read()
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_PROFILE": "prod"}, "ProfileNotFound: profile prod"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "PartialCredentialsError: provider env, cred var AWS_SECRET_ACCESS_KEY"),
        (
            {"HTTP_PROXY": "http://me:hunter2@127.0.0.1:1", "NO_PROXY": "", "no_proxy": ""},
            "ProxyConnectionError: proxy 127.0.0.1:1",
        ),
    ],
)
def test_what_of_aws_is_set_wrongly(
    odd: Odd, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None], says: str
) -> None:
    """Its name is shown; no password."""
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ParametersUnreadable) as error:
        Parameters("/prod").read()
    assert str(error.value) == f"AWS SSM could not be asked ({says})"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (CredentialRetrievalError(provider="custom-process", error_msg="hunter2"), "provider custom-process"),
        (ConnectTimeoutError(endpoint_url="http://[hunter2"), ""),
        (
            ConnectTimeoutError(endpoint_url="https://ssm.eu-west-1.amazonaws.com/"),
            "endpoint ssm.eu-west-1.amazonaws.com",
        ),
        (SSLError(endpoint_url="https://10.0.0.1:8443/hunter2", error="hunter2"), "endpoint 10.0.0.1:8443"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_botocores_show_where_and_nothing_else(error: Exception, says: str) -> None:
    """What a program printed that was asked for credentials, say, is not shown."""
    assert _kind(error) == type(error).__name__ + (f": {says}" if says else "")


def test_policy_on_the_page_allows_what_is_asked() -> None:
    """And nothing else; each action, resource and condition is one that AWS knows."""
    policy = (DOCS / "examples" / "ssm-policy.json").read_text(encoding="utf-8")
    assert aws.findings(policy) == []
    assert aws.findings(policy.replace("GetParametersByPath", "GetParametersByPaths"))
    assert {statement["Action"] for statement in json.loads(policy)["Statement"]} == {
        "ssm:GetParametersByPath",
        "kms:Decrypt",
    }


# Against moto's server.


@pytest.mark.slow
@pytest.mark.xdist_group("moto")
def test_settings_from_ssm(store: Store) -> None:
    """Decrypted, those right below the prefix alone, in one call."""
    store.put("/prod/credits", "http://credits.internal", "String")
    store.put("/prod/token", "t")
    store.put("/prod/staging/token", "another's")
    store.put("/production/token", "another's")
    settings = Settings(ssm_prefix="/prod")
    assert (settings.credits, settings.token) == ("http://credits.internal", SecretStr("t"))
    assert (settings.sources["credits"], settings.sources["token"]) == ("SSM", "SSM")
    assert store.calls == 1
    for number in range(12):
        store.put(f"/many/no-setting-{number}", "x", "String")
    assert len(Parameters("/many").read()) == 12
    assert store.calls == 3


class Scene:
    """An app and a credits service, both running; who keeps the token is AWS."""

    def __init__(self, store: Store, ledger: Ledger, url: str) -> None:
        self.store = store
        self.ledger = ledger
        self.url = url
        self.statuses: list[int] = []
        self.service = create_app(ledger, Tokens({"A": "*"}))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The service, as it is now."""

        async def watch(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
            await send(message)

        await self.service(scope, receive, watch)

    def rotate(self) -> None:
        """Another token, for the service and in SSM; the old one is void."""
        self.service = create_app(self.ledger, Tokens({"B": "*"}))
        self.store.put("/prod/token", "B")

    async def balance(self) -> int:
        await settled()
        return await self.ledger.balance("acme", "ann")


@pytest.fixture
async def scene(store: Store, tmp_path: Path) -> AsyncIterator[Scene]:
    ledger = Ledger(tmp_path / "credits.db")
    await ledger.start()
    await ledger.grant(Grant(idempotency_key="g", tenant_id="acme", user_id="ann", amount=1000, reason="test"))
    port = free_port()
    scene = Scene(store, ledger, f"http://127.0.0.1:{port}")
    store.put("/prod/token", "A")
    store.put("/prod/credits", scene.url)
    with serving_thread(scene, port):
        yield scene
    await ledger.close()


Clock = Callable[[], float]


def app(settings: Settings, later_s: list[float]) -> Starlette:
    """Items of which some fail; its clock can be put on."""

    async def work(request: Request) -> Response:
        return JSONResponse({"results": [{"status": "ok"}, {"status": "failed"}]})

    loop = asyncio.get_running_loop()
    runtime = Runtime(monotonic=lambda: loop.time() + later_s[0])
    billing = Middleware(
        MeteredBillingMiddleware, settings=settings, account=lambda: ANN, runtime=runtime, telemetry=Telemetry()
    )
    return Starlette(routes=[Route("/work", metered(cost=2)(work), methods=["POST"])], middleware=[billing])


@pytest.mark.slow
@pytest.mark.xdist_group("moto")
async def test_rotated_token_needs_no_restart(scene: Scene) -> None:
    """The request that finds it out pays one 401 and one call of SSM; those after it, nothing."""
    async with serving(app(Settings(ssm_prefix="/prod"), [0.0])) as client:
        for _ in range(3):
            assert (await client.post("/work")).status_code == 200
        await settled()
        assert scene.store.calls == 1
        scene.rotate()
        scene.statuses.clear()
        for _ in range(3):
            assert (await client.post("/work")).status_code == 200
        assert await scene.balance() == 1000 - 6
        assert scene.store.calls == 2
        assert scene.statuses.count(401) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("moto")
async def test_token_is_read_anew_after_five_minutes(scene: Scene) -> None:
    """Before the old one is void: then nobody is rejected at all. Nothing waits for it."""
    later_s = [0.0]
    async with serving(app(Settings(ssm_prefix="/prod"), later_s)) as client:
        scene.service = create_app(scene.ledger, Tokens({"A": "*", "B": "*"}))
        scene.store.put("/prod/token", "B")
        for _ in range(3):
            assert (await client.post("/work")).status_code == 200
        assert scene.store.calls == 1
        later_s[0] += 331
        assert (await client.post("/work")).status_code == 200
        while scene.store.calls < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        scene.rotate()
        assert (await client.post("/work")).status_code == 200
        assert await scene.balance() == 1000 - 5
        assert scene.store.calls == 2
        assert 401 not in scene.statuses


@pytest.mark.slow
@pytest.mark.xdist_group("moto")
async def test_hundred_requests_at_the_rotation(scene: Scene) -> None:
    """Two calls of SSM at the most, and not one request is refused."""
    async with serving(app(Settings(ssm_prefix="/prod"), [0.0])) as client:
        assert (await client.post("/work")).status_code == 200
        scene.rotate()
        answers = await asyncio.gather(*(client.post("/work") for _ in range(100)))
        assert [answer.status_code for answer in answers] == [200] * 100
        assert await scene.balance() == 1000 - 101
        assert scene.store.calls <= 3


@pytest.mark.slow
@pytest.mark.xdist_group("moto")
async def test_service_rotates_before_ssm(scene: Scene) -> None:
    """Until the new token is there, requests are refused and nothing stays charged; refunds go out once it is."""
    later_s = [0.0]
    async with serving(app(Settings(ssm_prefix="/prod"), later_s)) as client:
        assert (await client.post("/work")).status_code == 200
        assert await scene.balance() == 999
        scene.service = create_app(scene.ledger, Tokens({"B": "*"}))
        assert [(await client.post("/work")).status_code for _ in range(5)] == [503] * 5
        assert scene.store.calls == 2
        scene.store.put("/prod/token", "B")
        later_s[0] += 6
        assert (await client.post("/work")).status_code == 200
        assert scene.store.calls == 3
        assert await scene.balance() == 998
