"""Layers with a state of constant size: their instructions, and the functions on tensors.

The C side is `src/recurrent.c` and, where a state is a matrix, `src/rules.c`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from streamserve_kernels.native.execute import (
    Instruction,
    double_bits,
    pack_step,
    run_at_once,
)
from streamserve_kernels.pool import pool
from streamserve_kernels.recurrent import StepStates

_MAX_WIDTH = 16  # MAX_WIDTH of recurrent.c
_MAX_KEY_SIZE = 256  # MAX_KEY_SIZE of rules.c


class Rows(NamedTuple):
    """Rows of adjacent bfloat16 where C finds them, `stride` elements apart."""

    address: int
    stride: int
    width: int


def packed_taps(weight: Tensor) -> Tensor:
    """The weight [C, W] of a convolution as C reads it: [W, C]."""
    if weight.shape[1] > _MAX_WIDTH:
        raise ValueError(f"a convolution is at most {_MAX_WIDTH} wide, got {weight.shape[1]}")
    return weight.t().contiguous()


def convolution(
    out: Rows,
    x: Rows,
    taps: Tensor,
    bias: Tensor | None,
    states: Tensor,
    activation: Literal["silu"] | None,
) -> Instruction:
    """`causal_conv` of taps [W, C]. Raises TypeError or ValueError for what C cannot read."""
    width, channels = taps.shape
    check_parameters(taps, bias)
    if states.shape[1:] != (width - 1, channels) or x.width != channels:
        raise ValueError(
            f"{x.width} channels and states {tuple(states.shape)} do not fit a weight of"
            f" {channels} channels and width {width}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"a bias of {channels} channels cannot be {tuple(bias.shape)}")
    check_states(states, torch.bfloat16)
    args = (
        out.address,
        x.address,
        x.stride,
        taps.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        states.data_ptr(),
        states.shape[0],
        channels,
        width,
        int(activation == "silu"),
    )
    return "causal_conv", args


def scales_width(states: Tensor, num_key_heads: int) -> int:
    """Numbers of float32 that `delta_rule` needs for each row."""
    return 3 * num_key_heads + 2 * states.shape[1]


def delta_rule(
    out: Rows,
    qkv: Rows,
    gates: Rows,
    decay: Tensor,
    time_bias: Tensor,
    states: Tensor,
    num_key_heads: int,
    scales: Tensor,
) -> list[Instruction]:
    """`gated_delta_rule`; `scales` has room for every row: see `scales_width`.

    Raises TypeError or ValueError for what C cannot read.
    """
    per_head = {"decay": decay, "time_bias": time_bias}
    args = _rule(out, qkv, gates, 2, per_head, states, num_key_heads, scales)
    return [("delta_scales", args), ("delta_rule", args)]


def times_width(states: Tensor) -> int:
    """Numbers of float32 that `state_space` needs for each row."""
    return 2 * states.shape[1]


def state_space(
    out: Rows,
    xbc: Rows,
    dt: Rows,
    decay: Tensor,
    time_bias: Tensor,
    skip: Tensor,
    states: Tensor,
    num_groups: int,
    times: Tensor,
) -> list[Instruction]:
    """`state_space_scan`; `times` has room for every row: see `times_width`.

    Raises TypeError or ValueError for what C cannot read.
    """
    per_head = {"decay": decay, "time_bias": time_bias, "skip": skip}
    args = _rule(out, xbc, dt, 1, per_head, states, num_groups, times)
    args = (*args, skip.data_ptr())
    return [("state_space_times", args), ("state_space", args)]


def _rule(
    out: Rows,
    inputs: Rows,
    gates: Rows,
    gates_per_head: int,
    per_head: dict[str, Tensor],
    states: Tensor,
    num_key_heads: int,
    scales: Tensor,
) -> tuple[int, ...]:
    """What both kinds of rules are told, checked."""
    num_heads, key_size, value_size = states.shape[1:]
    check_states(states, torch.float32)
    for name, tensor in per_head.items():
        if tensor.shape != (num_heads,) or tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be {num_heads} numbers of float32")
        if not tensor.is_contiguous():
            raise TypeError(f"{name} must be contiguous")
    if num_heads % num_key_heads:
        raise ValueError(f"{num_heads} value heads cannot share {num_key_heads} key heads")
    if key_size > _MAX_KEY_SIZE:
        raise ValueError(f"a key head has at most {_MAX_KEY_SIZE} elements, got {key_size}")
    width = 2 * num_key_heads * key_size + num_heads * value_size
    if inputs.width != width or gates.width != gates_per_head * num_heads:
        raise ValueError(
            f"inputs and gates of {width} and {gates_per_head * num_heads} elements are due,"
            f" got {inputs.width} and {gates.width}"
        )
    return (
        out.address,
        inputs.address,
        inputs.stride,
        gates.address,
        gates.stride,
        per_head["decay"].data_ptr(),
        per_head["time_bias"].data_ptr(),
        scales.data_ptr(),
        states.data_ptr(),
        states.shape[0],
        num_key_heads,
        num_heads,
        key_size,
        value_size,
    )


def gated_norm(
    out: Rows, x: Rows, gate: Rows, weight: Tensor, eps: float, rows_kind: int
) -> Instruction:
    """`gated_rms_norm`. Raises TypeError or ValueError for what C cannot read."""
    check_parameters(weight)
    size = weight.shape[0]
    if x.width != gate.width or x.width % size:
        raise ValueError(f"heads of {size} in rows of {x.width}, gated by {gate.width} elements")
    fields = (x.width, rows_kind, weight.data_ptr(), size, double_bits(eps))
    return "gated_norm", (out.address, *x[:2], *gate[:2], *fields)


def norm_behind_gate(
    out: Rows, x: Rows, gate: Rows, weight: Tensor, eps: float, group_size: int, rows_kind: int
) -> Instruction:
    """`norm_of_gated`. Raises TypeError or ValueError for what C cannot read."""
    check_parameters(weight)
    if x.width != gate.width or x.width % group_size or weight.shape != (x.width,):
        raise ValueError(
            f"groups of {group_size} in rows of {x.width}, gated by {gate.width} elements,"
            f" weighted by {tuple(weight.shape)}"
        )
    fields = (x.width, rows_kind, weight.data_ptr(), group_size, double_bits(eps))
    return "norm_of_gated", (out.address, *x[:2], *gate[:2], *fields)


def gate_by_sigmoid(out: Rows, x: Rows, gate: Rows, rows_kind: int) -> Instruction:
    """`sigmoid_gate`. Raises ValueError for rows that are no runs of one gate each."""
    if x.width % gate.width:
        raise ValueError(f"rows of {x.width} elements cannot be gated by {gate.width}")
    run = x.width // gate.width
    return "sigmoid_gate", (out.address, *x[:2], *gate[:2], x.width, rows_kind, 0, run)


def check_parameters(*tensors: Tensor | None) -> None:
    """Raises TypeError for a weight that is not read by address: bfloat16, adjacent."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
            raise TypeError(f"weights must be contiguous bfloat16, got {tensor.dtype}")


