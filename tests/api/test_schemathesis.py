"""Bodies made from ``/openapi.json``, right and wrong: 4xx in its API's shape, or an answer.

schemathesis tries what each field's schema allows and what it does not. After each body the server
answers a plain request as ever.
"""

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from streamserve.api.openapi import ENDPOINTS, openapi
from streamserve.api.sampling import TIME_FIELDS
from tests.api.harness import Api, error_of, server_thread

CHECKS = (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
LATE = ("deadline_exceeded", "deadline_unreachable", "queue_timeout")
PLAIN = {"prompt": "Hi", "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with server_thread() as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


DOCUMENT = openapi(has_keys=False)
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


@pytest.fixture(scope="module")
def schema() -> BaseSchema:
    return schemathesis.openapi.from_dict(DOCUMENT)


# schemathesis's own parametrisation gives all operations one name: run in parallel, one is left.
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_only_4xx_and_it_answers_afterwards(path, method, schema, server):
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = st.one_of([schema[path][method].as_strategy(mode) for mode in modes])

    @given(cases)
    @settings(max_examples=15, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def try_cases(case):
        response = case.call(base_url=str(server.base_url))
        if response.status_code not in (503, 504) or not is_late(error_of(response.json())):
            case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            assert len(error_of(response.json())["message"]) > 10
        answer = server.post("/v1/completions", json=PLAIN)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"] == "abcd"

    try_cases()


def is_late(error):
    """Whether it is the deadline that the body asked for."""
    return error.get("code") in LATE


# JSON of every kind and size; none of them is right for every field.
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    7,
    1e300,
    2**63,
    "",
    "x",
    "\ud7ff\n\u0000",
    [],
    [None],
    ["x", 1],
    [[0.5]],
    {},
    {"x": {}},
    {"type": "x", "1": "x"},
]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
async def test_every_field_alone_with_anything(endpoint):
    """Each field over a body that is right: refused by its own name, or answered."""
    table = endpoint.table
    async with Api().running() as api:
        for name in [*table.honoured, *table.refused, *table.annotations, "nobody_knows"]:
            for value in VALUES:
                body = {**endpoint.example, name: value}
                answer = await api.call("POST", endpoint.path, body)
                if answer.status == 200 or (name in TIME_FIELDS and is_late(answer.error)):
                    continue
                assert 400 <= answer.status < 500, body
                assert name in answer.error["message"], (body, answer.error)
            answer = await api.call("POST", endpoint.path, endpoint.example)
            assert answer.status == 200, answer.json
        assert api.engine.is_idle
