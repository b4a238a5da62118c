"""gpt-oss's messages: thoughts, content and calls, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.detokenizer import IncrementalDetokenizer
from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS
from streamserve.engine.parsers.events import CallArguments, Content, ParsedMessage, Reasoning
from streamserve.engine.parsers.harmony import MARKERS, opened_by
from streamserve.engine.parsers.harmony_answer import HarmonyParser
from tests.engine.parsers.cutting import cuts, pieces

NAMES = ("get_weather", "add")


def new(opened="assistant", **options):
    return HarmonyParser(opened, NAMES, lambda token_id: bytes((token_id,)), **options)


def read(parts, **options):
    """What was said, thought and called, and the number of bytes thought."""
    parser, message = new(**options), ParsedMessage()
    for part in parts:
        parser.count(part.encode())
        message.add(parser.feed(part))
    message.add(parser.finish())
    calls = [(call.name, call.arguments) for call in message.calls]
    return message.reasoning, message.content, calls, parser.num_reasoning_tokens


NEXT = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Hm, 1 < 2.<|end|>"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>"

# text, thoughts, content, calls
EXAMPLES = [
    (THOUGHT + NEXT + FINAL + "Yes <b>.<|return|>", "Hm, 1 < 2.", "Yes <b>.", []),
    (FINAL + "Yes.", "", "Yes.", []),
    (THOUGHT + NEXT + CALL + '{"a": 1}<|call|>', "Hm, 1 < 2.", "", [("add", '{"a": 1}')]),
    (
        " to=functions.add<|channel|>commentary json<|message|>{}",
        "",
        "",
        [("add", "{}")],
    ),
    ("<|channel|>analysis to=functions.add code<|message|> {} \n", "", "", [("add", "{}")]),
    (CALL, "", "", [("add", "{}")]),
    (
        THOUGHT
        + NEXT
        + "<|channel|>commentary<|message|>I look.<|end|>"
        + NEXT
        + THOUGHT
        + NEXT
        + FINAL
        + "Yes.",
        "Hm, 1 < 2.\n\nHm, 1 < 2.",
        "I look.\n\nYes.",
        [],
    ),
    (CALL + "{}<|call|>" + NEXT + CALL + "{}<|call|>", "", "", [("add", "{}"), ("add", "{}")]),
    ("<|channel|>analysis to=python code<|message|>1 + 1", "1 + 1", "", []),
    ("<|channel|>analysis<|message|>cut <|en", "cut <|en", "", []),
    ("<|channel|>ana", "", "", []),
    ("<|message|>No channel.", "", "No channel.", []),
    (THOUGHT + "\n", "Hm, 1 < 2.", "", []),
    # Not as it should be.
    ("Just text. <|mess", "", "Just text. <|mess", []),
    (" t", "", " t", []),
    ("<|channel|>odd\nheader<|message|>x", "", "<|channel|>odd\nheader<|message|>x", []),
    ("<|channel|>commentary to=functions.nobody<|message|>{}", "", "{}", []),
    (CALL + "{broken}<|call|>", "", "{broken}", []),
    (CALL + '{"a": <|call|>', "", '{"a": ', []),
    (CALL + "{} and more", "", "and more", [("add", "{}")]),
    ("<|channel|>analysis<|message|>Hm." + FINAL + "Yes.", "Hm.", "Yes.", []),
    (THOUGHT + "Yes.", "Hm, 1 < 2.", "Yes.", []),
]


@pytest.mark.parametrize(("text", "thoughts", "content", "calls"), EXAMPLES)
def test_whole_and_character_by_character(text, thoughts, content, calls):
    expected = (thoughts, content, calls, len(thoughts.replace("\n\n", "")))
    assert read([text]) == read(list(text)) == expected


LONG = '{"text": "' + "x" * (2 * HOLD_CHARACTERS) + '"}'
SNIPPETS = [
    *MARKERS, NEXT, THOUGHT, FINAL, CALL, "analysis", "commentary", " to=functions.add", "json",
    "{}", '{"a": 1}', '{"a": ', LONG, LONG[:-2], "é", "<", "<|", "|>", " ", "\n", "x" * 300,
]  # fmt: skip
texts = st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)


@given(texts, cuts, st.sampled_from(["", "assistant", "assistant" + CALL, "assistant" + FINAL]))
def test_the_cuts_make_no_difference(text, bounds, opened):
    whole = read([text], opened=opened)
    assert read(pieces(text, bounds), opened=opened) == whole
    assert read(list(text), opened=opened) == whole


@given(texts.filter(lambda text: "<|" not in text), st.sampled_from(["", "assistant"]))
def test_an_answer_without_marks_is_its_text(text, opened):
    # At the very end the beginning of a header, or of nothing, may be cut off.
    if not text.lstrip().startswith("to=") and text.strip():
        assert read([text], opened=opened) == ("", text, [], 0)


def test_nothing_is_held_back_without_need():
    parser = new()
    assert parser.feed("<|channel|>analysis<|message|>Hm") == [Reasoning("Hm")]
    assert parser.feed(", 1 <") == [Reasoning(", 1 ")]
    assert parser.feed(" 2") == [Reasoning("< 2")]
    assert parser.feed("<|end|>" + NEXT + FINAL) == []
    assert parser.feed("Yes") == [Content("Yes")]
    held = new(is_certain=True)
    events = [event for character in CALL + '{"a": 1}' for event in held.feed(character)]
    assert [e.text for e in events if isinstance(e, CallArguments)] == list('{"a": 1}')


def test_options():
    text = THOUGHT + NEXT + CALL + "{}<|call|>" + NEXT + CALL + "{}"
    assert read([text], include_reasoning=False)[0] == ""
    assert read([text], max_calls=1)[2] == [("add", "{}")]


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", "assistant"),
        ("<|start|>assistant<|channel|>final<|message|>I say ", "assistant" + FINAL),
        ("<|start|>user<|message|>Hi<|end|>", ""),
        ("Hi", ""),
    ],
)
def test_what_a_prompt_opens(prompt, opened):
    assert opened_by(prompt) == opened


def test_marks_are_special_tokens():
    """Of one token each, which are not counted; a character of two tokens is thought twice."""
    tokenizer = ByteTokenizer(("<s>", "</s>", *MARKERS))
    ids = tokenizer.encode(
        THOUGHT.replace("1", "é") + NEXT + FINAL + "Ü.", add_special_tokens=False
    )
    assert sum(map(tokenizer.is_special, ids)) == 6
    params = SamplingParams(skip_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, (), params)
    parser = HarmonyParser("assistant", NAMES, tokenizer.token_bytes)
    message = ParsedMessage()
    for token_id in ids:
        parser.count((token_id,))
        message.add(parser.feed(detokenizer.add((token_id,))))
    message.add(parser.finish())
    assert (message.reasoning, message.content) == ("Hm, é < 2.", "Ü.")
    assert parser.num_reasoning_tokens == len("Hm, é < 2.".encode())
    assert parser.is_past_thoughts
