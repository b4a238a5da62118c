"""Several answers to one prompt in the engine: their streams, their ends, and what they leave."""

from __future__ import annotations

import asyncio

import pytest

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.errors import (
    ContextLengthError,
    DeviceDeadError,
    EngineDeadError,
    EngineError,
    InvalidParameterError,
)
from tests.engine.beam_runner import BeamRunner
from tests.engine.fakes import PROMPT, FakeRunner, collect, serving, turns

ANSWERS = {"r": "one", "r/1": "two", "r/2": "three"}


def choices(harness, n=3, **params):
    params = SamplingParams(**{"max_tokens": 64, **params})
    streams = harness.engine.submit_choices(list(PROMPT), params, n, request_id="r")
    harness.streams += streams
    return streams


def beams(harness, width=2, n=2, length_penalty=1.0, early_stopping=False, **params):
    params = SamplingParams(**{"max_tokens": 4, **params})
    search = BeamSearchParams(
        beam_width=width, length_penalty=length_penalty, early_stopping=early_stopping
    )
    streams = harness.engine.submit_beams(list(PROMPT), params, search, n, request_id="r")
    harness.streams += streams
    return streams


async def test_each_choice_has_its_own_answer_and_the_prompt_is_computed_once():
    runner = FakeRunner(ANSWERS)
    async with serving(runner) as harness:
        outputs = [await collect(stream) for stream in choices(harness)]
    assert [output.text for output in outputs] == ["one", "two", "three"]
    assert [output.usage.prompt_tokens for output in outputs] == [len(PROMPT)] * 3
    assert [output.usage.cached_tokens for output in outputs] == [0] + [len(PROMPT) - 1] * 2
    scheduled = [s for plan in runner.plans for s in plan.scheduled if s.output_position == 0]
    assert [len(s.token_ids) for s in scheduled] == [len(PROMPT), 1, 1]


async def test_what_each_choice_said_is_found_by_the_next_turn():
    answers = {"r": "one, " * 12, "r/1": "two, " * 12}
    async with serving(FakeRunner(answers)) as harness:
        for stream in choices(harness, n=2):
            await collect(stream)
        for i, text in enumerate(answers.values()):
            turn = [*PROMPT, *text.encode(), 33]
            params = SamplingParams(max_tokens=1)
            stream = harness.engine.submit(turn, params, request_id=f"t{i}")
            assert (await collect(stream)).usage.cached_tokens == len(turn) - 1


async def test_choices_have_one_seed_and_an_index_each():
    runner = FakeRunner(ANSWERS)
    async with serving(runner) as harness:
        streams = choices(harness, seed=5)
        await asyncio.gather(*(collect(stream) for stream in streams))
        new = [one for plan in runner.plans for one in plan.new_requests]
        assert [(one.seed, one.choice_index) for one in new] == [(5, 0), (5, 1), (5, 2)]
        unseeded = harness.engine.submit_choices(
            list(PROMPT), SamplingParams(max_tokens=2), 2, request_id="u"
        )
        await asyncio.gather(*(collect(stream) for stream in unseeded))
    new = [one for plan in runner.plans for one in plan.new_requests][3:]
    assert new[0].seed == new[1].seed


@pytest.mark.parametrize("index", [0, 1])
async def test_one_choice_may_leave_while_the_others_go_on(index):
    runner = FakeRunner(ANSWERS, hold=True)
    async with serving(runner) as harness:
        streams = choices(harness)
        await runner.release()
        streams[index].close()
        runner.release_all()
        rest = [stream for i, stream in enumerate(streams) if i != index]
        texts = [(await collect(stream)).text for stream in rest]
    assert texts == [text for i, text in enumerate(ANSWERS.values()) if i != index]


async def test_choices_leave_before_their_prompt_is_computed():
    runner = FakeRunner(ANSWERS, hold=True)
    async with serving(runner) as harness:
        streams = choices(harness)
        await runner.launched()
        for stream in streams:
            stream.close()
        runner.release_all()
        await turns()
        assert harness.engine.is_idle
        assert harness.num_held_blocks == 0


async def test_a_choice_that_cannot_be_queued_queues_none():
    async with serving(FakeRunner()) as harness:
        with pytest.raises(ContextLengthError):
            choices(harness, max_tokens=10_000)
        assert harness.engine.is_idle
        streams = choices(harness)
        with pytest.raises(InvalidParameterError, match="unique"):
            choices(harness)
        for stream in streams:
            stream.close()


