"""What layers remember of a sequence in one place of constant size, and the naive twins of these.

A *state* is what a layer knows of all tokens so far: the last inputs of a convolution, the matrix
of a gated delta rule. It lies in a row of a tensor, a *slot*, and a step goes on from where the
sequence's slot stands. What a state was after some token can be kept in another slot as it passes,
so that a later sequence with the same beginning starts from there.

Shape letters are those of `interface`; besides

    X slots    C channels    W width of a convolution
    Hk, Hv key and value heads (Hv a multiple of Hk), D and Dv their sizes
    H, P   heads of a state space and their size    G, N   groups that share B and C, their size
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class StepStates(NamedTuple):
    """Where a step's sequences have their states, the same slots in every layer.

    A sequence whose first token is in the step starts from zeros, whatever its slot holds; others
    from what is there. Its slot then holds what was after its last token. No slot is named twice.
    """

    slots: Tensor  # [R] int32; -1: it starts from zeros, and nothing is kept
    saves: Tensor  # [T] int32: the slot that keeps what was after this token, or -1


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
    """A convolution of each channel over the last W tokens: x [T, C] -> [T, C], a new tensor.

    y_t = act(bias + sum over w of weight[:, w] * x_{t - (W - 1) + w}), with `weight` [C, W], in
    float32, rounded once. `states` [X, W - 1, C] of x's dtype hold a sequence's last inputs, the
    oldest first. Rows that belong to no sequence come back as zeros.
    """
    width = weight.shape[1]
    taps = weight.float().t()
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for begin, end, slot, is_new in _sequences(step, query_start_loc, seq_lens):
        before = x.new_zeros(width - 1, x.shape[1]) if is_new or slot < 0 else states[slot]
        inputs = torch.cat([before, x[begin:end]])
        total = torch.zeros_like(x[begin:end], dtype=torch.float32)
        for w in range(width):
            total += taps[w] * inputs[w : w + end - begin].float()
        total = total if bias is None else total + bias.float()
        y[begin:end] = F.silu(total) if activation == "silu" else total
        for token, kept in _saved(step, begin, end, slot):
            states[kept] = inputs[token - begin + 1 : token - begin + width]
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
    """Linear attention by the gated delta rule (Yang et al. 2024) -> [T, Hv * Dv] of qkv's dtype.

    `qkv` [T, 2 * Hk * D + Hv * Dv] are queries, keys and values; value head h reads key head
    h // (Hv / Hk). Queries and keys are scaled to length 1 (x / sqrt(sum x² + 1e-6)), queries by
    D^-1/2 besides. `gates` [T, 2 * Hv] are b, then a; `decay` and `time_bias` are [Hv] float32.
    With S the state [D, Dv] of a value head, `states` [X, Hv, D, Dv] float32:

        S = S * exp(decay * softplus(a + time_bias))
        S = S + k (sigmoid(b) * (v - kᵀ S))
        y = qᵀ S

    All of it in float32, but for sigmoid(b), which is rounded to gates' dtype.
    Rows that belong to no sequence come back as zeros.
    """
    num_heads, _, value_size = states.shape[1:]
    query, key, value, beta, kept_share = delta_rule_inputs(
        qkv, gates, decay, time_bias, states, num_key_heads
    )
    share = num_heads // num_key_heads
    query, key = (x.repeat_interleave(share, dim=1) for x in (query, key))
    y = torch.zeros(len(qkv), num_heads, value_size, dtype=qkv.dtype, device=qkv.device)
    for begin, end, slot, is_new in _sequences(step, query_start_loc, seq_lens):
        state = torch.zeros_like(states[0]) if is_new or slot < 0 else states[slot].clone()
        saved = dict(_saved(step, begin, end, -1))
        for t in range(begin, end):
            state *= kept_share[t, :, None, None]
            delta = beta[t, :, None] * (value[t] - torch.einsum("hd,hdv->hv", key[t], state))
            state += key[t, :, :, None] * delta[:, None, :]
            y[t] = torch.einsum("hd,hdv->hv", query[t], state)
            if t in saved:
                states[saved[t]] = state
        if slot >= 0:
            states[slot] = state
    return y.view(len(qkv), num_heads * value_size)


class DeltaRuleInputs(NamedTuple):
    """What the gated delta rule makes of its arguments before it looks at a state, in float32."""

    query: Tensor  # [T, Hk, D]
    key: Tensor  # [T, Hk, D]
    value: Tensor  # [T, Hv, Dv]
    beta: Tensor  # [T, Hv]
    kept_share: Tensor  # [T, Hv]


def delta_rule_inputs(
    qkv: Tensor,
    gates: Tensor,
    decay: Tensor,
    time_bias: Tensor,
    states: Tensor,
    num_key_heads: int,
) -> DeltaRuleInputs:
    """See `gated_delta_rule`."""
    num_heads, key_size, value_size = states.shape[1:]
    keys = num_key_heads * key_size
    query, key, value = qkv.float().split_with_sizes([keys, keys, num_heads * value_size], -1)
    return DeltaRuleInputs(
        _unit(query.view(len(qkv), num_key_heads, key_size)) * key_size**-0.5,
        _unit(key.view(len(qkv), num_key_heads, key_size)),
        value.view(len(qkv), num_heads, value_size),
        gates[:, :num_heads].sigmoid().float(),
        torch.exp(decay * F.softplus(gates[:, num_heads:].float() + time_bias)),
    )


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
    """The selective state space of Mamba 2 (Dao & Gu 2024) -> [T, H * P] of xbc's dtype.

    `xbc` [T, H * P + 2 * G * N] are the inputs of H heads of P, then B and C of G groups of N; head
    h reads group h // (H / G). `dt` is [T, H]; `decay` (negative), `time_bias` and `skip` are [H]
    float32. With S the state [N, P] of a head, `states` [X, H, N, P] float32, and t the time step
    softplus(dt + time_bias):

        S = S * exp(decay * t) + B (t * x)
        y = Cᵀ S + skip * x

    All of it in float32. Rows that belong to no sequence come back as zeros.
    """
    num_heads, size, head_size = states.shape[1:]
    width = num_groups * size
    x, b, c = xbc.float().split_with_sizes([num_heads * head_size, width, width], -1)
    x = x.view(-1, num_heads, head_size)
    share = num_heads // num_groups
    b, c = (part.view(-1, num_groups, size).repeat_interleave(share, dim=1) for part in (b, c))
    time, kept_share = time_steps(dt, decay, time_bias)
    y = torch.zeros(len(xbc), num_heads, head_size, dtype=xbc.dtype, device=xbc.device)
    for begin, end, slot, is_new in _sequences(step, query_start_loc, seq_lens):
        state = torch.zeros_like(states[0]) if is_new or slot < 0 else states[slot].clone()
        saved = dict(_saved(step, begin, end, -1))
        for t in range(begin, end):
            state *= kept_share[t, :, None, None]
            state += b[t, :, :, None] * (time[t, :, None] * x[t])[:, None, :]
            y[t] = torch.einsum("hn,hnp->hp", c[t], state) + skip[:, None] * x[t]
            if t in saved:
                states[saved[t]] = state
        if slot >= 0:
            states[slot] = state
    return y.view(len(xbc), num_heads * head_size)


def time_steps(dt: Tensor, decay: Tensor, time_bias: Tensor) -> tuple[Tensor, Tensor]:
    """A state space's time steps, and the share of a state that each keeps: [T, H] float32."""
    time = F.softplus(dt.float() + time_bias)
    return time, torch.exp(decay * time)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head of x [T, H * D], times silu(gate [T, H * D]); `weight` is [D].

    The normalised head is rounded to x's dtype before the weight, as in `naive.rms_norm`; the
    gate's part is in float32, and so is the last product.
    """
    size = weight.shape[0]
    heads = x.reshape(len(x), x.shape[1] // size, size)
    h32 = heads.float()
    normed = weight * (h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed.reshape(x.shape).float() * F.silu(gate.float())).to(x.dtype)


def norm_of_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm of x * silu(gate), both [T, N], over each `group_size` elements; `weight` is [N].

    The normalised row is rounded to x's dtype before the weight, all before that is in float32.
    """
    gated = x.float() * F.silu(gate.float())
    groups = gated.view(len(x), x.shape[1] // group_size, group_size)
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return weight * normed.view(x.shape).to(x.dtype)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """`x * sigmoid(gate)`, [T, N] and [T, G], computed in float32 and rounded once.

    Each of a row's G gates is for N / G adjacent elements.
    """
    runs = x.float().reshape(*gate.shape, x.shape[1] // gate.shape[1])
    return (runs * gate.float().sigmoid()[..., None]).to(x.dtype).flatten(1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _sequences(
    step: StepStates, query_start_loc: Tensor, seq_lens: Tensor
) -> list[tuple[int, int, int, bool]]:
    """(first row, row behind the last, slot, whether its first token is in the step) of each."""
    rows = pairwise(query_start_loc.tolist())
    each = zip(rows, step.slots.tolist(), seq_lens.tolist(), strict=True)
    return [
        (begin, end, slot, length == end - begin)
        for (begin, end), slot, length in each
        if end > begin
    ]


def _saved(step: StepStates, begin: int, end: int, slot: int) -> list[tuple[int, int]]:
    """(row, slot that keeps the state after it) of a sequence; its own comes last."""
    saves = step.saves[begin:end].tolist()
    kept = [(begin + i, save) for i, save in enumerate(saves) if save >= 0]
    return kept if slot < 0 else [*kept, (end - 1, slot)]
