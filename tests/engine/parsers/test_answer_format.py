"""Which parsers a model gets: those of the flags, else those that its template speaks of."""

import pytest

from streamserve.cli.args import REASONING_PARSERS, TOOL_CALL_PARSERS, parse_args
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers import reasoning
from streamserve.engine.parsers.answer_format import (
    TOOL_PARSER_NAMES,
    AnswerFormat,
    MarkIds,
    choose_answer_format,
)
from streamserve.engine.parsers.tool_formats import TOOL_PARSER_ALIASES
from streamserve.errors import ConfigError
from tests.engine.tokenizers_for_tests import llama

HERMES = "{% if tools %}<tool_call>{% endif %}{% if enable_thinking %}</think>{% endif %}"


def chosen(template, **flags):
    return choose_answer_format(ChatTemplate(template, source="a test"), **flags)


def test_the_template_decides():
    found = chosen(HERMES)
    assert (found.tool_parser, found.reasoning_parser) == ("hermes", "qwen3")
    assert found.template_variables == {"tools", "enable_thinking"}
    assert chosen("{{ messages }}") == AnswerFormat(template_variables=frozenset({"messages"}))
    assert chosen("<tool_call> without tools").tool_parser is None


# Of published templates, what tells their formats.
QWEN3 = (
    """{%- if tools %}<tool_call>\n{"name": <function-name>}{%- endif %}"""
    "{%- if '</think>' in content %}{%- endif %}{%- if enable_thinking is defined %}{%- endif %}"
)
R1_DISTILLED = (
    "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type']}}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>'}}{% endif %}"
)
LLAMA_3_2 = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- if tools is not none %}"
    """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument """
    "name and its value}.' }}{%- endif %}"
)
MISTRAL = "{%- if tools is not none %}[AVAILABLE_TOOLS]{%- endif %}[TOOL_CALLS]"
GEMMA_3 = "{{ bos_token }}{%- for message in messages -%}<start_of_turn>{%- endfor -%}"
QWEN3_CODER = "{%- if tools %}<tool_call><function=example><parameter=p>{%- endif %}"
GLM_4_5 = "[gMASK]<sop>{%- if tools -%}<tool_call>{name}<arg_key><arg_value>{%- endif %}</think>"
MAGISTRAL = "{%- if tools is not none %}[AVAILABLE_TOOLS]{%- endif %}[TOOL_CALLS][THINK][/THINK]"
GEMMA_4 = "{%- if tools %}<|tool>{%- endif %}<|tool_call>call:<|channel>thought\n<channel|>"
LFM_2_5 = "<|im_start|>{%- if tools -%}List of tools: [{%- endif -%}</think>"
COMMAND_R7B = "{% if tools %}<|START_ACTION|>tool_name{% endif %}<|END_THINKING|>"
SEED_OSS = "{%- if tools %}<seed:tool_call><function=f>{%- endif %}</seed:think>"


@pytest.mark.parametrize(
    ("template", "tool_parser", "reasoning_parser"),
    [
        (QWEN3, "hermes", "qwen3"),
        (R1_DISTILLED, None, "qwen3"),
        (LLAMA_3_2, "llama3_json", None),
        (MISTRAL, "mistral", None),
        (GEMMA_3, None, None),
        (QWEN3_CODER, "qwen3_coder", None),
        (GLM_4_5, "glm45", "qwen3"),
        (MAGISTRAL, "mistral", "mistral"),
        (SEED_OSS, "seed_oss", "seed_oss"),
        (COMMAND_R7B, "cohere", "cohere"),
        (LFM_2_5, "lfm2", "qwen3"),
        (GEMMA_4, "gemma4", "gemma4"),
    ],
)
def test_what_published_templates_tell(template, tool_parser, reasoning_parser):
    found = chosen(template)
    assert (found.tool_parser, found.reasoning_parser) == (tool_parser, reasoning_parser)


def test_a_mark_is_special_if_one_of_its_tokens_is():
    marks = MarkIds(llama())
    assert marks.is_special("</s>")
    assert marks.is_special("</s>thought")
    assert not marks.is_special("thought")


def test_several_templates_are_one_text():
    found = chosen({"default": "{{ messages }}", "tool_use": HERMES})
    assert found.tool_parser == "hermes"


HARMONY = "{% if tools %}{% endif %}<|start|>a<|channel|>analysis<|message|>"


def test_harmony_is_one_format_for_thoughts_and_calls():
    both = ("openai", "openai_gptoss")
    found = chosen(HARMONY)
    assert (found.tool_parser, found.reasoning_parser) == both
    assert chosen(HARMONY, enable_auto_tool_choice=False).tool_parser is None
    found = chosen(HERMES, tool_parser="openai")
    assert (found.tool_parser, found.reasoning_parser) == both
    found = chosen(HERMES, reasoning_parser="openai_gptoss")
    assert (found.tool_parser, found.reasoning_parser) == both
    found = chosen(HARMONY, tool_parser="hermes")
    assert (found.tool_parser, found.reasoning_parser) == ("hermes", None)
    with pytest.raises(ConfigError, match="are one format, got hermes and openai_gptoss"):
        chosen(HARMONY, tool_parser="hermes", reasoning_parser="openai_gptoss")


@pytest.mark.parametrize("name", TOOL_PARSER_NAMES)
def test_a_flag_overrides_the_template(name):
    assert chosen(HERMES, tool_parser=name).tool_parser == name
    assert chosen("{{ messages }}", tool_parser=name).tool_parser == name


def test_auto_tool_choice_can_be_asked_for_and_turned_off():
    assert chosen(HERMES, enable_auto_tool_choice=False).tool_parser is None
    assert chosen(HERMES, enable_auto_tool_choice=True).tool_parser == "hermes"
    with pytest.raises(ConfigError, match="--enable-auto-tool-choice needs a --tool-call-parser"):
        chosen("{{ messages }}", enable_auto_tool_choice=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_parser": "x"}, "--tool-call-parser must be one of hermes"),
        ({"reasoning_parser": "x"}, "--reasoning-parser must be one of qwen3"),
    ],
)
def test_unknown_names(fields, message):
    with pytest.raises(ConfigError, match=message):
        AnswerFormat(**fields)


def test_the_flags_know_the_parsers():
    assert (*TOOL_PARSER_NAMES, *TOOL_PARSER_ALIASES) == TOOL_CALL_PARSERS
    assert chosen(HERMES, tool_parser="glm47").tool_parser == "glm45"
    assert reasoning.REASONING_PARSERS == REASONING_PARSERS
    args = parse_args(["serve", "--tool-call-parser", "mistral", "--reasoning-parser", "qwen3"])
    assert (args.tool_call_parser, args.reasoning_parser) == ("mistral", "qwen3")
    assert args.enable_auto_tool_choice is None
    assert parse_args(["serve", "--enable-auto-tool-choice"]).enable_auto_tool_choice is True
