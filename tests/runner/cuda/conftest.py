from __future__ import annotations

import pytest
import torch

from streamserve.models import Decoder, state_caches
from streamserve.runner.build import new_kv_cache
from streamserve.runner.cuda.build import assemble, build_cuda_runner
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.memory import MemoryPlan


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run: under their interpreter, or on a GPU where there is one."""
    pytest.importorskip("triton")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is not used beside a GPU")
    return torch.device(request.param)


def triton_runner(
    model: Decoder, memory: MemoryPlan, max_num_batched_tokens: int, **ladder_options: int
) -> CudaModelRunner:
    """Warm on a GPU. The interpreter takes minutes for what warm-up meets, and compiles nothing."""
    ladder = StepLadder(max_num_batched_tokens, memory.max_num_seqs, **ladder_options)
    caches = new_kv_cache(model.spec, memory, model.dtype, model.device, model.kernels)
    if model.device.type == "cuda":
        return build_cuda_runner(
            model,
            memory,
            ladder,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_caches=caches,
        )[0]
    return assemble(
        model,
        caches,
        ladder,
        vocab_size=model.spec.vocab_size,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        state_caches=state_caches(model.spec, caches),
    )[0]
