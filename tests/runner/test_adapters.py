"""Scheduler, cache, runner and a tiny model with two adapters: whoever is beside whom, the answers
are those of the models that PEFT makes by merging.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch

import streamserve_kernels
from streamserve.config import AdapterConfig
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.models import load_model
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.step_key import StepLadder
from tests.models.test_adapters import merged_model, save_adapter
from tests.runner.against_transformers import MAX_LEN, NUM_BLOCKS, VOCAB, Pair
from tests.runner.loop import BLOCK_SIZE, Loop, forget
from tests.runner.tiny_llama import CPU, memory_for

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
BASE, FIRST, SECOND = None, 0, 1
ADAPTERS = (BASE, FIRST, SECOND)
MAX_TOKENS = 48


class World:
    """A runner with both adapters, prompts, and what each model makes of them."""

    def __init__(self, directory: Path, kind: str) -> None:
        """``kind``: a backend, or one "on a device" (here the CPU too)."""
        backend, _, on_device = kind.partition(" ")
        pair = Pair(directory / "model", backend)
        paths = {slot: directory / str(slot) for slot in (FIRST, SECOND)}
        save_adapter(pair.theirs, paths[FIRST], target_modules="all-linear")
        save_adapter(pair.theirs, paths[SECOND], target_modules=["q_proj", "v_proj"], r=3)
        model = load_model(
            directory / "model",
            dtype=torch.float32,
            device=CPU,
            kernels=streamserve_kernels.load(CPU, backend),
            adapters=AdapterConfig(num_adapters=2, max_rank=4),
        )
        assert model.adapters is not None
        for slot, path in paths.items():
            model.adapters.load(slot, path)
        memory = memory_for(
            model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=MAX_LEN
        )
        build, caches = build_runner, None
        if on_device:
            caches = new_kv_cache(model.spec, memory, model.dtype, CPU, model.kernels)
            ladder = StepLadder(MAX_TOKENS, memory.max_num_seqs, num_adapters=2)
            build = partial(build_cuda_runner, ladder=ladder)
        self.runner, _ = build(model, memory, max_num_batched_tokens=MAX_TOKENS, kv_caches=caches)
        rng = random.Random(3)
        self.prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(6, 50))] for _ in "abc"]
        self.expected = {BASE: [_greedy(pair.theirs, prompt) for prompt in self.prompts]}
        for slot, path in paths.items():
            merged = merged_model(pair.theirs, path)
            self.expected[slot] = [_greedy(merged, prompt) for prompt in self.prompts]

    def request(self, adapter: int | None, index: int, name: str = "") -> Request:
        return Request(
            f"{name} {adapter} {index}",
            self.prompts[index],
            GREEDY,
            arrival_time=0.0,
            seed=0,
            adapter=adapter,
            cache_salt=f"adapter {adapter}",
        )

    def crowd(self, name: str = "") -> tuple[list[Request], list[list[int]]]:
        """Everyone's requests, in turns, and the answers that they must get."""
        order = [(adapter, i) for i in range(len(self.prompts)) for adapter in ADAPTERS]
        return [self.request(*who, name) for who in order], [self.expected[a][i] for a, i in order]


def _greedy(model, prompt: list[int]) -> list[int]:
    token_ids = list(prompt)
    with torch.no_grad():
        for _ in range(GREEDY.max_tokens or 0):
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt) :]


@pytest.fixture(scope="module", params=["cpu", "naive on a device"])
def world(request, tmp_path_factory):
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("world"), request.param)
    yield world
    world.runner.close()


@pytest.fixture(autouse=True)
def forget_requests(world):
    yield
    forget(world.runner)


def test_alone(world):
    for adapter in ADAPTERS:
        for index, expected in enumerate(world.expected[adapter]):
            request = world.request(adapter, index, "alone")
            assert Loop(world.runner, prefix=False).run([request]) == [expected]
            forget(world.runner)
    assert world.expected[BASE] != world.expected[FIRST] != world.expected[SECOND]


@pytest.mark.parametrize("max_num_batched_tokens", [MAX_TOKENS, 9])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_beside_each_other(world, steps_in_flight, max_num_batched_tokens):
    """In one batch, whole and in chunks; and again, each on what its own adapter left cached."""
    loop = Loop(
        world.runner,
        max_steps_in_flight=steps_in_flight,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    requests, expected = world.crowd()
    assert loop.run(requests) == expected
    assert not any(request.num_cached_tokens for request in requests)  # of another's nothing
    forget(world.runner)
    again, expected = world.crowd("again")
    assert loop.run(again) == expected
    assert all(request.num_cached_tokens for request in again)


def test_preempted(world):
    loop = Loop(world.runner, num_blocks=30)
    requests, expected = world.crowd("preempted")
    assert loop.run(requests) == expected
    assert sum(request.num_preemptions for request in requests)


def test_a_slot_is_used_until_its_last_step_has_retired(world):
    loop = Loop(world.runner)
    request = world.request(SECOND, 0, "used")
    loop.scheduler.add(request)
    assert loop.scheduler.uses_adapter(SECOND)
    assert not loop.scheduler.uses_adapter(FIRST)
    plan = loop.scheduler.schedule()
    world.runner.launch(plan)
    loop.scheduler.finish(request, FinishReason.ABORT)
    assert loop.scheduler.uses_adapter(SECOND)
    loop.futures.append(world.runner.sample(plan.step_id))
    loop.retire()
    assert not loop.scheduler.uses_adapter(SECOND)
