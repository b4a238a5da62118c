"""``/v1/responses`` over HTTP: create, look up, go on with, cancel, forget; and who may."""

import asyncio
import json
import logging
import re

import pytest

from streamserve.api.prompt_workers import LONG_BODY
from streamserve.engine.text_source import byte_text
from tests.api.harness import Api, BrokenRunner, Exchange, until
from tests.api.scripted import scripted, scripted_parts
from tests.api.test_tools import CALL
from tests.api.typed_events import assembled, typed_events

URL = "/v1/responses"
FLAT = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THOUGHT = "<think>\nHm.\n</think>\n\nYes."


async def create(api, headers=None, **fields):
    body = {"input": "Hi", "max_output_tokens": 5, **fields}
    return await api.call("POST", URL, body, headers=headers)


async def get(api, response_id, rest="", method="GET", headers=None):
    return await api.call(method, f"{URL}/{response_id}{rest}", headers=headers)


def text_of(response):
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def without_ids(response):
    """What two answers to one request have in common."""
    changing = ("id", "completed_at", "usage", "output", "store", "status")
    return {key: value for key, value in response.items() if key not in changing}


async def test_streamed_and_whole_are_the_same():
    async with Api().running() as api:
        whole = await create(api, metadata={"a": "b"}, temperature=0.5)
        stream = await create(api, metadata={"a": "b"}, temperature=0.5, stream=True)
        fetched = await get(api, whole.json["id"])
    assert whole.status == 200
    assert whole.json["status"] == "incomplete"
    assert whole.json["incomplete_details"] == {"reason": "max_output_tokens"}
    assert text_of(whole.json) == "abcde"
    events = typed_events(stream.body)
    assert events[-1]["type"] == "response.incomplete"
    assert assembled(events) == events[-1]["response"]["output"]
    assert without_ids(events[-1]["response"]) == without_ids(whole.json)
    assert text_of(events[-1]["response"]) == "abcde"
    assert fetched.json == whole.json
    assert whole.json["metadata"] == {"a": "b"}
    assert whole.json["temperature"] == 0.5


