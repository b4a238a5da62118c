"""Reasoning through the API: apart from the content, counted, and steered by the template."""

import openai
import pytest

from streamserve.engine.parsers.answer_format import AnswerFormat
from tests.api.harness import MODEL, Api, joined, server_thread
from tests.api.scripted import TEMPLATE, assert_refused, scripted, scripted_parts
from tests.api.test_tools import CALL, HI, TOOLS, deltas_of, finish_reasons

THOUGHT = "<think>\nHm, 1 < 2.\n</think>\n\nYes."


async def test_thoughts_are_apart():
    async with scripted(THOUGHT).running() as api:
        answer = await api.chat()
    message = answer.json["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning_content": "Hm, 1 < 2.",
        "reasoning": "Hm, 1 < 2.",
    }
    usage = answer.json["usage"]
    assert usage["completion_tokens"] == len(THOUGHT) + 1
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len("\nHm, 1 < 2.\n")}


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("stop", ["Hm", "<think>", "\n\n", "n"])
async def test_a_stop_string_is_not_looked_for_in_thoughts(stop, is_open):
    text = THOUGHT.removeprefix("<think>\n") if is_open else THOUGHT
    kwargs = {"enable_thinking": True} if is_open else {}
    async with scripted(f"{text} No. Yes.").running() as api:
        answer = await api.chat(stop=[stop, "No"], chat_template_kwargs=kwargs)
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"] == "Hm, 1 < 2."
    assert choice["message"]["content"] == "Yes. "


async def test_streamed_thoughts():
    async with scripted(THOUGHT).running() as api:
        answer = await api.chat(stream=True, stream_options={"include_usage": True})
    deltas = deltas_of(answer)
    assert deltas[0] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "H",
        "reasoning": "H",
    }
    assert joined(deltas, "reasoning_content") == joined(deltas, "reasoning") == "Hm, 1 < 2."
    assert joined(deltas, "content") == "Yes."
    usage = answer.events[-2]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len("\nHm, 1 < 2.\n")}
    assert len(deltas) > 10


