"""Compiling everything a model will call, before the server says that it is ready."""

from __future__ import annotations

import torch

from streamserve_kernels.cpu import ops, recurrent
from streamserve_kernels.cpu.attention import decode_kernel


def warm_up(
    dtype: torch.dtype,
    head_size: int,
    value_head_size: int | None = None,
    block_size: int = 16,
) -> None:
    """Compiles, or loads from the disk cache, all bodies for one dtype and shape of head.

    After it no call with this dtype, these head sizes and this block size compiles anything.
    """
    ops.copy_blocks_kernel()
    if dtype not in ops.COMPILED:
        return
    bits = 8 * dtype.itemsize
    decode_kernel(bits, head_size, value_head_size or head_size, block_size)
    ops.rms_norm_kernel(bits)
    ops.layer_norm_kernel(bits)
    ops.gated_kernel(bits)
    recurrent.conv_kernel(bits)
    recurrent.delta_kernel()
    recurrent.space_kernel()
    for interleaved in (False, True):
        ops.rotary_write_kernel(bits, interleaved)
