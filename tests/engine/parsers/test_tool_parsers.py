"""Calls are found, in each family's format, however the text is cut; what is no call is text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS
from streamserve.engine.parsers.events import CallArguments, CallStart, Content
from streamserve.engine.parsers.tool_formats import (
    TOOL_PARSERS,
    NamedParser,
    RequiredParser,
    tool_parser_of_template,
)
from tests.engine.parsers.cutting import cuts, pieces, read

TOOLS = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}}},
    "add": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
LONG = "x" * (2 * HOLD_CHARACTERS)


def said(message):
    return message.content, [(call.name, call.arguments) for call in message.calls]


def new(family, **kwargs):
    if family == "required":
        return RequiredParser(TOOLS, **kwargs)
    if family == "named":
        return NamedParser("add")
    return TOOL_PARSERS[family](TOOLS, **kwargs)


def call(name="add", key="arguments", **arguments):
    return json.dumps({"name": name, key: arguments})


A = '{"name": "add", "arguments": {"a": 1}}'
B = '{"name": "get_weather", "arguments": {"city": "Łódź \\"x\\" }"}}'
PA = A.replace("arguments", "parameters")
ARGS_A, ARGS_B = '{"a": 1}', '{"city": "Łódź \\"x\\" }"}'
LONG_TEXT_CALL = json.dumps({"name": "add", "arguments": f'{{"a": "{LONG}"}}'})
CALL_A, CALL_B = ("add", ARGS_A), ("get_weather", ARGS_B)

# One call of `add`, in families whose calls are not objects with a name.
PARAMETER = "<parameter=a>\n1\n</parameter>\n"
FUNCTION = f"<function=add>\n{PARAMETER}</function>\n"
INVOKE = '<invoke name="add">\n<parameter name="a">1</parameter>\n</invoke>\n'
KIMI_CALL = (
    f"<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{ARGS_A}<|tool_call_end|>"
)
V31_CALL = f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ARGS_A}<｜tool▁call▁end｜>"
V3_CALL = (
    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ARGS_A}\n```<｜tool▁call▁end｜>"
)
TOOL_A = '{"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}}'
OTHERS = {
    "qwen3_coder": f"<tool_call>\n{FUNCTION}</tool_call>",
    "seed_oss": f"<seed:tool_call>\n{FUNCTION}</seed:tool_call>",
    "glm45": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "minimax_m2": f"<minimax:tool_call>\n{INVOKE}</minimax:tool_call>",
    "kimi_k2": f"<|tool_calls_section_begin|>{KIMI_CALL}<|tool_calls_section_end|>",
    "deepseek_v3": f"<｜tool▁calls▁begin｜>{V3_CALL}<｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜>{V31_CALL}<｜tool▁calls▁end｜>",
    "lfm2": "<|tool_call_start|>[add(a=1)]<|tool_call_end|>",
    "cohere": f"<|START_ACTION|>[\n    {TOOL_A}\n]<|END_ACTION|>",
    "olmo3": "<function_calls>add(a=1)</function_calls>",
    "pythonic": "<|python_start|>[add(a=1)]<|python_end|>",
    "gemma4": "<|tool_call>call:add{a:1}<tool_call|>",
}


def bad(family, old, new):
    """An example that is no call."""
    text = OTHERS[family].replace(old, new, 1)
    return family, text, text, []


# (family, text, content, calls)
EXAMPLES = [
    ("hermes", f"<tool_call>\n{A}\n</tool_call>", "", [CALL_A]),
    ("hermes", f"<tool_call>{A}</tool_call>", "", [CALL_A]),
    ("hermes", f"<tool_call>\n{A}", "", [CALL_A]),
    ("hermes", f"<tool_call>\n{A}\n", "", [CALL_A]),
    (
        "hermes",
        f"Let me see.\n<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>\n",
        "Let me see.\n",
        [CALL_A, CALL_B],
    ),
    ("hermes", f"<tool_call>{A}</tool_call> Done <b>.", " Done <b>.", [CALL_A]),
    ("hermes", f"<tool_call>{PA}</tool_call>", "", [CALL_A]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [CALL_A]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [CALL_A],
    ),
    ("hermes", f"\n<tool_call>{A}</tool_call> Done", " Done", [CALL_A]),
    ("hermes", f"<tool_call>{LONG_TEXT_CALL}</tool_call>", "", [("add", f'{{"a": "{LONG}"}}')]),
    ("hermes", "  Just text. <tool", "  Just text. <tool", []),
    ("hermes", " \n", " \n", []),
    ("hermes", "", "", []),
    ("llama3_json", PA, "", [CALL_A]),
    ("llama3_json", f"\n{A}\n", "", [CALL_A]),
    ("llama3_json", f"{PA}; {B}", "", [CALL_A, CALL_B]),
    ("llama3_json", f"{PA}\n{B}", "", [CALL_A, CALL_B]),
    ("llama3_json", f"<|python_tag|>{PA}", "", [CALL_A]),
    ("llama3_json", f"Well. <|python_tag|>{PA}", "Well. ", [CALL_A]),
    ("llama3_json", f"The call is {PA}", f"The call is {PA}", []),
    ("llama3_json", '<|python_tag|>add.call(a="1")', '<|python_tag|>add.call(a="1")', []),
    ("llama3_json", '{"city": "Paris"}', '{"city": "Paris"}', []),
    ("llama3_json", "{not json", "{not json", []),
    ("llama3_json", f"{PA} Done", " Done", [CALL_A]),
    ("llama3_json", f"{PA}; and so on", "; and so on", [CALL_A]),
    ("mistral", f"[TOOL_CALLS] [{A}]", "", [CALL_A]),
    ("mistral", f"[TOOL_CALLS][{A}, {B}]", "", [CALL_A, CALL_B]),
    ("mistral", f"Wait. [TOOL_CALLS][{A}]\n", "Wait. ", [CALL_A]),
    ("mistral", f"[TOOL_CALLS]add{ARGS_A}", "", [CALL_A]),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{ARGS_A}", "", [CALL_A]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{ARGS_A}", "", [CALL_A]),
    (
        "mistral",
        f"[TOOL_CALLS]add{ARGS_A}[TOOL_CALLS]get_weather{ARGS_B}",
        "",
        [CALL_A, CALL_B],
    ),
    ("mistral", "[TOOL_CALLS]nobody{}", "[TOOL_CALLS]nobody{}", []),
    ("mistral", "[TOOL_CALLS]add(1)", "[TOOL_CALLS]add(1)", []),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    ("glm4", f"add\n{ARGS_A}", "", [CALL_A]),
    ("glm4", f"\nadd \n{ARGS_A}\n", "", [CALL_A]),
    ("glm4", f"add {ARGS_A}", f"add {ARGS_A}", []),
    ("glm4", f"\nI add\n{ARGS_A}", f"\nI add\n{ARGS_A}", []),
    ("glm4", "nobody\n{}", "nobody\n{}", []),
    ("glm4", "add", "add", []),
    ("glm4", f"add\n{ARGS_A} Done", " Done", [CALL_A]),
    ("phi4_mini_json", f"<|tool_call|>[{A}, {B}]<|/tool_call|>", "", [CALL_A, CALL_B]),
    ("phi4_mini_json", f"Well. <|tool_call|>[{A}]", "Well. ", [CALL_A]),
    ("phi4_mini_json", f"functools[{A}]", "", [CALL_A]),
    ("phi4_mini_json", f"{A} functools", f"{A} functools", []),
    ("phi4_mini_json", "<|tool_call|>add", "<|tool_call|>add", []),
    *((family, text, "", [CALL_A]) for family, text in OTHERS.items()),
    *((f, f"Well.\n{t}\n{t}\n", "Well.\n", [CALL_A, CALL_A]) for f, t in OTHERS.items()),
    *(bad(family, "add", "nobody") for family in OTHERS),
    *((f, t[: t.index("1")], t[: t.index("1")], []) for f, t in OTHERS.items()),
    ("qwen3_coder", FUNCTION, "", [CALL_A]),
    ("qwen3_coder", FUNCTION.replace("</parameter>\n", ""), "", [CALL_A]),
    (
        "qwen3_coder",
        FUNCTION.replace("</parameter>", PARAMETER.replace("=a", "=b")),
        "",
        [("add", '{"a": 1, "b": "1"}')],
    ),
    ("qwen3_coder", FUNCTION.replace(PARAMETER, ""), "", [("add", "{}")]),
    bad("qwen3_coder", "=add", "=add "),
    bad("qwen3_coder", "</parameter>", "</parameter>x"),
    ("glm45", "<tool_call>add</tool_call>", "", [("add", "{}")]),
    ("glm45", OTHERS["glm45"].replace("\n", ""), "", [CALL_A]),
    bad("glm45", "<arg_value>", ""),
    ("minimax_m2", INVOKE.replace("</parameter>", ""), "", [CALL_A]),
    ("minimax_m2", f"<minimax:tool_call>{INVOKE}{INVOKE}Done", "\nDone", [CALL_A, CALL_A]),
    ("kimi_k2", f"<|tool_calls_section_begin|>{KIMI_CALL}{KIMI_CALL}", "", [CALL_A, CALL_A]),
    ("kimi_k2", KIMI_CALL + OTHERS["kimi_k2"], "", [CALL_A, CALL_A]),
    bad("kimi_k2", ":0", ""),
    ("kimi_k2", f"<|tool_call_begin|>{LONG}{KIMI_CALL}", f"<|tool_call_begin|>{LONG}", [CALL_A]),
    ("deepseek_v31", V31_CALL + V31_CALL, "", [CALL_A, CALL_A]),
    ("lfm2", f"<|tool_call_start|>[{A}, {B}]<|tool_call_end|>", "", [CALL_A, CALL_B]),
    ("lfm2", "Hm. <|tool_call_start|>[add(a=1), add(a=1)]", "Hm. ", [CALL_A, CALL_A]),
    ("lfm2", "<|tool_call_start|>add( a = 1 )<|tool_call_end|>", "", [CALL_A]),
    ("lfm2", "[add(a=1)]", "[add(a=1)]", []),
    ("lfm2", "<|tool_call_start|>[add(a=1), nobody()]", ", nobody()]", [CALL_A]),
    bad("lfm2", "a=1", "1"),
    bad("lfm2", "a=1", "a=1, a=2"),
    bad("lfm2", "1", "1 + 1"),
    ("cohere", f"<|START_ACTION|>[{TOOL_A}, {TOOL_A}]<|END_ACTION|> Hm", " Hm", [CALL_A, CALL_A]),
    ("cohere", f"<|START_ACTION|>{TOOL_A}", "", [CALL_A]),
    bad("cohere", "tool_name", "name"),
    ("olmo3", "<function_calls>\nadd(a=1)\nadd(a=1)\n</function_calls>", "", [CALL_A, CALL_A]),
    ("olmo3", "<function_calls>[add(a=1), add(a=1)]", "", [CALL_A, CALL_A]),
    ("olmo3", "<function_calls>add(a=1)\nadd it", "\nadd it", [CALL_A]),
    ("pythonic", ' [add(a=1), get_weather(city="Łódź \\"x\\" }")]\n', "", [CALL_A, CALL_B]),
    ("pythonic", "[add](https://add) it", "[add](https://add) it", []),
    ("pythonic", "It is [add(a=1)]", "It is [add(a=1)]", []),
    ("gemma4", "<|tool_call>call:add{a:1}", "", [CALL_A]),
    ("gemma4", 2 * OTHERS["gemma4"] + "Done", "Done", [CALL_A, CALL_A]),
    bad("gemma4", "<|tool_call>", ""),
    bad("gemma4", "call:", ""),
    bad("gemma4", "{", "{{"),
    ("required", f"[{PA}]", "", [CALL_A]),
    ("required", f"[{PA}, {B.replace('arguments', 'parameters')}]", "", [CALL_A, CALL_B]),
    ("required", '[{"name": "add", "parameters": {"a": 1', "", [("add", '{"a": 1')]),
    ("required", '[{"name": "a', '[{"name": "a', []),
    ("named", ' {"a": 1} ', "", [CALL_A]),
    ("named", '{"a"', "", [("add", '{"a"')]),
    ("named", "{}", "", [("add", "{}")]),
]

MALFORMED = [
    "not json",
    "[1, 2]",
    "{}",
    '{"name": "nobody", "arguments": {}}',
    '{"name": 5, "arguments": {}}',
    '{"name": "add", "arguments": {"a": }}',
    '{"name": "add", "arguments": {"a": 1}',
    '{"name": "add", "arguments": [1]}',
    '{"name": "add", "arguments": "no"}',
    '{"name": "add", "arguments": "{} more"}',
    '{"name": "add", "arguments": {"a": "b\nc"}}',
    "{'name': 'add', 'arguments': {}}",
    '{"name": "add", "name": "add", "arguments": {}}',
]


@pytest.mark.parametrize(("family", "text", "content", "calls"), EXAMPLES)
def test_a_format_is_read_whole_and_character_by_character(family, text, content, calls):
    assert said(read(new(family), [text])) == (content, calls)
    assert said(read(new(family), list(text))) == (content, calls)


@pytest.mark.parametrize("bad", MALFORMED)
@pytest.mark.parametrize("form", ["<tool_call>\n{}\n</tool_call>", "<tool_call>{}"])
def test_a_malformed_call_is_text_and_the_next_one_a_call(bad, form):
    text = form.replace("{}", bad, 1)
    assert said(read(new("hermes"), list(text))) == (text, [])
    both = f"{text}<tool_call>{A}</tool_call>"
    assert said(read(new("hermes"), list(both))) == (text, [CALL_A])


@pytest.mark.parametrize("family", ["llama3_json", "mistral"])
@pytest.mark.parametrize("bad", MALFORMED)
def test_a_malformed_call_of_other_families_is_text(family, bad):
    text = f"[TOOL_CALLS] [{bad}]" if family == "mistral" else bad
    assert said(read(new(family), list(text))) == (text, [])


MARKERS = [
    "<|tool_call|>",
    "<|/tool_call|>",
    "functools",
    "add\n",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
]
MARKERS += [mark for parser in TOOL_PARSERS.values() for mark in parser.markers]
MARKERS += ["<function=add>", "<parameter=a>", "</parameter>", "</function>", "```", "</invoke>"]
MARKERS += ['<invoke name="add">', '<parameter name="a">', "functions.add:0", "add\n```json\n"]
MARKERS += ["[add(", "a=", "b='", '"""', "\\", "{'x': [", "True", ")"]
MARKERS += ["call:add{", "a:", "b:5", "}<tool_call|>"]
LONG_CALL = call(text=LONG)
CUT_CALLS = [LONG_CALL[:-9], LONG_CALL[:-3] + "\n", call("nobody", text=LONG)]
SMALL = ["[", "]", ",", ";", " ", "\n", "add", "Hello", "<", "{", "}", '"']
LONG_TAGS = [text.replace("1", LONG) for text in OTHERS.values()]
WHOLE = [A, B, PA, ARGS_A, LONG_CALL, *OTHERS.values(), *LONG_TAGS]
snippets = st.sampled_from([*WHOLE, *CUT_CALLS, *MALFORMED, *MARKERS, *SMALL])
texts = st.lists(snippets, max_size=10).map("".join)
shaped = st.one_of(
    texts,
    texts.map(lambda t: f"<tool_call>{t}</tool_call>"),
    texts.map(lambda t: f"[TOOL_CALLS] [{t}]"),
)