async def test_calls_and_thoughts():
    async with scripted("<think>Hm.</think>" + "Let me see.\n" + CALL).running() as api:
        options = {"max_output_tokens": None, "tools": [FLAT]}
        stream = await create(api, **options, stream=True)
        whole = await create(api, **options, include=["reasoning.encrypted_content"])
    for output in (assembled(typed_events(stream.body)), whole.json["output"]):
        thoughts, message, call = output
        assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm."}]
        assert thoughts["summary"] == []
        assert message["content"][0]["text"] == "Let me see.\n"
        assert call["name"] == "get_weather"
        assert call["arguments"] == '{"city": "Łódź"}'
        assert call["call_id"].startswith("call_")
        assert call["status"] == "completed"
    done = [e for e in typed_events(stream.body) if e["type"].endswith("arguments.done")]
    assert [event["name"] for event in done] == ["get_weather"]
    assert whole.json["output"][0]["encrypted_content"] == "SG0u"
    assert whole.json["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    assert whole.json["tools"] == [{**FLAT, "strict": True}]


@pytest.mark.parametrize("says", ["Hello.", "< hm", THOUGHT, "<think></think>Yes."])
async def test_logprobs_are_of_what_is_said(says):
    async with scripted(says).running() as api:
        options = {"max_output_tokens": None, "top_logprobs": 1}
        whole = await create(api, **options)
        streams = [await create(api, **options, stream=True, background=b) for b in (False, True)]
    said = says.partition("</think>")[2] or says
    streamed = [assembled(typed_events(stream.body)) for stream in streams]
    for output in (whole.json["output"], *streamed):
        [part] = output[-1]["content"]
        assert "".join(entry["token"] for entry in part["logprobs"]) == said
        assert part["text"] == said.lstrip()


@pytest.mark.parametrize("is_background", [False, True])
async def test_the_last_token_has_its_logprobs(is_background):
    async with Api().running() as api:
        stream = await create(api, top_logprobs=1, stream=True, background=is_background)
    [message] = assembled(typed_events(stream.body))
    assert "".join(entry["token"] for entry in message["content"][0]["logprobs"]) == "abcde"


@pytest.mark.parametrize("names_them", [False, True])
async def test_a_response_goes_on_with_another(names_them):
    """By id, by item, or by what was answered: the prompt is the same."""
    async with scripted(THOUGHT).running() as api:
        first = await create(api, max_output_tokens=None, instructions="Be short.")
        output = first.json["output"]
        if names_them:
            output = [{"type": "item_reference", "id": item["id"]} for item in output]
        await create(api, input="More", previous_response_id=first.json["id"])
        await create(api, input=[{"role": "user", "content": "Hi"}, *output,
                                 {"role": "user", "content": "More"}])  # fmt: skip
        one, by_id, by_items = api.runner.prompts
    assert one.startswith("system: Be short.user: Hiassistant: ")
    assert by_id == by_items
    assert by_id.startswith("user: Hiassistant: Yes.<think>Hm.</think>user: More")


async def test_functions_in_a_namespace_are_called_by_both_names():
    """Codex has some in its own, and those of each MCP server in another."""
    function = {**FLAT, "strict": False}
    sky = {"type": "namespace", "name": "mcp__sky__", "description": "S", "tools": [function]}
    tools = [sky, {**function, "name": "other"}, {**sky, "name": "sea"}]
    said = {"name": "mcp__sky__get_weather", "arguments": {"city": "Łódź"}}
    text = f"<tool_call>{json.dumps(said)}</tool_call>"
    result = {"type": "function_call_output", "namespace": "mcp__sky__", "output": "sun"}
    fields = {"tools": tools, "max_output_tokens": None}
    parts = scripted_parts(lambda prompt: "It shines." if "sun" in prompt else text)
    async with Api(**parts, max_model_len=2048).running() as api:
        streamed = await create(api, stream=True, **fields)
        whole = await create(api, **fields)
        [call] = whole.json["output"]
        result["call_id"] = call["call_id"]
        await create(api, input=[result], previous_response_id=whole.json["id"], **fields)
        said = [{"role": "user", "content": "Hi"}, call, result]
        assert "x-ignored-fields" not in (await create(api, input=said, **fields)).headers
    assert (call["namespace"], call["name"]) == ("mcp__sky__", "get_weather")
    [added, *_, done] = [event["item"] for event in typed_events(streamed.body) if "item" in event]
    assert {(item["namespace"], item["name"]) for item in (added, done)} == {
        ("mcp__sky__", "get_weather")
    }
    assert whole.json["tools"] == tools
    names = re.findall('"name": "([^"]*)"', api.runner.prompts[0])
    assert names == ["mcp__sky__get_weather", "other", "sea__get_weather"]
    for prompt in api.runner.prompts[2:]:
        assert "<tool_call>mcp__sky__get_weather" in prompt


async def test_functions_in_namespaces_count_as_tools():
    functions = [{**FLAT, "name": f"f{n}"} for n in range(512)]
    tools = [FLAT, {"type": "namespace", "name": "sky", "tools": functions}]
    async with scripted("ok").running() as api:
        answer = await create(api, tools=tools)
    assert answer.status == 400
    assert "at most 512 tools" in answer.error["message"]


async def test_a_chat_goes_on_behind_a_call_that_was_cut():
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "cu'}
    result = {"type": "function_call_output", "call_id": "c", "output": "not called"}
    async with scripted("ok").running() as api:
        answer = await create(api, input=[call, result])
    assert answer.status == 200
    assert '<tool_call>f{"_raw": "{\\"a\\": \\"cu"} c</tool_call>' in api.runner.prompts[0]


async def test_a_response_goes_on_with_one_of_the_background():
    async with scripted(THOUGHT).running() as api:
        first = await create(api, max_output_tokens=None, background=True, stream=True)
        response_id = typed_events(first.body)[0]["response"]["id"]
        await create(api, input="More", previous_response_id=response_id)
    assert api.runner.prompts[1].startswith("user: Hiassistant: Yes.<think>Hm.</think>user: More")


@pytest.mark.parametrize("is_background", [False, True])
async def test_it_is_logged_and_counted_like_every_request(is_background, caplog):
    caplog.set_level(logging.INFO, "streamserve.requests")
    async with Api(log_requests=True, api_keys=("one",)).running() as api:
        headers = {"authorization": "Bearer one"}
        options = {"stream": True, "background": is_background, "not_a_field": 1}
        answer = await create(api, headers, **options)
        [(_, counts)] = api.app.context.metrics.tenants.samples()
    response = typed_events(answer.body)[-1]["response"]
    usage = response["usage"]
    assert counts == (1, 0, usage["input_tokens"], 0, 5)
    assert api.app.context.metrics.num_finished["length"] == 1
    lines = [r.getMessage() for r in caplog.records if r.name == "streamserve.requests"]
    admitted, ended = lines
    assert admitted.startswith(f"{response['id']} admitted: ")
    assert ended.startswith(f"{response['id']} ended: length, ")
    assert answer.headers["x-ignored-fields"] == "not_a_field"


async def test_what_the_model_read_is_listed():
    async with Api().running() as api:
        first = await create(
            api, input=[{"role": "developer", "content": "Hi"}], max_output_tokens=1
        )
        second = await create(
            api,
            input=[
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "3"},
            ],
            previous_response_id=first.json["id"],
        )
        listed = (await get(api, second.json["id"], "/input_items?order=asc")).json
        page = (await get(api, second.json["id"], "/input_items?limit=2")).json
        rest = (await get(api, second.json["id"], f"/input_items?after={page['last_id']}")).json
        exact = (await get(api, second.json["id"], "/input_items?limit=4")).json
        wrong = [
            await get(api, second.json["id"], rest)
            for rest in (
                "/input_items?limit=0",
                f"/input_items?limit={'9' * 5000}",
                "/input_items?after=msg_not",
                "?starting_after=1",
                "?include_obfuscation=true",
            )
        ]
    kinds = [(item["type"], item.get("role")) for item in listed["data"]]
    assert kinds == [
        ("message", "developer"),
        ("message", "assistant"),
        ("function_call", None),
        ("function_call_output", None),
    ]
    assert listed["has_more"] is False
    assert page["has_more"] is True
    assert page["data"] + rest["data"] == listed["data"][::-1]
    assert exact["data"] == listed["data"][::-1]
    assert exact["has_more"] is False
    assert [answer.status for answer in wrong] == [400] * 5
    params = ["limit", "limit", "after", "starting_after", "include_obfuscation"]
    assert [answer.error["param"] for answer in wrong] == params


