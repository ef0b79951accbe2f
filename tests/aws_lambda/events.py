"""What Lambda is called with, in the shapes that AWS documents, and what it is told of the invocation."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

Event = dict[str, Any]

REQUEST_ID = "8f5d1c1e-3f4b-4c55-9d3a-0f1e2d3c4b5a"


@dataclass
class Context:
    """What a handler is told of its invocation."""

    aws_request_id: str = REQUEST_ID
    function_name: str = "cutouts-prod-app"
    left_ms: int = 29_000

    def get_remaining_time_in_millis(self) -> int:
        return self.left_ms


def _body(body: bytes | None, binary: bool) -> Event:
    if body is None:
        return {"isBase64Encoded": False}
    text = base64.b64encode(body).decode() if binary else body.decode()
    return {"body": text, "isBase64Encoded": binary}


def http_api(
    method: str, path: str, query: str = "", body: bytes | None = None, *, binary: bool = False, **headers: str
) -> Event:
    """An HTTP API of API Gateway, payload format 2.0: cookies apart, what is doubled joined by commas."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    cookies = given.pop("cookie", "")
    event: Event = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": query,
        "headers": {
            "accept": "*/*",
            "content-length": str(len(body or b"")),
            "host": "a1b2c3d4e5.execute-api.eu-central-1.amazonaws.com",
            "user-agent": "curl/8.5.0",
            "x-amzn-trace-id": "Root=1-65f1a2b3-0123456789abcdef01234567",
            "x-forwarded-for": "203.0.113.7",
            "x-forwarded-port": "443",
            "x-forwarded-proto": "https",
            **given,
        },
        "requestContext": {
            "accountId": "123456789012",
            "apiId": "a1b2c3d4e5",
            "domainName": "a1b2c3d4e5.execute-api.eu-central-1.amazonaws.com",
            "domainPrefix": "a1b2c3d4e5",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "203.0.113.7",
                "userAgent": "curl/8.5.0",
            },
            "requestId": "UqUOpgYnFiAEMMw=",
            "routeKey": "$default",
            "stage": "$default",
            "time": "13/Mar/2024:12:57:23 +0000",
            "timeEpoch": 1710334643518,
        },
        **_body(body, binary),
    }
    if cookies:
        event["cookies"] = cookies.split("; ")
    if query:
        joined: dict[str, str] = {}
        for name, value in parse_qsl(query):
            joined[name] = f"{joined[name]},{value}" if name in joined else value
        event["queryStringParameters"] = joined
    return event


def function_url(
    method: str, path: str, query: str = "", body: bytes | None = None, *, binary: bool = False, **headers: str
) -> Event:
    """A function URL: the HTTP API's format, under a name of Lambda's own."""
    event = http_api(method, path, query, body, binary=binary, **headers)
    domain = "abcdefghijklmnopqrstuvwxyz012345.lambda-url.eu-central-1.on.aws"
    event["headers"]["host"] = event["requestContext"]["domainName"] = domain
    event["requestContext"] |= {"accountId": "anonymous", "requestId": "84545120-9bda-41af-9b45-6bd9fb4503a6"}
    return event


def rest_api(
    method: str, path: str, query: str = "", body: bytes | None = None, *, binary: bool = False, **headers: str
) -> Event:
    """A REST API of API Gateway, payload format 1.0: each header and parameter once, and as a list."""
    own = {
        "Accept": "*/*",
        "Host": "a1b2c3d4e5.execute-api.eu-central-1.amazonaws.com",
        "X-Amzn-Trace-Id": "Root=1-65f1a2b3-0123456789abcdef01234567",
        "X-Forwarded-For": "203.0.113.7, 130.176.0.1",
        "X-Forwarded-Port": "443",
        "X-Forwarded-Proto": "https",
        **{name.replace("_", "-").title(): value for name, value in headers.items()},
    }
    lists: dict[str, list[str]] = {}
    for name, value in parse_qsl(query):
        lists.setdefault(name, []).append(value)
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": own,
        "multiValueHeaders": {name: [value] for name, value in own.items()},
        "queryStringParameters": {name: values[-1] for name, values in lists.items()} or None,
        "multiValueQueryStringParameters": lists or None,
        "pathParameters": {"proxy": path[1:]},
        "stageVariables": None,
        "requestContext": {
            "accountId": "123456789012",
            "apiId": "a1b2c3d4e5",
            "domainName": "a1b2c3d4e5.execute-api.eu-central-1.amazonaws.com",
            "extendedRequestId": "UqUOpgYnFiAEMMw=",
            "httpMethod": method,
            "identity": {"sourceIp": "203.0.113.7", "userAgent": "curl/8.5.0", "user": None},
            "path": f"/prod{path}",
            "protocol": "HTTP/1.1",
            "requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
            "requestTimeEpoch": 1710334643518,
            "resourceId": "0cwoxh",
            "resourcePath": "/{proxy+}",
            "stage": "prod",
        },
        **({"body": None, "isBase64Encoded": False} | _body(body, binary)),
    }


def load_balancer(
    method: str, path: str, query: str = "", body: bytes | None = None, *, binary: bool = False, **headers: str
) -> Event:
    """An application load balancer: names in lower case, parameters as they came, still encoded."""
    parameters = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
    return {
        "requestContext": {
            "elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu-central-1:123456789012:targetgroup/app/73e2d6bc"}
        },
        "httpMethod": method,
        "path": path,
        "queryStringParameters": parameters,
        "headers": {
            "accept": "*/*",
            "host": "app-1234567890.eu-central-1.elb.amazonaws.com",
            "x-amzn-trace-id": "Root=1-65f1a2b3-0123456789abcdef01234567",
            "x-forwarded-for": "203.0.113.7",
            "x-forwarded-port": "443",
            "x-forwarded-proto": "https",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
        **({"body": "", "isBase64Encoded": False} | _body(body, binary)),
    }


SHAPES: Mapping[str, Callable[..., Event]] = {
    "http-api": http_api,
    "function-url": function_url,
    "rest-api": rest_api,
    "load-balancer": load_balancer,
}


def headers_of(answer: Event) -> dict[str, str]:
    """The headers of what a handler returned, in whichever shape."""
    lists = {name: ", ".join(values) for name, values in (answer.get("multiValueHeaders") or {}).items()}
    return {name.lower(): value for name, value in {**lists, **(answer.get("headers") or {})}.items()}


def body_of(answer: Event) -> bytes:
    body: str = answer["body"]
    return base64.b64decode(body) if answer["isBase64Encoded"] else body.encode()


def json_of(answer: Event) -> Any:
    return json.loads(body_of(answer))
