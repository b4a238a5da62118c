"""Anthropic's Messages API: what the model sees, and what comes back, streamed and whole."""

import orjson
import pytest

from streamserve.engine.parsers.answer_format import AnswerFormat
from tests.api.harness import HI, MODEL, Api, Exchange, error_of, message_body
from tests.api.scripted import scripted, scripted_parts
from tests.api.test_message_frames import assembled, without_ids

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
ADD = {"name": "add", "input_schema": {"type": "object"}, "type": "custom"}
TOOLS = [WEATHER, ADD]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Łódź"}}</tool_call>'
OTHER = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\nYes."
PLAIN = AnswerFormat()


async def both(script, *, answer_format=None, template=None, **fields):
    """The message, asked for whole and as a stream, and the prompt that the model saw."""
    parts = {"answer_format": answer_format} | ({} if template is None else {"template": template})
    async with scripted(script, **parts).running() as api:
        whole = await api.message(**fields)
        streamed = await api.message(stream=True, **fields)
        assert (whole.status, streamed.status) == (200, 200), whole.json
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert api.engine.is_idle
    message, events = without_ids(whole.json), without_ids(assembled_answer(streamed))
    for answer in (message, events):
        assert answer.pop("id").startswith("msg_")
        signatures = [b.pop("signature") for b in answer["content"] if b["type"] == "thinking"]
        assert all(signatures)
        # The second finds the first one's prompt in the cache.
        usage = answer["usage"]
        usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    assert message == events
    return message, api.runner.prompts[0]


def assembled_answer(answer):
    return assembled(b"".join(block for block in answer.writes if block))


async def refusal(**fields):
    async with scripted("ok").running() as api:
        answer = await api.message(**fields)
        assert api.engine.is_idle
    assert answer.status == 400, answer.json
    assert answer.error["type"] == "invalid_request_error"
    return answer.error["message"]


async def test_a_message():
    message, prompt = await both("Hello!", system="Be kind.")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(prompt),
            "cache_creation_input_tokens": 0,
            "output_tokens": len("Hello!") + 1,
            "service_tier": "standard",
        },
    }
    assert prompt.startswith("system: Be kind.user: Hiassistant: ")


async def test_a_plain_stream_event_by_event():
    async with Api().running() as api:
        answer = await api.message(max_tokens=3, stream=True)
    blocks = answer.body.decode().split("\n\n")
    assert [block.split("\n")[0].removeprefix("event: ") for block in blocks[:-1]] == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert blocks[3] == (
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"a"}}'
    )
    assert assembled_answer(answer)["stop_reason"] == "max_tokens"
    assert len(answer.writes) == 3  # the first token's has what precedes, the last one's the end


async def test_what_the_prefix_cache_held_is_told_from_the_start():
    async with Api().running() as api:
        body = {"messages": [{"role": "user", "content": "x" * 64}], "max_tokens": 1}
        first = (await api.message(**body)).json["usage"]
        streamed = await api.message(**body, stream=True)
        start = orjson.loads(streamed.body.split(b"\n")[1].removeprefix(b"data: "))
    second = start["message"]["usage"]
    assert (first["cache_read_input_tokens"], second["output_tokens"]) == (0, 0)
    assert second["cache_read_input_tokens"] >= 64
    total = second["input_tokens"] + second["cache_read_input_tokens"]
    assert total == first["input_tokens"]


