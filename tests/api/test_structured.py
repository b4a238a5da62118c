"""``response_format`` and vLLM's fields: what they ask for, and what is refused by name."""

import json

import orjson
import pytest

from streamserve.api.chat_request import parse_chat_request
from streamserve.core.structured_output import GrammarKind
from streamserve.errors import InvalidParameterError
from tests.api.harness import Api, chat_body, text_of

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["x", "y"]}}}
STRICT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


def parsed(**fields):
    return parse_chat_request(chat_body(**fields), {}).params.structured_output


def test_json_schema_comes_in_many_ways():
    in_order = orjson.dumps(SCHEMA).decode()
    for fields, param in (
        ({"response_format": STRICT}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "guided_json"),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            "response_format.schema",
        ),
        ({"response_format": {"type": "json", "value": SCHEMA}}, "response_format.value"),
    ):
        output = parsed(**fields)
        assert (output.kind, output.text) == (GrammarKind.JSON_SCHEMA, in_order)
        assert output.param == param


def test_the_other_grammars():
    for name, value, kind, text in (
        ("regex", "a+", GrammarKind.REGEX, "a+"),
        ("choice", ["a", "é"], GrammarKind.CHOICE, '["a","é"]'),
        ("grammar", 'start: "a"', GrammarKind.LARK, 'start: "a"'),
    ):
        for fields in ({f"guided_{name}": value}, {"structured_outputs": {name: value}}):
            output = parsed(**fields)
            assert (output.kind, output.text) == (kind, text)
    regex = parsed(response_format={"type": "regex", "value": "a+"})
    assert (regex.kind, regex.text) == (GrammarKind.REGEX, "a+")
    any_object = {"response_format": {"type": "json_object"}}
    assert parsed(**any_object).text == '{"type":"object"}'
    assert parsed(structured_outputs={"json_object": True}) == parsed(**any_object)
    no_schema = {"type": "json_object", "schema": None, "value": None}
    assert parsed(response_format=no_schema) == parsed(**any_object)
    nameless = {"type": "json_schema", "json_schema": {"name": "any"}}
    assert parsed(response_format=nameless) == parsed(**any_object)


def test_what_asks_for_nothing():
    for fields in (
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"guided_decoding_backend": "auto"},
    ):
        assert parsed(**fields) is None


def test_white_space():
    assert parsed(guided_json={}, guided_whitespace_pattern=" ?").whitespace_pattern == " ?"
    options = {"json": {}, "whitespace_pattern": "[ ]"}
    assert parsed(structured_outputs=options).whitespace_pattern == "[ ]"
    options = {"json_object": True, "disable_any_whitespace": True}
    assert parsed(structured_outputs=options).whitespace_pattern == ""
    assert parsed(guided_json={}).whitespace_pattern is None


def test_additional_properties_can_be_shut_out():
    inner = {"type": "array", "items": {"properties": {"c": {}}, "additionalProperties": True}}
    value = {"properties": {"a": {"properties": {"b": {}}}, "d": inner}}
    for given in (value, json.dumps(value)):
        options = {"json": given, "disable_additional_properties": True}
        schema = json.loads(parsed(structured_outputs=options).text)
        assert schema["additionalProperties"] is False
        assert schema["properties"]["a"]["additionalProperties"] is False
        assert schema["properties"]["d"] == inner


BAD = [
    ({"response_format": "json"}, "response_format", "an object, got a string"),
    ({"response_format": {}}, "response_format.type", "one of text"),
    ({"response_format": {"type": 5}}, "response_format.type", "a string"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format", "only type, got 'x'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"response_format": {"type": "json", "value": 5}}, "response_format.value", "an object"),
    ({"response_format": {"type": "regex"}}, "response_format", "value is required"),
    (
        {"response_format": {"type": "json_object", "schema": {}, "value": {}}},
        "response_format",
        "give one",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": []}},
        "response_format.json_schema",
        "an object",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
        "response_format.json_schema.schema",
        "an object",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
        "response_format.json_schema.strict",
        "a boolean",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"scheme": {}}}},
        "response_format.json_schema",
        "'scheme'",
    ),
    ({"structured_outputs": []}, "structured_outputs", "an object"),
    ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "'jsn'"),
    ({"structured_outputs": {"structural": "{}"}}, "structured_outputs", "'structural'"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "one of json"),
    ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object", "boolean"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "an object or a string"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "must hold JSON"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "give one"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "non-empty"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]", "a string"),
    (
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
        "JSON grammar",
    ),
    ({"guided_json": []}, "guided_json", "an object or a string"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "give one"),
    ({"guided_regex": "a", "response_format": STRICT}, "response_format", "give one"),
    ({"guided_choice": "a"}, "guided_choice", "an array"),
    ({"guided_choice": ["a"] * 4097}, "guided_choice", "4096"),
    ({"guided_grammar": {}}, "guided_grammar", "a string"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "JSON grammar"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "'xgrammar'"),
    # Only the compiler knows:
    ({"guided_json": {"type": "x"}}, "guided_json", "Invalid type"),
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_grammar": "start"}, "guided_grammar", "cannot be used as a grammar"),
    ({"guided_json": {}, "guided_whitespace_pattern": "("}, "guided_json", "unclosed group"),
    (
        {"structured_outputs": {"json": {"uniqueItems": True}}},
        "structured_outputs.json",
        "uniqueItems",
    ),
    (
        {"guided_json": {"type": "integer", "multipleOf": 99_999_989}},
        "guided_json",
        "too complex",
    ),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "at most 262144 characters"),
]


@pytest.mark.parametrize("is_chat", [True, False])
async def test_what_is_refused_is_refused_by_name(is_chat):
    async with Api().running() as api:
        for fields, param, message in BAD:
            answer = await (api.chat if is_chat else api.complete)(**fields)
            assert answer.status == 400, fields
            assert message in answer.error["message"], fields
            assert answer.error["param"] == param
            assert answer.error["type"] == "invalid_request_error"
            assert api.engine.is_idle
        assert (await api.chat(max_tokens=3)).status == 200


def nested(depth: int) -> bytes:
    return b'{"type":"array","items":' * depth + b"{}" + b"}" * depth


@pytest.mark.parametrize("depth", [120, 240, 300, 900, 10_000])
async def test_deep_schemas_are_compiled_or_refused(depth):
    async with Api().running() as api:
        for field in (
            b'"guided_json":%b',
            b'"structured_outputs":{"disable_additional_properties":true,"json":%b}',
        ):
            body = b'{"max_tokens":3,"messages":[{"role":"user","content":"Hi"}],%b}'
            answer = await api.call("POST", "/v1/chat/completions", body % (field % nested(depth)))
            assert answer.status == 400 or depth == 120
            assert answer.status in (200, 400)


async def test_answers_follow_their_grammar_streamed_or_not():
    fields = {"max_tokens": 200, "response_format": STRICT}
    async with Api(token_ids=b"xyz0123456789").running() as api:
        whole = await api.chat(**fields)
        streamed = await api.chat(**fields, stream=True)
        completion = await api.complete(max_tokens=9, guided_choice=["one", "two"])
    [choice] = whole.json["choices"]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]) == {}
    assert text_of(streamed.events) == choice["message"]["content"]
    assert completion.json["choices"][0]["text"] in ("one", "two")
    assert completion.json["choices"][0]["finish_reason"] == "stop"


def test_a_bad_choice_of_half_a_character():
    with pytest.raises(InvalidParameterError, match="whole characters"):
        parsed(guided_choice=["\ud800"])
