"""Thoughts are free and end at their budget; a grammar holds behind them."""

import json
import re
from dataclasses import replace

import pytest

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.core.thinking import Thinking
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.errors import InvalidParameterError
from tests.engine.fakes import EOS, collect, serving
from tests.engine.random_runner import RandomRunner
from tests.engine.test_structured_answers import VOCAB_SIZE

YES_OR_NO = StructuredOutput(kind=GrammarKind.CHOICE, text=json.dumps(["yes", "no"]))
END = tuple(b"</think>")


def thinking(*, is_open=True, budget=None, end=END):
    return Thinking(
        is_open=is_open, start_token_ids=tuple(b"<think>"), end_token_ids=end, budget=budget
    )


class ThinkingRunner(RandomRunner):
    """Thinks in small letters until ``num_thoughts``, then ends it by itself."""

    def __init__(self, num_thoughts: int, start: bytes = b"") -> None:
        super().__init__(VOCAB_SIZE)
        self.script = start + b"a" * num_thoughts + b"</think>"

    def _draw(self, scheduled, mask):
        if scheduled.output_position < len(self.script):
            token_id = self.script[scheduled.output_position]
            if mask is None or mask[token_id >> 3] >> (token_id & 7) & 1:
                return token_id
        return super()._draw(scheduled, mask)


async def answer(runner, steps=2, **params):
    async with serving(runner, max_steps_in_flight=steps) as harness:
        await harness.engine.prepare(SamplingParams(max_tokens=60, **params))
        return await collect(harness.submit(max_tokens=60, **params))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("budget", [0, 1, 5])
async def test_a_budget_ends_thoughts(budget, steps):
    output = await answer(RandomRunner(VOCAB_SIZE), steps, thinking=thinking(budget=budget))
    assert re.fullmatch(f"[a-z]{{{budget}}}</think>[a-z]*", output.text)
    assert len(output.token_ids) == 60


@pytest.mark.parametrize("steps", [1, 2])
async def test_thoughts_that_end_in_time_are_left_alone(steps):
    runner = ThinkingRunner(5)
    output = await answer(runner, steps, thinking=thinking(budget=14))
    assert output.text.startswith("aaaaa</think>")
    assert output.text.count("</think>") == 1
    assert max(runner.num_masks) == 0


async def test_a_budget_counts_from_where_the_answer_begins_to_think():
    runner = ThinkingRunner(50, start=b"<think>")
    output = await answer(runner, thinking=thinking(is_open=False, budget=3))
    assert output.text.startswith("<think>aaa</think>")
    for budget in (0, 3):
        asked = thinking(is_open=False, budget=budget)
        assert "<" not in (await answer(RandomRunner(VOCAB_SIZE), thinking=asked)).text


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("budget", [None, 4, 30])
async def test_a_grammar_holds_behind_thoughts(steps, is_open, budget):
    start = b"" if is_open else b"<think>"
    runner = ThinkingRunner(20, start)
    output = await answer(
        runner,
        steps,
        thinking=thinking(is_open=is_open, budget=budget),
        structured_output=YES_OR_NO,
    )
    thoughts = "a" * min(20, 20 if budget is None else budget)
    assert re.fullmatch(f"{start.decode()}{thoughts}</think>(yes|no)", output.text)
    assert output.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("steps", [1, 2])
async def test_an_answer_with_a_grammar_does_not_end_in_its_thoughts(steps):
    runner = RandomRunner(VOCAB_SIZE, liked=frozenset({EOS, 1}))
    output = await answer(
        runner,
        steps,
        thinking=thinking(budget=20),
        structured_output=YES_OR_NO,
        stop_token_ids=(1,),
    )
    assert re.fullmatch(r".*</think>(yes|no)", output.text, re.DOTALL)
    assert output.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("thoughts", ["", "<think>aa</think>"])
async def test_a_grammar_that_begins_with_text_does_not_ask_for_thoughts(steps, thoughts):
    tokenizer = ByteTokenizer(("<s>", "</s>", "<think>"))
    runner = ThinkingRunner(0)
    runner.vocab_size = tokenizer.vocab_size
    runner.script = tokenizer.encode(thoughts + "Hi", add_special_tokens=False)
    text = json.dumps({"type": "const_string", "value": "Hi!"})
    params = {
        "structured_output": StructuredOutput(kind=GrammarKind.STRUCTURAL_TAG, text=text),
        "thinking": Thinking(
            is_open=False, start_token_ids=(258,), end_token_ids=END, is_optional=True
        ),
        "max_tokens": 60,
        "skip_special_tokens": False,
    }
    async with serving(runner, tokenizer=tokenizer, max_steps_in_flight=steps) as harness:
        await harness.engine.prepare(SamplingParams(**params))
        output = await collect(harness.submit(**params))
    assert output.text.removesuffix("</s>") == thoughts + "Hi!"


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("num_thoughts", [2, 50])
async def test_behind_thoughts_comes_what_must_and_then_what_may(steps, num_thoughts):
    asked = replace(thinking(budget=20), next_token_ids=tuple(b"<say>"), not_next=ord("x"))
    runner = ThinkingRunner(num_thoughts)
    runner.script += b"xxxxxxxxx"
    output = await answer(runner, steps, thinking=asked)
    assert re.match(rf"a{{{min(num_thoughts, 20)}}}</think><say>[^x]", output.text)


async def test_others_beside_it_are_free():
    runner = RandomRunner(VOCAB_SIZE)
    async with serving(runner, max_steps_in_flight=2) as harness:
        alone = (await harness.answer("free", max_tokens=30)).text
        short = harness.submit("short", max_tokens=30, thinking=thinking(budget=3))
        free = harness.submit("free", max_tokens=30)
        assert (await collect(short)).text[3:11] == "</think>"
        assert (await collect(free)).text == alone


def test_a_budget_has_a_lower_bound():
    with pytest.raises(InvalidParameterError, match="thinking_token_budget must be at least 0"):
        thinking(budget=-1)
