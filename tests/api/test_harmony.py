"""gpt-oss through the API: its channels as thoughts, content and calls, and its own template."""

import json
import re
from datetime import datetime
from pathlib import Path

import jsonschema
import pytest

from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.answer_format import choose_answer_format
from tests.api.harness import Api, joined
from tests.api.scripted import ScriptedRunner
from tests.api.test_forced_calls import STRICT
from tests.api.test_tools import ADD, HI, TOOLS, deltas_of, finish_reasons
from tests.api.typed_events import assembled, typed_events

TEMPLATE = ChatTemplate(
    Path(__file__).with_name("gpt_oss.jinja").read_text(),
    source="the test",
    now=lambda: datetime(2026, 1, 2),
)
NEXT = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Hm, 1 < 2.<|end|>"
FINAL = NEXT + "<|channel|>final<|message|>"
CALL = NEXT + "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
ARGUMENTS = '{"city": "Łódź"}'
PREAMBLE = NEXT + "<|channel|>commentary<|message|>I look.<|end|>"


def saying(text, **options) -> Api:
    return Api(
        runner=ScriptedRunner(lambda _: text),
        template=TEMPLATE,
        answer_format=choose_answer_format(TEMPLATE),
        max_model_len=1536,
        **options,
    )


async def ask(text, **fields):
    """The answer, and the prompt that was rendered."""
    async with saying(text).running() as api:
        answer = await api.chat(**fields)
    return answer, "".join(api.runner.prompts)


def message_of(answer):
    return answer.json["choices"][0]["message"]


async def test_channels():
    answer, prompt = await ask(THOUGHT + FINAL + "Yes.", max_tokens=200)
    message = message_of(answer)
    assert (message["reasoning_content"], message["content"]) == ("Hm, 1 < 2.", "Yes.")
    details = answer.json["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": len("Hm, 1 < 2.")}
    assert prompt.startswith(
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-01-02\n\nReasoning: medium\n\n"
    )
    assert prompt.endswith("<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant")
    streamed, _ = await ask(THOUGHT + FINAL + "Yes.", stream=True, max_tokens=200)
    deltas = deltas_of(streamed)
    assert joined(deltas, "reasoning_content") == "Hm, 1 < 2."
    assert joined(deltas, "content") == "Yes."
    assert len(deltas) >= len("Hm, 1 < 2.Yes.")


async def test_a_stop_string_is_not_looked_for_in_thoughts():
    answer, _ = await ask(THOUGHT + FINAL + "Yes. No.", stop=["Hm", "No"], max_tokens=200)
    message = message_of(answer)
    assert (message["reasoning_content"], message["content"]) == ("Hm, 1 < 2.", "Yes. ")
    assert answer.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_behind_thoughts_and_words(stream):
    text = THOUGHT + PREAMBLE + CALL + ARGUMENTS
    answer, prompt = await ask(text, tools=TOOLS, stream=stream, max_tokens=300)
    assert "type get_weather = (_: {\ncity: string,\n}) => any;" in prompt
    if stream:
        deltas = deltas_of(answer)
        functions = [call["function"] for d in deltas for call in d.get("tool_calls", ())]
        assert functions[0]["name"] == "get_weather"
        assert "".join(function["arguments"] for function in functions) == ARGUMENTS
        assert finish_reasons(answer) == ["tool_calls"]
        assert joined(deltas, "content") == "I look."
        return
    message = message_of(answer)
    assert message["reasoning"] == "Hm, 1 < 2."
    assert message["content"] == "I look."
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}


def calls_of(*ids):
    function = {"name": "get_weather", "arguments": ARGUMENTS}
    return [{"id": i, "type": "function", "function": function} for i in ids]


async def test_the_next_turns():
    """Thoughts stay as long as their calls are worked on, and each result is behind its call."""
    turn = [
        HI,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": calls_of("a", "b"),
        },
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
    ]
    call = (
        NEXT + f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
    )
    result = (
        '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"%s"<|end|>'
    )
    worked = call + result % "sun" + call + result % "rain"
    thought = NEXT + "<|channel|>analysis<|message|>Hm.\n\nI look.<|end|>"
    _, prompt = await ask(FINAL, messages=turn, tools=TOOLS)
    assert prompt.endswith("Hi<|end|>" + thought + worked + NEXT)
    said = {"role": "assistant", "content": "Sun.", "reasoning_content": "Hm."}
    _, prompt = await ask(FINAL, messages=[*turn, said, HI], tools=TOOLS)
    assert prompt.endswith(
        f"Hi<|end|>{worked}{FINAL}Sun.<|end|><|start|>user<|message|>Hi<|end|>{NEXT}"
    )


async def test_what_the_template_takes():
    kwargs = {"model_identity": "You are a bird.", "builtin_tools": ["python"]}
    _, prompt = await ask(FINAL, reasoning_effort="high", chat_template_kwargs=kwargs)
    assert prompt.startswith("<|start|>system<|message|>You are a bird.\n")
    assert "Reasoning: high\n\n# Tools\n\n## python\n\n" in prompt
    messages = [{"role": "developer", "content": "Be brief."}, HI]
    _, prompt = await ask(FINAL, messages=messages)
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>" in prompt
    answer, _ = await ask(FINAL, reasoning_effort="minimal")
    assert (answer.status, answer.error["param"]) == (400, "reasoning_effort")
    assert "must be one of none, low, medium, high for this model" in answer.error["message"]


