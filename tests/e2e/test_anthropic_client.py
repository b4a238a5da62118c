"""The anthropic package against a real server process with a real model."""

import json

import anthropic
import pytest

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
# Newer clients have no argument for the temperature.
ASKED = {"model": "box", "max_tokens": 100, "messages": CAPITAL, "extra_body": {"temperature": 0}}
PLACE = {
    "name": "place",
    "description": "Where a city is",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "is_capital": {"type": "boolean"}},
        "required": ["city", "is_capital"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(box):
    with anthropic.Anthropic(base_url=box.url, api_key="none", max_retries=0) as client:
        yield client


def test_create(client):
    message = client.messages.create(**ASKED)
    [block] = message.content
    assert "Paris" in block.text
    assert (message.role, message.stop_reason, message.model) == ("assistant", "end_turn", "box")
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_a_stream_is_the_same_message(client):
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == whole.content[0].text == final.content[0].text
    assert len(texts) > 3
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    seen = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert seen == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert final.usage.cache_read_input_tokens > 0


async def test_raw_events_of_the_async_client(box):
    async with anthropic.AsyncAnthropic(
        base_url=box.url, auth_token="none", api_key=None
    ) as client:
        stream = await client.messages.create(**ASKED, stream=True)
        kinds = [event.type async for event in stream]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_a_stop_sequence(client):
    whole = client.messages.create(**ASKED).content[0].text
    cut = client.messages.create(**ASKED, stop_sequences=["Par"])
    assert cut.content[0].text == whole[: whole.index("Par")]
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "Par")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "place"}])
def test_a_loop_of_tools(client, choice):
    """The model in the box knows no tools: a forced call is valid all the same."""
    asked = {**ASKED, "max_tokens": 300, "tools": [PLACE]}
    choice = {**choice, "disable_parallel_tool_use": True}
    called = client.messages.create(**asked, tool_choice=choice)
    with client.messages.stream(**asked, tool_choice=choice) as stream:
        inputs = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    [call] = called.content
    assert called.stop_reason == final.stop_reason == "tool_use"
    assert call.input == json.loads("".join(inputs)) == final.content[0].input
    assert set(call.input) == {"city", "is_capital"}

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Paris is in France."}
    turns = [
        *CAPITAL,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result, {"type": "text", "text": CAPITAL[0]["content"]}]},
    ]
    asked["messages"] = turns
    answer = client.messages.create(**asked, tool_choice={"type": "none"})
    assert answer.stop_reason == "end_turn"
    assert answer.content[0].text
    again = client.messages.create(**asked, tool_choice=choice)
    assert again.content[0].type == "tool_use"


def test_a_format(client):
    schema = PLACE["input_schema"]
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(**ASKED, output_config=config)
    assert set(json.loads(message.content[0].text)) == {"city", "is_capital"}


def test_count_tokens(client):
    counted = client.messages.count_tokens(model="box", messages=CAPITAL, system="Be kind.")
    usage = client.messages.create(**ASKED, system="Be kind.").usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"model": "claude"}, anthropic.NotFoundError, "does not exist"),
        ({"extra_body": {"temperature": 3}}, anthropic.BadRequestError, "temperature"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, anthropic.BadRequestError,
         "thinking.budget_tokens"),
        ({"tools": [{**PLACE, "name": "a b"}]}, anthropic.BadRequestError, "tools"),
        ({"messages": [{"role": "user", "content": "long " * 20_000}]}, anthropic.BadRequestError,
         "context length"),
    ],
)  # fmt: skip
def test_errors(client, fields, error, said):
    with pytest.raises(error, match=said) as caught:
        client.messages.create(**{**ASKED, **fields})
    assert caught.value.body["type"] == "error"
    assert caught.value.request_id
