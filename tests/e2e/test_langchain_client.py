"""LangChain's ChatOpenAI against a server, with only its ``base_url`` changed."""

import json

import httpx
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.e2e.test_structured import Place
from tests.e2e.test_tool_loops import QUIZ

CAPITAL = "What is the capital of France?"


@tool
def quiz(is_hard: bool) -> str:
    """The next question of the quiz."""
    return "What is the capital of Japan?" + " Mind the year!" * (not isinstance(is_hard, bool))


@pytest.fixture
async def chat(box):
    # Its own async client outlives the event loop that a test runs on.
    async with httpx.AsyncClient() as async_client:
        yield ChatOpenAI(
            base_url=f"{box.url}/v1",
            api_key="none",
            model="box",
            temperature=0,
            max_tokens=300,
            max_retries=0,
            http_async_client=async_client,
        )


def test_whole_streamed_and_batched(chat):
    whole = chat.invoke(CAPITAL)
    assert "Paris" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream(CAPITAL, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) > 0
    answers = chat.batch([CAPITAL, "What is the capital of Japan?"])
    assert [word in a.content for word, a in zip(("Paris", "Tokyo"), answers, strict=True)]


async def test_async(chat):
    assert "Paris" in (await chat.ainvoke(CAPITAL)).content
    assert "Paris" in "".join([chunk.content async for chunk in chat.astream(CAPITAL)])
    events = [event["event"] async for event in chat.astream_events(CAPITAL)]
    assert events.count("on_chat_model_stream") > 2


@pytest.mark.parametrize("strict", [None, True])
def test_a_tool_loop(chat, strict):
    messages = [HumanMessage(QUIZ["content"])]
    first = chat.bind_tools(
        [quiz], tool_choice="any", strict=strict, parallel_tool_calls=False
    ).invoke(messages)
    assert not first.invalid_tool_calls
    [call] = first.tool_calls
    messages += [first, quiz.invoke(call)]
    assert isinstance(messages[-1], ToolMessage)
    answer = chat.bind_tools([quiz], strict=strict).invoke(messages)
    assert "Tokyo" in answer.content
    assert not answer.tool_calls


async def test_a_streamed_tool_loop(chat):
    messages = [HumanMessage(QUIZ["content"])]
    first = None
    forced = chat.bind_tools([quiz], tool_choice="quiz", parallel_tool_calls=False)
    async for chunk in forced.astream(messages):
        first = chunk if first is None else first + chunk
    [call] = first.tool_calls
    assert isinstance(call["args"]["is_hard"], bool)
    messages += [first, await quiz.ainvoke(call)]
    answer = [chunk.content async for chunk in chat.bind_tools([quiz]).astream(messages)]
    assert "Tokyo" in "".join(answer)


# The openai package's own: it declares the parsed answer to be none.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output(chat, method):
    structured = chat.with_structured_output(Place, method=method)
    answer = structured.invoke(CAPITAL)
    assert isinstance(answer, Place)
    assert await structured.ainvoke(CAPITAL) == answer
    assert list(structured.stream(CAPITAL))[-1] == answer
    raw = chat.with_structured_output(
        Place.model_json_schema(), method=method, strict=True, include_raw=True
    ).invoke(CAPITAL)
    assert raw["parsing_error"] is None
    Place.model_validate(raw["parsed"])


def test_json_mode(chat):
    chat = chat.model_copy(update={"temperature": 1, "seed": 15})
    answer = chat.with_structured_output(None, method="json_mode", include_raw=True).invoke(
        f"{CAPITAL} As JSON."
    )
    assert isinstance(json.loads(answer["raw"].content), dict)
    assert answer["parsed"] == json.loads(answer["raw"].content)
