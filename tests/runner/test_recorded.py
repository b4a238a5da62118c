"""The runner on a forward that was recorded: bfloat16 on the native kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from streamserve.core.plan import NewRequest, ScheduledRequest, SchedulerOutput
from streamserve.core.sampling_params import SamplingParams
from streamserve.models import Decoder
from streamserve.runner.build import build_runner
from streamserve.runner.model_runner import TorchModelRunner
from streamserve_kernels.native.library import why_not
from tests.runner.test_end_to_end import GREEDY, SEEDED, Loop, prompts, requests
from tests.runner.tiny_llama import VOCAB, memory_for, tiny_llama

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
BLOCK_SIZE = 16
NUM_BLOCKS = 48
MAX_TOKENS = 48
LOGPROBS = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = tmp_path_factory.mktemp("model")
    return tiny_llama(directory, backend="native", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def shared_runner(model: Decoder) -> Iterator[TorchModelRunner]:
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    runner, _ = build_runner(model, memory, max_num_batched_tokens=MAX_TOKENS)
    yield runner
    runner.close()


@pytest.fixture
def runner(shared_runner: TorchModelRunner) -> Iterator[TorchModelRunner]:
    """With no request of the test before."""
    yield shared_runner
    batch = shared_runner._input_batch
    for request_id in batch.request_ids:
        batch._remove(request_id)


def loop(runner: TorchModelRunner, **options) -> Loop:
    return Loop(runner, **{"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, **options})


def solo(runner: TorchModelRunner, token_ids, params) -> list[list[int]]:
    return [loop(runner, prefix=False).run([request])[0] for request in requests(token_ids, params)]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_crowd_in_chunks_and_after_preemption_is_solo(runner, params):
    """On one thread a row of a recorded step does not depend on its batch, bit for bit."""
    token_ids = prompts(6)
    expected = solo(runner, token_ids, params)
    for name, options in {
        "crowd": {},
        "chunks": {"max_num_batched_tokens": 9},
        "hit": {"prefix": True, "enable_cascade_attention": False},
        "two in flight": {"max_steps_in_flight": 2},
    }.items():
        crowd = requests(token_ids, params, prefix=name)
        assert loop(runner, **{"prefix": False, **options}).run(crowd) == expected
    few = requests(token_ids, params, prefix="few blocks")
    assert loop(runner, prefix=False, num_blocks=8).run(few) == expected
    assert sum(request.num_preemptions for request in few) > 0


def test_greedy_steps_need_no_logits_and_agree_with_those_that_do(runner, model, monkeypatch):
    token_ids = prompts(6)
    sampled = loop(runner, prefix=False).run(requests(token_ids, LOGPROBS, prefix="logprobs"))

    forward, num_logits = model.forward, []

    def watched(batch, caches):
        num_logits.append(len(batch.logits_indices))
        return forward(batch, caches)

    monkeypatch.setattr(model, "forward", watched)
    assert loop(runner, prefix=False).run(requests(token_ids, GREEDY)) == sampled
    assert not any(num_logits)  # chunks that sample nothing have none


def test_a_mixed_step_samples_from_logits(runner):
    token_ids = prompts(4)
    expected = [
        ids
        for i in range(4)
        for ids in solo(runner, token_ids[i : i + 1], GREEDY if i % 2 else LOGPROBS)
    ]
    mixed = [
        request
        for i, ids in enumerate(token_ids)
        for request in requests([ids], GREEDY if i % 2 else LOGPROBS, prefix=f"mixed{i} ")
    ]
    assert loop(runner, prefix=False).run(mixed) == expected


def plan_of(
    step_id: int, token_ids: list[int], *, sample: bool = True, block_id: int | None = None
) -> SchedulerOutput:
    block_ids = [step_id % NUM_BLOCKS if block_id is None else block_id]
    request = NewRequest(f"p{step_id}", token_ids, len(token_ids), GREEDY, 0, 0)
    scheduled = ScheduledRequest(f"p{step_id}", 0, token_ids, block_ids, sample, 0)
    return SchedulerOutput(step_id, new_requests=[request], scheduled=[scheduled])


def test_a_mask_for_a_greedy_step_comes_too_late(runner):
    runner.launch(plan_of(1, [1, 2, 3]))
    future = runner.sample(1, {"p1": b"\xff" * (VOCAB // 8 + 1)})
    with pytest.raises(RuntimeError, match="a mask came for requests that were greedy"):
        future.result(timeout=60)
    runner.launch(plan_of(2, [1, 2, 3]))
    assert len(runner.sample(2, {}).result(timeout=60).sampled_token_ids[0]) == 1


def test_a_step_without_samples_and_one_with_a_bad_token(runner):
    runner.launch(plan_of(3, [1, 2, 3], sample=False))
    assert runner.sample(3).result(timeout=60).sampled_token_ids == [[]]
    runner.launch(plan_of(4, [1, VOCAB, 3]))
    with pytest.raises(IndexError, match="outside its embedding"):
        runner.sample(4).result(timeout=60)
    runner.launch(plan_of(5, [1, 2, 3]))
    assert len(runner.sample(5).result(timeout=60).sampled_token_ids[0]) == 1


def test_a_shared_prefix_is_close_to_solo(runner):
    """Its sums are in another order: an answer may part ways only at a near tie."""
    system = prompts(1)[0] * 4
    token_ids = [system[:50] + prompt[:30] for prompt in prompts(5)]
    expected = solo(runner, token_ids, GREEDY)
    together = loop(runner, num_blocks=40)
    found = together.run(requests(token_ids, GREEDY))
    assert together.scheduler.prefix_grouping.num_saved_tokens > 500
    same = [
        a == b
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert sum(same) >= 0.8 * len(same)


def test_a_plan_with_a_block_that_is_not_there_raises(runner):
    runner.launch(plan_of(0, [1, 2, 3], block_id=10**6))
    with pytest.raises(IndexError, match="not there"):
        runner.sample(0).result(timeout=60)
    runner.launch(plan_of(1, [1, 2, 3]))
    assert len(runner.sample(1).result(timeout=60).sampled_token_ids[0]) == 1
