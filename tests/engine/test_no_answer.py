"""``max_tokens=0``: a request that ends when its prompt is computed, without a token."""

from __future__ import annotations

import asyncio

import pytest

from streamserve.config import SpeculativeConfig
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.engine.null_runner import NullRunner
from streamserve.errors import ContextLengthError, InvalidParameterError
from tests.engine.fakes import EOS, PROMPT, FakeRunner, collect, serving

RUNNERS = pytest.mark.parametrize(
    "runner",
    [FakeRunner, lambda: FakeRunner({"r": [EOS]}), lambda: NullRunner(b"ab")],
    ids=["text", "end at once", "null"],
)


@RUNNERS
@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
async def test_it_ends_with_its_prompt(runner, max_steps_in_flight):
    config = {"max_steps_in_flight": max_steps_in_flight, "max_num_batched_tokens": 16}
    async with serving(runner(), **config) as h:
        output = await h.answer(max_tokens=0, logprobs=2, stop=("x",))
        assert (output.text, output.token_ids, output.logprobs) == ("", [], [])
        assert (output.finish_reason, output.stop_reason) == (FinishReason.LENGTH, None)
        assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (len(PROMPT), 0)
        stats = h.engine.stats()
        assert (stats.prompt_tokens, stats.generation_tokens) == (len(PROMPT), 0)


async def test_its_prompt_stays_cached_and_may_be_all_of_the_context():
    async with serving(NullRunner(b"ab")) as h:
        limit = h.scheduler.max_model_len
        whole = [7] * limit
        output = await h.answer(prompt=whole, max_tokens=0, prompt_logprobs=0)
        assert len(output.prompt_logprobs) == limit - 1
        output = await h.answer("again", prompt=whole, max_tokens=0)
        assert output.usage.cached_tokens == limit - 1
        with pytest.raises(ContextLengthError, match=f"{limit} tokens"):
            h.submit("long", [7] * (limit + 1), max_tokens=0)
        with pytest.raises(InvalidParameterError, match="min_tokens"):
            h.submit("min", max_tokens=0, min_tokens=1)


@pytest.mark.parametrize("stop", [(), ("x",)])
async def test_half_a_character_at_the_prompts_end_is_not_the_answers(stop):
    async with serving(NullRunner(b"ab")) as h:
        output = await h.answer(prompt=list("né".encode()[:-1]), max_tokens=0, stop=stop)
    assert output.text == ""


async def test_beside_streams_that_speculate():
    drafts = SpeculativeConfig(num_speculative_tokens=4, prompt_lookup_min=2, prompt_lookup_max=4)
    async with serving(NullRunner(b"ab"), speculative=drafts) as h:
        prompt = list(b"abababababababab")
        stream = h.submit("stream", prompt, max_tokens=64)
        outputs = await asyncio.gather(
            collect(stream), *(h.answer(f"r{n}", prompt, max_tokens=0) for n in range(5))
        )
    assert [len(output.token_ids) for output in outputs] == [64, 0, 0, 0, 0, 0]


async def test_several_choices_compute_the_prompt_once():
    runner = NullRunner(b"ab")
    async with serving(runner) as h:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        streams = h.engine.submit_choices(list(PROMPT), params, 3, request_id="r")
        outputs = [await collect(stream) for stream in streams]
    assert [len(output.prompt_logprobs) for output in outputs] == [len(PROMPT) - 1] * 3
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH] * 3


async def test_no_beams_can_be_searched():
    async with serving(NullRunner(b"ab")) as h:
        with pytest.raises(InvalidParameterError, match="max_tokens must be at least 1"):
            h.engine.submit_beams(
                list(PROMPT),
                SamplingParams(max_tokens=0),
                BeamSearchParams(beam_width=2),
                1,
                request_id="r",
            )
