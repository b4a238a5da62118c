"""Templates render as transformers renders them, and refuse with their own words."""

import itertools
import json
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from streamserve.engine.builtin_templates import TEMPLATES, builtin_template_name
from streamserve.engine.chat_template import ChatTemplate
from streamserve.errors import ConfigError, InvalidParameterError, ModelLoadError
from tests.engine.tokenizers_for_tests import byte_level

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# In the style of what is published with the models of these families.
INSTRUCT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
IM_WITH_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' and tools %}{%- continue %}{%- endif %}
    {%- if message.role == 'assistant' %}{%- set ns.last = loop.index0 %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>' ~ call.function.name ~ call.function.arguments | tojson }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.content is string %}{%- set text = message.content %}
    {%- else %}{%- set text = message.content | map(attribute='text') | join('') %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- text | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
TURNS = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{% if role == 'model' %}{% generation %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endgeneration %}{% else %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# It names "content", or transformers would not continue its messages.
JSON = """{# content #}{{ messages | tojson(indent=2) }}
{% if tools %}{{ tools | tojson(sort_keys=True) }}{% endif %}"""

PUBLISHED = {
    "instruct": INSTRUCT,
    "im_with_tools": IM_WITH_TOOLS,
    "headers": HEADERS,
    "turns": TURNS,
    "json": JSON,
}
SHORT = [{"role": "user", "content": "Hi <b>'there'</b> & 你好"}]
LONG = [
    {"role": "user", "content": " What is 2+2? "},
    {"role": "assistant", "content": "4\n"},
    {"role": "user", "content": "Sure?"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be  brief."}, *LONG]
OPEN = [*LONG, {"role": "assistant", "content": "Yes, because "}]
CHATS = {"short": SHORT, "long": LONG, "with_system": WITH_SYSTEM, "open": OPEN}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Fïnds <it>",
            "parameters": {"b": 1, "a": 2},
        },
    }
]


@pytest.fixture(scope="module")
def reference():
    return PreTrainedTokenizerFast(tokenizer_object=byte_level()._backend, **SPECIAL)


def theirs(reference, template, messages, **kwargs):
    """Rendered by transformers; what it raises as an exception."""
    try:
        return reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, **kwargs
        )
    except Exception as error:
        return type(error)


def ours(template, messages, /, **kwargs):
    chat_template = ChatTemplate(template, special_tokens=SPECIAL, source="test")
    return chat_template.render(messages, **kwargs)


# Of these one refuses what the system says, and one leaves it out.
RESAID = [("instruct", "with_system"), ("turns", "with_system")]


@pytest.mark.parametrize(
    ("name", "chat"),
    [pair for pair in itertools.product(PUBLISHED, CHATS) if pair not in RESAID],
)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "26 Jul 2024"},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=["prompt", "closed", "tools", "kwargs", "continue"],
)
def test_as_transformers_renders_it(reference, name, chat, kwargs):
    want = theirs(reference, PUBLISHED[name], CHATS[chat], **kwargs)
    if isinstance(want, str):
        assert ours(PUBLISHED[name], CHATS[chat], **kwargs) == want
    else:
        with pytest.raises(InvalidParameterError):
            ours(PUBLISHED[name], CHATS[chat], **kwargs)


def test_tool_calls_and_null_content(reference):
    call = {"function": {"name": "look_up", "arguments": {"x": "<&>"}}}
    messages = [*SHORT, {"role": "assistant", "content": "", "tool_calls": [call]}]
    want = theirs(reference, IM_WITH_TOOLS, messages, tools=TOOLS)
    assert ours(IM_WITH_TOOLS, messages, tools=TOOLS, add_generation_prompt=False) == want
    messages[1]["content"] = None
    with pytest.raises(InvalidParameterError, match="cannot render these messages"):
        ours(IM_WITH_TOOLS, messages)


def test_a_refusal_has_the_template_s_own_words():
    with pytest.raises(InvalidParameterError, match="roles must alternate") as caught:
        ours(INSTRUCT, LONG[1:])
    assert caught.value.param == "messages"


def test_a_template_s_variables_cannot_replace_the_messages():
    kwargs = {"messages": [], "self": 1}
    assert ours(INSTRUCT, SHORT, **kwargs) == ours(INSTRUCT, SHORT)


