"""The native CPU backend, bfloat16 on AVX2 or AVX-512: plain C, a step in one parallel region.

src/            the C sources: operations, and the program that runs a row of them
library         finds the compiled library and says why it cannot serve, if so
execute         instructions in C's layout, run on torch's threads
layout          the order of the elements in a cache block
product         how a weight tells its instructions, and what these have in common
ops, linear, by_head, quant_linear, stored*, experts, recurrent
                the functions of the contract on tensors, one or a few instructions each
sampling        draws from rows of logits, in float32 whatever the model's weights
record*, symbol, recorded
                a decoder's forward written down once as instructions, and run

Caches have the shape of `naive`'s, but the elements inside a block lie as the dot-product
instructions want them: `unpack_keys` and `unpack_values` tell how.
"""

from __future__ import annotations

from streamserve_kernels.naive import compilations, embedding, side_by_side, warm_up
from streamserve_kernels.native.adapters import AdapterTable, add_adapters
from streamserve_kernels.native.by_head import prepare_by_head
from streamserve_kernels.native.experts import add_shared_experts, chosen_experts, moe
from streamserve_kernels.native.layout import (
    check_head_sizes,
    kv_cache_shape,
    unpack_keys,
    unpack_values,
)
from streamserve_kernels.native.library import has_matrix_units, why_not
from streamserve_kernels.native.linear import FEW_ROWS, linear, prepare_linear
from streamserve_kernels.native.ops import (
    activation,
    copy_blocks,
    gated_activation,
    layer_norm,
    paged_attention,
    rms_norm,
    rotary_embedding,
    rotary_write_kv,
    write_kv,
)
from streamserve_kernels.native.quant_linear import prepare_quantised, slow_quantisation
from streamserve_kernels.native.record import Recorder
from streamserve_kernels.native.recurrent import (
    causal_conv,
    gated_delta_rule,
    gated_rms_norm,
    norm_of_gated,
    sigmoid_gate,
    state_space_scan,
)
from streamserve_kernels.native.stored import prepare_stored

__all__ = [
    "AdapterTable",
    "activation",
    "add_adapters",
    "add_shared_experts",
    "causal_conv",
    "check_head_sizes",
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
    "unpack_keys",
    "unpack_values",
    "warm_up",
    "why_not",
    "write_kv",
]

name = "native"


def recorder(max_tokens: int, max_logits: int) -> Recorder:
    """Writes down a forward for steps of up to so many tokens and rows that need logits.

    On a CPU with matrix units only for the few rows at which they do not pay.
    """
    if has_matrix_units():
        max_tokens = min(max_tokens, FEW_ROWS)
    return Recorder(max_tokens, min(max_logits, max_tokens))
