"""Tools with the openai package and the model in the box, from the question to the answer.

The box's model asks for nothing by itself, so its first turn is forced. What the tool says then
stands in the chat like a question, and that it answers.
"""

import json

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.test_structured import Place

QUIZ = {"role": "user", "content": "Ask the quiz for a question, and answer it."}


class Quiz(BaseModel):
    """The next question of the quiz."""

    is_hard: bool


TOOLS = [openai.pydantic_function_tool(Quiz, name="quiz")]


def asked_by(call) -> dict[str, str]:
    """The tool's message: what it says to a call."""
    assert call.function.name == "quiz"
    Quiz.model_validate_json(call.function.arguments)
    return {
        "role": "tool",
        "tool_call_id": call.id,
        "content": "What is the capital of Japan?",
    }


@pytest.fixture(scope="module")
def client(box):
    with box.client() as client:
        yield client


FIELDS = {"model": "box", "temperature": 0, "max_tokens": 300, "tools": TOOLS}
# Where it may, the box's model calls again and again.
FIELDS |= {"parallel_tool_calls": False}


def test_a_loop(client):
    first = client.chat.completions.create(messages=[QUIZ], tool_choice="required", **FIELDS)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    [call] = message.tool_calls
    raw = client.chat.completions.with_raw_response.create(
        messages=[QUIZ, message, asked_by(call)], **FIELDS
    )
    assert "x-ignored-fields" not in raw.headers
    [choice] = raw.parse().choices
    assert "Tokyo" in choice.message.content
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None


def test_a_streamed_loop(client):
    named = {"type": "function", "function": {"name": "quiz"}}
    with client.chat.completions.stream(messages=[QUIZ], tool_choice=named, **FIELDS) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Quiz)
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas) == done.arguments
    assert json.loads(done.arguments) == json.loads(call.function.arguments)
    messages = [QUIZ, message, asked_by(call)]
    with client.chat.completions.stream(messages=messages, **FIELDS) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert "Tokyo" in text


def test_tools_beside_a_format_for_the_answer(client):
    """Which of the two it is to be the model decides; either is valid."""
    reply = client.chat.completions.parse(messages=[QUIZ], response_format=Place, **FIELDS)
    message = reply.choices[0].message
    if message.tool_calls:
        assert isinstance(message.tool_calls[0].function.parsed_arguments, Quiz)
    else:
        assert isinstance(message.parsed, Place)


async def test_a_loop_with_the_async_client(box):
    async with box.async_client() as client:
        first = await client.chat.completions.parse(
            messages=[QUIZ], tool_choice="required", **FIELDS
        )
        [call] = first.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Quiz)
        second = await client.chat.completions.parse(
            messages=[QUIZ, first.choices[0].message, asked_by(call)], **FIELDS
        )
    assert "Tokyo" in second.choices[0].message.content
