"""Grammars beside free text through the API: strict tools that a model chooses, structural tags."""

import json
from typing import Any

import jsonschema
import pytest

from streamserve.engine.parsers.answer_format import AnswerFormat
from tests.api.harness import Api
from tests.api.scripted import assert_refused, scripted_parts
from tests.api.test_forced_calls import NESTED, STRICT
from tests.api.test_tools import ADD, deltas_of

PICK = STRICT["function"]["parameters"]
BAD = '{"colour": "green", "sure": 5, "more": 1}'
HERMES = f'<tool_call>\n{{"name": "pick", "arguments": {BAD}}}\n</tool_call>'
LLAMA = f'{{"name": "pick", "parameters": {BAD}}}'
MISTRAL = f'[TOOL_CALLS] [{{"name": "pick", "arguments": {BAD}}}]'
PHI = f'<|tool_call|>[{{"name": "pick", "arguments": {BAD}}}]<|/tool_call|>'
PYTHON = 'colour="green", sure=5, more=1'
NAMED = f"[TOOL_CALLS]pick{BAD}"


def saying(says, parser="hermes") -> Api:
    """With room for the tools in the prompt. Where a mask has made the model say something else it
    has lost its place, and says nonsense from there on.
    """
    parts = scripted_parts(says, answer_format=AnswerFormat(tool_parser=parser))
    return Api(**parts, max_model_len=1024)