async def test_running_usage_counts_thoughts():
    async with scripted(THOUGHT).running() as api:
        answer = await api.chat(stream=True, stream_options={"continuous_usage_stats": True})
    counts = [
        event["usage"]["completion_tokens_details"]["reasoning_tokens"]
        for event in answer.events
        if isinstance(event, dict)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == len("\nHm, 1 < 2.\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_may_be_left_out(stream):
    async with scripted(THOUGHT).running() as api:
        answer = await api.chat(include_reasoning=False, stream=stream)
    if stream:
        deltas = deltas_of(answer)
        assert deltas[0] == {"role": "assistant", "content": "Y"}
        assert not any("reasoning" in delta for delta in deltas)
    else:
        message = answer.json["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Yes.", "refusal": None}


async def test_thoughts_in_mistrals_marks_are_thoughts_and_have_a_budget():
    template = "[THINK][/THINK]{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    async with Api(
        **scripted_parts("[THINK]Hm, 1 < 2.[/THINK]Yes.", template=template)
    ).running() as api:
        answer = await api.chat()
        short = await api.chat(thinking_token_budget=2)
    message = answer.json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, 1 < 2.", "Yes.")
    usage = answer.json["usage"]["completion_tokens_details"]
    assert usage == {"reasoning_tokens": len("Hm, 1 < 2.")}
    assert short.json["choices"][0]["message"]["reasoning_content"] == "Hm"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thoughts", ["Hm.", None])
async def test_marks_around_the_text_are_no_content(thoughts, stream):
    """As Command writes it, whose template may have ended the thoughts in the prompt."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<|START_THINKING|>"
    template += "" if thoughts else "<|END_THINKING|>"
    says = f"{thoughts}<|END_THINKING|>" if thoughts else ""
    says += "<|START_RESPONSE|>Yes.<|END_RESPONSE|>"
    template = "{# <|END_THINKING|> #}" + template
    async with Api(**scripted_parts(says, template=template)).running() as api:
        answer = await api.chat(stream=stream)
    if stream:
        deltas = deltas_of(answer)
        said = {key: "".join(delta.get(key) or "" for delta in deltas)
                for key in ("reasoning_content", "content")}  # fmt: skip
    else:
        said = answer.json["choices"][0]["message"]
    assert (said.get("reasoning_content") or None, said["content"]) == (thoughts, "Yes.")


@pytest.mark.parametrize(
    ("kwargs", "text", "thoughts", "content"),
    [
        ({"enable_thinking": True}, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ({"enable_thinking": True}, "Hm.", "Hm.", None),
        ({"enable_thinking": False}, "Yes. </think>", None, "Yes. </think>"),
        ({}, "Yes. <think>no</think>", None, "Yes. <think>no</think>"),
    ],
)
async def test_the_template_may_open_or_close_the_thinking(kwargs, text, thoughts, content):
    async with scripted(text).running() as api:
        answer = await api.chat(chat_template_kwargs=kwargs)
    message = answer.json["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (thoughts, content)


async def test_the_servers_template_variables_hold_where_a_request_says_none():
    async with scripted("Yes.", template_defaults={"enable_thinking": False}).running() as api:
        answer = await api.chat()
        await api.chat(chat_template_kwargs={"enable_thinking": True})
        thinking = {"type": "enabled", "budget_tokens": 1024}
        await api.message(max_tokens=2048, thinking=thinking)
        await api.call("POST", "/v1/responses", {"input": "Hi"})
        tokens = await api.call("POST", "/tokenize", {"messages": [HI]})
        assert not api.app.context.preprocessor.has_run_away
    off, on = "<think>\n\n</think>\n\n", "<think>\n"
    ends = [prompt.partition("assistant: ")[2] for prompt in api.runner.prompts]
    assert ends == [off, on, on, off]
    assert tokens.json["count"] == answer.json["usage"]["prompt_tokens"]


async def test_deepseek_thinks_without_saying_so():
    parts = scripted_parts("Hm.\n</think>\n\nYes.", reasoning_parser="deepseek_r1")
    async with Api(**parts).running() as api:
        message = (await api.chat()).json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


async def test_a_thinking_answer_is_continued():
    async with scripted("m.</think>Yes.").running() as api:
        answer = await api.chat(
            messages=[HI, {"role": "assistant", "content": "<think>H"}],
            continue_final_message=True,
        )
        message = answer.json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("m.", "Yes.")
        answer = await api.chat(
            messages=[HI, {"role": "assistant", "content": "I say "}], continue_final_message=True
        )
    message = answer.json["choices"][0]["message"]
    assert message["content"] == "m.</think>Yes."


async def test_thoughts_then_a_call():
    async with scripted("<think>Hm.</think>\n" + CALL).running() as api:
        answer = await api.chat(tools=TOOLS, stream=True)
        whole = (await api.chat(tools=TOOLS)).json["choices"][0]
    assert joined(deltas_of(answer), "reasoning_content") == "Hm."
    assert joined(deltas_of(answer), "content") == ""
    assert finish_reasons(answer) == ["tool_calls"]
    assert whole["message"]["reasoning_content"] == "Hm."
    assert whole["message"]["content"] is None
    assert whole["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_thoughts_go_back_to_the_template(field):
    async with scripted("ok").running() as api:
        await api.chat(messages=[HI, {"role": "assistant", "content": "Yes.", field: "Hm."}, HI])
    assert "assistant: Yes.<think>Hm.</think>" in api.runner.prompts[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": True}])
async def test_a_budget(stream, kwargs):
    text = "Hm, hm, hm" if kwargs else "<think>Hm, hm, hm"
    async with scripted(text).running() as api:
        answer = await api.chat(
            chat_template_kwargs=kwargs,
            thinking_token_budget=5,
            stream=stream,
            stream_options={"include_usage": True} if stream else None,
        )
    usage = answer.events[-2]["usage"] if stream else answer.json["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 5}
    message = answer.json["choices"][0]["message"] if not stream else None
    thoughts = joined(deltas_of(answer), "reasoning") if stream else message["reasoning"]
    assert thoughts == "Hm, h"


async def test_no_budget_is_none():
    async with scripted(THOUGHT).running() as api:
        answer = await api.chat(thinking_token_budget=-1)
    assert answer.json["choices"][0]["message"]["reasoning"] == "Hm, 1 < 2."


async def test_an_answer_in_json_is_thought_about_first():
    says = '<think>Hm.</think>{"a": 1}'
    async with scripted(says).running() as api:
        answer = await api.chat(response_format={"type": "json_object"})
    message = answer.json["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm.", '{"a": 1}')


EFFORT = TEMPLATE + "{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("template", "effort", "end"),
    [
        (TEMPLATE, "none", "<think>\n\n</think>\n\n"),
        (EFFORT, "none", "<think>\n\n</think>\n\n"),
        (EFFORT, "high", "assistant: high"),
        (EFFORT, "max", "assistant: max"),
        (TEMPLATE, "low", "<think>\n"),
        ("{{ messages[0].content }}", "none", "Hi"),
    ],
)
async def test_effort_where_it_means_something(template, effort, end):
    async with scripted("ok", template=template).running() as api:
        answer = await api.chat(reasoning_effort=effort)
    assert answer.status == 200
    assert api.runner.prompts[0].endswith(end)


BAD = [
    ({"reasoning_effort": "much"}, "reasoning_effort", "one of none, minimal, low"),
    ({"reasoning_effort": 5}, "reasoning_effort", "a string"),
    ({"include_reasoning": "no"}, "include_reasoning", "a boolean"),
    ({"thinking_token_budget": -2}, "thinking_token_budget", "between -1"),
    ({"thinking_token_budget": "all"}, "thinking_token_budget", "an integer"),
    ({"messages": [{**HI, "reasoning": "x"}]}, "messages[0].reasoning", "role 'assistant'"),
    (
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": 5}]},
        "messages[0].reasoning_content",
        "a string",
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD)
async def test_bad_values_are_refused_by_name(fields, param, message):
    await assert_refused(fields, param, message)


@pytest.mark.parametrize(
    ("template", "kwargs", "end"),
    [
        (TEMPLATE, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (EFFORT, {"reasoning_effort": "low"}, "assistant: low"),
    ],
)
async def test_a_requests_own_variables_of_the_template_come_before_its_effort(
    template, kwargs, end
):
    async with scripted("ok", template=template).running() as api:
        answer = await api.chat(reasoning_effort="high", chat_template_kwargs=kwargs)
    assert answer.status == 200
    assert api.runner.prompts[0].endswith(end)


async def test_a_model_that_does_not_think_is_not_asked_to():
    async with Api(answer_format=AnswerFormat()).running() as api:
        assert (await api.chat(reasoning_effort="none", max_tokens=1)).status == 200
        assert (await api.chat(include_reasoning=False, max_tokens=1)).status == 200
        answer = await api.chat(reasoning_effort="low")
        budget = await api.chat(thinking_token_budget=5)
    assert budget.error["param"] == "thinking_token_budget"
    assert answer.status == 400
    assert answer.error["param"] == "reasoning_effort"


async def test_a_budget_and_beams_do_not_go_together():
    async with scripted("<think>Hm").running() as api:
        answer = await api.chat(thinking_token_budget=5, use_beam_search=True, best_of=2)
    assert answer.status == 400
    assert answer.error["param"] == "thinking_token_budget"


def test_openais_client_sees_thoughts():
    with (
        server_thread(**scripted_parts(THOUGHT)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model=MODEL, messages=[HI])
        chunks = list(client.chat.completions.create(model=MODEL, messages=[HI], stream=True))
    assert answer.choices[0].message.reasoning_content == "Hm, 1 < 2."
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("\nHm, 1 < 2.\n")
    thoughts = [getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks]
    assert "".join(thoughts) == "Hm, 1 < 2."
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Yes."
