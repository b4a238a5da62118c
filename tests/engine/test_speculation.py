"""Several tokens of a request in one step: the reader sees what he would see one by one."""

import pytest

from streamserve.config import SpeculativeConfig
from streamserve.core.request import FinishReason
from tests.engine.fakes import FakeRunner, serving

TEXT = "the cat sat, the cat sat, the cat sat on the mat, the cat sat."
LOOKUP = SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_min=2, prompt_lookup_max=4)


async def answers(speculative, depth, **params):
    runner = FakeRunner(default=TEXT)
    async with serving(runner, speculative=speculative, max_steps_in_flight=depth) as h:
        output = await h.answer("r", max_tokens=80, **params)
        return output, h.scheduler.speculation_stats.num_accepted_tokens


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"logprobs": 0},
        {"min_tokens": 70, "ignore_eos": True},
        *({"stop": (stop,)} for stop in ("sat on", "t, the cat sat on", "mat, the", "cat sat.")),
        {"stop": ("on the m",), "include_stop_str_in_output": True, "logprobs": 0},
        {"stop_token_ids": (ord("o"),)},
    ],
)
async def test_the_answer_is_the_same(params, depth):
    plain, _ = await answers(None, depth, **params)
    drafted, num_accepted = await answers(LOOKUP, depth, **params)
    assert num_accepted > 5
    for name in ("text", "token_ids", "usage", "logprobs", "finish_reason", "stop_reason"):
        assert getattr(drafted, name) == getattr(plain, name)


async def test_a_stop_string_inside_a_step_drops_what_came_behind_it():
    runner = FakeRunner(default="abcabcabcabcabcabc")
    async with serving(runner, speculative=LOOKUP, max_steps_in_flight=2) as h:
        output = await h.answer("r", max_tokens=18, stop=("cabca",), min_tokens=9)
        assert output.text == "abcab"
        assert output.finish_reason is FinishReason.STOP
        assert output.usage.completion_tokens == len(output.token_ids) == 10


async def test_what_came_behind_a_stop_string_is_not_cached():
    answer = "abcabcabcabcabcabcabcabcabcabc"
    async with serving(FakeRunner(default=answer), speculative=LOOKUP) as h:
        prompt = list(range(15))  # the answer's second token begins a block
        stopped = await h.answer("r", prompt, max_tokens=30, stop=("cabca",), min_tokens=14)
        known = [*prompt, *stopped.token_ids]
        later = await h.answer("s", [*prompt, *answer.encode()], max_tokens=1)
        assert h.scheduler.speculation_stats.num_accepted_tokens
        assert later.usage.cached_tokens <= len(known)
