"""Layers with a state of constant size: the compiled bodies behind the signatures of `naive`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from streamserve_kernels import recurrent
from streamserve_kernels.cpu import recurrent_bodies as bodies
from streamserve_kernels.cpu.ops import COMPILED, require
from streamserve_kernels.pool import pool
from streamserve_kernels.recurrent import StepStates

_Run = Callable[..., None]


@lru_cache(maxsize=4)
def conv_kernel(bits: int) -> _Run:
    return pool().kernel(bodies.conv_body(bits), bodies.CONV_LAYOUT)


@lru_cache(maxsize=1)
def delta_kernel() -> _Run:
    return pool().kernel(bodies.delta_body(), bodies.DELTA_LAYOUT)


@lru_cache(maxsize=1)
def space_kernel() -> _Run:
    return pool().kernel(bodies.space_body(), bodies.SPACE_LAYOUT)


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
    if x.dtype not in COMPILED:
        return recurrent.causal_conv(
            x, weight, bias, states, step, query_start_loc, seq_lens, activation=activation
        )
    channels, width = weight.shape
    require("x", x, x.dtype)
    _require_states(states, x.dtype, (width - 1, channels))
    indices = _indices(step, query_start_loc, seq_lens)
    taps = weight.t().float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    threads = pool().threads()
    scratch = torch.empty(threads, bodies.CONV_PIECE)
    conv_kernel(8 * x.element_size())(
        threads,
        out.data_ptr(),
        x.data_ptr(),
        taps.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        states.data_ptr(),
        *indices,
        scratch.data_ptr(),
        x.stride(0),
        len(x),
        len(seq_lens),
        channels,
        width,
        int(activation == "silu"),
    )
    return out


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
    """See `recurrent.gated_delta_rule`; what becomes of a state is compiled, in float32."""
    num_heads, key_size, value_size = states.shape[1:]
    require("qkv", qkv, qkv.dtype)
    _require_states(states, torch.float32, (num_heads, key_size, value_size))
    indices = _indices(step, query_start_loc, seq_lens)
    query, key, value, beta, kept_share = recurrent.delta_rule_inputs(
        qkv, gates, decay, time_bias, states, num_key_heads
    )
    out = torch.zeros(len(qkv), num_heads * value_size)
    threads = pool().threads()
    room = bodies.rule_scratch(key_size, value_size)
    scratch = torch.empty(threads, room)
    delta_kernel()(
        threads,
        out.data_ptr(),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        beta.data_ptr(),
        kept_share.data_ptr(),
        states.data_ptr(),
        *indices,
        scratch.data_ptr(),
        room,
        value.stride(0),
        len(seq_lens),
        num_key_heads,
        num_heads,
        key_size,
        value_size,
    )
    return out.to(qkv.dtype)


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
    """See `recurrent.state_space_scan`; what becomes of a state is compiled, in float32."""
    num_heads, size, head_size = states.shape[1:]
    require("xbc", xbc, xbc.dtype)
    require("dt", dt, dt.dtype)
    require("skip", skip, torch.float32)
    _require_states(states, torch.float32, (num_heads, size, head_size))
    indices = _indices(step, query_start_loc, seq_lens)
    width = num_groups * size
    x, b, c = xbc.float().split_with_sizes([num_heads * head_size, width, width], -1)
    time, kept_share = recurrent.time_steps(dt, decay, time_bias)
    out = torch.zeros(len(xbc), num_heads * head_size)
    threads = pool().threads()
    room = bodies.rule_scratch(size, head_size)
    scratch = torch.empty(threads, room)
    space_kernel()(
        threads,
        out.data_ptr(),
        x.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        time.data_ptr(),
        kept_share.data_ptr(),
        skip.data_ptr(),
        states.data_ptr(),
        *indices,
        scratch.data_ptr(),
        room,
        x.stride(0),
        len(seq_lens),
        num_groups,
        num_heads,
        size,
        head_size,
    )
    return out.to(xbc.dtype)


def _require_states(states: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if states.dtype != dtype or not states.is_contiguous():
        raise TypeError(f"states must be contiguous {dtype}, got {states.dtype}")
    if states.shape[1:] != shape:
        raise ValueError(f"states {tuple(states.shape)} are not of slots {shape}")


def _indices(
    step: StepStates, query_start_loc: Tensor, seq_lens: Tensor
) -> tuple[int, int, int, int]:
    """Where slots, saves, starts and lengths lie."""
    given = (step.slots, step.saves, query_start_loc, seq_lens)
    for tensor in given:
        require("a step's indices", tensor, torch.int32)
    slots, saves, starts, lengths = (tensor.data_ptr() for tensor in given)
    return slots, saves, starts, lengths
