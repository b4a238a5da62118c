"""Chats with tools as families' templates have them, which know less than OpenAI's messages."""

import json

import pytest

from streamserve.api.family_messages import family_messages
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.answer_format import AnswerFormat, choose_answer_format
from tests.api.harness import Api
from tests.api.scripted import scripted_parts
from tests.api.test_tools import HI, WEATHER

# As they are published, without what is of no interest here.
GLM_4_0414 = """\
[gMASK]<sop>
{%- if tools -%}
<|system|>
# 可用工具
{% for tool in tools %}
    {%- set function = tool.function if tool.get("function") else tool %}

## {{ function.name }}

{{ function | tojson }}
{%- endfor %}
{%- endif -%}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] %}
    {%- set meta = message.get("metadata", "") %}
    {%- if role == 'user' %}
<|user|>
{{ content }}
    {%- elif role == 'assistant' and not meta %}
<|assistant|>
{{ content }}
    {%- elif role == 'assistant' and meta %}
<|assistant|>{{ meta }}
{{ content }}
    {%- elif role == 'observation' %}
<|observation|>
{{ content }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
GLM_4_9B = """\
[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>
# 可用工具{% set tools = item['tools'] %}{% for tool in tools %}{% if tool['type'] == 'function' %}

## {{ tool['function']['name'] }}{% endif %}{% endfor %}{% endif %}{% if item['content'] %}\
<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
PHI_4_MINI = """\
{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and \
message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' \
+ message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}\
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

KIMI_K2 = """\
{%- if tools -%}<|im_system|>{{ tools | length }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
<|tool_calls_section_begin|>{%- for call in message['tool_calls'] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>\
{{ call['function']['arguments'] | tojson }}<|tool_call_end|>{%- endfor -%}
<|tool_calls_section_end|>
{%- elif message['role'] == 'tool' -%}
## Return of {{ message.tool_call_id }}|{{ message['content'] }}
{%- else -%}{{ message['content'] }}{%- endif -%}<|im_end|>{%- endfor -%}"""
DEEPSEEK_V3_1 = """\
{%- if not thinking is defined %}{% set thinking = false %}{% endif -%}
{%- if tools %}{{ tools | length }} tools|{% endif -%}
{%- for message in messages %}{% for tool in message['tool_calls'] or [] -%}
{{ '<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' \
+ tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor -%}
{{ message['content'] }}{% endfor -%}
{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}"""

LFM_2 = """\
{%- set ns = namespace(system_prompt="") -%}
{%- if tools -%}
    {%- set ns.system_prompt = "List of tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- set ns.system_prompt = ns.system_prompt + tool | tojson -%}
    {%- endfor -%}
    {{- ns.system_prompt + "]<|tool_list_end|>" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- set content = message["content"] -%}
    {%- if message["role"] == "tool" -%}
        {%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}
    {%- endif -%}
    {{- content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}"""

GEMMA_4 = """\
{%- for message in messages -%}
    {%- if message['role'] != 'tool' -%}
        {%- if not (loop.index0 and loop.previtem['role'] == 'tool') -%}
            {{- '<|turn>' + message['role'] + '\\n' -}}
        {%- endif -%}
        {%- if message.get('reasoning_content') -%}
            {{- '<|channel>thought\\n' + message['reasoning_content'] + '\\n<channel|>' -}}
        {%- endif -%}
        {%- for tool_call in message['tool_calls'] or [] -%}
            {{- '<|tool_call>call:' + tool_call['function']['name'] + '{' -}}
            {%- for key, value in tool_call['function']['arguments'] | dictsort -%}
                {{- key -}}:<|"|>{{- value -}}<|"|>
            {%- endfor -%}
            {{- '}<tool_call|>' -}}
        {%- endfor -%}
        {%- for response in message.get('tool_responses') or [] -%}
            {{- '<|tool_response>response:' + response['name'] -}}
            {{- response['response'] | tojson + '<tool_response|>' -}}
        {%- endfor -%}
        {{- message['content'] -}}
        {%- if message['content'] -%}<turn|>{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if tools -%}<|tool>{%- endif -%}"""

FUNCTION = WEATHER["function"]
ARGUMENTS = {"city": "Łódź"}
CALL = {"name": "get_weather", "arguments": ARGUMENTS}
CHAT = (
    HI,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": CALL}]},
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
)
SHOWN = json.dumps(ARGUMENTS, ensure_ascii=False)
TWO_CALLS = (
    *CHAT[:2],
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "b", "function": CALL}]},
    {"role": "tool", "tool_call_id": "b", "content": "rain"},
    {"role": "tool", "tool_call_id": "unheard of", "content": ""},
)
TURNS = f"<|user|>\nHi<|assistant|>get_weather\n{SHOWN}<|observation|>\nsun"


@pytest.mark.parametrize(
    ("template", "parser", "prompt"),
    [
        (
            GLM_4_0414,
            "glm4",
            "[gMASK]<sop><|system|>\n# 可用工具\n\n## get_weather\n\n"
            f"{json.dumps(FUNCTION, ensure_ascii=False)}{TURNS}<|assistant|>",
        ),
        (
            GLM_4_9B,
            "glm4",
            f"[gMASK]<sop><|system|>\n# 可用工具\n## get_weather{TURNS}<|assistant|>",
        ),
        (
            PHI_4_MINI,
            "phi4_mini_json",
            f"<|system|><|tool|>{json.dumps([FUNCTION])}<|/tool|><|end|><|user|>Hi<|end|>"
            f"<|assistant|><|tool_call|>[{json.dumps(CALL, ensure_ascii=False)}]<|/tool_call|>"
            "<|end|><|tool_response|>sun<|end|><|assistant|>",
        ),
        (
            LFM_2,
            "lfm2",
            f"List of tools: <|tool_list_start|>[{json.dumps(WEATHER)}]<|tool_list_end|>"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|tool_call_start|>"
            '[get_weather(city="Łódź")]<|tool_call_end|><|im_end|>\n<|im_start|>tool\n'
            "<|tool_response_start|>sun<|tool_response_end|><|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=["glm-4-0414", "glm-4-9b", "phi-4-mini", "lfm-2"],
)
def test_tools_calls_and_results_reach_the_template(template, parser, prompt):
    compiled = ChatTemplate(template, source="the test")
    found = choose_answer_format(compiled)
    assert (found.tool_parser, found.reasoning_parser) == (parser, None)
    messages = family_messages(CHAT, found, [WEATHER])
    assert compiled.render(messages, tools=[WEATHER]) == prompt


def test_an_lfm_sees_python_and_what_it_thought():
    arguments = {"a": [1, None], "b": {"x": True}, "c": 'it\'s "x"', "d": False}
    call = {"id": "a", "function": {"name": "f", "arguments": arguments}}
    called = {"role": "assistant", "content": "Hm.", "tool_calls": [call]}
    called["reasoning_content"] = "So"
    found = AnswerFormat(tool_parser="lfm2")
    [shown] = family_messages([called], found, [WEATHER])
    assert shown["thinking"] == "So"
    assert shown["content"] == (
        'Hm.<|tool_call_start|>[f(a=[1, None], b={"x": true}, c="it\'s \\"x\\"", d=False)]'
        "<|tool_call_end|>"
    )
    found = AnswerFormat(tool_parser="lfm2", has_calls=True)
    [shown] = family_messages([{**called, "content": None}], found, [WEATHER])
    assert shown == {**called, "content": "", "thinking": "So"}


def test_calls_of_a_chat_are_numbered_for_kimi():
    compiled = ChatTemplate(KIMI_K2, source="the test")
    found = choose_answer_format(compiled)
    assert found.tool_parser == "kimi_k2"
    prompt = compiled.render(family_messages(TWO_CALLS, found, [WEATHER]), tools=[WEATHER])
    ids = [part.split("<", 1)[0] for part in prompt.split("<|tool_call_begin|>")[1:]]
    assert ids == ["functions.get_weather:0", "functions.get_weather:1"]
    results = [part.split("|", 1)[0] for part in prompt.split("## Return of ")[1:]]
    assert results == [*ids, "unheard of"]


def test_arguments_that_a_template_adds_to_text_are_text():
    compiled = ChatTemplate(DEEPSEEK_V3_1, source="the test")
    found = choose_answer_format(compiled)
    assert (found.tool_parser, found.has_text_arguments) == ("deepseek_v31", True)
    messages = family_messages(CHAT, found, [WEATHER])
    assert f"<｜tool▁sep｜>{SHOWN}<｜tool▁call▁end｜>" in compiled.render(messages, tools=[WEATHER])
    as_object = DEEPSEEK_V3_1.replace("['arguments']", "['arguments'] | tojson")
    assert not choose_answer_format(ChatTemplate(as_object, source="x")).has_text_arguments


CALLED = f'<|tool_call>call:get_weather{{city:<|"|>{ARGUMENTS["city"]}<|"|>}}<tool_call|>'


@pytest.mark.parametrize(
    ("content", "response"),
    [
        ("sun", '"sun"'),
        ('{"t": 5}', '{"t": 5}'),
        ("[5]", '"[5]"'),
        ([{"type": "text", "text": "sun"}], '"sun"'),
    ],
)
def test_results_are_in_the_message_that_calls_for_gemma(content, response):
    compiled = ChatTemplate(GEMMA_4, source="the test")
    found = choose_answer_format(compiled)
    assert (found.tool_parser, found.has_results_in_calls) == ("gemma4", True)
    hi, call, _ = CHAT
    result = {"role": "tool", "tool_call_id": "a", "content": content}
    done = {"role": "assistant", "content": "Fine."}
    chat = [hi, {**call, "content": "Wait."}, result, call, result, done, hi, call]
    prompt = compiled.render(family_messages(chat, found, [WEATHER]), tools=[WEATHER])
    shown = f"{CALLED}<|tool_response>response:get_weather{response}<tool_response|>"
    assert prompt == (
        f"<|turn>user\nHi<turn|><|turn>assistant\n<|channel>thought\nWait.\n<channel|>{shown}"
        f"<|turn>assistant\n{shown}Fine.<turn|><|turn>user\nHi<turn|><|turn>assistant\n{CALLED}<|tool>"
    )
    stray = [hi, call, {**result, "tool_call_id": "unheard of"}]
    prompt = compiled.render(family_messages(stray, found, [WEATHER]), tools=[WEATHER])
    assert f"{CALLED}<|tool_response>response:unknown{response}" in prompt


def test_a_template_that_finds_results_itself_gets_them_as_they_are():
    newer = ChatTemplate(GEMMA_4 + "{# tool_call_id #}", source="the test")
    found = choose_answer_format(newer)
    assert (found.tool_parser, found.has_results_in_calls) == ("gemma4", False)
    assert family_messages(CHAT, found, [WEATHER]) == CHAT


async def test_a_templates_own_switch_of_thinking_is_turned():
    parts = scripted_parts("Hm.</think>Yes.", template=DEEPSEEK_V3_1)
    async with Api(**parts).running() as api:
        on = await api.chat(chat_template_kwargs={"thinking": True})
        off = await api.chat(reasoning_effort="none")
    assert on.json["choices"][0]["message"]["reasoning_content"] == "Hm."
    assert off.json["choices"][0]["message"]["content"] == "Hm.</think>Yes."


def test_tools_stand_in_the_system_message_that_there_is():
    compiled = ChatTemplate(PHI_4_MINI, source="the test")
    chat = ({"role": "system", "content": "Be brief."}, HI)
    found = choose_answer_format(compiled)
    prompt = compiled.render(family_messages(chat, found, [WEATHER]))
    assert prompt.startswith('<|system|>Be brief.<|tool|>[{"name": "get_weather"')
    assert compiled.render(family_messages(chat, found, None)).startswith(
        "<|system|>Be brief.<|end|>"
    )
