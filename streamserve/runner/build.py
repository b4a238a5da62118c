"""From a loaded model and a memory plan to a runner that is warm."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from streamserve.core.plan import ModelRunner
from streamserve.core.step_time import StepProfile
from streamserve.models import (
    KVCache,
    LanguageModel,
    allocate_kv_cache,
    state_caches,
    touch_kv_cache,
)
from streamserve.models.model_shape import ModelShape
from streamserve.runner.allocator import keep_freed_memory
from streamserve.runner.kv_transfer import KVTransfer
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.model_runner import TorchModelRunner
from streamserve.runner.passing_thread import on_passing_thread
from streamserve.runner.sampler import Sampler
from streamserve.runner.step_buffers import step_sizes
from streamserve.runner.tensor_parallel.drawing import rank_runner
from streamserve.runner.tensor_parallel.team import Team, steered
from streamserve.runner.warm_up import WarmUp, closed_on_error
from streamserve_kernels import Kernels, row_draws_bytes


def new_kv_cache(
    spec: ModelShape,
    memory: MemoryPlan,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    activations: torch.dtype | None = None,
) -> KVCache:
    """Allocates the KV cache of a plan; on a CPU its memory is only promised.

    ``activations`` have a dtype of their own where the cache's is narrower.
    """
    return allocate_kv_cache(
        spec,
        memory.num_blocks,
        memory.block_size,
        dtype,
        device,
        kernels,
        num_state_slots=memory.num_state_slots,
        state_dtype=activations,
    )


def build_runner(
    model: LanguageModel,
    memory: MemoryPlan,
    *,
    max_num_batched_tokens: int,
    kv_caches: KVCache | None = None,
    transfer: KVTransfer | None = None,
    max_num_sampled: int | None = None,
    keeps_hidden_states: bool = False,
    team: Team | None = None,
) -> tuple[ModelRunner, StepProfile]:
    """Makes the step buffers, and a touched KV cache if none is given; starts and warms the runner.

    A ``transfer`` is one between these ``kv_caches`` and host memory. ``max_num_sampled``: rows
    that a step may sample, where that is more than one for each seat. ``keeps_hidden_states``: for
    a draft head. With a ``team`` the model is a share, and the runner that of all ranks.
    After it no step compiles anything or asks the system for much memory. On a CPU it changes the
    allocator's settings for the whole process. The forward is recorded where the kernels can; what
    is left is met at all sizes with one layer of each kind, and only a few steps are run with the
    whole model; these are measured. Raises what torch raises when the memory is not there after
    all.
    """
    if max_num_sampled is not None:
        # To a runner it is all the same whose rows they are.
        memory = replace(memory, max_num_seqs=max(memory.max_num_seqs, max_num_sampled))
    if model.device.type == "cpu":
        keep_freed_memory()
    if kv_caches is None:
        kv_caches = new_kv_cache(model.spec, memory, model.dtype, model.device, model.kernels)
        touch_kv_cache(kv_caches)
    on_passing_thread(lambda: model.warm_up(memory.block_size))
    num_recorded = model.record(
        kv_caches, max_tokens=max_num_batched_tokens, max_logits=memory.max_num_seqs
    )
    sizes = step_sizes(max_num_batched_tokens, memory.max_num_seqs, num_recorded)
    own = (TorchModelRunner if team is None else partial(rank_runner, team.ranks))(
        model.one_of_each_layer(),
        kv_caches,
        vocab_size=model.spec.vocab_size,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        padded_sizes=sizes,
        transfer=transfer,
        state_caches=state_caches(model.spec, kv_caches),
        keeps_hidden_states=keeps_hidden_states,
    )
    runner, call = steered(own, {"whole model": lambda: own.replace_model(model)}, team)
    with closed_on_error(runner):
        warm_up = WarmUp(runner, memory, max_num_batched_tokens)
        if sizes:
            warm_up.run(sizes)
        warm_up.run_sampler()
        call("whole model")
        if sizes:
            warm_up.run_full_steps()
        return runner, warm_up.measure(sizes)


def step_buffer_bytes(
    spec: ModelShape, dtype: torch.dtype, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """About what one step needs beside weights and KV: activations, logits, the sampler's copy."""
    num_rows = step_sizes(max_num_batched_tokens, max_num_seqs)[-1]
    activations = num_rows * spec.row_width() * dtype.itemsize
    logits = max_num_seqs * spec.vocab_size * (dtype.itemsize + torch.float32.itemsize)
    draws = row_draws_bytes(spec.vocab_size, max_num_seqs)
    return activations + logits + Sampler.work_bytes(spec.vocab_size, max_num_seqs) + draws


def head_buffer_bytes(
    spec: ModelShape, dtype: torch.dtype, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """About what feeding a draft head and guessing needs, beside its weights and KV."""
    activations = max_num_batched_tokens * spec.row_width() * dtype.itemsize
    return activations + max_num_seqs * spec.vocab_size * torch.float32.itemsize
