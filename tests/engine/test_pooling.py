"""Requests that end with a vector in the engine: one output, and every way that they end early."""

from __future__ import annotations

import asyncio
import math
from array import array

import pytest

from streamserve.core.pooling import Pooling
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.null_runner import NullRunner
from streamserve.errors import ContextLengthError, EngineError, InvalidParameterError
from tests.engine.fakes import PROMPT, collect, serving

VECTOR = [float(len(PROMPT)), float(PROMPT[-1]), 1.0, 0.0]


def pooled(harness, request_id="v", prompt=PROMPT, **options):
    params = SamplingParams(max_tokens=1, pooling=Pooling(**options))
    return harness.engine.submit(list(prompt), params, request_id=request_id)


async def test_a_vector_is_the_one_output():
    async with serving(NullRunner(b"ab")) as harness:
        outputs = [output async for output in pooled(harness, normalize=False)]
        stats = harness.engine.stats()
    [output] = outputs
    assert output.embedding.tolist() == VECTOR
    assert (output.text, output.token_ids, output.finish_reason) == ("", [], FinishReason.STOP)
    assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (len(PROMPT), 0)
    assert (stats.prompt_tokens, stats.generation_tokens) == (len(PROMPT), 0)


async def test_vectors_come_beside_streams_and_share_their_prefix():
    async with serving(NullRunner(b"ab")) as harness:
        stream = harness.engine.submit(
            list(PROMPT), SamplingParams(max_tokens=40), request_id="stream"
        )
        await stream.get()
        last, cut, mean = (
            pooled(harness, str(i), **options)
            for i, options in enumerate(({}, {"dimensions": 2}, {"kind": "mean"}))
        )
        found = [await collect(one) for one in (last, cut, mean)]
        answer = await collect(stream)
    assert len(answer.token_ids) + 1 == 40
    length = math.hypot(*VECTOR)
    assert found[0].embedding.tolist() == pytest.approx([v / length for v in VECTOR])
    assert len(found[1].embedding) == 2
    cached = [output.usage.cached_tokens for output in found]
    assert cached == [16, 16, 0]  # the stream's full block


async def test_the_whole_context_fits_and_no_more():
    async with serving(NullRunner(b"ab")) as harness:
        limit = harness.engine._scheduler.max_model_len
        output = await collect(pooled(harness, prompt=[7] * limit))
        assert output.usage.prompt_tokens == limit
        with pytest.raises(ContextLengthError, match=f"{limit} tokens.*{limit + 1} tokens"):
            pooled(harness, prompt=[7] * (limit + 1))
        with pytest.raises(InvalidParameterError, match="at least one token"):
            pooled(harness, prompt=[])


async def test_one_that_leaves_frees_what_it_held():
    held = []
    async with serving(NullRunner(b"ab", pace=held.append)) as harness:
        stream = pooled(harness)
        while not held:
            await asyncio.sleep(0)
        stream.close()
        held.pop()()
        while not harness.engine.is_idle:
            await asyncio.sleep(0)
        harness.engine._scheduler.check_integrity()


class _NotFinite(NullRunner):
    def _pool(self, plan, sampled):
        found = super()._pool(plan, sampled)
        return {name: array("f", [math.nan, *vector[1:]]) for name, vector in found.items()}


async def test_numbers_that_are_not_finite_are_an_error():
    async with serving(_NotFinite(b"ab")) as harness:
        with pytest.raises(EngineError, match="ValueError"):
            await collect(pooled(harness))