def test_the_clock_is_injected():
    template = ChatTemplate(
        HEADERS, special_tokens=SPECIAL, source="test", now=lambda: datetime(2024, 7, 26)
    )
    assert "Today Date: 26 Jul 2024" in template.render(SHORT)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_are_in_a_sandbox(attack):
    with pytest.raises(InvalidParameterError):
        ours(attack, SHORT)


PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    }
]


def test_parts_go_to_a_template_that_knows_them_and_are_joined_for_others():
    assert "onetwo" in ours(HEADERS, PARTS)
    for text in (INSTRUCT, IM_WITH_TOOLS, TURNS):
        assert "one\ntwo" in ours(text, PARTS)


def test_continuing_parts():
    messages = [*SHORT, {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}]
    for text in (HEADERS, INSTRUCT):
        rendered = ours(text, messages, add_generation_prompt=False, continue_final_message=True)
        assert rendered.endswith(("Well,", "Well, "))


@pytest.mark.parametrize(
    ("template", "messages", "kwargs"),
    [
        (INSTRUCT, SHORT, {"add_generation_prompt": True}),
        (INSTRUCT, [], {}),
        (INSTRUCT, [{"role": "assistant", "content": None}], {}),
        ("{{ messages[0].content }}", OPEN, {}),
    ],
)
def test_what_cannot_be_continued_is_refused(template, messages, kwargs):
    kwargs = {"add_generation_prompt": False, "continue_final_message": True, **kwargs}
    with pytest.raises(InvalidParameterError) as caught:
        ours(template, messages, **kwargs)
    assert caught.value.param == "continue_final_message"


# Where templates come from


def write(directory, name, content):
    file = directory / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def source_of(directory, **kwargs):
    template = ChatTemplate.from_directory(directory, special_tokens=SPECIAL, **kwargs)
    return template.source, template.render(SHORT), template.is_builtin


def test_a_checkpoint_s_template_is_found_in_order_of_precedence(tmp_path):
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    assert source_of(tmp_path)[0::2] == ("built-in plain", True)
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    assert source_of(tmp_path) == ("tokenizer_config.json", "config", False)
    write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert source_of(tmp_path) == ("chat_template.json", "json", False)
    write(tmp_path, "chat_template.jinja", "jinja")
    assert source_of(tmp_path) == ("chat_template.jinja", "jinja", False)
    mine = write(tmp_path, "mine.jinja", "mine")
    assert source_of(tmp_path, override=mine) == (str(mine), "mine", False)
    mine = write(tmp_path, "mine.json", {"chat_template": "mine"})
    assert source_of(tmp_path, override=str(mine)) == (str(mine), "mine", False)
    assert source_of(tmp_path, override="{{ 'x' }}") == ("--chat-template", "x", False)
    assert source_of(tmp_path, override="chatml")[0] == "built-in chatml"


@pytest.mark.parametrize("form", ["list", "files"])
def test_templates_by_name(tmp_path, form):
    if form == "list":
        named = [{"name": n, "template": n} for n in ("default", "tool_use", "rag")]
        write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    else:
        write(tmp_path, "chat_template.jinja", "default")
        write(tmp_path, "additional_chat_templates/tool_use.jinja", "tool_use")
    template = ChatTemplate.from_directory(tmp_path)
    assert template.render(SHORT) == "default"
    assert template.render(SHORT, tools=TOOLS) == "tool_use"


def test_a_template_that_is_no_jinja_names_its_file(tmp_path):
    write(tmp_path, "chat_template.jinja", "{% if %}")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja"):
        ChatTemplate.from_directory(tmp_path)
    write(tmp_path, "chat_template.jinja", "fine")
    with pytest.raises(ConfigError, match="no-such-file"):
        ChatTemplate.from_directory(tmp_path, override="no-such-file")
    write(tmp_path, "empty.json", {})
    with pytest.raises(ConfigError, match=r"empty\.json"):
        ChatTemplate.from_directory(tmp_path, override=tmp_path / "empty.json")


# The built-in ones

