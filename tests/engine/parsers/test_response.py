"""Marks around an answer's text are taken off, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import ParsedMessage
from streamserve.engine.parsers.list_formats import CohereParser
from streamserve.engine.parsers.reasoning import ReasoningParser, ThinkState, thought_marks
from streamserve.engine.parsers.response import ResponseParser, response_marks
from tests.engine.parsers.cutting import cuts, pieces

MARKS = response_marks("cohere")
CALL = '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "add", "parameters": {}}]<|END_ACTION|>'
THOUGHTS = "<|START_THINKING|>Hm.<|END_THINKING|>"


def taken_off(parts, **kwargs):
    parser = ResponseParser(MARKS, **kwargs)
    return "".join([*map(parser.feed, parts), parser.finish()])


@pytest.mark.parametrize(
    ("text", "is_open", "said"),
    [
        ("<|START_RESPONSE|>Yes.<|END_RESPONSE|>", False, "Yes."),
        ("\n<|START_TEXT|> Yes.\n<|END_TEXT|>", False, " Yes.\n"),
        ("<|START_RESPONSE|>Yes <|END_", False, "Yes <|END_"),
        ("<|START_RESPONSE|>a<|END_TEXT|>b<|END_RESPONSE|>c", False, "a<|END_TEXT|>bc"),
        (" Yes.<|END_RESPONSE|>", False, " Yes.<|END_RESPONSE|>"),
        (" Yes.<|END_RESPONSE|>", True, " Yes."),
        ("Yes <|START_TEXT|>", False, "Yes <|START_TEXT|>"),
        (" <|START_", False, " <|START_"),
        ("", False, ""),
    ],
)
def test_examples(text, is_open, said):
    assert taken_off([text], is_open=is_open) == said
    assert taken_off(list(text), is_open=is_open) == said


snippets = st.sampled_from([*(text for mark in MARKS for text in mark), "<|", " ", "Yes", "END"])


@given(st.lists(snippets, max_size=8).map("".join), cuts, st.booleans())
def test_the_cuts_make_no_difference(text, bounds, is_open):
    assert taken_off(pieces(text, bounds), is_open=is_open) == taken_off([text], is_open=is_open)


@pytest.mark.parametrize(
    ("text", "content", "num_calls"),
    [
        (f"{THOUGHTS}{CALL}", "", 1),
        (f"{THOUGHTS}<|START_RESPONSE|>Yes.<|END_RESPONSE|>", "Yes.", 0),
        (f"{THOUGHTS}<|START_TEXT|>Yes.<|END_TEXT|>{CALL}", "Yes.", 1),
        (f"{THOUGHTS}<|START_TEXT|>Yes <|END", "Yes <|END", 0),
    ],
)
def test_thoughts_come_first_and_then_text_or_calls(text, content, num_calls):
    for parts in ([text], list(text)):
        parser = AnswerParser(
            reasoning=ReasoningParser(ThinkState.UNDECIDED, thought_marks("cohere")),
            response=ResponseParser(MARKS),
            tools=CohereParser({"add": {}}),
        )
        message = ParsedMessage()
        for part in parts:
            message.add(parser.feed(part))
        message.add(parser.finish())
        assert (message.reasoning, message.content) == ("Hm.", content)
        assert len(message.calls) == num_calls