async def test_prompt_logprobs_are_every_choices():
    runner = BeamRunner()
    async with serving(runner) as harness:
        streams = choices(harness, prompt_logprobs=0, max_tokens=2)
        outputs = [await collect(stream) for stream in streams]
    for output in outputs:
        assert [entry.token_id for entry in output.prompt_logprobs] == PROMPT[1:]


# The tree of BeamRunner: likeliest first, each with its logprob.
#   a -> c d    b -> e EOS


async def test_beams_come_best_first_and_end_with_their_last_token():
    runner = BeamRunner({"": "a-0.5 b-1.0", "a": "c-1.0 d-1.2", "b": "e-0.1 $-0.2"})
    async with serving(runner) as harness:
        outputs = [await collect(stream) for stream in beams(harness, max_tokens=2)]
    assert [output.text for output in outputs] == ["be", "b"]
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH, FinishReason.STOP]
    assert [output.usage.completion_tokens for output in outputs] == [2, 2]
    assert outputs[0].logprobs == []


async def test_both_beams_may_go_on_from_the_second():
    first = {"": "a-0.5 b-0.6", "a": "c-3.0 d-4.0", "b": "e-0.1 f-0.2"}
    runner = BeamRunner({**first, "be": "x-0.1 y-5.0", "bf": "z-0.1 w-5.0"})
    async with serving(runner) as harness:
        outputs = [await collect(stream) for stream in beams(harness, max_tokens=3)]
    assert [output.text for output in outputs] == ["bex", "bfz"]


async def test_beams_say_what_was_cached_of_their_prompt():
    async with serving(BeamRunner()) as harness:
        for num_cached in (0, len(PROMPT) - 1):
            outputs = [await collect(stream) for stream in beams(harness)]
            assert [output.usage.cached_tokens for output in outputs] == [num_cached] * 2


async def test_beams_report_the_logprobs_of_their_tokens():
    runner = BeamRunner({"": "a-0.5 b-1.0", "a": "c-1.0 d-1.2", "b": "e-0.1 $-0.2"})
    async with serving(runner) as harness:
        [stream] = beams(harness, n=1, max_tokens=2, logprobs=1)
        output = await collect(stream)
    assert [entry.logprob for entry in output.logprobs] == [-1.0, -0.1]
    assert [entry.top for entry in output.logprobs] == [((97, -0.5),), ((101, -0.1),)]


async def test_beams_share_blocks_and_a_lone_continuation_copies_nothing():
    runner = BeamRunner()
    async with serving(runner) as harness:
        streams = beams(harness, width=3, n=3, max_tokens=6)
        await asyncio.gather(*(collect(stream) for stream in streams))
        stats = harness.scheduler.kv_cache.stats
        num_forks = sum(len(plan.new_requests) for plan in runner.plans) - 1
    assert num_forks >= 2
    assert stats.num_block_copies <= num_forks
    computed = [len(s.token_ids) for plan in runner.plans for s in plan.scheduled]
    assert computed[0] == len(PROMPT)
    assert set(computed[1:]) == {1}


@pytest.mark.parametrize("num_steps", [0, 1, 3])
async def test_who_closes_one_beam_closes_all(num_steps):
    runner = BeamRunner(hold=True)
    async with serving(runner) as harness:
        streams = beams(harness, width=3, n=2, max_tokens=50)
        await runner.release(num_steps)
        await runner.launched()
        streams[1].close()
        last = await collect(streams[0])
        assert last.finish_reason is FinishReason.ABORT
        runner.release_all()
        await turns()
        assert harness.engine.is_idle
        assert harness.num_held_blocks == 0


@pytest.mark.parametrize("num_steps", [1, 2, 5])
async def test_beams_go_on_after_a_step_that_fails(num_steps):
    async with serving(BeamRunner()) as harness:
        quiet = [await collect(stream) for stream in beams(harness, width=4, max_tokens=12)]
    runner = BeamRunner()
    runner.failing_samples = {num_steps, num_steps + 9}
    async with serving(runner) as harness:
        failed = [await collect(stream) for stream in beams(harness, width=4, max_tokens=12)]
        assert harness.engine.stats().num_failed_steps == 2
    assert [o.token_ids for o in failed] == [o.token_ids for o in quiet]