def check_states(states: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless slots lie one behind the other."""
    if states.dtype != dtype or not states.is_contiguous():
        raise TypeError(f"states must be contiguous {dtype}, got {states.dtype}")


# --- on tensors -----------------------------------------------------------------------------------


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
    out, taps = torch.empty(x.shape, dtype=torch.bfloat16), packed_taps(weight)
    instruction = convolution(_rows(out), _rows(x), taps, bias, states, activation)
    fields = _step(x, step, query_start_loc, seq_lens)
    run_at_once([instruction], fields, pool().threads())
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
    """See `recurrent.gated_delta_rule`."""
    out = torch.empty(len(qkv), states.shape[1] * states.shape[3], dtype=torch.bfloat16)
    if len(gates) != len(qkv):
        raise ValueError(f"{len(qkv)} rows cannot have gates of {len(gates)}")
    scales = torch.empty(len(qkv), scales_width(states, num_key_heads))
    instructions = delta_rule(
        _rows(out), _rows(qkv), _rows(gates), decay, time_bias, states, num_key_heads, scales
    )
    fields = _step(qkv, step, query_start_loc, seq_lens)
    run_at_once(instructions, fields, pool().threads())
    return out


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
    """See `recurrent.state_space_scan`."""
    out = torch.empty(len(xbc), states.shape[1] * states.shape[3], dtype=torch.bfloat16)
    if len(dt) != len(xbc):
        raise ValueError(f"{len(xbc)} rows cannot have time steps of {len(dt)}")
    times = torch.empty(len(xbc), times_width(states))
    instructions = state_space(
        _rows(out), _rows(xbc), _rows(dt), decay, time_bias, skip, states, num_groups, times
    )
    fields = _step(xbc, step, query_start_loc, seq_lens)
    run_at_once(instructions, fields, pool().threads())
    return out


def norm_of_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """See `recurrent.norm_of_gated`."""
    out = _empty_like(x, gate)
    instruction = norm_behind_gate(_rows(out), _rows(x), _rows(gate), weight, eps, group_size, 0)
    run_at_once([instruction], pack_step(len(x)), pool().threads())
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `recurrent.gated_rms_norm`."""
    out = _empty_like(x, gate)
    instruction = gated_norm(_rows(out), _rows(x), _rows(gate), weight, eps, 0)
    run_at_once([instruction], pack_step(len(x)), pool().threads())
    return out


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """See `recurrent.sigmoid_gate`."""
    if len(gate) != len(x):
        raise ValueError(f"{len(x)} rows cannot be gated by {len(gate)}")
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    instruction = gate_by_sigmoid(_rows(out), _rows(x), _rows(gate), 0)
    run_at_once([instruction], pack_step(len(x)), pool().threads())
    return out


def _empty_like(x: Tensor, gate: Tensor) -> Tensor:
    if gate.shape != x.shape:
        raise ValueError(f"rows {tuple(x.shape)} cannot be gated by {tuple(gate.shape)}")
    return torch.empty(x.shape, dtype=torch.bfloat16)


def _rows(x: Tensor) -> Rows:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise TypeError(f"rows must be adjacent bfloat16, got {x.dtype} at stride {x.stride()}")
    return Rows(x.data_ptr(), x.stride(0), x.shape[1])


def _step(x: Tensor, step: StepStates, query_start_loc: Tensor, seq_lens: Tensor) -> bytes:
    num_requests = seq_lens.shape[0]
    given = (query_start_loc, num_requests + 1), (seq_lens, num_requests)
    for tensor, length in (*given, (step.slots, num_requests), (step.saves, len(x))):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise TypeError(f"a step's indices must be contiguous int32, got {tensor.dtype}")
        if tensor.shape != (length,):
            raise ValueError(f"{length} indices are due, got {tuple(tensor.shape)}")
    starts, lengths = query_start_loc.data_ptr(), seq_lens.data_ptr()
    slots = step.slots.data_ptr(), step.saves.data_ptr()
    return pack_step(
        len(x), 0, num_requests, 0, 0, 0, 0, 0, starts, lengths, 0, 0, 0, 0, 0, 0, *slots
    )
