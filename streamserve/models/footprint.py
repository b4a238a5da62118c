"""What a model's weights take, told by its spec before any of them is read."""

from __future__ import annotations

import math

import torch

from streamserve.models.parameters import (
    Module,
    StoredQuantization,
    decoder_modules,
    module_quantization,
)
from streamserve.models.spec import DecoderSpec, ExpertsSpec, used_share
from streamserve_kernels.quantised import Quantization, packed_bytes


def weight_bytes(
    spec: DecoderSpec,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    stored: StoredQuantization | None = None,
    num_tokens: int | None = None,
) -> int:
    """Bytes of all weights in ``dtype``, an upper bound to plan memory with before loading.

    ``num_tokens``: see `ModelConfig.weight_bytes`.

    What the checkpoint holds quantised stays so; ``quantization`` is of a plain one. An unquantised
    tied head counts twice: kernels that pack linear weights keep the rows for the embedding and a
    packed copy for the head.
    """
    total = 0.0
    for module in decoder_modules(spec):
        held = module_quantization(module, spec, quantization)
        kept = None if stored is None or module.by_head else stored.format(module)
        if module.columns is None or (held is None and kept is None):
            itemsize = torch.float32.itemsize if module.float32 else dtype.itemsize
            num_bytes = module.numel * itemsize
            if spec.tied_head and module.name == "embedding":
                num_bytes *= 2
        else:
            num_bytes = module.num_rows * torch.float32.itemsize if module.bias else 0
            if kept is not None:
                num_bytes += kept.nbytes(module.num_rows, module.columns)
            elif held is not None:
                num_bytes += packed_bytes(held, module.num_rows, module.columns)
        total += num_bytes * _share_used(spec, module, num_tokens)
    return math.ceil(total)


def _share_used(spec: DecoderSpec, module: Module, num_tokens: int | None) -> float:
    if module.expert is None or module.layer is None or num_tokens is None:
        return 1.0
    experts = spec.layers[module.layer].mlp
    assert isinstance(experts, ExpertsSpec)
    return used_share(experts.top_k, experts.num_experts, num_tokens)
