"""Many answers from one prompt through engine, scheduler, runner and a real (tiny) model."""

from __future__ import annotations

import asyncio
from functools import cache
from itertools import count

import pytest
import torch

from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.byte_tokenizer import ByteTokenizer
from tests.runner.against_transformers import BLOCK_SIZE, MAX_LEN, NUM_BLOCKS, VOCAB, prompt_of
from tests.runner.loop import forget

_numbers = count()
EOS = frozenset(range(1, 90, 9))  # many, so that sequences end


class _Shared:
    """A runner that outlives its engine."""

    def __init__(self, runner) -> None:
        self._runner = runner
        self.launch, self.sample = runner.launch, runner.sample
        self.on_death = runner.on_death
        self.num_compilations = 0

    def close(self) -> None:
        """The fixture's."""


def answers(runner, submit, *, num_blocks=NUM_BLOCKS, **config):
    """The outputs of all streams that ``submit(engine)`` gave, and the scheduler."""
    scheduler = Scheduler(
        SchedulerConfig(max_model_len=MAX_LEN, max_num_seqs=8, max_num_batched_tokens=48, **config),
        KVCacheManager(CacheConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE)),
        monotonic,
    )

    async def run():
        engine = AsyncEngine(
            scheduler=scheduler,
            runner=_Shared(runner),
            tokenizer=ByteTokenizer(),
            eos_token_ids=EOS,
            max_model_len=MAX_LEN,
            vocab_size=VOCAB,
        )
        await engine.start()
        streams = submit(engine)
        outputs = await asyncio.gather(*(_read(stream) for stream in streams))
        await engine.stop()
        scheduler.check_integrity()
        assert scheduler.kv_cache.num_free_blocks == num_blocks
        return outputs

    found = asyncio.run(run())
    forget(runner)
    return found, scheduler


async def _read(stream):
    outputs = [output async for output in stream]
    assert outputs[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    return [token_id for output in outputs for token_id in output.token_ids], outputs[-1]


def beams(engine, prompt, width, **params):
    search = {k: params.pop(k) for k in ("length_penalty", "early_stopping") if k in params}
    return engine.submit_beams(
        prompt,
        SamplingParams(**params),
        BeamSearchParams(beam_width=width, **search),
        width,
        request_id=f"b{next(_numbers)}",
    )


def theirs(pair, prompt, width, max_tokens, eos_token_id=tuple(sorted(EOS)), **options):
    """transformers' beams: once for all runners."""
    asked = (tuple(prompt), width, max_tokens, eos_token_id, tuple(options.items()))
    return _theirs(pair, *asked)


@cache
def _theirs(pair, prompt, width, max_tokens, eos_token_id, options):
    found = pair.theirs.generate(
        torch.tensor([prompt]),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(eos_token_id),
        **dict(options),
    )
    sequences = []
    for row in found[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in eos_token_id), None)
        sequences.append(row if end is None else row[: end + 1])
    return sequences


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_beams_are_transformers(pair, runner, early_stopping, length_penalty):
    ended = 0
    for seed, width in ((1, 2), (2, 4), (3, 5)):
        prompt = prompt_of(7 * seed, seed)
        options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        outputs, _ = answers(
            runner, lambda e, p=prompt, w=width, o=options: beams(e, p, w, max_tokens=14, **o)
        )
        found = [token_ids for token_ids, _ in outputs]
        assert found == theirs(pair, prompt, width, 14, **options)
        ended += sum(last.finish_reason is FinishReason.STOP for _, last in outputs)
    assert ended or length_penalty > 1.0  # which prefers long ones


def test_beams_with_a_least_length_are_transformers(pair, runner):
    prompt = prompt_of(9, 4)
    outputs, _ = answers(runner, lambda e: beams(e, prompt, 4, max_tokens=12, min_tokens=8))
    found = [token_ids for token_ids, _ in outputs]
    assert found == theirs(pair, prompt, 4, 12, min_new_tokens=8)


def test_beams_that_ignore_the_end_are_transformers(pair, runner):
    prompt = prompt_of(9, 5)
    outputs, _ = answers(runner, lambda e: beams(e, prompt, 3, max_tokens=12, ignore_eos=True))
    found = [token_ids for token_ids, _ in outputs]
    assert found == theirs(pair, prompt, 3, 12, eos_token_id=(-1,))


def test_searches_beside_each_other_and_with_little_memory_are_themselves(pair, runner):
    prompts = [prompt_of(20, seed) for seed in (6, 7)]

    def submit(engine):
        searches = [stream for p in prompts for stream in beams(engine, p, 3, max_tokens=12)]
        plain = engine.submit(prompts[0], SamplingParams(max_tokens=12), request_id="plain")
        return [*searches, plain]

    outputs, scheduler = answers(runner, submit, num_blocks=18)
    found = [token_ids for token_ids, _ in outputs[:-1]]
    assert found == theirs(pair, prompts[0], 3, 12) + theirs(pair, prompts[1], 3, 12)
    assert scheduler.kv_cache.stats.num_block_copies > 0


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_blocks", [NUM_BLOCKS, 24])
def test_a_choice_is_itself_in_any_batch(runner, steps_in_flight, num_blocks):
    prompt = prompt_of(22, 8)
    params = SamplingParams(
        temperature=1.2, top_p=0.95, seed=11, max_tokens=16, ignore_eos=True, presence_penalty=0.2
    )

    def alone(index):
        def submit(engine):
            return [engine.submit(prompt, params, request_id="one", choice_index=index)]

        return answers(runner, submit)[0][0][0]

    outputs, scheduler = answers(
        runner,
        lambda engine: engine.submit_choices(prompt, params, 6, request_id="many"),
        num_blocks=num_blocks,
        max_steps_in_flight=steps_in_flight,
    )
    found = [token_ids for token_ids, _ in outputs]
    assert found == [alone(index) for index in range(6)]
    assert len({tuple(token_ids) for token_ids in found}) == 6
    if num_blocks == NUM_BLOCKS:
        assert scheduler.kv_cache.stats.num_block_copies == 5
