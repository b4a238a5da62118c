"""Thoughts and answers are told apart, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import Content, Reasoning
from streamserve.engine.parsers.reasoning import (
    ReasoningParser,
    ReasoningTokens,
    ThinkState,
    state_after_prompt,
    thought_marks,
)
from streamserve.engine.parsers.tool_formats import HermesParser
from tests.engine.parsers.cutting import cuts, pieces, read

UNDECIDED, INSIDE, OVER = ThinkState


EXAMPLES = [
    (UNDECIDED, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    (UNDECIDED, "\n<think>Hm.</think>Yes.\n", "Hm.", "Yes.\n"),
    (UNDECIDED, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    (UNDECIDED, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
    (UNDECIDED, "<thin", "", "<thin"),
    (UNDECIDED, " \n", "", " \n"),
    (UNDECIDED, "<think>Hm. A < b, </thin", "Hm. A < b, </thin", ""),
    (INSIDE, "Hm. \n more\n</think>\n\nYes.", "Hm. \n more", "Yes."),
    (INSIDE, "<think>\nHm.</think>Yes.", "Hm.", "Yes."),
    (INSIDE, "Hm.\n", "Hm.", ""),
    (INSIDE, "<", "<", ""),
    (OVER, "Yes. </think>", "", "Yes. </think>"),
    (OVER, "", "", ""),
]


@pytest.mark.parametrize(("state", "text", "reasoning", "content"), EXAMPLES)
def test_examples(state, text, reasoning, content):
    for parts in ([text], list(text)):
        message = read(ReasoningParser(state), parts)
        assert (message.reasoning, message.content) == (reasoning, content)


@pytest.mark.parametrize("parser", ["mistral", "seed_oss", "gemma4", "cohere"])
@pytest.mark.parametrize(("state", "text", "reasoning", "content"), EXAMPLES)
def test_examples_in_other_marks(parser, state, text, reasoning, content):
    marks = thought_marks(parser)

    def marked(text):
        for theirs, ours in zip(thought_marks("qwen3"), marks, strict=True):
            text = text.replace(theirs, ours)
        return text

    message = read(ReasoningParser(state, marks), list(marked(text)))
    assert (message.reasoning, message.content) == (marked(reasoning), marked(content))


texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", " ", "\n", "Hm.", "Yes.", "<"]),
    max_size=12,
).map("".join)


@given(st.sampled_from(ThinkState), texts, cuts)
def test_the_cuts_make_no_difference(state, text, bounds):
    assert read(ReasoningParser(state), pieces(text, bounds)) == read(
        ReasoningParser(state), [text]
    )


@given(st.sampled_from(ThinkState), texts)
def test_nothing_but_marks_and_space_is_lost(state, text):
    message = read(ReasoningParser(state), [text])
    kept = message.reasoning + message.content
    for mark in ("<think>", "</think>"):
        text, kept = text.replace(mark, ""), kept.replace(mark, "")
    assert "".join(kept.split()) == "".join(text.split())


def test_thoughts_stream_as_they_come():
    parser = ReasoningParser(INSIDE)
    assert parser.feed("Hm, ") == [Reasoning("Hm,")]
    assert parser.feed("well </t") == [Reasoning(" well")]
    assert parser.feed("hink>\n") == []
    assert parser.feed("\nYes ") == [Content("Yes ")]


@pytest.mark.parametrize(
    ("parser", "prompt", "continued", "state"),
    [
        ("qwen3", "<|im_start|>assistant\n", None, UNDECIDED),
        ("qwen3", "<|im_start|>assistant\n<think>\n", None, INSIDE),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", None, OVER),
        ("deepseek_r1", "<｜Assistant｜>", None, INSIDE),
        ("deepseek_r1", "<｜Assistant｜><think>\n", None, INSIDE),
        ("deepseek_r1", "<｜Assistant｜></think>", None, OVER),
        ("deepseek_r1", "user says <think>: assistant: Yes", "Yes", OVER),
        ("qwen3", "…<think>Hm", "<think>Hm", INSIDE),
        ("mistral", "[INST]Hi[/INST]", None, UNDECIDED),
        ("mistral", "[INST]Hi[/INST][THINK]", None, INSIDE),
        ("mistral", "…<think>", None, UNDECIDED),
        ("minimax_m2", "]~b]ai\n", None, INSIDE),
        ("kimi_k2", "<|im_assistant|>assistant<|im_middle|>", None, INSIDE),
        ("glm45", "<|assistant|>\n<think></think>", None, OVER),
        ("qwen3", "…<think>Hm</think>Y", "<think>Hm</think>Y", OVER),
    ],
)
def test_where_a_prompt_leaves_the_answer(parser, prompt, continued, state):
    assert state_after_prompt(parser, prompt, continued) is state


def count(state, tokens):
    table = dict(enumerate(token.encode() for token in tokens))
    counter = ReasoningTokens(state, table.__getitem__)
    for token_id in table:
        counter.feed([token_id])
    at_once = ReasoningTokens(state, table.__getitem__)
    at_once.feed(list(table))
    assert at_once.count == counter.count
    return counter.count


@pytest.mark.parametrize(
    ("state", "tokens", "expected"),
    [
        (UNDECIDED, ["<think>", "a", "b", "</think>", "c"], 2),
        (UNDECIDED, ["\n", *"<think>", "a", "b", *"</think>", "c"], 2),
        (UNDECIDED, ["a", "<think>", "b", "</think>"], 0),
        (INSIDE, ["a", "b", "</think>", "c"], 2),
        (INSIDE, ["<think>", "a", "b", "</think>", "c"], 2),
        (INSIDE, [*"abc", *"</think>", "c"], 3),
        (INSIDE, ["ab</", "think>c", "d"], 1),
        (INSIDE, ["a" * 50, "b" * 50, "c"], 3),
        (INSIDE, ["</think>", "a"], 0),
        (OVER, ["a", "</think>"], 0),
    ],
)
def test_thoughts_are_counted_in_tokens(state, tokens, expected):
    assert count(state, tokens) == expected


@pytest.mark.parametrize(
    ("state", "tokens", "is_inside"),
    [
        (UNDECIDED, [], False),
        (UNDECIDED, ["\n", "<thi"], False),
        (UNDECIDED, ["<thi", "nk>"], True),
        (UNDECIDED, ["Yes"], False),
        (INSIDE, ["<thi"], True),
        (INSIDE, ["Hm", "</think>"], False),
        (OVER, [], False),
    ],
)
def test_whether_the_tokens_end_in_thoughts(state, tokens, is_inside):
    counter = ReasoningTokens(state, lambda token_id: tokens[token_id].encode())
    counter.feed(range(len(tokens)))
    assert counter.is_inside is is_inside


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@given(cuts)
def test_thoughts_then_text_then_a_call(bounds):
    text = f"<think>\nI could {CALL}.\n</think>\n\nWell.\n{CALL}"
    parser = AnswerParser(reasoning=ReasoningParser(UNDECIDED), tools=HermesParser({"add": {}}))
    message = read(parser, pieces(text, bounds))
    assert message.reasoning == f"I could {CALL}."
    assert message.content == "Well.\n"
    assert [(c.name, c.arguments) for c in message.calls] == [("add", '{"a": 1}')]
    assert parser.num_calls == 1


@pytest.mark.parametrize("end", ["<think>Hm. </thi", "<think>Hm.</think>Yes. <tool_ca", "<thi"])
def test_what_was_held_back_is_said_at_the_end(end):
    parser = AnswerParser(reasoning=ReasoningParser(UNDECIDED), tools=HermesParser({"add": {}}))
    message = read(parser, list(end))
    said = message.reasoning + message.content
    assert said == end.replace("<think>", "").replace("</think>", "")


def test_thoughts_may_be_left_out():
    parser = AnswerParser(reasoning=ReasoningParser(UNDECIDED), include_reasoning=False)
    message = read(parser, list("<think>Hm.</think>Yes."))
    assert (message.reasoning, message.content) == ("", "Yes.")