@given(st.sampled_from([*TOOL_PARSERS, "required", "named"]), shaped, cuts)
def test_the_cuts_make_no_difference(family, text, bounds):
    whole = read(new(family), [text])
    assert said(read(new(family), pieces(text, bounds))) == said(whole)
    for call in whole.calls:
        assert call.name in TOOLS


@given(st.sampled_from([*TOOL_PARSERS]), shaped)
def test_nothing_is_lost(family, text):
    """Without a call an answer is its text."""
    message = read(new(family), [text])
    if not message.calls:
        assert message.content == text


@given(st.sampled_from([*TOOL_PARSERS]), shaped, cuts)
def test_short_calls_are_whole_and_valid(family, text, bounds):
    for call in read(new(family), pieces(text, bounds)).calls:
        if len(call.arguments) < HOLD_CHARACTERS // 2:
            assert isinstance(json.loads(call.arguments), dict)


def test_the_arguments_of_a_long_call_come_as_they_are_written():
    text = f"<tool_call>{call(text=LONG)}</tool_call>"
    parser = new("hermes")
    events = [event for character in text for event in parser.feed(character)]
    assert isinstance(events[0], CallStart)
    arguments = [event.text for event in events[1:] if isinstance(event, CallArguments)]
    assert len(arguments) > HOLD_CHARACTERS
    assert json.loads("".join(arguments)) == {"text": LONG}


