from __future__ import annotations

import threading

import pytest
import torch

from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.core.step_time import StepShape
from streamserve.models import kv_bytes_per_block
from streamserve.runner.build import build_runner, step_buffer_bytes
from streamserve.runner.step_buffers import step_sizes
from streamserve.runner.warm_up import WarmUp
from tests.runner.tiny_llama import memory_for, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Recorder:
    """A runner that only writes down what it is given."""

    def __init__(self) -> None:
        self.plans: list[SchedulerOutput] = []

    def launch(self, plan: SchedulerOutput) -> None:
        self.plans.append(plan)

    def sample(self, step_id: int, masks=None):
        assert self.plans[-1].step_id == step_id
        return self

    def result(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(0, [])

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("max_num_seqs", "max_tokens", "max_model_len", "num_blocks"),
    [(8, 48, 128, 160), (1, 1, 2, 1), (64, 8, 32, 8), (3, 100, 16, 4), (16, 512, 100, 30)],
)
def test_warm_up_meets_every_size_and_no_more_than_the_limits(
    model, max_num_seqs, max_tokens, max_model_len, num_blocks
):
    memory = memory_for(
        model, num_blocks=num_blocks, max_model_len=max_model_len, max_num_seqs=max_num_seqs
    )
    recorder = Recorder()
    WarmUp(recorder, memory, max_tokens).run(step_sizes(max_tokens, max_num_seqs))
    live: set[str] = set()
    for plan in recorder.plans:
        assert plan.num_tokens <= max_tokens
        assert len(plan.scheduled) <= max_num_seqs
        live -= set(plan.released_ids)
        live |= {request.request_id for request in plan.new_requests}
        assert live == {scheduled.request_id for scheduled in plan.scheduled}
        for scheduled in plan.scheduled:
            end = scheduled.start + len(scheduled.token_ids)
            assert end <= max_model_len
            assert end <= len(scheduled.new_block_ids) * memory.block_size
            assert max(scheduled.new_block_ids) < num_blocks
    assert not live
    most_tokens = min(max_tokens, max_num_seqs * max_model_len)
    assert max(plan.num_tokens for plan in recorder.plans) == most_tokens
    assert max(len(plan.scheduled) for plan in recorder.plans) == min(max_num_seqs, max_tokens)


def test_serving_meets_no_size_that_warm_up_did_not(model, monkeypatch):
    sizes: set[tuple[str, int]] = set()
    forward = model.forward

    def watched(batch, caches):
        sizes.add(("rows", len(batch.input_ids)))
        sizes.add(("logits", len(batch.logits_indices)))
        return forward(batch, caches)

    monkeypatch.setattr(model, "forward", watched)
    memory = memory_for(model, num_blocks=160)
    build_runner(model, memory, max_num_batched_tokens=48)[0].close()
    ladder = step_sizes(48, 8)
    assert sizes >= {("rows", size) for size in ladder}
    assert sizes >= {("logits", size) for size in ladder if size <= 8}


def test_a_warm_up_that_fails_leaves_no_thread(model, monkeypatch):
    def broken(batch, caches):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        build_runner(model, memory_for(model, num_blocks=32), max_num_batched_tokens=48)
    assert not any(thread.name == "streamserve-device" for thread in threading.enumerate())


def test_the_runner_is_empty_when_it_is_ready(model):
    memory = memory_for(model, num_blocks=32)
    runner, _ = build_runner(model, memory, max_num_batched_tokens=48)
    assert len(runner._input_batch) == 0
    assert len(runner._kv_caches) == len(model.spec.layers)
    num_bytes = sum(cache.nbytes for pair in runner._kv_caches for cache in pair)
    assert num_bytes == memory.kv_bytes == 32 * kv_bytes_per_block(model.spec, 4, torch.float32)
    runner.close()


def test_the_profile_holds_what_the_whole_model_took(model):
    memory = memory_for(model, num_blocks=160)
    runner, profile = build_runner(model, memory, max_num_batched_tokens=48)
    runner.close()
    shapes = [shape for shape, _ in profile.samples]
    assert {1, 8, 32, 48} <= {shape.num_tokens for shape in shapes if shape.num_sampled == 1}
    assert StepShape(8, 8, 8 * 128) in shapes  # decodes, and a chunk, behind a long context
    assert any(shape.prefill_keys == 128 for shape in shapes)
    assert all(seconds > 0 for _, seconds in profile.samples)


def test_step_buffers_grow_with_what_a_step_may_hold(model):
    def size(tokens: int, seqs: int, dtype=torch.float32) -> int:
        return step_buffer_bytes(model.spec, dtype, tokens, seqs)

    assert size(512, 64) > size(64, 64) > size(64, 8) > 0
    assert size(512, 64, torch.bfloat16) < size(512, 64)