async def test_a_response_is_its_makers_alone():
    async with Api(api_keys=("one", "two")).running() as api:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        made = (await create(api, headers=one)).json["id"]
        for rest, method in (("", "GET"), ("", "DELETE"), ("/cancel", "POST"),
                             ("/input_items", "GET")):  # fmt: skip
            answer = await get(api, made, rest, method, headers=two)
            assert (answer.status, answer.error["code"]) == (404, "response_not_found")
        taken = await create(api, headers=two, previous_response_id=made)
        assert (taken.status, taken.error["param"]) == (400, "previous_response_id")
        assert (await create(api, headers=one, previous_response_id=made)).status == 200
        assert (await get(api, made, method="DELETE", headers=one)).json["deleted"] is True
        assert (await get(api, made, headers=one)).status == 404


async def test_what_is_on_its_way_is_its_makers_alone_too():
    async with Api(api_keys=("one", "two"), is_held=True).running() as api:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        made = (await create(api, headers=one, background=True)).json["id"]
        for rest, method in (("", "GET"), ("?stream=true", "GET"), ("", "DELETE"),
                             ("/cancel", "POST"), ("/input_items", "GET")):  # fmt: skip
            answer = await get(api, made, rest, method, headers=two)
            assert (answer.status, answer.error["code"]) == (404, "response_not_found")
        taken = await create(api, headers=two, previous_response_id=made)
        assert "still in progress" not in taken.error["message"]
        assert (await get(api, made, headers=one)).json["status"] != "cancelled"
        api.pace.let_go()


