"""Forced calls: whatever the model would say, what comes is calls with valid arguments."""

import json

import jsonschema
import openai
import pytest

from streamserve.api.call_grammars import closed
from streamserve.engine.parsers.answer_format import AnswerFormat
from tests.api.harness import MODEL, server_thread
from tests.api.scripted import scripted, scripted_parts
from tests.api.test_tools import ADD, HI, TOOLS, deltas_of, finish_reasons

NAMED = {"type": "function", "function": {"name": "get_weather"}}
STRICT = {
    "type": "function",
    "function": {
        "name": "pick",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
            "required": ["colour", "sure"],
            "additionalProperties": False,
        },
    },
}


HERMES = AnswerFormat(tool_parser="hermes")


def check(calls, tools):
    schemas = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, schemas[call["function"]["name"]])


@pytest.mark.parametrize("says", ["nonsense", "", '{"colour": "green", "sure": 5'])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
@pytest.mark.parametrize("stream", [False, True])
async def test_any_model_calls(says, choice, stream):
    async with scripted(says, answer_format=HERMES).running() as api:
        answer = await api.chat(
            tools=[STRICT], tool_choice=choice, stream=stream, parallel_tool_calls=False
        )
    assert answer.status == 200
    if stream:
        calls = [call for delta in deltas_of(answer) for call in delta.get("tool_calls", ())]
        assert calls[0]["id"].startswith("call_")
        assert [("id" in call) for call in calls] == [True] + [False] * (len(calls) - 1)
        text = "".join(call["function"]["arguments"] for call in calls)
        check([{"function": {"name": calls[0]["function"]["name"], "arguments": text}}], [STRICT])
        assert len(calls) > 10  # nothing is held back
        assert finish_reasons(answer) == ["tool_calls"]
    else:
        [choice] = answer.json["choices"]
        check(choice["message"]["tool_calls"], [STRICT])
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"


async def test_what_the_model_wants_to_say_passes():
    says = '[{"name": "add", "parameters": {"a": 1}}, {"name": "get_weather", "parameters": '
    says += '{"city": "Łódź"}}]'
    async with scripted(says, answer_format=HERMES).running() as api:
        answer = await api.chat(tools=TOOLS, tool_choice="required")
        named = await api.chat(tools=TOOLS, tool_choice=NAMED)
    calls = answer.json["choices"][0]["message"]["tool_calls"]
    assert [c["function"] for c in calls] == [
        {"name": "add", "arguments": '{"a": 1}'},
        {"name": "get_weather", "arguments": '{"city": "Łódź"}'},
    ]
    [call] = named.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    check([call], TOOLS)


NESTED = {
    "type": "function",
    "function": {
        "name": "draw",
        "parameters": {
            "type": "object",
            "properties": {"p": {"$ref": "#/$defs/Point"}},
            "required": ["p"],
            "$defs": {
                "Point": {
                    "type": "object",
                    "properties": {"sure": {"enum": [1, 2]}, "next": {"type": "null"}},
                    "required": ["sure", "next"],
                }
            },
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "draw"}}])
async def test_a_tools_schema_may_refer_to_itself(choice):
    """As pydantic writes the schemas of models with models in them."""
    async with scripted("nonsense", answer_format=HERMES).running() as api:
        answer = await api.chat(
            tools=[ADD, NESTED][choice != "required" :],
            tool_choice=choice,
            parallel_tool_calls=False,
        )
    [call] = answer.json["choices"][0]["message"]["tool_calls"]
    if call["function"]["name"] == "draw":
        check([call], [NESTED])


async def test_a_call_has_only_the_arguments_that_its_tool_names():
    says = '{"city": "Rome", "and": "so on", "and so": "on"}'
    async with scripted(says, answer_format=HERMES).running() as api:
        answer = await api.chat(tools=TOOLS, tool_choice=NAMED)
    [call] = answer.json["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}


def test_only_what_says_nothing_of_other_members_is_closed():
    point = {"type": "object", "properties": {"x": {"type": "number"}}}
    shut = {**point, "additionalProperties": False}
    assert closed({"properties": {"p": point}, "required": ["p"], "$defs": {"q": point}}) == {
        "properties": {"p": shut},
        "required": ["p"],
        "$defs": {"q": shut},
        "additionalProperties": False,
    }
    assert closed({"items": point, "anyOf": [point, {"type": "null"}]}) == {
        "items": shut,
        "anyOf": [shut, {"type": "null"}],
    }
    for open_ in (
        {},
        {"type": "object", "properties": {}},
        {**point, "additionalProperties": {"type": "string"}},
        {**point, "required": ["y"]},
        {**point, "patternProperties": {"a": {}}},
        {"properties": {"p": {"allOf": [point, point]}}},
    ):
        assert closed(open_) == open_


async def test_a_forced_call_is_cut_by_max_tokens():
    async with scripted('{"city": "' + "x" * 100, answer_format=HERMES).running() as api:
        answer = await api.chat(tools=TOOLS, tool_choice=NAMED, max_tokens=15)
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "xxxxx'


async def test_a_thinking_model_thinks_before_a_forced_call():
    says = '<think>Hm.</think>{"city": "Rome"}'
    async with scripted(says).running() as api:
        closed = await api.chat(tools=TOOLS, tool_choice=NAMED)
        opened = await api.chat(
            tools=TOOLS, tool_choice=NAMED, chat_template_kwargs={"enable_thinking": True}
        )
    for answer in (closed, opened):
        message = answer.json["choices"][0]["message"]
        assert message["reasoning_content"] == "Hm."
        assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


@pytest.mark.parametrize("parameters", [{"type": "nonsense"}, {"pattern": "("}, {"$ref": "#/x"}])
async def test_a_schema_that_is_none_is_refused(parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    async with scripted("ok").running() as api:
        answer = await api.chat(tools=[ADD, tool], tool_choice="required")
    assert answer.status == 400
    assert answer.error["param"] == "tools"


def test_openais_client_gets_forced_calls():
    with (
        server_thread(**scripted_parts("I would rather talk.", answer_format=HERMES)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[HI],
            tools=[STRICT],
            tool_choice="required",
            parallel_tool_calls=False,
        )
        with client.chat.completions.stream(
            model=MODEL,
            messages=[HI],
            tools=[STRICT],
            tool_choice={"type": "function", "function": {"name": "pick"}},
        ) as stream:
            final = stream.get_final_completion()
    assert answer.choices[0].message.tool_calls
    [call] = final.choices[0].message.tool_calls
    assert call.function.parsed_arguments["colour"] in ("red", "blue")