@pytest.mark.parametrize(
    ("family", "text"), [("required", f"[{PA}]"), ("named", '{"a": 1}'), ("required", f"[{A}]")]
)
def test_what_a_grammar_writes_is_shown_at_once(family, text):
    parser = new(family)
    events = [event for character in text for event in parser.feed(character)]
    assert isinstance(events[0], CallStart)
    assert [e.text for e in events[1:] if isinstance(e, CallArguments)] == list('{"a": 1}')


def test_a_long_call_that_breaks_late_ends_in_text():
    text = f"<tool_call>{call(text=LONG)[:-3]}\nrest</tool_call>"
    message = read(new("hermes"), [text])
    assert message.calls[0].arguments == '{"text": "' + LONG
    assert message.content == "\nrest</tool_call>"


@pytest.mark.parametrize(("family", "bare"), [("kimi_k2", KIMI_CALL), ("minimax_m2", INVOKE)])
def test_what_a_grammar_writes_as_text_is_text(family, bare):
    """It makes calls in their section only."""
    assert said(read(new(family), [bare]))[1] == [CALL_A]
    assert said(read(new(family, is_certain=True), [bare])) == (bare, [])


def test_text_is_not_held_back():
    parser = new("hermes")
    assert parser.feed("Hello ") == [Content("Hello ")]
    assert parser.feed("a < b <to") == [Content("a < b ")]
    assert parser.feed("p>") == [Content("<top>")]


