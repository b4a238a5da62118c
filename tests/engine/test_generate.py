"""The engine as an async generator."""

from __future__ import annotations

import pytest

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import EngineError, InvalidParameterError
from tests.engine.fakes import FakeRunner, serving, turns

PARAMS = SamplingParams(max_tokens=100)


async def test_it_yields_what_is_new_until_the_end():
    async with serving(FakeRunner()) as h:
        outputs = [output async for output in h.engine.generate("Hi", PARAMS)]
        assert "".join(output.text for output in outputs) == "Hello, world!"
        assert outputs[-1].finish_reason is FinishReason.STOP
        again = [output async for output in h.engine.generate(list(b"Hi"), PARAMS)]
        assert "".join(output.text for output in again) == "Hello, world!"


async def test_leaving_the_loop_early_frees_the_request():
    async with serving(FakeRunner(default="ever " * 40)) as h:
        async for _ in h.engine.generate("Hi", PARAMS):
            assert h.engine.stats().num_running == 1
            break
        await turns()
        assert h.engine.is_idle


async def test_a_refusal_comes_before_the_first_output():
    async with serving(FakeRunner()) as h:
        with pytest.raises(InvalidParameterError, match="at least one token"):
            await anext(h.engine.generate([], PARAMS))


async def test_a_failed_step_raises():
    runner = FakeRunner()
    runner.fail_all = True
    async with serving(runner) as h:
        with pytest.raises(EngineError, match="the model step failed"):
            await anext(h.engine.generate("Hi", PARAMS))
