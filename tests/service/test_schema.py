"""The service against its own description: schemathesis, with all its checks, and nothing unexplained.

Each call is made up from `/openapi.json`, as it should be and as it should not. What a check complains of is a fault,
unless it stands in `EXPLAINED` with the reason why it is none. `make fuzz` does the same for long.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import AcceptedNegativeData, Failure, FailureGroup
from schemathesis.core.transport import Response
from schemathesis.openapi.checks import RejectedPositiveData

from metered_billing.ledger import Ledger
from metered_billing.service import Tokens, create_app

ADMIN = {"Authorization": "Bearer admin-token"}

Case = schemathesis.Case[Any]

PROFILE = hypothesis.settings()
SHORT = PROFILE.max_examples <= 100

POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE

CHECKS = {
    "allow_header_conformance",
    "content_type_conformance",
    "ensure_resource_availability",
    "ignored_auth",
    "missing_required_header",
    "negative_data_rejection",
    "not_a_server_error",
    "object_level_authorization",
    "positive_data_acceptance",
    "response_headers_conformance",
    "response_schema_conformance",
    "status_code_conformance",
    "unsupported_method",
    "use_after_free",
}
"""All that schemathesis has: a release that brings another is looked at before it counts."""

OF_THE_BOOKS = {"insufficient-credits", "idempotency-key-reused", "refund-exceeds-deduction", "grant-too-large"}


def of_the_books(case: Case, answer: Response) -> bool:
    """What the ledger holds decides, which no schema can know beforehand."""
    return name(answer) in OF_THE_BOOKS


def fields_are_explained(case: Case, answer: Response) -> bool:
    """Each field that is complained of has one of `REASONS`."""
    wrong = errors(answer)
    return bool(wrong) and all(any(reason(case, each) for reason in REASONS) for each in wrong)


def float_that_is_whole(case: Case, error: dict[str, str]) -> bool:
    """JSON Schema takes 2.0 for an integer. The API does not: credits are never computed as floats."""
    value = dict(in_body(case.body)).get(error["field"])
    return isinstance(value, float) and value.is_integer()


def cursor_that_was_not_given_out(case: Case, error: dict[str, str]) -> bool:
    """A cursor is a text that a page gave, and no other: JSON Schema has no words for that."""
    return error["field"] == "cursor" and "gave out" in error["message"]


def metadata_that_is_too_long(case: Case, error: dict[str, str]) -> bool:
    """It is bounded in bytes of JSON: JSON Schema has no words for that, either."""
    return error["field"] == "metadata" and len(json.dumps(dict(in_body(case.body))["metadata"])) > 2048


def operation_has_its_own_answer(case: Case, answer: Response) -> bool:
    """A batch with a malformed operation is done but for that one, which gets its own 422."""
    return case.path == "/v1/batch" and any(result["status"] == 422 for result in answer.json().get("results", []))


def parameter_that_was_not_sent(case: Case, answer: Response) -> bool:
    """An empty list or object has no way of being sent in a query: what arrives is the parameter left out."""
    sent = parse_qs(urlsplit(answer.request.url or "").query, keep_blank_values=True)
    return not (case.query or {}).keys() <= sent.keys()


def sent_as_a_text(case: Case, answer: Response) -> bool:
    """A query has neither lists nor objects: of one with a single item, or name, just that arrives."""
    sent = parse_qs(urlsplit(answer.request.url or "").query, keep_blank_values=True)
    several = [name for name, value in (case.query or {}).items() if isinstance(value, list | dict)]
    return any(len(sent.get(name, ())) == 1 for name in several)


REASONS = (float_that_is_whole, cursor_that_was_not_given_out, metadata_that_is_too_long)

EXPLAINED: dict[type[Failure], tuple[Callable[[Case, Response], bool], ...]] = {
    RejectedPositiveData: (of_the_books, fields_are_explained),
    AcceptedNegativeData: (operation_has_its_own_answer, parameter_that_was_not_sent, sent_as_a_text),
}


def name(answer: Response) -> str:
    return str(answer.json().get("type", "")).removeprefix("urn:metered-billing:")


def errors(answer: Response) -> list[dict[str, str]]:
    found: list[dict[str, str]] = answer.json().get("errors", [])
    return found


def in_body(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each field's path, as an error names it, and its value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        here = f"{path}.{key}" if path else str(key)
        yield here, part
        yield from in_body(part, here)


def check(case: Case, answer: Response) -> None:
    """All checks, but for what is explained."""
    try:
        case.validate_response(answer, headers=ADMIN)
    except FailureGroup as group:
        left = [failure for failure in group.exceptions if not is_explained(failure, case, answer)]
        if left:
            raise AssertionError("\n\n".join(map(str, left)) + f"\n{answer.status_code} {answer.text}") from group


def is_explained(failure: BaseException, case: Case, answer: Response) -> bool:
    return any(
        reason(case, answer) for kind, reasons in EXPLAINED.items() if isinstance(failure, kind) for reason in reasons
    )


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    directory: Path = tmp_path_factory.mktemp("described")
    return create_app(Ledger(directory / "credits.db"), Tokens({"admin-token": "admin"}))


@pytest.fixture(scope="module")
def schema(described: FastAPI) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", described)


def tried(examples: int) -> settings:
    """So many examples each day, and more by the profile; the same ones each day, so that no red surprises anybody."""
    return settings(
        max_examples=max(2, examples * PROFILE.max_examples // 100),
        derandomize=SHORT,
        database=None,
        phases=[Phase.explicit, Phase.generate] if SHORT else list(Phase),
        suppress_health_check=list(HealthCheck),
    )


def test_all_checks_are_known(schema: Any) -> None:
    """Those that the module above speaks of are those that run."""
    assert schema is not None  # it registers them
    assert set(schemathesis.checks.CHECKS.get_all_names()) == CHECKS


def test_metadata_are_texts_that_a_database_can_hold(described: FastAPI) -> None:
    """Neither names nor values with NUL: what is refused stands in the description, so that a client is told."""
    (metadata, _) = described.openapi()["components"]["schemas"]["DeductionBody"]["properties"]["metadata"]["anyOf"]
    for pattern in (metadata["propertyNames"]["pattern"], metadata["additionalProperties"]["pattern"]):
        assert re.search(pattern, "two\nlines")
        assert not re.search(pattern, "a\x00b")


OPERATIONS = [
    "POST /v1/deductions",
    "POST /v1/deductions/{transaction_id}/refunds",
    "POST /v1/voids",
    "POST /v1/grants",
    "POST /v1/batch",
    "GET /v1/balance",
    "GET /v1/transactions",
    "GET /v1/transactions/{transaction_id}",
    "GET /healthz",
    "GET /livez",
]

ASKED_NOTHING = {"/healthz", "/livez"}
"""They have nothing that could be asked otherwise."""


def test_all_operations_are_tried(schema: Any) -> None:
    """None is left out."""
    assert {result.ok().label for result in schema.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [pytest.param(label, POSITIVE, id=f"{label} as described") for label in OPERATIONS]
    + [
        pytest.param(label, NEGATIVE, id=f"{label} otherwise")
        for label in OPERATIONS
        if label.split(" ")[1] not in ASKED_NOTHING
    ],
)
def test_operation_is_as_described(schema: Any, label: str, mode: Any) -> None:
    """Whatever it is asked: status, headers and body are what the description says, and what is wrong is refused."""
    method, path = label.split(" ")
    operation = schema[path][method]
    answers: Counter[int] = Counter()

    @tried(4)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        answer = case.call(headers=ADMIN)
        answers[answer.status_code] += 1
        check(case, answer)

    ask()
    # What asks for nothing but refusals would show nothing.
    assert mode is NEGATIVE or min(answers) < 300 or path.count("{") or method == "POST"


def test_stories_hold_together(schema: Any) -> None:
    """Calls that follow from each other's answers: what was made is there, and can be refunded."""
    machine = schema.as_state_machine()

    class Story(machine):  # type: ignore[misc, valid-type]
        def call(self, case: Case, **options: Any) -> Response:
            return super().call(case, **{**options, "headers": ADMIN})  # type: ignore[no-any-return]

        def validate_response(self, response: Response, case: Case, **_: Any) -> None:
            check(case, response)

    Story.run(settings=settings(tried(4), stateful_step_count=6))


def test_faults_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A service that answers something that it does not describe does not get by."""
    app = create_app(Ledger(tmp_path / "credits.db"), Tokens({"admin-token": "admin"}))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)

    async def balance(self: Ledger, tenant_id: str, user_id: str | None) -> str:
        return "many"

    monkeypatch.setattr(Ledger, "balance", balance)

    @tried(2)
    @given(case=schema["/v1/balance"]["GET"].as_strategy())
    def ask(case: Case) -> None:
        check(case, case.call(headers=ADMIN))

    with pytest.raises(AssertionError, match="schema"):
        ask()


def test_description_is_the_same_each_time(described: FastAPI) -> None:
    """And is JSON: what clients are made from."""
    assert json.loads(json.dumps(described.openapi())) == described.openapi()
