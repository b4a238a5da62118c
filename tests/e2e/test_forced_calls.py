"""The model in the box knows no tools: a forced call is valid all the same."""

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.test_structured import CAPITAL, Place


class Weather(BaseModel):
    """Bounded, as `Place` is."""

    celsius: bool


TOOLS = [openai.pydantic_function_tool(Place), openai.pydantic_function_tool(Weather)]
MODELS = {"Place": Place, "Weather": Weather}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Place"}}]
)
def test_forced_calls_are_valid(box, choice):
    asked = {"model": "box", "messages": CAPITAL, "tools": TOOLS, "tool_choice": choice}
    asked |= {"parallel_tool_calls": False, "temperature": 0, "max_tokens": 300}
    with box.client() as client:
        whole = client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0]
    for answer in (whole, streamed):
        assert answer.finish_reason == "tool_calls"
        [call] = answer.message.tool_calls
        MODELS[call.function.name].model_validate_json(call.function.arguments)
    assert whole.message.tool_calls[0].function.arguments == call.function.arguments
