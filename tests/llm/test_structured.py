"""Answers that follow a grammar, asked for as vLLM's programs do."""

from __future__ import annotations

import json
import re

import pytest

from streamserve import SamplingParams, StructuredOutputsParams
from streamserve.errors import InvalidParameterError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 2, 3]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHAT = [{"role": "user", "content": "Hi"}]


def params(**grammar) -> SamplingParams:
    structured = StructuredOutputsParams(**grammar)
    return SamplingParams(temperature=0.8, seed=1, max_tokens=120, structured_outputs=structured)


def text_of(outputs) -> str:
    assert outputs[0].outputs[0].finish_reason == "stop"
    return outputs[0].outputs[0].text


def is_person(text: str) -> bool:
    return set(json.loads(text)) == {"name", "age"}


@pytest.mark.parametrize(
    ("grammar", "is_right"),
    [
        ({"json": SCHEMA}, is_person),
        ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, is_person),
        ({"regex": r"[a-c]{3}-\d"}, lambda text: bool(re.fullmatch(r"[a-c]{3}-\d", text))),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'root ::= "a" | "bc"'}, lambda text: text in ("a", "bc")),
    ],
    ids=["json", "json text", "regex", "choice", "grammar"],
)
def test_the_answer_is_a_sentence_of_the_grammar(llm, grammar, is_right):
    assert is_right(text_of(llm.generate(["Hi"], params(**grammar), use_tqdm=False)))
    assert is_right(text_of(llm.chat(CHAT, params(**grammar), use_tqdm=False)))


def test_each_prompt_may_have_its_own(llm, monkeypatch):
    monkeypatch.setattr(llm._service.engine._grammars, "_max_entries", 1)  # fewer than the prompts
    choices = [params(choice=["one"]), SamplingParams(max_tokens=3), params(choice=["two"])]
    outputs = llm.generate(["a", "b", "c"], choices, use_tqdm=False)
    assert (outputs[0].outputs[0].text, outputs[2].outputs[0].text) == ("one", "two")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({}, "structured_outputs must hold one of"),
        ({"regex": "a", "choice": ["b"]}, "both say what the answer looks like"),
        ({"json": "{"}, "structured_outputs.json must hold JSON"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": "yes"}, "structured_outputs.choice must be an array"),
        ({"structural_tag": "{}"}, "structured_outputs.structural_tag"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern"),
    ],
)
def test_what_says_nothing_clear_is_refused(grammar, message):
    with pytest.raises(InvalidParameterError, match=message):
        StructuredOutputsParams(**grammar)


def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_runs(llm):
    with pytest.raises(InvalidParameterError, match=r"structured_outputs\.regex"):
        llm.generate(["a", "b"], [SamplingParams(), params(regex="(")], use_tqdm=False)
    with pytest.raises(InvalidParameterError, match="must be StructuredOutputsParams, got dict"):
        SamplingParams(structured_outputs={"regex": "a"})
