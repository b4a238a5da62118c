"""``/openapi.json`` says what the server takes: both come from the same tables."""

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.api.chat_request import CHAT_TABLE, parse_chat_request
from streamserve.api.completion_request import COMPLETION_TABLE, parse_completion_request
from streamserve.api.descriptions import DESCRIPTIONS
from streamserve.api.fields import STATUS, TypedReader
from streamserve.api.message_request import MESSAGES_TABLE, parse_messages_request
from streamserve.api.openapi import ENDPOINTS, OBJECTS, openapi
from streamserve.api.responses.request import RESPONSES_TABLE, parse_responses_request
from streamserve.errors import InvalidParameterError
from tests.api.harness import Api

TABLES = {
    **{endpoint.name: endpoint.table for endpoint in ENDPOINTS},
    **dict(OBJECTS),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_reader_has_a_schema(name):
    untyped = [f for f, r in TABLES[name].honoured.items() if not isinstance(r, TypedReader)]
    assert untyped == []


def test_every_description_is_of_a_field():
    fields = {field for table in TABLES.values() for field in table.honoured}
    assert set(DESCRIPTIONS) <= fields


async def test_the_document_lists_every_route():
    async with Api().running() as api:
        document = (await api.call("GET", "/openapi.json")).json
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    routes = {
        (method, route.path.replace(":path", ""))
        for route in api.app.routes
        for method in route.methods or {"POST"}
    }
    pages = {("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json")}
    assert {route for route in routes if route[0] != "HEAD"} - pages == listed
    assert "security" not in document


def test_with_keys_the_document_says_so():
    document = openapi(has_keys=True)
    assert document["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }


def test_a_field_says_whether_it_is_honoured():
    properties = openapi(has_keys=False)["components"]["schemas"]["ChatCompletionRequest"][
        "properties"
    ]
    assert properties["temperature"] == {
        "type": ["number", "null"],
        "minimum": 0.0,
        "maximum": 2.0,
        STATUS: "honoured",
        "description": DESCRIPTIONS["temperature"],
    }
    assert properties["messages"]["type"] == "array"
    assert properties["metadata"] == {STATUS: "no effect"}
    for name, refused in CHAT_TABLE.refused.items():
        assert properties[name][STATUS] == "refused"
        assert properties[name]["enum"] == [*refused.neutral, None]


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "1", "include_usage"])
            | st.text(max_size=2),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def _body(table, valid):
    """A valid body with some of the table's fields set to anything, or to what a schema allows."""
    names = sorted({*table.honoured, *table.refused})
    neutral = {
        name: st.sampled_from([*refused.neutral, None]) for name, refused in table.refused.items()
    }
    field = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), neutral.get(name, _json) | _json)
    )
    return st.lists(field, max_size=3).map(lambda fields: {**valid, **dict(fields)})


HI = {"role": "user", "content": "Hi"}
_VALIDATORS = {
    id(table): jsonschema.Draft202012Validator(table.schema())
    for table in (CHAT_TABLE, COMPLETION_TABLE, MESSAGES_TABLE, RESPONSES_TABLE)
}


@pytest.mark.parametrize(
    ("table", "parse", "valid"),
    [
        (CHAT_TABLE, parse_chat_request, {"messages": [HI], "stream": True}),
        (COMPLETION_TABLE, parse_completion_request, {"prompt": "Hi"}),
        (RESPONSES_TABLE, parse_responses_request, {"input": [HI], "stream": True}),
        (MESSAGES_TABLE, parse_messages_request, {"messages": [HI], "max_tokens": 4}),
    ],
)
def test_the_schema_excludes_nothing_that_is_taken(table, parse, valid):
    validator = _VALIDATORS[id(table)]

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
    @given(body=_body(table, valid))
    def check(body):
        try:
            parse(body, {})
        except InvalidParameterError:
            return
        validator.validate(body)

    check()
