"""The CPU backend: the names of `naive`, each from where it is fastest.

jit, vector, simd   what kernel bodies are written in: pointers, bfloat16, vector operations
attention*          paged attention: compiled for decode, torch's flash attention for prompts
elementwise, ops    norms, rotary + cache write, gated activation, block copies
recurrent*          layers with a state of constant size
packed_linear       bfloat16 weights packed for oneDNN; linear_few reads them for a few rows
"""

from __future__ import annotations

from streamserve_kernels.adapters import AdapterTable, add_adapters
from streamserve_kernels.by_head import prepare_by_head
from streamserve_kernels.cpu.attention import paged_attention
from streamserve_kernels.cpu.jit import compilations
from streamserve_kernels.cpu.ops import (
    activation,
    copy_blocks,
    gated_activation,
    layer_norm,
    moe,
    rms_norm,
    rotary_embedding,
    rotary_write_kv,
    write_kv,
)
from streamserve_kernels.cpu.packed_linear import linear, prepare_linear
from streamserve_kernels.cpu.recurrent import causal_conv, gated_delta_rule, state_space_scan
from streamserve_kernels.cpu.warming import warm_up
from streamserve_kernels.experts import chosen_experts
from streamserve_kernels.naive import (
    add_shared_experts,
    embedding,
    kv_cache_shape,
    recorder,
    side_by_side,
)
from streamserve_kernels.native.quant_linear import prepare_quantised, slow_quantisation
from streamserve_kernels.native.stored import prepare_stored
from streamserve_kernels.recurrent import (
    gated_rms_norm,
    norm_of_gated,
    sigmoid_gate,
)

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

name = "cpu"
