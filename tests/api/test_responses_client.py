"""The Responses API as users of the openai package have it."""

import json

import openai
import pydantic
import pytest
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI
from openai.types.responses import Response

from streamserve.engine.parsers.answer_format import AnswerFormat
from tests.api.harness import MODEL, TEXT, Api, BrokenRunner, server_thread
from tests.api.scripted import scripted_parts
from tests.api.test_responses import FLAT
from tests.api.test_tools import CALL


class City(pydantic.BaseModel):
    city: str
    people: int


def says(prompt):
    """A model that calls its tool, and then says what it returned."""
    if "(of call" in prompt:
        return "<think>So be it.</think>It is 21 degrees."
    if "<tools>" in prompt:
        return "<think>I must look.</think>" + CALL
    if "JSON" in prompt:
        return '<think>Hm.</think>{"city": "Łódź", "people": 670000}'
    return "Hello."


@pytest.fixture(scope="module")
def client():
    parts = {**scripted_parts(says), "max_model_len": 2048}
    with (
        server_thread(api_keys=("key",), **parts) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client,
    ):
        yield client


def check(response):
    """What was sent is what the package's types say, to the letter."""
    Response.model_validate(response.model_dump(by_alias=True, warnings=False), strict=True)


def test_create(client):
    response = client.responses.create(model=MODEL, input="Hi", instructions="Be kind.")
    assert response.output_text == "Hello."
    assert response.status == "completed"
    assert response.usage.output_tokens == len("Hello.") + 1
    check(response)
    raw = client.responses.with_raw_response.create(model=MODEL, input=[{"role": "user",
                                                    "content": "Hi"}])  # fmt: skip
    assert "x-ignored-fields" not in raw.headers


def test_stream(client):
    events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello."
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        type(event).model_validate(event.model_dump(by_alias=True, warnings=False))
    check(events[-1].response)


def test_the_streaming_helper_parses(client):
    with client.responses.stream(model=MODEL, input="JSON", text_format=City) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert json.loads(text)["city"] == "Łódź"
    assert final.output_parsed == City(city="Łódź", people=670000)


def test_parse(client):
    response = client.responses.parse(model=MODEL, input="JSON", text_format=City)
    assert response.output_parsed == City(city="Łódź", people=670000)
    assert response.text.format.type == "json_schema"
    check(response)


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_of_tools(client, by_id, stream):
    """The model calls, the client answers, and the model says what it has learnt."""
    options = {"model": MODEL, "tools": [FLAT]}
    asked = [{"role": "user", "content": "How warm is it?"}]
    if stream:
        with client.responses.stream(input=asked, **options) as events:
            kinds = [event.type for event in events]
            response = events.get_final_response()
        assert "response.reasoning_text.delta" in kinds
        assert "response.function_call_arguments.delta" in kinds
    else:
        response = client.responses.create(input=asked, **options)
    check(response)
    thoughts, call = response.output
    assert thoughts.content[0].text == "I must look."
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments) == {"city": "Łódź"}
    returned = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    if by_id:
        last = client.responses.create(
            input=[returned], previous_response_id=response.id, **options
        )
    else:
        last = client.responses.create(input=[*asked, *response.output, returned], **options)
    assert last.output_text == "It is 21 degrees."
    items = client.responses.input_items.list(last.id, order="asc").data
    assert [item.type for item in items] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]


def test_retrieve_and_delete(client):
    made = client.responses.create(model=MODEL, input="Hi", metadata={"a": "b"})
    assert client.responses.retrieve(made.id) == made
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(made.id)
    assert caught.value.code == "response_not_found"


def test_in_the_background(client):
    made = client.responses.create(model=MODEL, input="Hi", background=True)
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[-1].response.output_text == "Hello."
    again = client.responses.retrieve(made.id, stream=True, starting_after=2)
    assert [e.sequence_number for e in again] == [e.sequence_number for e in events[3:]]
    assert client.responses.cancel(made.id).status == "completed"
    stream = client.responses.create(model=MODEL, input="Hi", background=True, stream=True)
    assert [event.type for event in stream] == [event.type for event in events]


def test_the_prompt_is_counted(client):
    made = client.responses.create(model=MODEL, input="Hi")
    options = {"input": "More", "previous_response_id": made.id, "tools": [FLAT]}
    counted = client.responses.input_tokens.count(model=MODEL, **options)
    response = client.responses.create(model=MODEL, **options)
    assert counted.input_tokens == response.usage.input_tokens


def test_langchain_speaks_it(client):
    chat = ChatOpenAI(
        base_url=str(client.base_url), api_key="key", model=MODEL, use_responses_api=True
    )
    assert chat.invoke("Hi").text == "Hello."
    assert "".join(chunk.text for chunk in chat.stream("Hi")) == "Hello."
    asked = chat.bind_tools([FLAT]).invoke("How warm is it?")
    [call] = asked.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Łódź"})
    messages = [("user", "How warm is it?"), asked, ToolMessage("21", tool_call_id=call["id"])]
    assert chat.bind_tools([FLAT]).invoke(messages).text == "It is 21 degrees."
    assert chat.with_structured_output(City).invoke("JSON") == City(city="Łódź", people=670000)


def test_forced_calls(client):
    response = client.responses.create(
        model=MODEL,
        input="Hi",
        tools=[FLAT],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=200,
    )
    [*_, call] = response.output
    assert call.name == "get_weather"
    assert response.tool_choice.name == "get_weather"


def test_logprobs():
    with (
        server_thread() as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        options = {"model": MODEL, "input": "Hi", "max_output_tokens": 10, "top_logprobs": 2}
        whole = client.responses.create(**options, include=["message.output_text.logprobs"])
        events = list(client.responses.create(**options, stream=True))
    entries = whole.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == TEXT.decode()
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert [e.logprobs[0].token for e in deltas] == [entry.token for entry in entries]
    assert events[-1].response.output[0].content[0].logprobs == entries


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"previous_response_id": "resp_x"}, openai.BadRequestError, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
        ({"text": {"format": {"type": "x"}}}, openai.BadRequestError, "text.format.type"),
    ],
)
def test_errors_are_the_clients_own(client, fields, error, param):
    with pytest.raises(error) as caught:
        client.responses.create(**{"model": MODEL, "input": "Hi", **fields})
    assert caught.value.param == param


async def test_a_failed_stream_says_so():
    api = Api(runner=BrokenRunner(good_steps=2), answer_format=AnswerFormat())
    async with (
        api.serving() as (host, port),
        openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="x") as client,
    ):
        stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
        events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