async def test_blocks_and_turns_become_a_chat():
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "One", **cached}]},
        {"role": "user", "content": "Two"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "I l", "citations": None},
                {"type": "text", "text": "ook."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "add", "input": {}, **cached},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "no"}],
                    "is_error": True,
                    **cached,
                },
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be kind.", **cached}]
    _, prompt = await both("ok", messages=messages, system=system, tools=[ADD])
    assert prompt == (
        '<tools>[{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}]</tools>\n'
        "system: Be kind."
        "user: One\nTwo"
        'assistant: I look.<tool_call>add{"a": 1} t1</tool_call>'
        "<tool_call>add{} t2</tool_call><think>Hm.</think>"
        "tool: 3 (of t1)tool: Error: no (of t2)tool:  (of t3)"
        "user: And?"
        "assistant: <think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("form", ["blocks", "text"])
async def test_what_claude_code_writes_for_its_bill_is_no_part_of_the_prompt(form):
    """It says something else in each request, and so no prefix would be found."""
    prompts = set()
    for bill in ("0ad5b", "9f1c2"):
        line = f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cch={bill};"
        system = f"{line}\nBe kind."
        if form == "blocks":
            system = [{"type": "text", "text": text} for text in (line, "Be kind.")]
        _, prompt = await both("ok", system=system)
        prompts.add(prompt)
    [prompt] = prompts
    assert prompt.startswith("system: Be kind.user: Hi")


async def test_calls():
    message, _ = await both("I look. " + CALL + OTHER, tools=TOOLS)
    assert message["content"] == [
        {"type": "text", "text": "I look. "},
        {"type": "tool_use", "name": "get_weather", "input": {"city": "Łódź"}},
        {"type": "tool_use", "name": "add", "input": {"a": 1}},
    ]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, ["get_weather"]),
        ({"type": "auto"}, ["get_weather", "add"]),
        ({"type": "none"}, []),
    ],
)
async def test_tool_choice(choice, calls):
    message, prompt = await both(CALL + OTHER, tools=TOOLS, tool_choice=choice)
    found = [block["name"] for block in message["content"] if block["type"] == "tool_use"]
    assert found == calls
    assert ("<tools>" in prompt) == (choice["type"] != "none")


@pytest.mark.parametrize(
    ("choice", "script", "called"),
    [
        ({"type": "tool", "name": "get_weather"}, '{"city": "Łódź"}', {"city": "Łódź"}),
        ({"type": "any"}, '[{"name": "add", "parameters": {"a": 1}}]', {"a": 1}),
    ],
)
async def test_a_forced_call_needs_no_parser(choice, script, called):
    message, _ = await both(script, answer_format=PLAIN, tools=TOOLS, tool_choice=choice)
    [block] = message["content"]
    assert block["input"] == called
    assert message["stop_reason"] == "tool_use"


async def test_a_format():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        message, _ = await both('Sure: {"a": 1}', answer_format=PLAIN, **fields)
        assert orjson.loads(message["content"][0]["text"]).keys() == {"a"}
    said = await refusal(output_config={"format": form}, output_format=form)
    assert "output_format" in said


@pytest.mark.parametrize(
    ("thinking", "script", "kinds"),
    [
        ({"type": "enabled", "budget_tokens": 50}, "Hm.</think>Yes.", ["thinking", "text"]),
        ({"type": "adaptive"}, "Hm.</think>Yes.", ["thinking", "text"]),
        ({"type": "adaptive", "display": "summarized"}, "Hm.</think>Yes.", ["thinking", "text"]),
        ({"type": "adaptive", "display": "omitted"}, "Hm.</think>Yes.", ["text"]),
        ({"type": "disabled"}, "Yes.", ["text"]),
        (None, "Yes.", ["text"]),
    ],
)
async def test_thinking(thinking, script, kinds):
    message, prompt = await both(script, thinking=thinking)
    assert [block["type"] for block in message["content"]] == kinds
    assert message["content"][-1] == {"type": "text", "text": "Yes."}
    if kinds[0] == "thinking":
        assert message["content"][0]["thinking"] == "Hm."
    is_on = thinking is not None and thinking["type"] != "disabled"
    assert prompt.endswith("<think>\n" if is_on else "</think>\n\n")
    # A template may leave it to the model: then its thoughts have no room.
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}"
    closed = "<think></think>Yes." if not is_on else "<think>" + script
    message, _ = await both(closed, template=template, thinking=thinking)
    assert [block["type"] for block in message["content"]] == kinds


async def test_disabled_is_held_against_a_model_that_thinks_anyway():
    parts = scripted_parts(
        "Hm, hm.\n</think>\n\nYes.",
        template="{% for m in messages %}{{ m.content }}{% endfor %}",
        reasoning_parser="deepseek_r1",
    )
    async with Api(**parts).running() as api:
        message = (await api.message()).json
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 0}
    assert [block["type"] for block in message["content"]] == ["text"]


