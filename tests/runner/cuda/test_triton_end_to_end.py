"""The whole runner on the Triton kernels: what happens to a request never shows.

On a GPU with CUDA graphs. Under the interpreter, launch by launch, a step takes seconds: there two
short requests show that the parts fit together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.speculation import Propose
from streamserve.runner.build import build_runner
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve_kernels.triton.runtime import compiled_kernels
from tests.runner.cuda.conftest import triton_runner
from tests.runner.loop import Loop, forget
from tests.runner.test_end_to_end import prompts, requests
from tests.runner.test_speculation import lookup
from tests.runner.tiny_llama import VOCAB, memory_for, tiny_llama

pytestmark = pytest.mark.usefixtures("forget_requests")

BLOCK_SIZE = 16
NUM_BLOCKS = 40
FEW_BLOCKS = 6  # five requests preempt each other
MAX_TOKENS = 48
SEATS = 4
NUM_ADAPTERS = 2
NUM_DRAFTS = 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
SEEDED = SamplingParams(temperature=1.2, top_p=0.95, max_tokens=10, presence_penalty=0.3)
MIXED = SamplingParams(temperature=0.8, top_k=20, min_p=0.02, max_tokens=10, logprobs=2)
KINDS = {"greedy": GREEDY, "seeded": SEEDED, "mixed": MIXED}
SHORT = [[3, 17, 90, 4, 201], [8, 8, 150, 33, 2, 71]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def runner(device, directory) -> Iterator[CudaModelRunner]:
    model = tiny_llama(directory, backend="triton", device=device, num_adapters=NUM_ADAPTERS)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=SEATS)
    runner = triton_runner(
        model,
        memory,
        MAX_TOKENS,
        num_adapters=NUM_ADAPTERS,
        num_drafts=NUM_DRAFTS,
        max_num_sampled=SEATS * (1 + NUM_DRAFTS),
    )
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def expected(device, directory) -> dict[str, list[list[int]]]:
    """Every request alone, by the naive kernels."""
    # On the same device: random weights are drawn there, and differ from those of a CPU.
    model = tiny_llama(directory, backend="naive", device=device, num_adapters=NUM_ADAPTERS)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    plain, _ = build_runner(model, memory, max_num_batched_tokens=MAX_TOKENS)
    found: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
    for kind, params in KINDS.items():
        for request in asked(device, params):
            found[kind] += loop(plain, prefix=False).run([request])
            forget(plain)
    plain.close()
    return found


def asked(device, params: SamplingParams, **names) -> list[Request]:
    """With the first adapter, with none, with the second, and so on."""
    if device.type == "cuda":
        made = requests(prompts(5), params, **names)
    else:
        made = requests(SHORT, replace(params, max_tokens=3), **names)
    for request, adapter in zip(made, cycle((0, None, 1)), strict=False):
        request.adapter, request.cache_salt = adapter, str(adapter)
    return made


@pytest.fixture
def gpu(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("the interpreter would take minutes")
    return device


def loop(runner, **config) -> Loop:
    options = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_num_seqs": SEATS}
    return Loop(runner, **{**options, **config})


GRANITE = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, torch.bfloat16), ({**GRANITE, "logits_scaling": 3.0}, torch.float32)],
    ids=["plain", "scaled"],
)
def test_logits_are_kept_in_the_smallest_dtype_that_holds_them(device, tmp_path, changes, dtype):
    model = tiny_llama(tmp_path, backend="triton", device=device, dtype=torch.bfloat16, **changes)
    assert model.logits_dtype == dtype
    for rows in (1, 3):
        # Not drawn on the device: its generator is not to be used while another thread captures.
        hidden_states = torch.randn(rows, 64).to(device, torch.bfloat16)
        expected = model.compute_logits(hidden_states)
        kept = torch.full_like(expected, float("nan"), dtype=dtype)
        assert model.compute_logits(hidden_states, kept) is kept
        assert expected.dtype == torch.float32
        assert torch.equal(kept.float(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_overlapped_is_solo(device, runner, expected, kind):
    if kind != "mixed" and device.type == "cpu":
        pytest.skip("the mixed ones show it")
    found = loop(runner, max_steps_in_flight=2).run(asked(device, KINDS[kind]))
    assert found == expected[kind]


def guesses(answers: list[list[int]]) -> Propose:
    """What was answered before, every third token of it spoilt."""

    def propose(request: Request, max_tokens: int) -> list[int]:
        index, known = int(request.request_id[1:]), request.num_output_tokens
        drafts = enumerate(answers[index][known : known + max_tokens], known + 2 * index)
        return [token if place % 3 else (token + 1) % VOCAB for place, token in drafts]

    return propose


@pytest.mark.parametrize("kind", KINDS)
def test_drafted_is_solo(device, runner, expected, kind):
    """Right drafts and wrong ones, beside a prompt that comes in chunks; on a GPU preempted too."""
    if kind == "mixed" and device.type == "cpu":
        pytest.skip("the others show it")
    config = {"speculative": lookup(NUM_DRAFTS), "propose": guesses(expected[kind])}
    max_tokens = MAX_TOKENS if device.type == "cuda" else 6
    some = loop(runner, max_num_batched_tokens=max_tokens, max_steps_in_flight=2, **config)
    assert some.run(asked(device, KINDS[kind])) == expected[kind]
    stats = some.scheduler.speculation_stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    rows = [[part.sample for part in plan.scheduled] for plan in some.plans]
    assert any(max(step) > 1 and 0 in step for step in rows), "beside no chunk"
    if device.type == "cuda":
        forget(runner)
        few = loop(runner, num_blocks=FEW_BLOCKS, max_steps_in_flight=2, **config)
        drafted = asked(device, KINDS[kind])
        assert few.run(drafted) == expected[kind]
        assert sum(request.num_preemptions for request in drafted) > 0


def test_chunked_is_solo(gpu, runner, expected):
    chunks = loop(runner, max_num_batched_tokens=17, max_steps_in_flight=2, prefix=False)
    assert chunks.run(asked(gpu, GREEDY)) == expected["greedy"]


def test_a_prefix_hit_and_groups_are_solo(gpu, runner, expected):
    again = loop(runner, max_steps_in_flight=2)
    again.run(asked(gpu, GREEDY))
    twice = asked(gpu, GREEDY, prefix="again")
    assert again.run(twice) == expected["greedy"]
    assert sum(request.num_cached_tokens for request in twice) > 50


def test_nothing_compiles_after_warm_up(gpu, runner):
    before = compiled_kernels()
    for params in KINDS.values():
        for in_flight in (1, 2):
            some = loop(runner, max_steps_in_flight=in_flight)
            some.run(requests(prompts(5, seed=in_flight), params))
            forget(runner)
    assert compiled_kernels() == before


def test_steps_are_replayed_from_graphs(gpu, runner):
    executor = runner._executor
    runner.capture_graphs()
    assert executor.num_graphs == len(list(runner._batch._ladder.graphs()))
    before = executor.num_replays
    some = loop(runner, max_steps_in_flight=2)
    some.run(asked(gpu, GREEDY))
    assert executor.num_replays - before == some.scheduler._next_step_id