BUILTIN_SHORT = {
    "llama2": "<s>[INST] Hi [/INST]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi [/INST]",
    "mistral7": "<s>[INST]Hi[/INST]",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "phi3": "<|user|>\nHi<|end|>\n<|assistant|>\n",
    "phi": "Instruct: Hi\nOutput:",
    "chatglm3": "[gMASK]sop<|user|>\n Hi<|assistant|>",
    "chatglm2": "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：",
    "glm4": "[gMASK]<sop><|user|>\nHi<|assistant|>",
    "baichuan1": "<reserved_102>Hi<reserved_103>",
    "baichuan": "<reserved_106>Hi<reserved_107>",
    "plain": "User: Hi\nAssistant:",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_builtin_templates(name):
    template = ChatTemplate.builtin(name, special_tokens=SPECIAL)
    assert template.render([{"role": "user", "content": "Hi"}]) == BUILTIN_SHORT[name]
    text = template.render(WITH_SYSTEM)
    order = [text.index(part) for part in ("Be  brief.", "What is 2+2?", "4", "Sure?")]
    assert order == sorted(order)
    opened = template.render(OPEN, add_generation_prompt=False, continue_final_message=True)
    assert opened.endswith(("Yes, because ", "Yes, because"))
    assert "\\n" not in text


def test_chatglm2_counts_its_rounds():
    template = ChatTemplate.builtin("chatglm2")
    said = [message["content"] for message in WITH_SYSTEM]
    assert template.render(WITH_SYSTEM) == (
        f"[gMASK]sop{said[0]}\n\n[Round 1]\n\n问：{said[1]}\n\n答：{said[2]}\n\n"
        f"[Round 2]\n\n问：{said[3]}\n\n答："
    )


def test_llama2_puts_the_system_message_into_the_first_turn():
    template = ChatTemplate.builtin("llama2", special_tokens=SPECIAL)
    assert template.render(WITH_SYSTEM) == (
        "<s>[INST] <<SYS>>\nBe  brief.\n<</SYS>>\n\nWhat is 2+2? [/INST] 4 </s>"
        "<s>[INST] Sure? [/INST]"
    )


@pytest.mark.parametrize(
    ("model_type", "tokens", "name"),
    [
        ("llama", [], "llama2"),
        ("llama", ["<|start_header_id|>"], "llama3"),
        ("qwen2", ["<|im_start|>"], "chatml"),
        ("mixtral", [], "mistral"),
        ("mistral3", ["[SYSTEM_PROMPT]"], "mistral7"),
        ("phi", [], "phi"),
        ("baichuan", {"<reserved_106>": 195, "<reserved_102>": 191}, "baichuan"),
        ("baichuan", {"<reserved_106>": 199, "<reserved_102>": 195}, "baichuan1"),
        ("qwen", ["<|im_start|>"], "qwen"),
        ("chatglm", ["sop"], "chatglm2"),
        ("chatglm", ["sop", "<|user|>"], "chatglm3"),
        ("chatglm", ["<sop>", "<|user|>"], "glm4"),
        ("gpt2", [], "plain"),
        (None, [], "plain"),
    ],
)
def test_the_family_chooses(model_type, tokens, name):
    ids = tokens if isinstance(tokens, dict) else dict.fromkeys(tokens, 7)
    assert builtin_template_name(model_type, ids.get) == name


SHOWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
IN_PARTS = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
MARK = "CONTINUE_FINAL_MESSAGE_TAG "


@pytest.mark.parametrize(
    ("text", "content", "rendered"),
    [
        (SHOWN, f"It is {MARK}, he said", f"assistant: It is {MARK}, he said"),
        (IN_PARTS, [{"type": "text", "text": t} for t in "ab"], "[a][b"),
    ],
)
def test_the_last_words_of_the_last_message_are_gone_on_with(text, content, rendered):
    messages = [{"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ChatTemplate(text, source="test").render(messages, **options) == rendered


def test_a_requests_own_template_is_trusted_or_refused():
    asked = {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    messages = [{"role": "user", "content": "Hi"}]
    trusting = ChatTemplate(SHOWN, special_tokens=SPECIAL, source="test", trusts_requests=True)
    assert trusting.render(messages, **asked) == "<s>Hi"
    with pytest.raises(InvalidParameterError, match="--trust-request-chat-template"):
        ChatTemplate(SHOWN, source="test").render(messages, **asked)


@pytest.mark.parametrize(
    ("text", "options", "rendered"),
    [
        ("  {% if true %}x{% endif %}", {}, "x"),
        ("{{ tools is none }}", {}, "True"),
        ("{{ tools is none }}", {"tools": []}, "False"),
        ("{{ bos_token }}", {"bos_token": "mine"}, "mine"),
    ],
)
def test_what_a_template_finds(text, options, rendered):
    template = ChatTemplate(text, special_tokens=SPECIAL, source="test")
    assert template.render([{"role": "user", "content": "Hi"}], **options) == rendered