async def test_a_budget_ends_the_thoughts():
    thinking = {"type": "enabled", "budget_tokens": 5}
    message, _ = await both("Hm, hm, hm", thinking=thinking)
    assert message["content"][0]["thinking"] == "Hm, h"
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 5}


@pytest.mark.parametrize("answer_format", [PLAIN, None])
async def test_a_stop_sequence_is_named(answer_format):
    message, _ = await both("one two three", answer_format=answer_format, stop_sequences=["x", "t"])
    assert message["content"] == [{"type": "text", "text": "one "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "t")


async def test_max_tokens_may_be_more_than_the_context_has():
    message, prompt = await both("word " * 200, max_tokens=100_000)
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["output_tokens"] == 512 - len(prompt)
    message, _ = await both("word " * 200, max_tokens=5)
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 5)
    said = await refusal(messages=[{"role": "user", "content": "x" * 600}])
    assert "maximum context length is 512" in said


async def test_the_last_turn_of_an_assistant_is_continued():
    messages = [HI, {"role": "assistant", "content": "The answer is"}]
    message, prompt = await both(" 4.", messages=messages, answer_format=PLAIN)
    assert prompt.endswith("assistant: The answer is")
    assert message["content"] == [{"type": "text", "text": " 4."}]


async def test_an_empty_answer_has_an_empty_block():
    for answer_format in (PLAIN, None):
        message, _ = await both("", answer_format=answer_format)
        assert message["content"] == [{"type": "text", "text": ""}]


def user(*blocks):
    return [{"role": "user", "content": list(blocks)}]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
TEXT = {"type": "text", "text": "Hi"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages must be an array of 1 to"),
        ({"max_tokens": None}, "max_tokens is required"),
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"messages": user(IMAGE)}, "messages[0].content[0].type 'image' is not supported"),
        ({"messages": user({"type": "document"})}, "type 'document' is not supported"),
        ({"messages": user({**TEXT, "citations": [{}]})}, "content[0].citations is not"),
        ({"messages": user()}, "messages[0].content must be"),
        ({"messages": user({"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]})},
         "messages[0].content[0].content[0].type 'image'"),
        ({"messages": user({"type": "tool_result"})}, "tool_use_id is required"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
         "type 'redacted_thinking' is not supported"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
         "messages must not end with a tool_use block"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be one of"),
        ({"system": [IMAGE]}, "system[0].type 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         "tools[0].type 'web_search_20250305' is not supported"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema is required"),
        ({"tools": [ADD, ADD]}, "tools[1].name must be unlike"),
        ({"tools": [{**ADD, "defer_loading": True}]}, "tools[0].defer_loading is not supported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice 'any' may be given only with tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "one of get_weather, add"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "name": "add"}}, "tool_choice.name may"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "n": 1}}, "tool_choice must hold only"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, "must be less than max_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 3}}, "only with type enabled"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "format.schema is required"),
        ({"stop_sequences": [""]}, "stop_sequences must be an array of non-empty strings"),
        ({"temperature": 3}, "temperature must be between"),
        ({"metadata": {"user_id": 1}}, "metadata.user_id must be a string"),
        ({"container": "x"}, "container is not supported"),
        ({"speed": "fast"}, "speed is not supported"),
        ({"context_management": {"edits": [{}]}}, "context_management is not supported"),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}},
            "context_management is not supported",
        ),
    ],
)  # fmt: skip
async def test_refused_by_name(fields, said):
    assert said in await refusal(**fields)


async def test_a_model_that_does_not_think_says_so():
    async with Api().running() as api:
        answer = await api.message(thinking={"type": "enabled", "budget_tokens": 9})
        assert answer.status == 400
        assert "thinking.budget_tokens is not supported" in answer.error["message"]
        # How much to think is the model's choice here, and this one's is not to.
        assert (await api.message(thinking={"type": "adaptive"}, max_tokens=2)).status == 200
        answer = await api.message(output_config={"effort": "max"})
        assert answer.status == 400
        assert "output_config.effort 'max' is not supported" in answer.error["message"]


