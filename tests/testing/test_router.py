"""Other hosts than the service's are none of the kit's business."""

import httpx
import pytest
import respx
from respx.models import AllMockedAssertionError

from metered_billing.testing import Billing
from tests.serving import free_port

ELSEWHERE = "http://elsewhere.test/"


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, verify=False)


def test_test_mocks_other_hosts_itself(billing: Billing, respx_mock: respx.MockRouter) -> None:
    """By respx's own fixture, which wants all of its routes called."""
    respx_mock.get(ELSEWHERE).respond(204)
    assert get(ELSEWHERE).status_code == 204
    assert get(f"{billing.url}/healthz").json() == {"status": "ok"}
    with pytest.raises(AllMockedAssertionError):
        get("http://nobody.test/")
    assert [str(call.request.url) for call in respx_mock.calls] == [ELSEWHERE]


@respx.mock
def test_mock_that_was_there_first(request: pytest.FixtureRequest) -> None:
    """Even one that answers whatever it is asked does not answer for the service."""
    with respx.mock(assert_all_mocked=False):
        billing: Billing = request.getfixturevalue("billing")
        assert get(f"{billing.url}/healthz").json() == {"status": "ok"}
        assert get(ELSEWHERE).content == b""


def test_mock_inside_a_test(billing: Billing) -> None:
    """It begins later and ends earlier, and respx's own reset does not reach the service."""
    with respx.mock:
        respx.get(ELSEWHERE).respond(204)
        assert get(ELSEWHERE).status_code == 204
        assert get(f"{billing.url}/healthz").is_success
    respx.stop()
    respx.reset()
    assert get(f"{billing.url}/healthz").is_success


def test_host_that_nobody_mocks_is_called(billing: Billing) -> None:
    """It goes out, as it would without the kit: here nobody listens."""
    with pytest.raises(httpx.ConnectError):
        get(f"http://127.0.0.1:{free_port()}/")
    assert billing.calls == []


def test_service_is_gone_after_the_test() -> None:
    """Nothing stays patched."""
    with pytest.raises(httpx.ConnectError):
        get("http://credits.test/healthz")
