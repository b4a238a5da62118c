"""From a model on a GPU, its caches and a memory plan to a runner that is warm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamserve.core.step_time import StepProfile
from streamserve.models import Decoder, KVCache
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.model_runner import TorchModelRunner
from streamserve.runner.warm_up import GPU_MEASURING, WarmUp


def build_cuda_runner(
    model: Decoder,
    memory: MemoryPlan,
    *,
    max_num_batched_tokens: int,
    kv_caches: KVCache,
    enforce_eager: bool,
    graph_sizes: Sequence[int] | None,
) -> tuple[TorchModelRunner, StepProfile]:
    """Starts and warms the runner; every step is eager."""
    del enforce_eager, graph_sizes
    torch.cuda.set_device(model.device)
    model.warm_up(memory.block_size)
    runner = TorchModelRunner(
        model,
        kv_caches,
        vocab_size=model.spec.vocab_size,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    try:
        warm_up = WarmUp(runner, memory, max_num_batched_tokens, GPU_MEASURING)
        warm_up.run_ragged()
        warm_up.run_sampler()
        warm_up.run_full_steps()
        profile = warm_up.measure()
    except BaseException:
        runner.close()
        raise
    return runner, profile
