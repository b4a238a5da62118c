"""Calls whose arguments stand between tags: values get the types that the tool's schema has."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.argument_types import json_of, parameter_types
from streamserve.engine.parsers.events import CallArguments
from streamserve.engine.parsers.tool_formats import TOOL_PARSERS
from tests.engine.parsers.cutting import cuts, pieces, read

PARAMETERS = {
    "type": "object",
    "$defs": {"Colour": {"enum": ["red", 5]}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]}},
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": "number"},
        "b": {"type": "boolean"},
        "o": {"type": "object"},
        "a": {"type": ["array", "null"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "colour": {"allOf": [{"$ref": "#/$defs/Colour"}]},
        "fixed": {"const": None},
        "loop": {"$ref": "#/$defs/Loop"},
        "any": {},
    },
}
TOOLS = {"f": PARAMETERS}
FORMATS = {
    "qwen3_coder": (
        "<tool_call>\n<function=f>\n",
        "<parameter={}>\n{}\n</parameter>\n",
        "</function>\n</tool_call>",
    ),
    "glm45": (
        "<tool_call>f\n",
        "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
        "</tool_call>",
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="f">\n',
        '<parameter name="{}">{}</parameter>\n',
        "</invoke>\n</minimax:tool_call>",
    ),
}


def written(family, arguments):
    begin, argument, end = FORMATS[family]
    return begin + "".join(argument.format(*pair) for pair in arguments) + end


def parsed(family, parts, **kwargs):
    return read(TOOL_PARSERS[family](TOOLS, **kwargs), parts)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("s", "5", "5"),
        ("s", "true", "true"),
        ("s", ' "x"\n\n{\t\\', ' "x"\n\n{\t\\'),
        ("s", "", ""),
        ("s", "a < b </par", "a < b </par"),
        ("i", "5", 5),
        ("i", " -7\n", -7),
        ("i", "12345678901234567890", 12345678901234567890),
        ("i", "five", "five"),
        ("i", "5.5", 5.5),
        ("i", "NaN", "NaN"),
        ("n", "1e3", 1000.0),
        ("n", "+.5", 0.5),
        ("n", "inf", "inf"),
        ("b", "True", True),
        ("b", "false", False),
        ("b", "0", False),
        ("o", '{"x": {"y": [1, "2", null]}}', {"x": {"y": [1, "2", None]}}),
        ("o", '{"x": ', '{"x": '),
        ("o", "[" * 20000, "[" * 20000),
        ("a", "None", None),
        ("a", '["x\\n", "y"]', ["x\n", "y"]),
        ("maybe", "null", None),
        ("maybe", "no", "no"),
        ("maybe", "5", "5"),
        ("colour", "5", 5),
        ("colour", "red", "red"),
        ("fixed", "null", None),
        ("loop", "5", "5"),
        ("any", "5", "5"),
        ("unheard of", "5", "5"),
    ],
)
def test_a_value_has_the_type_of_its_parameter(key, text, value):
    assert json.loads(json_of(text, parameter_types(PARAMETERS, key))) == value
    if len(text) < 1000:
        for family in FORMATS:
            [call] = parsed(family, [written(family, [(key, text), ("z", "1")])]).calls
            assert json.loads(call.arguments) == {key: value, "z": "1"}


@pytest.mark.parametrize(
    "schema", [None, True, [], {"properties": 5}, {"$ref": "#"}, {"$ref": "x"}]
)
def test_where_a_schema_says_nothing_a_value_is_text(schema):
    assert parameter_types(schema, "x") == {"string"}


values = st.text('ab \n<>/"\\é😊=', max_size=20).filter(lambda text: "</" not in text)
lengthy = st.one_of(values, values.map(lambda text: 300 * (text + "x")))


@given(
    st.sampled_from([*FORMATS]),
    st.dictionaries(st.sampled_from([*PARAMETERS["properties"], "é", "x y"]), lengthy),
    cuts,
    st.booleans(),
)
def test_what_is_written_comes_back(family, arguments, bounds, is_certain):
    text = written(family, arguments.items())
    [call] = parsed(family, pieces(text, bounds), is_certain=is_certain).calls
    types = {key: parameter_types(PARAMETERS, key) for key in arguments}
    expected = {key: json.loads(json_of(text, types[key])) for key, text in arguments.items()}
    assert json.loads(call.arguments) == expected


@pytest.mark.parametrize("family", FORMATS)
def test_a_long_text_is_shown_while_it_is_written(family):
    text = written(family, [("i", "1"), ("s", "\n".join(["line"] * 100))])
    parser = TOOL_PARSERS[family](TOOLS)
    events = [event for character in text for event in parser.feed(character)]
    shown = [event.text for event in events if isinstance(event, CallArguments)]
    assert len(shown) > 200
    assert json.loads("".join(shown)) == {"i": 1, "s": "\n".join(["line"] * 100)}


@pytest.mark.parametrize("family", FORMATS)
def test_a_key_may_come_once_and_has_an_end(family):
    twice = written(family, [("i", "1"), ("i", "2")])
    endless = written(family, [("k" * 300, "1")])
    for text in (twice, endless):
        for parts in ([text], list(text)):
            assert parsed(family, parts).content == text


def test_a_grammar_lets_a_text_say_what_would_end_it_otherwise():
    text = written("qwen3_coder", [("s", "</function>")])
    assert not parsed("qwen3_coder", [text]).content.startswith("<tool_call>")
    [call] = parsed("qwen3_coder", [text], is_certain=True).calls
    assert json.loads(call.arguments) == {"s": "</function>"}
    bare = "<function=f></function>"
    assert parsed("qwen3_coder", [bare]).calls
    assert parsed("qwen3_coder", [bare], is_certain=True).content == bare
