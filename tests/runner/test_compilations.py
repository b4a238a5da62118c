"""Nothing is compiled once the runner is warm: a reader would wait for it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import streamserve_kernels
from streamserve.config import CacheConfig, SchedulerConfig, SpeculativeConfig
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.models import allocate_kv_cache
from streamserve.runner.build import build_runner
from streamserve.runner.compilations import num_compilations
from tests.runner.tiny_llama import MAX_LEN, VOCAB, memory_for, tiny_llama

BLOCK_SIZE = 16
NUM_BLOCKS = 128
MAX_TOKENS = 48
MAX_SAMPLED = 48  # 8 seats with five drafts each
# Sizes that the Triton kernels take: heads of 64, and blocks of 16.
SHAPE = {"hidden_size": 256, "head_dim": 64}
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=9),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=17),
    SamplingParams(temperature=1.1, top_k=7, min_p=0.02, max_tokens=5),
    SamplingParams(temperature=0.0, logprobs=3, max_tokens=12),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, max_tokens=30),
]


def serve(runner, scheduler, requests) -> None:
    """The engine's step loop with two steps in flight, some requests coming late."""
    late = [requests.pop() for _ in range(len(requests) // 2)]
    for request in requests:
        scheduler.add(request)
    futures = []
    while scheduler.has_unfinished or late or futures:
        if late and not scheduler.num_waiting:
            scheduler.add(late.pop())
        plan = scheduler.schedule()
        if plan is not None:
            runner.launch(plan)
            futures.append(runner.sample(plan.step_id))
        if futures and (plan is None or len(futures) == 2):
            scheduler.update(futures.pop(0).result(timeout=120))


def ragged_requests(seed: int) -> list[Request]:
    """Prompts of 1 to 90 tokens, half of which begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    return [
        Request(
            f"{seed}-{i}",
            shared[: 40 * (i % 2)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 50))],
            PARAMS[i % len(PARAMS)],
            arrival_time=0.0,
            seed=i,
        )
        for i in range(24)
    ]


DRAFTING = SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_min=1, prompt_lookup_max=2)


def counts_while_serving(runner, speculative: SpeculativeConfig | None = None) -> list[int]:
    """The runner's count when it is warm, and after each of two rounds."""
    cache = KVCacheManager(CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE))
    config = SchedulerConfig(
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=MAX_TOKENS,
        max_steps_in_flight=2,
        cascade_overhead_tokens=0,
        speculative=speculative,
    )
    scheduler = Scheduler(config, cache, lambda: 0.0)
    counts = [runner.num_compilations]
    for seed in range(2):
        serve(runner, scheduler, ragged_requests(seed))
        counts.append(runner.num_compilations)
    assert scheduler.prefix_grouping.num_saved_tokens > 0
    assert (scheduler.speculation_stats.num_drafts > 0) == (speculative is not None)
    return counts


@pytest.mark.parametrize("speculative", [None, DRAFTING], ids=["plain", "drafting"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu(dtype, speculative, tmp_path):
    model = tiny_llama(tmp_path, dtype=dtype, backend="cpu", **SHAPE)
    before = num_compilations(model.kernels)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    runner, _ = build_runner(
        model,
        memory,
        max_num_batched_tokens=MAX_TOKENS,
        max_num_sampled=MAX_SAMPLED if speculative else None,
    )
    try:
        counts = counts_while_serving(runner, speculative)
    finally:
        runner.close()
    assert counts[0] >= before
    assert counts[0] > 0
    assert all(one == other for one, other in pairwise(counts))


@pytest.mark.gpu
@pytest.mark.parametrize("speculative", [None, DRAFTING], ids=["plain", "drafting"])
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_on_a_gpu(enforce_eager, speculative, tmp_path):
    from streamserve.runner.cuda.build import build_cuda_runner
    from streamserve.runner.cuda.step_key import StepLadder

    device = torch.device("cuda", torch.cuda.current_device())
    model = tiny_llama(tmp_path, dtype=torch.bfloat16, device=device, **SHAPE)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    caches = allocate_kv_cache(
        model.spec, NUM_BLOCKS, BLOCK_SIZE, torch.bfloat16, device, model.kernels
    )
    drafting = {}
    if speculative is not None:
        drafting = {"num_drafts": 5, "max_num_sampled": MAX_SAMPLED}
    runner, _ = build_cuda_runner(
        model,
        memory,
        StepLadder(MAX_TOKENS, memory.max_num_seqs, **drafting),
        max_num_batched_tokens=MAX_TOKENS,
        kv_caches=caches,
        enforce_eager=enforce_eager,
    )
    try:
        counts = counts_while_serving(runner, speculative)
    finally:
        runner.close()
    assert counts[0] > 0
    assert all(one == other for one, other in pairwise(counts))


def test_graphs_of_torch_compile_count_too():
    model = torch.compile(lambda x: x + 1, backend="eager")
    kernels = streamserve_kernels.load("cpu", "naive")
    before = num_compilations(kernels)
    model(torch.zeros(3))
    first = num_compilations(kernels)
    model(torch.ones(3))
    assert first == before + 1
    assert num_compilations(kernels) == first
