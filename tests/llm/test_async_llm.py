"""``AsyncLLM``: the answer so far, again and again, on the caller's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from streamserve import AsyncLLM, SamplingParams
from streamserve.errors import EngineError, InvalidParameterError
from tests.e2e.servers import SMALL

GREEDY = SamplingParams(temperature=0, max_tokens=12)
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def llm() -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(**SMALL) as llm:
        yield llm


async def test_all_that_it_does(llm):
    texts = [output.outputs[0].text async for output in llm.generate("Hello", GREEDY)]
    assert all(later.startswith(before) for before, later in pairwise(texts))

    async def last(prompt: str):
        outputs = [output async for output in llm.generate(prompt, GREEDY)]
        assert [output.finished for output in outputs[:-1]] == [False] * (len(outputs) - 1)
        assert outputs[-1].finished
        return outputs[-1].outputs[0].text

    assert await asyncio.gather(*(last("Hello") for _ in range(3))) == [texts[-1]] * 3

    answer = [output async for output in llm.chat(CAPITAL, GREEDY)][-1]
    assert "Paris" in answer.outputs[0].text

    several = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=9, ignore_eos=True)
    outputs = [output async for output in llm.generate("Hello", several)]
    assert [output.finished for output in outputs].index(True) == len(outputs) - 1
    assert [len(answer.token_ids) for answer in outputs[-1].outputs] == [9] * 3
    with pytest.raises(InvalidParameterError, match="best_of must not be above n"):
        await anext(llm.generate("Hello", SamplingParams(best_of=2)))

    beams = SamplingParams(n=2, best_of=3, use_beam_search=True, max_tokens=6)
    last_output = [output async for output in llm.generate("Hello", beams)][-1]
    assert last_output.finished
    assert len({answer.text for answer in last_output.outputs}) == 2

    async for output in llm.generate("Hello", SamplingParams(max_tokens=400, ignore_eos=True)):
        assert not output.finished
        break
    async with asyncio.timeout(60):
        while not llm.engine.is_idle:
            await asyncio.sleep(0)

    long = llm.generate("Hello", SamplingParams(max_tokens=400, ignore_eos=True), "mine")
    await anext(long)
    assert llm.abort("mine")
    with pytest.raises(EngineError, match="cut off"):
        async for _ in long:
            pass

    with pytest.raises(InvalidParameterError, match="token ids from 0"):
        await anext(llm.generate([10**6], GREEDY))