def test_one_call_at_most():
    text = f"<tool_call>{A}</tool_call><tool_call>{B}</tool_call> and so on"
    parser = new("hermes", max_calls=1)
    assert said(read(parser, [text])) == ("", [CALL_A])
    assert parser.is_over


def test_ids():
    ids = [read(new("hermes"), [f"<tool_call>{A}"]).calls[0].call_id for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(i.startswith("call_") and i[5:].isalnum() for i in ids)
    short = read(new("mistral"), [f"[TOOL_CALLS] [{A}]"]).calls[0].call_id
    assert len(short) == 9
    assert short.isalnum()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{% if tools %}<tool_call>", "hermes"),
        ("{% if tools %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|python_tag|>", "llama3_json"),
        ("{% if tools %}<tool_call><function=", None),
        ("{% if tools %}<tool_call><function=f><parameter=p>", "qwen3_coder"),
        ("{% if tools %}<seed:tool_call><function=f><parameter=p>", "seed_oss"),
        ("[gMASK]{% if tools %}<tool_call>f<arg_key>k</arg_key><arg_value>", "glm45"),
        ('<minimax:tool_call>{% if tools %}<invoke name="f"><parameter name="p">', "minimax_m2"),
        ("{% if tools %}<tool_call><invoke name=", None),
        ("{% if tools %}<|tool_calls_section_begin|><|tool_call_argument_begin|>", "kimi_k2"),
        ("{% if tools %}<｜tool▁call▁begin｜>f<｜tool▁sep｜>n\n```json", "deepseek_v3"),
        ("{% if tools %}<｜tool▁call▁begin｜>n<｜tool▁sep｜>", "deepseek_v31"),
        ("{% if tools %}<|tool>'<|tool_call>call:'", "gemma4"),
        ("{% if message['tools'] %}<|tool|><|/tool|>", "phi4_mini_json"),
        ("[gMASK]{% if tools %}{{ item.metadata }}", "glm4"),
        ("<|im_start|>{% if tools %}List of tools: <|tool_list_start|>[", "lfm2"),
        ("{% if tools %}[func_name1(params_name1=params_value1", "pythonic"),
        ('{% if tools %}<|START_ACTION|>[{"tool_name": ', "cohere"),
        ("{% if tools %}<functions></functions><function_calls>", "olmo3"),
        ("{% if tools %}", None),
    ],
)
def test_a_template_tells_its_format(source, name):
    assert tool_parser_of_template(source) == name