@pytest.mark.parametrize(
    ("parser", "says", "content"),
    [
        ("hermes", "Hm < that.\n" + HERMES, "Hm < that.\n"),
        ("hermes", HERMES + HERMES, ""),
        ("llama3_json", LLAMA, ""),
        ("llama3_json", LLAMA + "; " + LLAMA, ""),
        ("llama3_json", "Hm. <|python_tag|>" + LLAMA, "Hm. "),
        ("mistral", "Hm. " + MISTRAL, "Hm. "),
        ("mistral", NAMED + NAMED, ""),
        ("glm4", f"pick\n{BAD}", ""),
        ("phi4_mini_json", "Hm. " + PHI, "Hm. "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_chosen_call_of_a_strict_tool_follows_its_schema(parser, says, content, stream):
    async with saying(says, parser).running() as api:
        answer = await api.chat(tools=[STRICT, ADD], stream=stream)
        assert answer.status == 200
    if stream:
        deltas = deltas_of(answer)
        said = "".join(delta.get("content") or "" for delta in deltas)
        pieces = [call["function"] for d in deltas for call in d.get("tool_calls", ())
                  if call["index"] == 0]  # fmt: skip
        assert len(pieces) > 10  # nothing is held back
        arguments = "".join(piece["arguments"] for piece in pieces)
    else:
        message = answer.json["choices"][0]["message"]
        said = message["content"] or ""
        arguments = message["tool_calls"][0]["function"]["arguments"]
    assert said.startswith(content)
    jsonschema.validate(json.loads(arguments), PICK)


@pytest.mark.parametrize(
    "parser", ["hermes", "llama3_json", "mistral", "glm4", "glm45", "kimi_k2", "gemma4"]
)
@pytest.mark.parametrize("text", ["", "Łódź, <tool [TOOL", '{"name": "nobody", "parameters": {}}'])
async def test_text_stays_free(parser, text):
    async with saying(text, parser).running() as api:
        answer = await api.chat(tools=[STRICT])
    message = answer.json["choices"][0]["message"]
    assert (message["content"], answer.json["choices"][0]["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in message


DATED = {
    "type": "object",
    "$defs": {"Note": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    "properties": {
        **PICK["properties"],
        "day": {"type": "string", "pattern": "^[0-9]{4}/[0-9]{2}$"},
        "short": {"type": "string", "maxLength": 3},
        "text": {"type": "string"},
        "note": {"anyOf": [{"$ref": "#/$defs/Note"}, {"type": "null"}, {"enum": ["no", 5]}]},
    },
    "required": ["colour", "sure", "day", "short", "text", "note"],
}
TAGGED = {
    "qwen3_coder": (
        "<tool_call>\n<function=pick>\n",
        "<parameter={}>\n{}\n</parameter>\n",
        "</function>\n</tool_call>",
    ),
    "glm45": (
        "<tool_call>pick\n",
        "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
        "</tool_call>",
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="pick">\n',
        '<parameter name="{}">{}</parameter>\n',
        "</invoke>\n</minimax:tool_call>",
    ),
}


@pytest.mark.parametrize("parser", TAGGED)
@pytest.mark.parametrize("note", ["null", '{"x": 1}'])
async def test_a_chosen_call_in_tags_follows_its_schema(parser, note):
    """A value that the schema does not have ends as soon as it may, and the right ones stay."""
    begin, argument, end = TAGGED[parser]
    right = {"colour": "red", "sure": "true", "day": "2026/11", "short": "a\nb", "text": "<p>\n5"}
    right |= {"note": note}
    strict = {**STRICT, "function": {**STRICT["function"], "parameters": DATED}}
    called = []
    for values in (right, {**right, "colour": "green", "short": "long", "more": "1"}):
        says = "Hm. " + begin + "".join(argument.format(*pair) for pair in values.items()) + end
        async with saying(says, parser).running() as api:
            message = (await api.chat(tools=[strict, ADD])).json["choices"][0]["message"]
        assert message["content"].startswith("Hm. ")
        called += [json.loads(call["function"]["arguments"]) for call in message["tool_calls"][:1]]
    for arguments in called:
        jsonschema.validate(arguments, DATED)
    assert called[0] == {
        **right,
        "sure": True,
        "note": json.loads(note),
    }


LONG_STRINGS = {"type": "string", "pattern": "a", "minLength": 1}


def having(schema) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": schema}}


NOTED = {
    **DATED,
    "$defs": {"Note": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Note"}}}},
    "properties": {
        **DATED["properties"],
        "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        "any": {},
    },
    "required": [*DATED["required"], "list"],
}
GEMMA = (
    '<|tool_call>call:pick{colour:<|"|>red<|"|>,sure:true,day:<|"|>2026/11<|"|>,short:<|"|>a\nb<|"|>'
    ',text:<|"|>{"<|"|>,note:{next:{next:{}}},list:[1,2],any:[{a:<|"|>}<|"|>},null]}<tool_call|>'
)


async def test_a_chosen_call_of_gemmas_follows_its_schema():
    """What follows it stays as it is said, of what does not something else is said."""
    strict = {**STRICT, "function": {**STRICT["function"], "parameters": NOTED}}
    called = []
    wrong = (("red", "green"), ("a\nb", "a\nbc\n"), ("1,2", "1,2,3"), ("true", "5"))
    for old, new in (("", ""), *wrong):
        async with saying(f"Hm. {GEMMA.replace(old, new)}", "gemma4").running() as api:
            message = (await api.chat(tools=[strict, ADD])).json["choices"][0]["message"]
        assert message["content"].startswith("Hm. ")
        called += [json.loads(call["function"]["arguments"]) for call in message["tool_calls"][:1]]
    assert len(called) == 5
    for arguments in called:
        jsonschema.validate(arguments, NOTED)
    assert called[0] == {
        "colour": "red",
        "sure": True,
        "day": "2026/11",
        "short": "a\nb",
        "text": '{"',
        "note": {"next": {"next": {}}},
        "list": [1, 2],
        "any": [{"a": "}"}, None],
    }


@pytest.mark.parametrize(
    ("parser", "says"),
    [
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.pick:0"
         f"<|tool_call_argument_begin|>{BAD}<|tool_call_end|><|tool_calls_section_end|>"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>pick\n"
         f"```json\n{BAD}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>pick<｜tool▁sep｜>"
         f"{BAD}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        ("lfm2", f"<|tool_call_start|>[pick({PYTHON}), add()]<|tool_call_end|>"),
        ("cohere", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "pick", "parameters": '
         f"{BAD}}}]<|END_ACTION|>"),
        ("olmo3", f"<function_calls>pick({PYTHON})\nadd()</function_calls>"),
        ("pythonic", f"[pick({PYTHON})]"),
    ],
)  # fmt: skip
async def test_a_chosen_call_in_a_section_follows_its_schema(parser, says):
    before = "" if parser == "pythonic" else "Hm. "
    async with saying(before + says, parser).running() as api:
        message = (await api.chat(tools=[STRICT, ADD])).json["choices"][0]["message"]
    jsonschema.validate(json.loads(message["tool_calls"][0]["function"]["arguments"]), PICK)


@pytest.mark.parametrize(
    ("parser", "parameters", "message"),
    [
        ("glm45", {"type": "object", "anyOf": [PICK]}, "anyOf of parameters cannot be followed"),
        ("gemma4", {"type": "object", "anyOf": [PICK]}, "anyOf of parameters cannot be followed"),
        ("glm45", having({"not": {}}), "the schema of x cannot be"),
        ("gemma4", having({"not": {}}), "a schema of parameters cannot be followed"),
        ("gemma4", having({"type": "array", "uniqueItems": True}), "uniqueItems of a list cannot"),
        ("gemma4", having({"const": '<|"|>'}), "cannot be written in Gemma 4's calls"),
        ("gemma4", having(False), "a schema that nothing follows"),
        ("gemma4", having(LONG_STRINGS), "a parameter has a pattern and a length"),
        ("glm45", having(LONG_STRINGS), "x has a pattern and a length"),
    ],
)
async def test_what_tags_cannot_follow_is_refused(parser, parameters, message):
    strict = {**STRICT, "function": {**STRICT["function"], "parameters": parameters}}
    async with saying("", parser).running() as api:
        answer = await api.chat(tools=[strict])
    assert answer.status == 400
    assert answer.json["error"]["param"] == "tools"
    assert message in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "object", "anyOf": [PICK]}, "anyOf of parameters cannot be followed"),
        ({"type": "object", "properties": {"x y": {}}}, "'x y' cannot be the name of an argument"),
    ],
)
async def test_what_calls_in_python_cannot_follow_is_refused(parameters, message):
    strict = {**STRICT, "function": {**STRICT["function"], "parameters": parameters}}
    async with saying("", "lfm2").running() as api:
        answer = await api.chat(tools=[strict])
    assert answer.status == 400
    assert message in answer.json["error"]["message"]


OPTIONAL = {
    "type": "object",
    "$defs": {"Day": {"enum": ["today", None]}},
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "string"},
        "c": {"$ref": "#/$defs/Day"},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("required", "says", "called"),
    [
        ([], "", {}),
        ([], 'b="x"', {"b": "x"}),
        ([], 'a=1, c="today"', {"a": 1, "c": "today"}),
        (["b"], 'b="x", c=null', {"b": "x", "c": None}),
        (["b"], 'a=1, b="x"', {"a": 1, "b": "x"}),
    ],
)
async def test_arguments_in_python_may_be_left_out(required, says, called):
    parameters = {**OPTIONAL, "required": required}
    strict = {**STRICT, "function": {**STRICT["function"], "parameters": parameters}}
    says = f"<|tool_call_start|>[pick({says})]<|tool_call_end|>"
    async with saying(says, "lfm2").running() as api:
        message = (await api.chat(tools=[strict])).json["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == called


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "mistral"])
async def test_a_strict_tools_schema_may_refer_to_itself(parser):
    call = {"hermes": "<tool_call>", "llama3_json": "", "mistral": "[TOOL_CALLS] ["}[parser]
    key = "parameters" if parser == "llama3_json" else "arguments"
    call += f'{{"name": "draw", "{key}": {{"p": {{"sure": 1, "next": null, "x": 1'
    strict = {**NESTED, "function": {**NESTED["function"], "strict": True}}
    async with saying(call, parser).running() as api:
        answer = await api.chat(tools=[strict])
    called = answer.json["choices"][0]["message"]["tool_calls"][0]["function"]
    assert json.loads(called["arguments"]) == {"p": {"sure": 1, "next": None}}


async def test_other_tools_are_called_with_any_object():
    call = '<tool_call>\n{"name": "add", "arguments": {"x": [1, {"y": null}]}}\n</tool_call>'
    async with saying(call).running() as api:
        answer = await api.chat(tools=[STRICT, ADD])
    [made] = answer.json["choices"][0]["message"]["tool_calls"]
    assert made["function"] == {"name": "add", "arguments": '{"x": [1, {"y": null}]}'}


async def test_without_strict_there_is_no_grammar():
    loose = {**STRICT, "function": {**STRICT["function"], "strict": False}}
    async with saying(HERMES).running() as api:
        answer = await api.chat(tools=[loose])
    [made] = answer.json["choices"][0]["message"]["tool_calls"]
    assert made["function"]["arguments"] == BAD


async def test_a_bad_schema_of_a_strict_tool_is_refused():
    function = {"name": "f", "strict": True, "parameters": {"pattern": "("}}
    await assert_refused({"tools": [ADD, {"type": "function", "function": function}]}, "tools", "")


ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "a",
        "schema": {
            "type": "object",
            "properties": {"x": {"enum": ["yes", "no"]}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    ("parser", "call"), [("hermes", HERMES), ("llama3_json", LLAMA), ("mistral", MISTRAL)]
)
async def test_a_format_for_the_answer_leaves_room_for_calls(parser, call):
    """As the openai package's `parse` and the AI SDK's `Output.object` ask with tools."""
    fields: dict[str, Any] = {"tools": [STRICT, ADD], "response_format": ANSWER}
    async with saying(call, parser).running() as api:
        called = (await api.chat(**fields)).json["choices"][0]
    async with saying('{"x": "yes"}', parser).running() as api:
        said = (await api.chat(**fields)).json["choices"][0]
    [made] = called["message"]["tool_calls"]
    jsonschema.validate(json.loads(made["function"]["arguments"]), PICK)
    assert called["message"]["content"] is None
    assert (said["message"]["content"], said["finish_reason"]) == ('{"x": "yes"}', "stop")
    assert "tool_calls" not in said["message"]


OLD = {
    "type": "structural_tag",
    "structures": [{"begin": "<pick>", "schema": PICK, "end": "</pick>"}],
    "triggers": ["<pick"],
}
TAG = {"begin": "<pick>", "content": {"type": "json_schema", "json_schema": PICK}, "end": "</pick>"}
NEW = {
    "type": "structural_tag",
    "format": {"type": "triggered_tags", "triggers": ["<pick"], "tags": [{"type": "tag", **TAG}]},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": OLD},
        {"response_format": NEW},
        {"structured_outputs": {"structural_tag": NEW}},
        {"structured_outputs": {"structural_tag": json.dumps(OLD), "disable_any_whitespace": True}},
    ],
)
async def test_structural_tags(fields):
    says = f"Well: <pick>{BAD}</pick> and {{5}}"
    async with saying(says, None).running() as api:
        whole = await api.chat(**fields)
        streamed = await api.chat(**fields, stream=True)
        fields |= {"add_special_tokens": False, "max_tokens": 900}
        completion = await api.complete(prompt="Hi", **fields)
    content = whole.json["choices"][0]["message"]["content"]
    before, _, rest = content.partition("<pick>")
    inside, _, _ = rest.partition("</pick>")
    assert before == "Well: "
    jsonschema.validate(json.loads(inside), PICK)
    assert "".join(delta.get("content") or "" for delta in deltas_of(streamed)) == content
    assert completion.json["choices"][0]["text"] == content


def of_format(tree):
    return {"response_format": {"type": "structural_tag", "format": tree}}


def of_tags(**fields):
    return of_format({"type": "triggered_tags", "triggers": ["<"], "tags": [TAG], **fields})


ANY = {"type": "any_text"}
F = "response_format.format"
REFUSED = [
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structures is required"),
    ({"response_format": {**OLD, "triggers": []}}, "response_format.triggers", "1 to 256, got"),
    ({"response_format": {**OLD, "triggers": ["<", "<p"]}}, "response_format.triggers[0]", "other"),
    ({"response_format": {**OLD, "triggers": ["x"]}}, "response_format.triggers[0]", "some tag"),
    ({"response_format": {**OLD, "x": 1}}, "response_format", "must hold only"),
    ({"response_format": {**OLD, "structures": [{}]}}, "response_format.structures[0]", "required"),
    (of_format("x"), F, "an object"),
    (of_format({"type": "qwen_xml_parameter"}), f"{F}.type", "not supported"),
    (of_format({"type": "any_text", "excludes": ["x"]}), F, "excludes"),
    (of_format({"type": "json_schema", "json_schema": 5}), f"{F}.json_schema", "an object or true"),
    (of_format({"type": "regex", "pattern": ""}), f"{F}.pattern", "non-empty"),
    (of_format({"type": "regex", "pattern": "("}), "response_format", "grammar"),
    (of_format({"type": "sequence", "elements": [ANY, ANY]}), f"{F}.elements[0]", "follow"),
    (of_tags(at_least_one=1), f"{F}.at_least_one", "a boolean"),
    (of_tags(tags=[{**TAG, "begin": "x"}]), f"{F}.triggers[0]", "some tag"),
    (of_tags(tags=[{**TAG, "content": ANY, "end": ""}]), f"{F}.tags[0]", "follow"),
    (of_tags(triggers="<"), f"{F}.triggers", "an array"),
    (
        {"structured_outputs": {"structural_tag": "{"}},
        "structured_outputs.structural_tag",
        "hold JSON",
    ),
    (
        {"response_format": NEW, "tools": [ADD]},
        "response_format",
        "leaves no room",
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
async def test_what_cannot_be_followed_is_refused_by_name(fields, param, message):
    await assert_refused(fields, param, message)
