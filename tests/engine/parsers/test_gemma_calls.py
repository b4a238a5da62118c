"""Gemma 4's calls: bare keys and its own marks of strings become JSON, nothing else does."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.events import CallArguments
from streamserve.engine.parsers.gemma_calls import Gemma4Parser
from tests.engine.parsers.cutting import cuts, pieces, read

TOOLS = {"f": {}}


def written(value):
    """As the published template writes arguments."""
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def call(arguments):
    return f"<|tool_call>call:f{arguments}<tool_call|>"


def parsed(parts, **kwargs):
    return read(Gemma4Parser(TOOLS, **kwargs), parts)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("{}", {}),
        (
            '{key:<|"|>text<|"|>,n:3,flag:true,list:[1,2],obj:{a:<|"|>x<|"|>}}',
            {"key": "text", "n": 3, "flag": True, "list": [1, 2], "obj": {"a": "x"}},
        ),
        ('{ a : [ ] ,\n b : { } , c : <|"|><|"|> }', {"a": [], "b": {}, "c": ""}),
        (
            '{s:<|"|>}<tool_call|>{"\\n\n,<|"><|tool_call>call:f{<|"|>}',
            {"s": '}<tool_call|>{"\\n\n,<|"><|tool_call>call:f{'},
        ),
        ('{<|"|>a:b, "c"<|"|>:-1.5e3,$ref é.x-y:1}', {'a:b, "c"': -1500.0, "$ref é.x-y": 1}),
        ("{a:None,b:True,c:[False,null,[{x:[{}]}]]}",
         {"a": None, "b": True, "c": [False, None, [{"x": [{}]}]]}),
        ("{a:{a:1},b:[{a:1},{a:2}]}", {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}),
    ],
)  # fmt: skip
def test_arguments_become_json(arguments, value):
    text = call(arguments)
    for parts in ([text], list(text)):
        message = parsed(parts)
        assert [json.loads(made.arguments) for made in message.calls] == [value]
        assert not message.content


@pytest.mark.parametrize(
    "arguments",
    [
        "{a}",
        "{a:}",
        "{:1}",
        "{a:1,}",
        "{,a:1}",
        "{a:1 b:2}",
        "{a:1]",
        "{a:[1}",
        "{a:[1,]}",
        "{a:[,1]}",
        "{a:]}",
        "{a:text}",
        "{a:01}",
        "{a:inf}",
        '{a:"text"}',
        '{"a":1}',
        "{a:1,a:2}",
        "{o:{a:1,a:2}}",
        '{a:<|"|>x<|"|>y}',
        '{a:<|"x}',
        "{" + "k" * 257 + ":1}",
        '{<|"|>' + "k" * 257 + '<|"|>:1}',
        "{a:" + "1" * 1025 + "}",
    ],
)
def test_what_is_not_well_formed_is_text_and_the_next_one_a_call(arguments):
    bad, good = call(arguments), call("{a:1}")
    for parts in ([bad], list(bad)):
        assert parsed(parts).content == bad
        assert not parsed(parts).calls
    for parts in ([bad + good], list(bad + good)):
        message = parsed(parts)
        assert message.content == bad
        assert [made.arguments for made in message.calls] == ['{"a": 1}']


texts = st.text('ab \n<|">{}[]:,\\é😊', max_size=20).filter(lambda text: '<|"|>' not in text)
keys = st.sampled_from(["a", "b_c", "é x", "$ref"])
values = st.recursive(
    st.one_of(texts, st.integers(), st.booleans(), st.none(), st.floats(-1e9, 1e9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values | texts.map(lambda t: 300 * (t + "x"))), cuts, st.booleans())
def test_what_the_template_writes_comes_back(arguments, bounds, is_certain):
    text = f"Well. {call(written(arguments))}" * 2
    message = parsed(pieces(text, bounds), is_certain=is_certain)
    assert [json.loads(made.arguments) for made in message.calls] == [arguments, arguments]


def test_a_long_text_is_shown_while_it_is_written():
    text = call(written({"i": 1, "s": "\n".join(["line"] * 100)}))
    parser = Gemma4Parser(TOOLS)
    events = [event for character in text for event in parser.feed(character)]
    shown = [event.text for event in events if isinstance(event, CallArguments)]
    assert len(shown) > 200
    assert json.loads("".join(shown)) == {"i": 1, "s": "\n".join(["line"] * 100)}