async def test_without_thoughts():
    """What the model begins to think is ended at once, and may not begin anew."""
    text = "<|channel|>analysis<|message|><|end|>" + FINAL + "Yes."
    answer, _ = await ask(text, reasoning_effort="none", max_tokens=200)
    assert message_of(answer) == {"role": "assistant", "content": "Yes.", "refusal": None}
    again = "<|channel|>analysis<|message|><|end|>" + NEXT + THOUGHT + FINAL + "Yes."
    answer, _ = await ask(again, reasoning_effort="none", max_tokens=200)
    assert "reasoning" not in message_of(answer)
    answer, _ = await ask(THOUGHT + FINAL + "Yes.", include_reasoning=False, max_tokens=200)
    assert message_of(answer)["content"] == "Yes."


async def test_a_budget():
    text = "<|channel|>analysis<|message|>Hm, h<|end|>" + FINAL + "Yes."
    answer, _ = await ask(text.replace("h<", "hm, hm<"), thinking_token_budget=5, max_tokens=200)
    assert message_of(answer)["reasoning"] == "Hm, h"
    answer, _ = await ask(text, thinking_token_budget=100, max_tokens=200)
    message = message_of(answer)
    assert (message["reasoning"], message["content"]) == ("Hm, h", "Yes.")


async def test_an_answer_goes_on():
    messages = [HI, {"role": "assistant", "content": "I say "}]
    answer, prompt = await ask("yes.", messages=messages, continue_final_message=True)
    assert prompt.endswith("<|channel|>final<|message|>I say ")
    assert message_of(answer)["content"] == "yes."
    answer, _ = await ask("yes.", messages=messages, continue_final_message=True, tools=[STRICT])
    assert (answer.status, answer.error["param"]) == (400, "tools")


@pytest.mark.parametrize("says", [THOUGHT + FINAL + '{"a": 1}', "{", ""])
async def test_a_grammar_holds_in_the_final_message(says):
    format_ = {"type": "json_object"}
    answer, _ = await ask(says, response_format=format_, max_tokens=400)
    message = message_of(answer)
    if says.startswith(THOUGHT):
        assert (message["reasoning"], message["content"]) == ("Hm, 1 < 2.", '{"a": 1}')
    else:
        assert "<|" not in (message["content"] or "")


PICK = CALL.replace("get_weather", "pick")
NAMED = {"type": "function", "function": {"name": "pick"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("says", [PICK.removeprefix(NEXT), THOUGHT + PICK + "nonsense"])
async def test_a_model_that_must_call_does(says, choice):
    tools = [STRICT, ADD] if choice == "required" else [ADD, STRICT]
    answer, _ = await ask(says, tools=tools, tool_choice=choice, max_tokens=400)
    [call] = message_of(answer)["tool_calls"]
    assert call["function"]["name"] == "pick"
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, STRICT["function"]["parameters"])
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_strict_tools_call_follows_its_schema():
    bad = CALL.replace("get_weather", "pick") + '{"colour": "green", "sure": 5}'
    answer, _ = await ask(THOUGHT + PREAMBLE + bad, tools=[STRICT], max_tokens=400)
    message = message_of(answer)
    assert (message["reasoning"], message["content"]) == ("Hm, 1 < 2.", "I look.")
    [call] = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, STRICT["function"]["parameters"])
    free, _ = await ask(THOUGHT + FINAL + "Ł <|x.", tools=[STRICT], max_tokens=400)
    assert message_of(free)["content"] == "Ł <|x."


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_and_messages(stream):
    text = THOUGHT + PREAMBLE + NEXT + THOUGHT + CALL + ARGUMENTS
    function = {"type": "function", **TOOLS[0]["function"]}
    tool = {"name": "get_weather", "input_schema": TOOLS[0]["function"]["parameters"]}
    async with saying(text).running() as api:
        response = await api.call(
            "POST",
            "/v1/responses",
            {
                "input": "Hi",
                "tools": [function],
                "reasoning": {"effort": "low"},
                "stream": stream,
                "max_output_tokens": 400,
            },
        )
        message = await api.message(
            tools=[tool],
            thinking={"type": "enabled", "budget_tokens": 1024},
            max_tokens=1100,
            stream=stream,
        )
    assert "Reasoning: low" in api.runner.prompts[0]
    kinds = ["reasoning", "message", "reasoning", "function_call"]
    blocks = ["thinking", "text", "thinking", "tool_use"]
    if stream:
        assert [item["type"] for item in assembled(typed_events(response.body))] == kinds
        starts = re.findall(rb'"content_block":\{"type":"(\w+)"', message.body)
        assert [start.decode() for start in starts] == blocks
        return
    assert [item["type"] for item in response.json["output"]] == kinds
    content = message.json["content"]
    assert [block["type"] for block in content] == blocks
    assert (content[1]["text"], content[3]["input"]) == ("I look.", json.loads(ARGUMENTS))
