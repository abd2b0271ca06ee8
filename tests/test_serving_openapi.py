"""/openapi.json is true: what it describes is what is there, and what schemathesis makes of it breaks nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("flask")
pytest.importorskip("waitress")
pytest.importorskip("prometheus_client")
schemathesis = pytest.importorskip("schemathesis")

from schemathesis.specs.openapi import checks  # noqa: E402
from served import KEY, serving  # noqa: E402

from functional_lm.serving.app import Service, create  # noqa: E402
from functional_lm.serving.routes import ROUTES  # noqa: E402

# Left out: `positive_data_acceptance`, because a schema cannot say that a token is in the vocabulary, that a text is no
# half of a surrogate pair, or that two fields go together.
CHECKS = (
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.ignored_auth,
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(api_keys=(KEY,), max_tokens=3) as made:
        yield made


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    return create(service).test_client()


@pytest.fixture(scope="module")
def document(client: Any) -> Any:
    return client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).get_json()


def test_every_route_is_described_and_no_other(service: Service, document: Any) -> None:
    rules = {
        (rule.rule, method.lower())
        for rule in create(service).url_map.iter_rules()
        for method in (rule.methods or ()) - {"HEAD", "OPTIONS"}
    }
    assert rules == {(route.path, route.method.lower()) for route in ROUTES}
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.template, route.method.lower()) for route in ROUTES}
    names = [part["operationId"] for methods in document["paths"].values() for part in methods.values()]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (entry for name, entry in value.items() if name == "$ref")
            value = list(value.values())
        if isinstance(value, list):
            for entry in value:
                yield from references(entry)

    found = set(references(document))
    assert len(found) > 15
    assert found <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert document["openapi"].startswith("3.1")


def examples(client: Any, count: int, number: int) -> None:
    """`count` requests, right and wrong ones, to one route."""
    route, headers = ROUTES[number], {"Authorization": f"Bearer {KEY}"}
    refused = {"negative_data_rejection": {"expected-statuses": [400, 401, 404, 413, 422, 429, 503]}}
    schema = schemathesis.openapi.from_wsgi(
        "/openapi.json", client.application, headers=headers, config=schemathesis.Config.from_dict({"checks": refused})
    )
    operation = schema[route.template][route.method]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE][: 2 if route.form else 1]

    @given(data=st.data())
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def run(data: st.DataObject) -> None:
        for mode in modes:
            case = data.draw(operation.as_strategy(generation_mode=mode))
            case.call_and_validate(checks=CHECKS, headers=headers)

    run()


@pytest.mark.parametrize("number", range(len(ROUTES)), ids=[f"{route.method} {route.path}" for route in ROUTES])
def test_what_is_made_of_the_document_breaks_nothing(client: Any, number: int) -> None:
    examples(client, 6, number)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(ROUTES)), ids=[f"{route.method} {route.path}" for route in ROUTES])
def test_nor_do_many_more(client: Any, number: int) -> None:
    examples(client, 100, number)
