"""Tools through the API: what the template sees, what comes back, streamed and whole."""

import json
import re

import openai
import pytest

from streamserve.api.prompt_workers import LONG_BODY
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.text_source import byte_text
from tests.api.harness import MODEL, Api, server_thread, until
from tests.api.scripted import TEMPLATE, assert_refused, scripted, scripted_parts

HI = {"role": "user", "content": "Hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
TOOLS = [WEATHER, ADD]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def deltas_of(answer, index=0):
    return [
        choice["delta"]
        for event in answer.events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["index"] == index
    ]


def finish_reasons(answer):
    choices = [event["choices"] for event in answer.events if isinstance(event, dict)]
    return [c["finish_reason"] for cs in choices for c in cs if c["finish_reason"]]


async def test_a_call():
    async with scripted(CALL).running() as api:
        answer = await api.chat(tools=TOOLS)
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Łódź"}'}
    # Without "strict", and nothing added: what the model was trained on.
    assert f"<tools>{json.dumps(TOOLS, ensure_ascii=False)}</tools>" in api.runner.prompts[0]


async def test_a_streamed_call():
    async with scripted("Let me see.\n" + CALL + "\n" + OTHER).running() as api:
        answer = await api.chat(tools=TOOLS, stream=True)
    deltas = deltas_of(answer)
    assert deltas[0] == {"role": "assistant", "content": "L"}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see.\n"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    starts = [call for call in calls if "id" in call]
    assert [(c["index"], c["type"], c["function"]) for c in starts] == [
        (0, "function", {"name": "get_weather", "arguments": ""}),
        (1, "function", {"name": "add", "arguments": ""}),
    ]
    assert starts[0]["id"] != starts[1]["id"]
    more = [call for call in calls if "id" not in call]
    assert {frozenset(call) for call in more} == {frozenset({"index", "function"})}
    assert [call["function"] for call in more] == [
        {"arguments": '{"city": "Łódź"}'},
        {"arguments": '{"a": 1}'},
    ]
    assert deltas[-1] == {}
    assert finish_reasons(answer) == ["tool_calls"]
    assert answer.events[-1] == "[DONE]"


async def test_a_stream_that_begins_with_a_call_has_null_content():
    async with scripted(CALL).running() as api:
        answer = await api.chat(tools=TOOLS, stream=True)
    first = deltas_of(answer)[0]
    assert (first["role"], first["content"]) == ("assistant", None)
    assert first["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_long_arguments_stream_as_they_come():
    text = '<tool_call>{"name": "add", "arguments": {"code": "' + "x" * 600
    async with scripted(text).running() as api:
        answer = await api.chat(tools=[ADD], stream=True, max_tokens=380)
    calls = [c for d in deltas_of(answer) for c in d.get("tool_calls", ())]
    num_held = len("<tool_call>") + 255
    assert len(calls) == 1 + 380 - num_held  # the start, what is there by then, one by one
    assert finish_reasons(answer) == ["length"]


BAD = '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("text", [BAD, "<tool_call>{oops", "Just text", "", CALL[:-20]])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_no_call_is_text(text, stream):
    async with scripted(text).running() as api:
        answer = await api.chat(tools=TOOLS, stream=stream)
    if stream:
        deltas = deltas_of(answer)
        assert "".join(delta.get("content") or "" for delta in deltas) == text
        assert deltas[0]["role"] == "assistant"
        assert not any("tool_calls" in delta for delta in deltas)
        assert finish_reasons(answer) == ["stop"]
    else:
        [choice] = answer.json["choices"]
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"


async def test_tool_choice_none_shows_no_tools_and_finds_no_calls():
    async with scripted(CALL).running() as api:
        answer = await api.chat(tools=TOOLS, tool_choice="none")
    assert answer.json["choices"][0]["message"]["content"] == CALL
    assert "<tools>" not in api.runner.prompts[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_at_a_time(stream):
    """The first call ends the answer: the rest is not even generated."""
    options = {"include_usage": True} if stream else None
    async with scripted("Hm. " + CALL + OTHER * 5).running() as api:
        answer = await api.chat(
            tools=TOOLS, parallel_tool_calls=False, stream=stream, stream_options=options, n=2
        )
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        metrics = (await api.call("GET", "/metrics")).body.decode()
        assert re.search(r'request_success_total{.*finished_reason="stop".*} 2.0', metrics)
    size = len(("Hm. " + CALL).encode()) - len("\n</tool_call>")
    for index in range(2):
        if stream:
            calls = [c for d in deltas_of(answer, index) for c in d.get("tool_calls", ())]
            assert {call["index"] for call in calls} == {0}
            message = {"content": "".join(d.get("content") or "" for d in deltas_of(answer, index))}
            arguments = "".join(call["function"]["arguments"] for call in calls)
        else:
            message = answer.json["choices"][index]["message"]
            [call] = message["tool_calls"]
            arguments = call["function"]["arguments"]
            assert answer.json["choices"][index]["finish_reason"] == "tool_calls"
        assert (message["content"].strip(), arguments) == ("Hm.", '{"city": "Łódź"}')
    if stream:
        assert finish_reasons(answer) == ["tool_calls"] * 2
        assert answer.events[-1] == "[DONE]"
    usage = answer.events[-2]["usage"] if stream else answer.json["usage"]
    assert usage["completion_tokens"] < 2 * (size + len(OTHER))


async def test_usage_and_logprobs_are_of_all_tokens():
    async with scripted("Hi " + CALL).running() as api:
        whole = await api.chat(tools=TOOLS, logprobs=True)
        streamed = await api.chat(
            tools=TOOLS, logprobs=True, stream=True, stream_options={"include_usage": True}
        )
    text = "".join(e["token"] for e in whole.json["choices"][0]["logprobs"]["content"])
    size = len(("Hi " + CALL).encode())
    assert text.startswith("Hi <tool_call>")
    entries = [
        entry
        for event in streamed.events
        if isinstance(event, dict)
        for choice in event["choices"]
        for entry in (choice["logprobs"] or {}).get("content", ())
    ]
    assert entries == whole.json["choices"][0]["logprobs"]["content"]
    assert len(entries) == size
    assert whole.json["usage"]["completion_tokens"] == size + 1  # and the end
    assert streamed.events[-2]["usage"]["completion_tokens"] == size + 1


async def test_a_stop_string_ends_the_text():
    async with scripted("One. Two. " + CALL).running() as api:
        answer = await api.chat(tools=TOOLS, stop="Two")
    [choice] = answer.json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("One. ", "stop")


async def test_a_conversation_with_calls_reaches_the_template():
    messages = [
        HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
    ]
    async with scripted("ok").running() as api:
        answer = await api.chat(messages=messages)
        assert answer.status == 200
        assert "x-ignored-fields" not in answer.headers
        empty = json.loads(json.dumps(messages).replace(json.dumps('{"a": 1, "b": "ü"}'), '""'))
        assert (await api.chat(messages=empty)).status == 200
    prompt, second = api.runner.prompts
    assert 'assistant: <tool_call>add{"a": 1, "b": "ü"} call_1</tool_call>' in prompt
    assert "tool: 42 (of call_1)" in prompt
    assert "<tool_call>add{} call_1</tool_call>" in second


async def test_mistral_templates_get_ids_of_nine_characters():
    template = TEMPLATE + "{# [TOOL_CALLS] #}"
    template = template.replace("<tool_call>", "[CALL]").replace("</tool_call>", "")
    call = '[TOOL_CALLS] [{"name": "add", "arguments": {}}]'
    async with scripted(call, template=template).running() as api:
        answer = await api.chat(tools=TOOLS)
        [made] = answer.json["choices"][0]["message"]["tool_calls"]
        assert len(made["id"]) == 9
        foreign = {**made, "id": "call_abcdef0123456789"}
        messages = [
            HI,
            {"role": "assistant", "tool_calls": [made, foreign]},
            {"role": "tool", "tool_call_id": foreign["id"], "content": "1"},
        ]
        await api.chat(messages=messages, tools=TOOLS)
    assert f"add{{}} {made['id']}" in api.runner.prompts[1]
    assert "add{} 123456789" in api.runner.prompts[1]
    assert "(of 123456789)" in api.runner.prompts[1]


async def test_a_template_without_tools_refuses_auto():
    async with Api().running() as api:
        answer = await api.chat(tools=TOOLS)
        assert (await api.chat(tools=TOOLS, tool_choice="none", max_tokens=1)).status == 200
    assert answer.status == 400
    assert answer.error["param"] == "tools"
    assert "--tool-call-parser" in answer.error["message"]


@pytest.mark.parametrize("choice", ["auto", None])
async def test_a_format_for_the_whole_answer_leaves_no_room_for_calls(choice):
    async with scripted(CALL).running() as api:
        answer = await api.chat(tools=TOOLS, tool_choice=choice, structured_outputs={"regex": "a+"})
    assert answer.status == 400
    assert answer.error["param"] == "structured_outputs.regex"
    assert "tool_choice" in answer.error["message"]


FUNCTION = {"name": "f"}


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


def called(**fields):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}, **fields}
    return {"messages": [HI, {"role": "assistant", "tool_calls": [call]}]}


BAD_TOOLS = [
    ({"tools": "f"}, "tools", "an array of tools, got a string"),
    ({"tools": [TOOLS[1]] * 513}, "tools", "at most 512"),
    ({"tools": ["f"]}, "tools[0]", "an object"),
    ({"tools": [WEATHER, {"function": FUNCTION}]}, "tools[1]", "type is required"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "function is required"),
    ({"tools": [{"type": "custom", "function": FUNCTION}]}, "tools[0].type", "'custom'"),
    ({"tools": [{"type": 5, "function": FUNCTION}]}, "tools[0].type", "a string"),
    ({"tools": [{"type": "function", "function": "f"}]}, "tools[0].function", "an object"),
    (
        {"tools": [{"type": "function", "function": {}}]},
        "tools[0].function",
        "name is required",
    ),
    ({"tools": [WEATHER, tool(name=5)]}, "tools[1].function.name", "a string, got an integer: 5"),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name", "1 to 128 letters"),
    ({"tools": [tool(name="x" * 129)]}, "tools[0].function.name", "1 to 128 letters"),
    ({"tools": [ADD, ADD]}, "tools[1].function.name", "unlike the other tools' names, got 'add'"),
    ({"tools": [tool(description=1)]}, "tools[0].function.description", "a string"),
    ({"tools": [tool(parameters="{}")]}, "tools[0].function.parameters", "an object"),
    ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "a boolean"),
    ({"tool_choice": "required"}, "tool_choice", "only with tools"),
    ({"tool_choice": {"type": "function", "function": FUNCTION}}, "tool_choice", "only with tools"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "one of none, auto, required"),
    ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", "a string or an object"),
    ({"tools": TOOLS, "tool_choice": {}}, "tool_choice", "type is required"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "allowed"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "function is required"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
        "tool_choice.function",
        "name is required",
    ),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
        "one of get_weather, add, got 'g'",
    ),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "a boolean"),
    ({"functions": [FUNCTION]}, "functions", "use tools"),
    ({"function_call": FUNCTION}, "function_call", "use tools"),
    (
        {"messages": [HI, {"role": "tool", "content": "a"}]},
        "messages[1]",
        "tool_call_id is required",
    ),
    (
        {"messages": [HI, {"role": "tool", "content": "a", "tool_call_id": ""}]},
        "messages[1].tool_call_id",
        "the id of a call",
    ),
    (
        {"messages": [HI, {"role": "tool", "content": "a", "tool_call_id": 1}]},
        "messages[1].tool_call_id",
        "a string",
    ),
    (
        {"messages": [HI, {"role": "tool", "tool_call_id": "1"}]},
        "messages[1]",
        "content is required",
    ),
    (
        {"messages": [{**HI, "tool_call_id": "1"}]},
        "messages[0].tool_call_id",
        "only with role 'tool', got 'user'",
    ),
    (
        {"messages": [{**HI, "tool_calls": called()["messages"][1]["tool_calls"]}]},
        "messages[0].tool_calls",
        "only with role 'assistant', got 'user'",
    ),
    (
        {"messages": [{"role": "function", "name": "f", "content": "a"}]},
        "messages[0].role",
        "use tools",
    ),
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
        "messages[0].function_call",
        "use tools",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": {}}]},
        "messages[0].tool_calls",
        "an array of tool calls",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [1]}]},
        "messages[0].tool_calls[0]",
        "an object",
    ),
    (called(id=None), "messages[1].tool_calls[0]", "id is required"),
    (called(id=1), "messages[1].tool_calls[0].id", "a string"),
    (called(type="custom"), "messages[1].tool_calls[0].type", "'custom'"),
    (called(function=None), "messages[1].tool_calls[0]", "function is required"),
    (called(function={}), "messages[1].tool_calls[0].function", "name is required"),
    (
        called(function={"name": "f"}),
        "messages[1].tool_calls[0].function",
        "arguments is required",
    ),
    (
        called(function={"name": "f", "arguments": {}}),
        "messages[1].tool_calls[0].function.arguments",
        "a string, got an object",
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_TOOLS)
async def test_bad_tools_are_refused_by_name(fields, param, message):
    await assert_refused(fields, param, message)


