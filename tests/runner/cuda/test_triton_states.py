"""Layers that keep a state on the runner of a GPU: slots, copies and saves, graphs and all."""

from __future__ import annotations

import torch

import streamserve_kernels
from streamserve.core.sampling_params import SamplingParams
from streamserve.models import LanguageModel, kv_bytes_per_block, load_model, state_bytes
from streamserve.runner.build import build_runner
from streamserve.runner.memory import AvailableMemory, MemoryPlan, plan_memory
from tests.models.native import HYBRID
from tests.models.random_model import random_model
from tests.runner.cuda.conftest import triton_runner
from tests.runner.loop import Loop, forget
from tests.runner.test_end_to_end import requests

BLOCK_SIZE = 16
NUM_BLOCKS = 20
NUM_SLOTS = 4
MAX_LEN = 64
MAX_TOKENS = 32
SEATS = 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=2)
SHARED = [3 + 7 * i % 90 for i in range(21)]  # more tokens than are gone through one by one
PROMPTS = [[*SHARED, 4, 9], [*SHARED, 8]]


def memory_for(model: LanguageModel) -> MemoryPlan:
    per_block = kv_bytes_per_block(model.spec, BLOCK_SIZE, model.dtype)
    per_state = state_bytes(model.spec, model.dtype)
    return plan_memory(
        available=AvailableMemory(2**40, "a test"),
        weight_bytes=model.nbytes,
        step_buffer_bytes=0,
        kv_bytes_per_block=per_block,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LEN,
        max_num_seqs=SEATS,
        kv_cache_memory=2 * NUM_SLOTS * per_state + NUM_BLOCKS * per_block,
        state_bytes=per_state,
    )


def loop(runner, **config) -> Loop:
    options = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_num_seqs": SEATS}
    sizes = {"max_model_len": MAX_LEN, "max_num_batched_tokens": MAX_TOKENS}
    return Loop(runner, num_state_slots=NUM_SLOTS, **options, **sizes, **config)


def test_who_goes_on_from_a_state_answers_as_the_naive_kernels_do(device, tmp_path):
    random_model(HYBRID["qwen3.5"]()).save_pretrained(tmp_path)

    def loaded(backend: str) -> LanguageModel:
        kernels = streamserve_kernels.load(device, backend)
        options = {"dtype": torch.float32, "device": device, "max_model_len": MAX_LEN}
        return load_model(tmp_path, kernels=kernels, **options)

    model = loaded("naive")
    plain, _ = build_runner(model, memory_for(model), max_num_batched_tokens=MAX_TOKENS)

    def alone(prompt: list[int]) -> list[int]:
        forget(plain)
        return loop(plain, prefix=False).run(requests([prompt], GREEDY))[0]

    expected = [alone(prompt) for prompt in PROMPTS]
    turn = [*PROMPTS[0], *expected[0], 11]
    expected.append(alone(turn))
    plain.close()

    model = loaded("triton")
    memory = memory_for(model)
    assert memory.num_state_slots == NUM_SLOTS
    runner = triton_runner(model, memory, MAX_TOKENS)
    before = model.kernels.compilations()
    served = loop(runner, max_steps_in_flight=2)
    found = served.run(requests(PROMPTS, GREEDY))
    again = requests([turn], GREEDY, prefix="turn")
    found += served.run(again)
    assert found == expected
    assert again[0].num_cached_tokens == len(turn) - 2
    assert any(plan.state_copies for plan in served.plans)
    assert any(plan.state_saves for plan in served.plans)
    assert model.kernels.compilations() == before
    runner.close()
