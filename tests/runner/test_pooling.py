"""Vectors of prompts through scheduler and runner, against transformers' hidden states."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from streamserve.config import SpeculativeConfig
from streamserve.core.pooling import Pooling
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.build import build_runner
from streamserve_kernels.native.library import why_not
from tests.runner.against_transformers import MAX_LEN, Pair, prompt_of
from tests.runner.loop import Loop
from tests.runner.tiny_llama import memory_for, tiny_llama

pytestmark = pytest.mark.usefixtures("forget_requests")

_numbers = count()
LENGTHS = (1, 2, 5, 17, 40)


def pooled(token_ids: list[int], kind="last", **options) -> Request:
    return request_of(token_ids, max_tokens=1, pooling=Pooling(kind=kind, **options))


def request_of(token_ids: list[int], **params) -> Request:
    options = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **params})
    return Request(f"v{next(_numbers)}", token_ids, options, arrival_time=0.0, seed=0)


def check(pair: Pair, request: Request) -> None:
    pooling = request.sampling_params.pooling
    with torch.no_grad():
        states = pair.theirs(
            torch.tensor([request.token_ids]), output_hidden_states=True
        ).hidden_states[-1][0]
    expected = states.mean(0) if pooling.kind == "mean" else states[-1]
    expected = expected[: pooling.dimensions]
    if pooling.normalize:
        expected = torch.nn.functional.normalize(expected, dim=0)
    assert request.finish_reason is FinishReason.STOP
    assert request.output_token_ids == []
    torch.testing.assert_close(torch.tensor(request.embedding), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 48])
@pytest.mark.parametrize("kind", ["last", "mean"])
def test_vectors_are_transformers(pair, runner, kind, max_num_batched_tokens, steps_in_flight):
    """In chunks, beside requests that decode, and of prompts that are cached."""
    loop = Loop(
        runner,
        max_num_batched_tokens=max_num_batched_tokens,
        max_steps_in_flight=steps_in_flight,
    )
    prompts = [prompt_of(length, length) for length in LENGTHS]
    alone = Loop(runner, prefix=False).run([request_of(prompt) for prompt in prompts])
    for turn in range(2):
        asking = [pooled(prompt, kind) for prompt in prompts]
        others = [request_of(prompt) for prompt in prompts]
        loop.run([request for both in zip(asking, others, strict=True) for request in both])
        for request in asking:
            check(pair, request)
        assert [request.output_token_ids for request in others] == alone
        num_cached = sum(request.num_cached_tokens for request in asking)
        assert num_cached == 0 if kind == "mean" else turn == 0 or num_cached > 50


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_a_preempted_prompt_has_its_vector(pair, runner, kind):
    """Answers that came before it take its blocks while it is computed chunk by chunk."""
    loop = Loop(runner, num_blocks=24, max_num_batched_tokens=6, policy="fcfs")
    answers = [request_of(prompt_of(8, seed), max_tokens=30) for seed in range(2)]
    asking = pooled(prompt_of(60, 9), kind)
    loop.run([*answers, asking])
    assert asking.num_preemptions > 0
    check(pair, asking)


def test_a_vector_is_cut_and_scaled_as_asked(pair, runner):
    prompt = prompt_of(11, 4)
    asking = [
        pooled(prompt, kind, dimensions=dimensions, normalize=normalize)
        for kind in ("last", "mean")
        for dimensions in (None, 5)
        for normalize in (True, False)
    ]
    Loop(runner).run(asking)
    assert [len(request.embedding) for request in asking] == [32, 32, 5, 5] * 2
    for request in asking:
        check(pair, request)


def test_the_longest_prompt_needs_no_room_for_an_answer(pair, runner):
    asking = [pooled(prompt_of(MAX_LEN, seed), kind) for seed, kind in enumerate(("last", "mean"))]
    loop = Loop(runner, num_blocks=MAX_LEN // 4)
    loop.run(asking)
    for request in asking:
        check(pair, request)
    assert loop.scheduler.kv_cache.num_free_blocks == MAX_LEN // 4


def test_drafts_and_logprobs_of_prompts_beside_it_are_their_own(pair, runner):
    speculative = SpeculativeConfig(
        num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3
    )
    repeating = prompt_of(6, 1) * 3
    alone = Loop(runner, prefix=False).run([request_of(repeating, max_tokens=20)])
    on_device = pair.kind.endswith("device")  # where nothing is drafted
    loop = Loop(runner, max_num_batched_tokens=9, speculative=None if on_device else speculative)
    decoding = request_of(repeating, max_tokens=20)
    logprobs = request_of(prompt_of(20, 3), prompt_logprobs=0)
    asking = [pooled(prompt_of(15, seed), kind) for seed, kind in ((5, "last"), (6, "mean"))]
    assert loop.run([decoding, logprobs, *asking])[0] == alone[0]
    for request in asking:
        check(pair, request)
    theirs = pair.logprobs(logprobs.token_ids)
    for row, entry in zip(theirs, logprobs.prompt_logprobs, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("kind", ["last", "mean"])
def test_recorded_steps_give_what_function_by_function_gives(tmp_path, kind):
    model = tiny_llama(tmp_path, backend="native", dtype=torch.bfloat16)
    memory = memory_for(model, num_blocks=48, block_size=16)
    runner, _ = build_runner(model, memory, max_num_batched_tokens=48)
    prompts = [prompt_of(length, length) for length in LENGTHS]

    def vectors(**options) -> list[torch.Tensor]:
        asking = [pooled(prompt, kind) for prompt in prompts]
        others = [request_of(prompt) for prompt in prompts]
        Loop(runner, num_blocks=48, block_size=16, **options).run([*asking, *others])
        return [torch.tensor(request.embedding) for request in asking]

    try:
        recorded = [vectors(), vectors(max_num_batched_tokens=9)]
        model._recorded = None
        expected = vectors(prefix=False)
    finally:
        runner.close()
    for found in recorded:
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
            assert float(ours @ theirs) > 0.999
