"""Layers with a state of constant size: the launches of `recurrent_kernels`."""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from streamserve_kernels.recurrent import StepStates
from streamserve_kernels.triton.delta_chunks import (
    CHUNK,
    EXACT,
    delta_chunks_kernel,
    delta_parts_kernel,
)
from streamserve_kernels.triton.recurrent_kernels import (
    conv_kernel,
    delta_kernel,
    gated_norm_kernel,
    norm_of_gated_kernel,
    sigmoid_gate_kernel,
    state_space_kernel,
)
from streamserve_kernels.triton.runtime import overlaps

_CHANNELS = 256  # of a program of the convolution
_TOKENS = 16  # and of a sequence's tokens, where it may have more than one
_FEW_TOKENS = 16  # more of a sequence's are chunks of matrix products, where a step may have them
_ANY = 2**31 - 1
_ELEMENTS = 1024  # of a program of what goes through memory once
_COLUMNS = 32  # of a program's part of a state: a row of it is a cache line


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    step: StepStates,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """See `recurrent.causal_conv`."""
    x = _with_adjacent_columns(x)
    num_tokens, channels = x.shape
    num_seqs, width = seq_lens.shape[0], weight.shape[1]
    y = torch.empty(num_tokens, channels, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    # Decodes, but for a few of more tokens: tiles as short as can be.
    tokens = triton.next_power_of_2(max(width - 1, 4 if num_tokens <= num_seqs else _TOKENS))
    overlap = overlaps(x.device)
    # Each sequence's first tile, then all others: see `_later_tile`.
    grid = (num_seqs + triton.cdiv(num_tokens, tokens), triton.cdiv(channels, _CHANNELS))
    conv_kernel[grid](
        x, weight.contiguous(), x if bias is None else bias, states, step.slots, step.saves,
        query_start_loc, seq_lens, y, x.stride(0), num_tokens, num_seqs,
        C=channels, W=width, HAS_BIAS=bias is not None, HAS_SILU=activation == "silu",
        BLOCK_T=tokens, BLOCK_C=_CHANNELS, BLOCK_W=triton.next_power_of_2(max(width - 1, 1)),
        OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return y


def gated_delta_rule(
    qkv: Tensor,
    gates: Tensor,
    decay: Tensor,
    time_bias: Tensor,
    states: Tensor,
    step: StepStates,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    num_key_heads: int,
) -> Tensor:
    """See `recurrent.gated_delta_rule`."""
    qkv, gates = _with_adjacent_columns(qkv), _with_adjacent_columns(gates)
    num_heads, key_size, value_size = states.shape[1:]
    num_tokens, num_seqs = qkv.shape[0], seq_lens.shape[0]
    y = torch.empty(num_tokens, num_heads * value_size, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return y
    has_chunks = num_tokens > max(num_seqs, _FEW_TOKENS)
    columns = min(triton.next_power_of_2(value_size), _COLUMNS)
    overlap = overlaps(qkv.device)
    delta_kernel[(num_heads * triton.cdiv(value_size, columns), num_seqs + 1)](
        qkv, gates, decay, time_bias, states, step.slots, step.saves, query_start_loc, seq_lens, y,
        qkv.stride(0), gates.stride(0), num_tokens, num_seqs,
        HK=num_key_heads, HV=num_heads, D=key_size, DV=value_size,
        BLOCK_D=triton.next_power_of_2(key_size), BLOCK_V=columns,
        MOST=_FEW_TOKENS if has_chunks else _ANY,
        OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    if has_chunks:
        parameters = decay, time_bias, states
        where = step, query_start_loc, seq_lens
        _in_chunks(qkv, gates, *parameters, *where, y, num_key_heads)
    return y


def _in_chunks(
    qkv: Tensor,
    gates: Tensor,
    decay: Tensor,
    time_bias: Tensor,
    states: Tensor,
    step: StepStates,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    y: Tensor,
    num_key_heads: int,
) -> None:
    """Sequences of more than a few tokens: see `delta_chunks`."""
    num_heads, key_size, value_size = states.shape[1:]
    num_tokens, num_seqs, overlap = qkv.shape[0], seq_lens.shape[0], overlaps(qkv.device)
    of_tokens = num_tokens, num_heads
    updates, scores, scales = (
        torch.empty(*shape, dtype=torch.float32, device=qkv.device)
        for shape in ((*of_tokens, CHUNK), (*of_tokens, CHUNK), (3, *of_tokens))
    )
    block = max(triton.next_power_of_2(key_size), 16)
    sizes = {
        "HK": num_key_heads,
        "HV": num_heads,
        "D": key_size,
        "BLOCK_D": block,
        "FEW": _FEW_TOKENS,
        "PRECISION": EXACT if qkv.dtype == torch.float32 else "tf32",
        "OVERLAP": overlap,
        "num_warps": 4 if block <= 128 else 8,
        "launch_pdl": overlap,
    }
    # Each sequence has at most one chunk that is not full.
    num_chunks = num_tokens // CHUNK + min(num_seqs, num_tokens // (_FEW_TOKENS + 1))
    delta_parts_kernel[(num_heads, num_chunks)](
        qkv, gates, decay, time_bias, query_start_loc, updates, scores, scales,
        qkv.stride(0), gates.stride(0), num_tokens, num_seqs, **sizes,
    )  # fmt: skip
    columns = min(max(triton.next_power_of_2(value_size), 16), _COLUMNS)
    delta_chunks_kernel[(num_heads * triton.cdiv(value_size, columns), num_seqs)](
        qkv, states, step.slots, step.saves, query_start_loc, seq_lens, updates, scores, scales, y,
        qkv.stride(0), num_tokens, DV=value_size, BLOCK_V=columns, **sizes,
    )  # fmt: skip


def state_space_scan(
    xbc: Tensor,
    dt: Tensor,
    decay: Tensor,
    time_bias: Tensor,
    skip: Tensor,
    states: Tensor,
    step: StepStates,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    num_groups: int,
) -> Tensor:
    """See `recurrent.state_space_scan`. Token by token, whatever their number."""
    xbc, dt = _with_adjacent_columns(xbc), _with_adjacent_columns(dt)
    num_heads, size, head_size = states.shape[1:]
    num_tokens, num_seqs, overlap = xbc.shape[0], seq_lens.shape[0], overlaps(xbc.device)
    y = torch.empty(num_tokens, num_heads * head_size, dtype=xbc.dtype, device=xbc.device)
    columns = min(triton.next_power_of_2(head_size), _COLUMNS)
    if num_tokens:
        state_space_kernel[(num_heads * triton.cdiv(head_size, columns), num_seqs + 1)](
            xbc, dt, decay, time_bias, skip, states, step.slots, step.saves, query_start_loc,
            seq_lens, y, xbc.stride(0), dt.stride(0), num_tokens, num_seqs,
            G=num_groups, H=num_heads, N=size, P=head_size,
            BLOCK_N=triton.next_power_of_2(size), BLOCK_P=columns,
            OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
        )  # fmt: skip
    return y


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `recurrent.gated_rms_norm`."""
    x, gate = _with_adjacent_columns(x), _with_adjacent_columns(gate)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    size = weight.shape[0]
    num_heads, block = x.shape[1] // size, triton.next_power_of_2(size)
    heads = min(max(_ELEMENTS // block, 1), triton.next_power_of_2(num_heads))
    overlap = overlaps(x.device)
    if len(x):
        gated_norm_kernel[(len(x), triton.cdiv(num_heads, heads))](
            x, gate, weight, y, x.stride(0), gate.stride(0), eps,
            H=num_heads, D=size, HEADS=heads, BLOCK_D=block, IS_ROUNDED=weight.dtype == x.dtype,
            OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
        )  # fmt: skip
    return y


def norm_of_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """See `recurrent.norm_of_gated`."""
    x, gate = _with_adjacent_columns(x), _with_adjacent_columns(gate)
    width, block = x.shape[1], triton.next_power_of_2(group_size)
    dtype, overlap = torch.promote_types(x.dtype, weight.dtype), overlaps(x.device)
    y = torch.empty(*x.shape, dtype=dtype, device=x.device)
    if len(x):
        norm_of_gated_kernel[(len(x), width // group_size)](
            x, gate, weight, y, x.stride(0), gate.stride(0), eps,
            N=width, SIZE=group_size, BLOCK=block, OVERLAP=overlap,
            num_warps=min(max(block // 512, 1), 16), launch_pdl=overlap,
        )  # fmt: skip
    return y


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """See `recurrent.sigmoid_gate`."""
    x, gate = _with_adjacent_columns(x), _with_adjacent_columns(gate)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    width, overlap = x.shape[1], overlaps(x.device)
    if y.numel():
        sigmoid_gate_kernel[(len(x), triton.cdiv(width, _ELEMENTS))](
            x, gate, y, x.stride(0), gate.stride(0), N=width, RUN=width // gate.shape[1],
            BLOCK=_ELEMENTS, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
        )  # fmt: skip
    return y


def _with_adjacent_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
