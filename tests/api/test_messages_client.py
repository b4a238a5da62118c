"""The anthropic package against a model that thinks, calls, and breaks."""

import anthropic
import orjson
import pytest

from tests.api.harness import HI, MODEL, Api, BrokenRunner, server_thread
from tests.api.scripted import scripted_parts
from tests.api.test_messages import CALL, TOOLS


def answer_to(prompt):
    if "tool: " in prompt:
        return "Rain.</think>It rains."
    return "Hm.</think>\n" + CALL


def test_a_loop_of_thoughts_and_tools():
    with (
        server_thread(**scripted_parts(answer_to), max_model_len=4096) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        asked = {"model": MODEL, "max_tokens": 200, "tools": TOOLS}
        asked["thinking"] = {"type": "enabled", "budget_tokens": 100}
        whole = client.messages.create(**asked, messages=[HI])
        with client.messages.stream(**asked, messages=[HI]) as stream:
            kinds = {event.type for event in stream}
            first = stream.get_final_message()
        result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "rain"}
        turns = [
            HI,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        last = client.messages.create(**asked, messages=turns)
    assert kinds >= {"thinking", "signature", "input_json", "message_stop"}
    for message in (whole, first):
        assert [block.type for block in message.content] == ["thinking", "tool_use"]
        assert message.content[0].thinking == "Hm."
        assert message.content[0].signature
        assert message.content[1].input == {"city": "Łódź"}
        assert message.stop_reason == "tool_use"
    assert whole.usage.output_tokens_details.thinking_tokens == len("Hm.")
    assert [block.type for block in last.content] == ["thinking", "text"]
    assert last.content[1].text == "It rains."
    assert last.stop_reason == "end_turn"


async def test_a_stream_that_fails_ends_with_an_error_event():
    async with Api(runner=BrokenRunner(3)).running() as api:
        body = {"model": MODEL, "max_tokens": 9, "messages": [HI], "stream": True}
        answer = await api.call("POST", "/v1/messages", body)
    blocks = answer.body.decode().split("\n\n")
    name, data = blocks[-2].split("\n")
    error = orjson.loads(data.removeprefix("data: "))
    assert (name, error["type"]) == ("event: error", "error")
    assert error["error"]["type"] in {"api_error", "overloaded_error"}
    assert "message_stop" not in answer.body.decode()


def test_the_client_raises_what_a_stream_ends_with():
    with (
        server_thread(runner=BrokenRunner(3)) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        stream = client.messages.create(model=MODEL, max_tokens=9, messages=[HI], stream=True)
        with pytest.raises(anthropic.APIStatusError, match="error"):
            list(stream)
