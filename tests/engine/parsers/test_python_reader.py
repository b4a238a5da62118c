"""Arguments in Python's syntax: what is written is the JSON of its value, however it is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.events import CallArguments
from streamserve.engine.parsers.pythonic_formats import Lfm2Parser
from tests.engine.parsers.cutting import cuts, pieces, read

TOOLS = {"Calendar.add": {}}


def answer(arguments):
    return f"<|tool_call_start|>[Calendar.add({arguments})]<|tool_call_end|>"


def arguments_of(arguments):
    for parts in ([answer(arguments)], list(answer(arguments))):
        message = read(Lfm2Parser(TOOLS), parts)
        assert message.content == ""
        [call] = message.calls
        yield json.loads(call.arguments)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("'it'", "it"),
        ('"it\'s"', "it's"),
        (r"'it\'s'", "it's"),
        ("''", ""),
        ('""', ""),
        ('"""a "b" c\n"""', 'a "b" c\n'),
        ("''''''", ""),
        ("'two\nlines'", "two\nlines"),
        (r"'two\nlines\t\\'", "two\nlines\t\\"),
        ("'one \\\nline'", "one line"),
        (r"'\x41\101\0\u00e9\U0001F60A'", "AA\0é😊"),
        (r"'\ud83d\ude0a'", "😊"),
        (r"'\d+ \/'", r"\d+ /"),
        ("1", 1),
        ("-1.5e3", -1500.0),
        ("+1_000", 1000),
        ("0x1E", 30),
        (".5", 0.5),
        ("5.", 5.0),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("[]", []),
        ("[1, [2, {}], 'x',]", [1, [2, {}], "x"]),
        ('{"a": None, \'b\': [True], "c": {"d": 1,},}', {"a": None, "b": [True], "c": {"d": 1}}),
    ],
)
def test_literals(written, value):
    for found in arguments_of(f"x={written}, y-z = {written},"):
        assert found == {"x": value, "y-z": value}


@pytest.mark.parametrize(
    "arguments",
    [
        "5",
        "x",
        "x=",
        "x=5, x=6",
        ",",
        "x=5 6",
        "x=,",
        "x=y",
        "x=nan",
        "x=1e",
        "x=007",
        "x='it's'",
        "x=[1, , 2]",
        "x=[1}",
        "x={1: 2}",
        "x={'a'}",
        "x={'a': }",
        r"x='\x4'",
        r"x='\uZZZZ'",
        r"x='\U0000d800'",
        r"x='\U00110000'",
        f"x={'1' * 200}",
        f"{'k' * 300}=1",
        "x=1",
    ],
)
def test_what_is_not_well_formed_is_text(arguments):
    text = answer(arguments).removesuffix(")]<|tool_call_end|>")
    text += "" if arguments == "x=1" else ")]<|tool_call_end|>"
    for parts in ([text], list(text)):
        message = read(Lfm2Parser(TOOLS), parts)
        assert (message.content, message.calls) == (text, [])


keys = st.text("abc_é1", min_size=1, max_size=4)
strings = st.text("ab \n\t\\<>/\"'é😊\x00", max_size=8)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), strings)
    .filter(lambda value: value not in (float("inf"), -float("inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(keys, values, max_size=4), cuts, st.booleans(), st.booleans())
def test_what_is_written_comes_back(arguments, bounds, is_json, is_certain):
    write = json.dumps if is_json else repr
    text = answer(", ".join(f"{key}={write(value)}" for key, value in arguments.items()))
    message = read(Lfm2Parser(TOOLS, is_certain=is_certain), pieces(text, bounds))
    assert [json.loads(call.arguments) for call in message.calls] == [arguments]


def test_a_long_string_is_shown_while_it_is_written():
    text = answer(f"n=1, x='{'line ' * 100}'")
    parser = Lfm2Parser(TOOLS)
    events = [event for character in text for event in parser.feed(character)]
    shown = [event.text for event in events if isinstance(event, CallArguments)]
    assert len(shown) > 200
    assert json.loads("".join(shown)) == {"n": 1, "x": "line " * 100}


def test_a_long_call_that_breaks_late_ends_in_text():
    text = answer(f"x='{'line ' * 100}', y=z")
    for parts in ([text], list(text)):
        message = read(Lfm2Parser(TOOLS), parts)
        assert message.calls[0].arguments == json.dumps({"x": "line " * 100})[:-1] + ', "y": '
        assert message.content == "z)]<|tool_call_end|>"