async def test_what_is_not_stored_cannot_be_asked_for():
    async with Api(max_stored_responses=1).running() as api:
        unstored = await create(api, store=False)
        assert unstored.json["store"] is False
        assert (await get(api, unstored.json["id"])).status == 404
        first, second = [(await create(api)).json["id"] for _ in range(2)]
        assert (await get(api, first)).status == 404
        assert (await get(api, second)).status == 200
        assert (await get(api, second, "?stream=true")).error["param"] == "stream"
        assert (await get(api, second, "/cancel", "POST")).status == 400
    async with Api(max_stored_responses=0).running() as api:
        assert (await create(api)).json["store"] is False
        assert (await create(api, store=True)).error["param"] == "store"
        assert (await create(api, background=True)).error["param"] == "background"


async def test_in_the_background():
    async with Api(is_held=True).running() as api:
        created = await create(api, background=True)
        assert created.json["status"] == "queued"
        response_id = created.json["id"]
        early = await create(api, input="More", previous_response_id=response_id)
        assert "still in progress" in early.error["message"]
        await api.pace.step()
        follower = Exchange(api.app, "GET", f"{URL}/{response_id}?stream=true")
        await until(lambda: b"output_text.delta" in follower.body)
        assert (await get(api, response_id)).json["status"] == "in_progress"
        api.pace.let_go()
        await follower.finished()
        finished = await get(api, response_id)
        late = await get(api, response_id, "?stream=true&starting_after=4")
        assert (await get(api, response_id, "/cancel", "POST")).json == finished.json
    events = typed_events(follower.body)
    types = [event["type"].removeprefix("response.") for event in events]
    assert types[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert types.count("in_progress") == 1
    assert events[-1]["response"] == finished.json
    assert text_of(finished.json) == "abcde"
    assert typed_events(late.body) == events[5:]
    assert api.app.context.gate.num_inside == 0


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_a_cancelled_response_frees_its_request(method):
    async with Api(is_held=True).running() as api:
        created = await create(api, background=True, max_output_tokens=100)
        response_id = created.json["id"]
        follower = Exchange(api.app, "GET", f"{URL}/{response_id}?stream=true")
        await api.pace.step()
        await api.pace.step()
        await until(lambda: b"output_text.delta" in follower.body)
        rest = "/cancel" if method == "POST" else ""
        ended = await get(api, response_id, rest, method)
        await follower.finished()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        assert api.app.context.gate.num_inside == 0
        assert api.app.context.metrics.num_finished["abort"] == 1
        fetched = await get(api, response_id)
        assert not [task for task in asyncio.all_tasks() if "BackgroundRun" in repr(task)]
    last = typed_events(follower.body)[-1]
    assert last["response"]["status"] == "cancelled"
    assert assembled(typed_events(follower.body)) == last["response"]["output"]
    if method == "POST":
        assert ended.json == fetched.json == last["response"]
    else:
        assert fetched.status == 404


@pytest.mark.parametrize("is_background", [False, True])
async def test_when_the_reader_leaves(is_background):
    async with Api(is_held=True).running() as api:
        body = {"input": "Hi", "max_output_tokens": 9, "stream": True, "background": is_background}
        reader = Exchange(api.app, "POST", URL, body)
        await api.pace.step()
        await until(lambda: b"output_text.delta" in reader.body)
        reader.leave()
        await reader.finished()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        response_id = reader.body.split(b'"id":"')[1].split(b'"')[0].decode()
        found = await get(api, response_id)
    if is_background:
        assert text_of(found.json) == "abcdefghi"
    else:
        assert found.status == 404
        assert api.app.context.metrics.num_finished["abort"] == 1


@pytest.mark.parametrize("is_background", [False, True])
async def test_a_failure_is_an_event(is_background):
    async with Api(runner=BrokenRunner(2)).running() as api:
        answer = await create(api, stream=True, background=is_background)
        events = typed_events(answer.body)
        fetched = await get(api, events[0]["response"]["id"])
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert response["output"][0]["status"] == "incomplete"
    assert fetched.json == response
    assert api.app.context.metrics.num_finished["error"] == 1


async def test_the_step_loop_writes_by_itself():
    """All of the text is in the response, whoever wrote the events."""
    api = Api()
    async with api.serving() as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        body = b'{"input": "Hi", "stream": true, "max_output_tokens": 40}'
        writer.write(
            b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        raw = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
    chunks, rest = [], raw
    while rest and (size := int(rest.partition(b"\r\n")[0], 16)):
        start = rest.index(b"\r\n") + 2
        chunks.append(rest[start : start + size])
        rest = rest[start + size + 2 :]
    events = typed_events(b"".join(chunks))
    assert assembled(events) == events[-1]["response"]["output"]
    assert text_of(events[-1]["response"]) == "abcdefghij" * 4
    assert len([e for e in events if e["type"] == "response.output_text.delta"]) == 40


async def test_errors_of_length_name_the_responses_own_field():
    async with scripted("ok").running() as api:
        long = await create(api, input="x", max_output_tokens=4000)
        short = await create(api, input="x", max_output_tokens=3, min_tokens=4)
    assert (long.status, long.error["param"]) == (400, "max_output_tokens")
    assert (short.status, short.error["param"]) == (400, "min_tokens")
    assert "max_output_tokens (3)" in short.error["message"]


async def test_truncation_drops_whole_turns():
    items = [
        {"role": role, "content": f"{i}" * 100} for i in range(4) for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "S"}, *items, {"role": "user", "content": "last"}]
    async with scripted("ok").running() as api:
        refused = await create(api, input=items)
        assert refused.error["code"] == "context_length_exceeded"
        assert refused.error["param"] == "input"
        kept = await create(api, input=items, truncation="auto", instructions="I")
        assert kept.json["truncation"] == "auto"
        [prompt] = api.runner.prompts
    assert prompt.startswith("system: Isystem: Suser: 2")
    assert "user: last" in prompt


@pytest.mark.parametrize("truncation", ["auto", "disabled"])
async def test_a_worker_reads_as_the_server_itself(truncation):
    padding = "x" * LONG_BODY
    items = [{"role": "user", "content": padding}, {"role": "user", "content": "Hi"}]
    found = []
    for api in (Api(), Api(load_text=byte_text)):
        async with api.running():
            first = await create(api)
            answer = await create(
                api, input=items, truncation=truncation, previous_response_id=first.json["id"]
            )
            workers = api.app.context.prompt_workers
            if workers is not None:
                assert len(workers.pids) == 1
                workers.close()
        content = answer.json
        for name in ("id", "output", "previous_response_id"):
            content.pop(name, None)
        found.append((answer.status, content))
    assert found[0] == found[1]
    assert found[0][0] == (200 if truncation == "auto" else 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_0"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [FLAT]}, "tools"),
        ({"tools": [FLAT, FLAT]}, "tools[1].name"),
        ({"tools": [{"type": "namespace", "name": "a b", "tools": []}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{**FLAT, "type": "mcp"}]}]},
         "tools[0].tools[0].type"),
        ({"tools": [{"type": "namespace", "name": n, "tools": [FLAT]} for n in ("n", "n__")]},
         "tools[1].name"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "x"}},
         "tool_choice.function.name"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "text.format"),
        ({"include": ["everything"]}, "include[0]"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_by_name(fields, param):
    async with Api().running() as api:
        answer = await create(api, **fields)
        assert api.engine.is_idle
    assert answer.status == 400
    assert answer.error["param"] == param
