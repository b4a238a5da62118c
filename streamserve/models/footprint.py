"""What a model's weights take, told by its spec before any of them is read."""

from __future__ import annotations

import torch

from streamserve.models.parameters import StoredQuantization, decoder_modules, module_quantization
from streamserve.models.spec import DecoderSpec
from streamserve_kernels.quantised import Quantization, packed_bytes


def weight_bytes(
    spec: DecoderSpec,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    stored: StoredQuantization | None = None,
) -> int:
    """Bytes of all weights in ``dtype``, an upper bound to plan memory with before loading.

    What the checkpoint holds quantised stays so; ``quantization`` is of a plain one. An unquantised
    tied head counts twice: kernels that pack linear weights keep the rows for the embedding and a
    packed copy for the head.
    """
    total = 0
    for module in decoder_modules(spec):
        held = module_quantization(module, spec, quantization)
        kept = None if stored is None else stored.format(module)
        if module.columns is None or (held is None and kept is None):
            total += module.numel * dtype.itemsize
            if spec.tied_head and module.name == "embedding":
                total += module.numel * dtype.itemsize
            continue
        bias_bytes = module.num_rows * torch.float32.itemsize if module.bias else 0
        if kept is not None:
            total += kept.nbytes(module.num_rows, module.columns) + bias_bytes
        elif held is not None:
            total += packed_bytes(held, module.num_rows, module.columns) + bias_bytes
    return total
