"""The Triton backend, for NVIDIA GPUs: the functions of `interface.Kernels`.

Every launch follows from shapes, dtypes and numbers that the host knows, and none reads the device:
a step can be captured into a CUDA graph. Under Triton's interpreter the same kernels run on a CPU,
for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamserve_kernels.by_head import prepare_by_head
from streamserve_kernels.interface import QuantLinear
from streamserve_kernels.naive import add_shared_experts, kv_cache_shape, side_by_side
from streamserve_kernels.triton.adapters import AdapterTable, add_adapters
from streamserve_kernels.triton.attention import paged_attention
from streamserve_kernels.triton.cache import (
    copy_blocks,
    rotary_embedding,
    rotary_write_kv,
    write_kv,
)
from streamserve_kernels.triton.elementwise import (
    activation,
    gated_activation,
    gather,
    layer_norm,
    resolve_tokens,
    rms_norm,
)
from streamserve_kernels.triton.linear import (
    linear,
    prepare_linear,
    prepare_quantised,
    slow_quantisation,
)
from streamserve_kernels.triton.moe import chosen_experts, moe
from streamserve_kernels.triton.recurrent import (
    causal_conv,
    gated_delta_rule,
    gated_rms_norm,
    norm_of_gated,
    sigmoid_gate,
    state_space_scan,
)
from streamserve_kernels.triton.runtime import compilations
from streamserve_kernels.triton.stored import prepare_stored

__all__ = [
    "AdapterTable",
    "activation",
    "add_adapters",
    "add_shared_experts",
    "causal_conv",
    "chosen_experts",
    "compilations",
    "copy_blocks",
    "embedding",
    "gated_activation",
    "gated_delta_rule",
    "gated_rms_norm",
    "kv_cache_shape",
    "layer_norm",
    "linear",
    "moe",
    "name",
    "norm_of_gated",
    "paged_attention",
    "prepare_by_head",
    "prepare_linear",
    "prepare_quantised",
    "prepare_stored",
    "recorder",
    "resolve_tokens",
    "rms_norm",
    "rotary_embedding",
    "rotary_write_kv",
    "side_by_side",
    "sigmoid_gate",
    "slow_quantisation",
    "state_space_scan",
    "warm_up",
    "write_kv",
]

name = "triton"


def embedding(ids: Tensor, weight: Tensor | QuantLinear) -> Tensor:
    """See `naive.embedding`."""
    return gather(ids, weight) if isinstance(weight, Tensor) else weight.rows(ids)


def warm_up(
    dtype: torch.dtype,
    head_size: int,
    value_head_size: int | None = None,
    block_size: int = 16,
) -> None:
    """Nothing: a kernel compiles for the shapes of a model, which the runner's first steps meet."""


def recorder(max_tokens: int, max_logits: int) -> None:
    """Steps are captured as CUDA graphs, by the runner."""