async def test_names_that_nobody_knows_are_reported():
    odd = {"type": "function", "cache": 1, "function": {"name": "f", "strict": None, "x": 1}}
    call = {
        "id": "1",
        "index": 0,
        "y": 1,
        "function": {"name": "f", "arguments": "{}", "parsed_arguments": None, "z": 2},
    }
    async with scripted("ok").running() as api:
        answer = await api.chat(
            tools=[odd], messages=[HI, {"role": "assistant", "tool_calls": [call]}]
        )
    names = answer.headers["x-ignored-fields"].split(", ")
    assert set(names) == {
        "tools[0].cache",
        "tools[0].function.x",
        "messages[1].tool_calls[0].y",
        "messages[1].tool_calls[0].function.z",
    }


@pytest.mark.parametrize("arguments", ['{"a": "cut', "[1]", '"a"', "}"])
async def test_a_chat_goes_on_behind_a_call_whose_arguments_are_no_object(arguments):
    body = called(function={"name": "f", "arguments": arguments})
    result = {"role": "tool", "tool_call_id": "1", "content": "not called"}
    async with scripted("ok").running() as api:
        answer = await api.chat(messages=[*body["messages"], result], tools=TOOLS)
    assert answer.status == 200
    shown = json.dumps({"_raw": arguments})
    assert f"<tool_call>f{shown} 1</tool_call>" in api.runner.prompts[0]


