from __future__ import annotations

import threading

import pytest
import torch

from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.core.step_time import StepShape
from streamserve.errors import OutOfMemoryError
from streamserve.models import kv_bytes_per_block
from streamserve.runner.build import build_runner, step_buffer_bytes
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.step_buffers import step_sizes
from streamserve.runner.warm_up import CPU_MEASURING, GPU_MEASURING, WarmUp
from tests.runner.tiny_llama import memory_for, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Recorder:
    """A runner that only writes down what it is given."""

    num_compilations = 0

    def __init__(self, duration_s: float | None = None) -> None:
        self.plans: list[SchedulerOutput] = []
        self.duration_s = duration_s

    def launch(self, plan: SchedulerOutput) -> None:
        self.plans.append(plan)

    def sample(self, step_id: int, masks=None):
        assert self.plans[-1].step_id == step_id
        return self

    def result(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(0, [], duration_s=self.duration_s)

    def close(self) -> None:
        pass


def check_plans(plans: list[SchedulerOutput], memory: MemoryPlan, max_tokens: int) -> None:
    """Plans as a scheduler makes them, and nobody left at the end."""
    live: set[str] = set()
    for plan in plans:
        assert plan.num_tokens <= max_tokens
        assert len(plan.scheduled) <= memory.max_num_seqs
        live -= set(plan.released_ids)
        live |= {request.request_id for request in plan.new_requests}
        assert live == {scheduled.request_id for scheduled in plan.scheduled}
        for scheduled in plan.scheduled:
            end = scheduled.start + len(scheduled.token_ids)
            assert end <= memory.max_model_len
            assert end <= len(scheduled.new_block_ids) * memory.block_size
            assert max(scheduled.new_block_ids) < memory.num_blocks
        for members, num_blocks in plan.prefix_groups:
            shared = [plan.scheduled[i] for i in members]
            assert num_blocks * memory.block_size <= min(s.start for s in shared)
            assert len({tuple(s.new_block_ids[:num_blocks]) for s in shared}) == 1
    assert not live


LIMITS = pytest.mark.parametrize(
    ("max_num_seqs", "max_tokens", "max_model_len", "num_blocks"),
    [(8, 48, 128, 160), (1, 1, 2, 1), (64, 8, 32, 8), (3, 100, 16, 4), (16, 512, 100, 30)],
)


@LIMITS
def test_warm_up_meets_every_size_and_no_more_than_the_limits(
    model, max_num_seqs, max_tokens, max_model_len, num_blocks
):
    memory = memory_for(
        model, num_blocks=num_blocks, max_model_len=max_model_len, max_num_seqs=max_num_seqs
    )
    recorder = Recorder()
    WarmUp(recorder, memory, max_tokens).run(step_sizes(max_tokens, max_num_seqs))
    check_plans(recorder.plans, memory, max_tokens)
    most_tokens = min(max_tokens, max_num_seqs * max_model_len)
    assert max(plan.num_tokens for plan in recorder.plans) == most_tokens
    assert max(len(plan.scheduled) for plan in recorder.plans) == min(max_num_seqs, max_tokens)


@LIMITS
def test_ragged_warm_up_meets_every_make_up(
    model, max_num_seqs, max_tokens, max_model_len, num_blocks
):
    memory = memory_for(
        model, num_blocks=num_blocks, max_model_len=max_model_len, max_num_seqs=max_num_seqs
    )
    recorder = Recorder()
    WarmUp(recorder, memory, max_tokens, GPU_MEASURING).run_ragged()
    check_plans(recorder.plans, memory, max_tokens)
    assert max(len(plan.scheduled) for plan in recorder.plans) == min(max_num_seqs, max_tokens)
    lengths = [[len(s.token_ids) for s in plan.scheduled] for plan in recorder.plans]
    can_mix = min(max_num_seqs, max_tokens) > 1
    for shared in (False, True) if can_mix else (False,):
        kinds = {
            (min(of_plan) == 1, max(of_plan) > 1)
            for of_plan, plan in zip(lengths, recorder.plans, strict=True)
            if of_plan and bool(plan.prefix_groups) == shared
        }
        assert (True, False) in kinds  # decodes
        assert (True, True) in kinds or not can_mix  # beside a chunk


@pytest.mark.parametrize(
    ("measuring", "max_tokens", "max_model_len", "rows"),
    [
        (CPU_MEASURING, 512, 4096, [1, 8, 32, 64, 128]),
        (CPU_MEASURING, 48, 128, [1, 8, 32]),
        (GPU_MEASURING, 8192, 9000, [1, 8, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096, 8192]),
        (GPU_MEASURING, 8192, 1000, [1, 8, 32, 64, 128, 256, 384, 512, 1000]),
        (GPU_MEASURING, 1, 64, [1]),
    ],
)
def test_measured_steps_reach_to_the_largest(model, measuring, max_tokens, max_model_len, rows):
    memory = memory_for(model, num_blocks=4000, max_model_len=max_model_len)
    recorder = Recorder(duration_s=0.25)
    profile = WarmUp(recorder, memory, max_tokens, measuring).measure((1, 2, 4))
    plain = [s.num_tokens for s, _ in profile.samples if s.prefill_pairs == s.num_tokens**2 / 2]
    prompts = [shape.num_tokens for shape, _ in profile.samples if shape.num_sampled == 1]
    assert sorted({1, *plain}) == rows
    assert set(rows) <= set(prompts)
    assert profile.padded_sizes == (1, 2, 4)
    assert all(seconds == 0.25 for _, seconds in profile.samples)


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
    before = set(threading.enumerate())
    with pytest.raises(OutOfMemoryError, match="too large"):
        build_runner(model, memory_for(model, num_blocks=32), max_num_batched_tokens=48)
    assert set(threading.enumerate()) <= before


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
