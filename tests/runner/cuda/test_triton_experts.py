"""A mixture of experts on the runner of a GPU: routing stays on the device, graphs and all."""

from __future__ import annotations

from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.build import build_runner
from tests.runner.cuda.conftest import triton_runner
from tests.runner.loop import Loop, forget
from tests.runner.test_end_to_end import requests
from tests.runner.tiny_llama import memory_for, tiny_llama

BLOCK_SIZE = 16
NUM_BLOCKS = 20
MAX_TOKENS = 16
SEATS = 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)
PROMPTS = [[3, 17, 90, 4, 201], [8, 8, 150, 33, 2, 71, 12, 60, 5]]
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def loop(runner, **config) -> Loop:
    return Loop(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=SEATS, **config)


def test_experts_in_a_batch_are_those_of_the_naive_kernels(device, tmp_path):
    # On the same device: random weights are drawn there, and differ from those of a CPU.
    model = tiny_llama(tmp_path, backend="naive", device=device, **MIXTRAL)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    plain, _ = build_runner(model, memory, max_num_batched_tokens=MAX_TOKENS)
    expected = []
    for request in requests(PROMPTS, GREEDY):
        expected += loop(plain, prefix=False).run([request])
        forget(plain)
    plain.close()

    model = tiny_llama(tmp_path, backend="triton", device=device, **MIXTRAL)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=SEATS)
    runner = triton_runner(model, memory, MAX_TOKENS)
    before = model.kernels.compilations()
    found = loop(runner, max_steps_in_flight=2).run(requests(PROMPTS, GREEDY))
    assert found == expected
    assert model.kernels.compilations() == before
    runner.close()