async def test_an_assistant_may_have_said_no_parts():
    said = {**called()["messages"][1], "content": []}
    async with scripted("ok").running() as api:
        answer = await api.chat(messages=[HI, said])
    assert answer.status == 200
    assert "assistant: <tool_call>f" in api.runner.prompts[0]


async def test_names_are_as_long_as_mcp_makes_them():
    name = "mcp__" + "x" * 123
    async with scripted(CALL.replace("get_weather", name)).running() as api:
        answer = await api.chat(tools=[tool(name=name)])
    assert answer.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == name


def loop_script(prompt):
    """Calls first, and answers when the result is there."""
    return "It is 21 degrees." if "tool: 21" in prompt else CALL


@pytest.fixture(scope="module")
def client():
    with (
        server_thread(**scripted_parts(loop_script)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


def test_a_tool_loop_with_openais_client(client):
    messages = [HI]
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Łódź"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    second = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages, tools=TOOLS
    )
    assert "x-ignored-fields" not in second.headers
    assert second.parse().choices[0].message.content == "It is 21 degrees."
    assert second.parse().choices[0].finish_reason == "stop"


def test_a_streamed_tool_loop_with_openais_client(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[HI], tools=TOOLS, tool_choice="auto", stream=True
    )
    calls = []
    for chunk in stream:
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.id is not None:
                calls.append({"id": delta.id, "type": delta.type, "function": {"arguments": ""}})
                calls[delta.index]["function"]["name"] = delta.function.name
            calls[delta.index]["function"]["arguments"] += delta.function.arguments
    assert chunk.choices[0].finish_reason == "tool_calls"
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "21"}
    second = client.chat.completions.create(
        model=MODEL, messages=[HI, answer, result], tools=TOOLS, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in second)
    assert text == "It is 21 degrees."


def test_the_streaming_helper_assembles_calls(client):
    with client.chat.completions.stream(model=MODEL, messages=[HI], tools=TOOLS) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in events
    assert final.choices[0].message.content is None
    [call] = final.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Łódź"}


async def test_a_long_body_is_read_elsewhere_and_means_the_same():
    parts = scripted_parts(CALL, answer_format=AnswerFormat(tool_parser="hermes"))
    padding = {"metadata": {"x": "y" * LONG_BODY}}
    async with Api(**{**parts, "template": "plain"}, load_text=byte_text).running() as api:
        try:
            answer = await api.chat(tools=TOOLS, **padding)
            assert api.app.context.prompt_workers.pids
        finally:
            api.app.context.prompt_workers.close()
    [call] = answer.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