async def test_a_beam_that_fails_alone_fails_them_all():
    runner = BeamRunner()
    async with serving(runner) as harness:
        runner.spoilt = {"r/2"}
        streams = beams(harness, width=3, n=2, max_tokens=50)
        for stream in streams:
            with pytest.raises(EngineError, match="model step failed"):
                await collect(stream)
        assert harness.engine.is_idle
        assert (await harness.answer("after", max_tokens=2)).finish_reason is not None


async def test_a_search_dies_with_the_engine():
    runner = BeamRunner(hold=True)
    async with serving(runner) as harness:
        streams = beams(harness, width=3, n=2, max_tokens=50)
        await runner.release(3)
        await runner.launched()
        runner.error, runner.failing_samples = DeviceDeadError("gone"), set(range(99))
        runner.release_all()
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await collect(stream)
        async with asyncio.timeout(60):
            await harness.engine.wait_dead()


async def test_beams_run_beside_others_and_with_little_memory():
    runner = BeamRunner()
    async with serving(runner) as harness:
        quiet = [await collect(stream) for stream in beams(harness, width=4, max_tokens=30)]
    runner = BeamRunner()
    async with serving(runner, num_blocks=6, max_num_seqs=3) as harness:
        streams = beams(harness, width=4, max_tokens=30)
        other = harness.submit("other", max_tokens=20)
        crowded = [await collect(stream) for stream in streams]
        await collect(other)
    assert [o.token_ids for o in crowded] == [o.token_ids for o in quiet]


async def test_two_searches_that_fill_the_memory_both_end():
    runner = BeamRunner()
    async with serving(runner, num_blocks=7) as harness:
        first = beams(harness, width=4, max_tokens=30)
        params = SamplingParams(max_tokens=30)
        search = BeamSearchParams(beam_width=4)
        second = harness.engine.submit_beams(list(PROMPT), params, search, 1, request_id="s")
        outputs = [await collect(stream) for stream in (*first, *second)]
    assert outputs[0].token_ids == outputs[2].token_ids


async def test_beams_take_no_id_that_somebody_else_may_have_chosen():
    async with serving(BeamRunner()) as harness:
        other = harness.engine.submit(list(PROMPT), SamplingParams(max_tokens=8), request_id="r/1")
        outputs = [await collect(stream) for stream in (*beams(harness), other)]
    assert [len(output.token_ids) for output in outputs] == [4, 4, 8]


@pytest.mark.parametrize("is_search", [False, True])
async def test_all_requests_of_an_answer_are_the_same_clients(is_search, monkeypatch):
    origin = {
        "adapter": 1,
        "arrival_time": 0.5,
        "cache_salt": "salt",
        "priority": 3,
        "shares_public_prefixes": True,
        "tenant": "tenant",
        "weight": 2.0,
    }
    entered = []
    async with serving(BeamRunner()) as harness:
        seats, engine = harness.scheduler._seats, harness.engine
        enter = seats.enter

        def spy(request):
            entered.append(request)
            enter(request)

        monkeypatch.setattr(seats, "enter", spy)
        params = SamplingParams(max_tokens=6)
        if is_search:
            search = BeamSearchParams(beam_width=3)
            streams = engine.submit_beams(list(PROMPT), params, search, 2, request_id="r", **origin)
        else:
            streams = engine.submit_choices(list(PROMPT), params, 3, request_id="r", **origin)
        for stream in streams:
            await collect(stream)
    assert len(entered) > 2
    for request in entered:
        assert {name: getattr(request, name) for name in origin} == origin
        assert request.seed == entered[0].seed


async def test_too_many_beams_are_refused():
    async with serving(BeamRunner()) as harness:
        with pytest.raises(InvalidParameterError, match="best_of must be at most 19"):
            beams(harness, width=20)
        with pytest.raises(InvalidParameterError, match="n must be at most the beam width of 2"):
            beams(harness, width=2, n=3)
        assert harness.engine.is_idle


async def test_the_server_stops_in_the_middle_of_a_search():
    runner = BeamRunner(hold=True)
    async with serving(runner) as harness:
        streams = beams(harness, width=2, max_tokens=50)
        await runner.launched()
        stopping = asyncio.create_task(harness.engine.stop())
        await turns()
        runner.release_all()
        for stream in streams:
            assert (await collect(stream)).finish_reason is FinishReason.ABORT
        await stopping