async def test_edits_of_the_context_that_clear_nothing_are_taken():
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    async with Api().running() as api:
        answer = await api.message(context_management={"edits": edits}, max_tokens=2)
    assert answer.status == 200


async def test_unknown_fields_are_named():
    tools = [{**ADD, "x": 1}]
    messages = user({**TEXT, "y": 2})
    async with scripted("ok").running() as api:
        answer = await api.message(tools=tools, messages=messages, z=3, metadata={"w": 4})
    assert answer.status == 200
    assert set(answer.headers["x-ignored-fields"].split(", ")) == {
        "messages[0].content[0].y",
        "metadata.w",
        "tools[0].x",
        "z",
    }


async def test_count_tokens_counts_what_is_answered():
    fields = {"system": "Be kind.", "messages": user(TEXT, TEXT), "tools": TOOLS}
    async with scripted("ok").running() as api:
        body = {"model": MODEL, **fields}
        counted = await api.call("POST", "/v1/messages/count_tokens", body)
        usage = (await api.message(**fields)).json["usage"]
        refused = await api.call("POST", "/v1/messages/count_tokens", {**body, "speed": "fast"})
        absent = await api.call("POST", "/v1/messages/count_tokens", {**body, "model": "x"})
    assert counted.json == {"input_tokens": usage["input_tokens"]}
    assert "speed" in refused.error["message"]
    assert absent.error["type"] == "not_found_error"


async def test_errors_have_anthropics_shape():
    async with Api(api_keys=("k",), max_body_bytes=2000).running() as api:
        calls = {
            401: ("POST", "/v1/messages", message_body(), {}),
            404: ("POST", "/v1/messages", message_body(model="x"), {"x-api-key": "k"}),
            405: ("GET", "/v1/messages", None, {"x-api-key": "k"}),
            413: ("POST", "/v1/messages", message_body(x="x" * 3000), {"x-api-key": "k"}),
            415: ("POST", "/v1/messages", message_body(),
                  {"x-api-key": "k", "content-type": "text/plain"}),
        }  # fmt: skip
        found = {}
        for status, (method, path, body, headers) in calls.items():
            answer = await api.call(method, path, body, headers=headers)
            assert answer.status == status
            assert answer.json["request_id"] == answer.headers["request-id"]
            found[status] = error_of(answer.json)["type"]
        nowhere = await api.call("POST", "/v1/messages/batches", {}, headers={"x-api-key": "k"})
        assert (nowhere.status, nowhere.error["type"]) == (404, "not_found_error")
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        good = await api.call("POST", "/v1/messages", message_body(max_tokens=1), headers=headers)
        assert good.status == 200
        for key in ("Bearer k", "bearer  k"):
            wrong = {"authorization": key, "x-api-key": "wrong"}
            assert (await api.call("GET", "/v1/models", headers=wrong)).status == 200
        assert (await api.call("GET", "/v1/models", headers={"x-api-key": "j"})).status == 401
        api.app.context.gate.close()
        late = await api.call("POST", "/v1/messages", message_body(), headers={"x-api-key": "k"})
        found[late.status] = late.error["type"]
    assert found == {
        401: "authentication_error",
        404: "not_found_error",
        405: "invalid_request_error",
        413: "request_too_large",
        415: "invalid_request_error",
        503: "overloaded_error",
    }


async def test_a_full_queue_says_when_to_come_back():
    async with Api(is_held=True, max_num_waiting=1).running() as api:
        held = [Exchange(api.app, "POST", "/v1/messages", message_body()) for _ in range(12)]
        await held[-1].finished()
        [start, body] = held[-1].messages
        for exchange in held:
            exchange.leave()
        api.pace.let_go()
    assert start["status"] == 429
    assert error_of(orjson.loads(body["body"]))["type"] == "rate_limit_error"
    assert b"retry-after" in dict(start["headers"])
