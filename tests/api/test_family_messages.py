"""Chats with tools as families' templates have them, which know less than OpenAI's messages."""

import json

import pytest

from streamserve.api.family_messages import family_messages
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.answer_format import choose_answer_format
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

FUNCTION = WEATHER["function"]
ARGUMENTS = {"city": "Łódź"}
CALL = {"name": "get_weather", "arguments": ARGUMENTS}
CHAT = (
    HI,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": CALL}]},
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
)
SHOWN = json.dumps(ARGUMENTS, ensure_ascii=False)
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
    ],
    ids=["glm-4-0414", "glm-4-9b", "phi-4-mini"],
)
def test_tools_calls_and_results_reach_the_template(template, parser, prompt):
    compiled = ChatTemplate(template, source="the test")
    found = choose_answer_format(compiled)
    assert (found.tool_parser, found.reasoning_parser) == (parser, None)
    messages = family_messages(CHAT, found, [WEATHER])
    assert compiled.render(messages, tools=[WEATHER]) == prompt


def test_tools_stand_in_the_system_message_that_there_is():
    compiled = ChatTemplate(PHI_4_MINI, source="the test")
    chat = ({"role": "system", "content": "Be brief."}, HI)
    found = choose_answer_format(compiled)
    prompt = compiled.render(family_messages(chat, found, [WEATHER]))
    assert prompt.startswith('<|system|>Be brief.<|tool|>[{"name": "get_weather"')
    assert compiled.render(family_messages(chat, found, None)).startswith(
        "<|system|>Be brief.<|end|>"
    )
