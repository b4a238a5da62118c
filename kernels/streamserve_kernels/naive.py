"""The specification: every kernel in plain torch, on any device, readable before fast.

Sums run in float32 whatever the dtype of the tensors. Each function here is the meaning of the
function of the same name in every other backend, the fallback where there is none, and what the
tests compare with. Shape letters are those of `interface`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve_kernels import adapters, recurrent
from streamserve_kernels.by_head import NaiveHeadsLinear
from streamserve_kernels.experts import expert_activation
from streamserve_kernels.float8 import FLOAT8
from streamserve_kernels.fp8 import NaiveFp8Linear
from streamserve_kernels.interface import (
    ActivationKind,
    ExpertKind,
    GatedKind,
    HeadsLinear,
    PackedLinear,
    PrefixGroups,
    QuantLinear,
)
from streamserve_kernels.quantised import NaiveQuantLinear, Quantization
from streamserve_kernels.routing import Routing, route
from streamserve_kernels.stored import StoredWeight
from streamserve_kernels.stored_naive import NaiveStoredLinear, prepare_parts

name = "naive"

AdapterTable = adapters.AdapterTable
add_adapters = adapters.add_adapters

causal_conv = recurrent.causal_conv
gated_delta_rule = recurrent.gated_delta_rule
gated_rms_norm = recurrent.gated_rms_norm
norm_of_gated = recurrent.norm_of_gated
sigmoid_gate = recurrent.sigmoid_gate
state_space_scan = recurrent.state_space_scan


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    """Shape [B, Hkv, S, D] of one layer's key (or value) cache.

    Block first, so a block is one contiguous piece for `copy_blocks`; head before token, so that
    attention over one kv head reads S·D adjacent elements per block.
    """
    return (num_blocks, num_kv_heads, block_size, head_size)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Writes this step's keys [T, Hkv, D] and values [T, Hkv, Dv] into the caches, in place.

    `slot_mapping` [T] int64: `block_id * S + offset`, or -1 for a padding row, which is skipped.
    A float8_e4m3fn cache takes its largest value for what is larger.
    """
    block_size = key_cache.shape[2]
    rows = (slot_mapping >= 0).nonzero(as_tuple=True)[0]
    slots = slot_mapping[rows]
    blocks, offsets = slots // block_size, slots % block_size
    for cache, new in ((key_cache, key), (value_cache, value)):
        if cache.dtype == FLOAT8:
            limit = torch.finfo(cache.dtype).max
            held = new[rows].float().clamp(-limit, limit).to(cache.dtype).view(torch.uint8)
            cache.view(torch.uint8)[blocks, :, offsets] = held
        else:
            cache[blocks, :, offsets] = new[rows].to(cache.dtype)


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copies whole blocks `src` [C] to `dst` [C] (int64) along dim 0 of every cache, in place.

    No block is both a source and a destination, so the order of the copies does not matter.
    """
    for cache in caches:
        held = cache.view(torch.uint8) if cache.dtype == FLOAT8 else cache
        held[dst] = held[src]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    prefix_groups: PrefixGroups | None = None,
    max_query_len: int | None = None,
) -> Tensor:
    """Causal attention of ragged queries [T, Hq, D] over a paged cache -> [T, Hq, Dv].

    Request r's queries are rows `query_start_loc[r]:query_start_loc[r + 1]`; the last of them sits
    at position `seq_lens[r] - 1`. Its key at position j is in block `block_table[r, j // S]`,
    offset `j % S`. Entries of the table past the sequence are never read. Query head h reads kv
    head `h // (Hq / Hkv)`. Rows that belong to no request come back as zeros.

    score(i, j) = scale·q_i·k_j, then soft_cap·tanh(score / soft_cap), then + slope_h·(j - i);
    visible iff j <= i and, with a window, i - j < window. `sinks` [Hq] is one extra logit per head
    that takes part in the softmax's denominator only (gpt-oss).

    `prefix_groups` changes nothing but the order of sums: what a group shares is attended to once,
    for the queries of all its members, and merged with each one's own rest by log-sum-exp. A
    backend may ignore it. It must be `None` if the window hides any of a shared part.

    `max_query_len` is no less than the queries of any request, where the host knows a bound: a
    device that must not be asked chooses its kernel by it. It changes no result.

    Paging: Kwon et al. 2023; ALiBi: Press et al. 2022; soft cap: Gemma Team 2024; shared prefixes:
    Juravsky et al. 2024 (Hydragen), Ye et al. 2024 (cascade inference).
    """
    block_size = key_cache.shape[2]
    block_table = block_table.long()
    output = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    attention = _Attention(key_cache, value_cache, scale, window, alibi_slopes, soft_cap)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    rows = [slice(start, end) for start, end in pairwise(starts)]
    positions = [
        torch.arange(length - (row.stop - row.start), length, device=query.device)
        for row, length in zip(rows, lengths, strict=True)
    ]
    shared = query.new_empty(output.shape, dtype=torch.float32)  # attention over the shared parts
    shared_lse = shared.new_empty(output.shape[:2])
    num_shared = [0] * len(lengths)  # blocks
    for members, num_blocks in [] if prefix_groups is None else _groups(prefix_groups):
        tokens = torch.cat([torch.arange(rows[r].start, rows[r].stop) for r in members])
        at = torch.cat([positions[r] for r in members])
        blocks = block_table[members[0], :num_blocks]
        shared[tokens], scores = attention(query[tokens], at, blocks, 0, num_blocks * block_size)
        shared_lse[tokens] = _log_sum_exp(scores)
        for r in members:
            num_shared[r] = num_blocks
    for r, length in enumerate(lengths):
        row, first = rows[r], num_shared[r]
        if row.stop == row.start:
            continue
        blocks = block_table[r, first : -(-length // block_size)]
        own, scores = attention(query[row], positions[r], blocks, first * block_size, length, sinks)
        if first > 0:
            share = torch.sigmoid(shared_lse[row] - _log_sum_exp(scores))  # of the weight
            own = own.lerp(shared[row], share[..., None])
        output[row] = own.to(output.dtype)
    return output


def _log_sum_exp(scores: Tensor) -> Tensor:
    """Scores [Hq, q, L] -> [q, Hq], the logarithm of the softmax's denominator."""
    return scores.logsumexp(-1).transpose(0, 1)


def _blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of a cache; torch indexes no float8 on a CPU."""
    if cache.dtype == FLOAT8:
        return cache.view(torch.uint8)[blocks].view(cache.dtype).float()
    return cache[blocks]


def _groups(groups: PrefixGroups) -> list[tuple[list[int], int]]:
    """(members, leading blocks) of each group that has members."""
    members, starts = groups.members.tolist(), groups.starts.tolist()
    return [
        (members[start:end], num_blocks)
        for start, end, num_blocks in zip(
            starts[:-1], starts[1:], groups.num_blocks.tolist(), strict=True
        )
        if end > start
    ]


@dataclass(frozen=True, slots=True)
class _Attention:
    """Attention of any queries over a run of keys: what `paged_attention` is put together from."""

    key_cache: Tensor
    value_cache: Tensor
    scale: float
    window: int | None
    alibi_slopes: Tensor | None
    soft_cap: float | None

    def __call__(
        self,
        query: Tensor,
        positions: Tensor,
        blocks: Tensor,
        start: int,
        end: int,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries [q, Hq, D] at `positions` [q] over the keys at `start` to `end`, in `blocks`.

        Returns the attention [q, Hq, Dv] and its scores [Hq, q, L], sinks behind them, in float32.
        """
        num_heads = query.shape[1]
        keys = self._gather(self.key_cache, blocks, end - start, num_heads)
        values = self._gather(self.value_cache, blocks, end - start, num_heads)
        scores = self.scale * (query.float().transpose(0, 1) @ keys.transpose(1, 2))  # [Hq, q, L]
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        key_positions = torch.arange(start, end, device=query.device)
        positions = positions[:, None]
        if self.alibi_slopes is not None:
            distance = (key_positions - positions).float()
            scores = scores + self.alibi_slopes.float()[:, None, None] * distance
        hidden = key_positions > positions
        if self.window is not None:
            hidden |= positions - key_positions >= self.window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, len(query), 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : end - start]
        return (weights @ values).transpose(0, 1), scores

    @staticmethod
    def _gather(cache: Tensor, blocks: Tensor, length: int, num_heads: int) -> Tensor:
        """The first `length` rows in `blocks` -> [Hq, length, D] float32, a copy per query head."""
        num_kv_heads, _, size = cache.shape[1:]
        rows = _blocks(cache, blocks).transpose(0, 1).reshape(num_kv_heads, -1, size)[:, :length]
        return rows.float().repeat_interleave(num_heads // num_kv_heads, dim=0)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm of x [..., H] (Zhang & Sennrich 2019); sums in float32.

    Without an offset (Llama) the normalised row is rounded to x's dtype before the weight; with one
    (Gemma, whose weights are stored minus 1) `weight_offset + weight` multiplies in float32. With
    `residual` [..., H] it returns `(norm(h), h)` where `h = x + residual`.
    """
    h = x if residual is None else x + residual
    h32 = h.float()
    normed = h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps)
    if weight_offset == 0.0:
        normed = normed.to(x.dtype) * weight
    else:
        normed = normed * (weight_offset + weight.float())
    normed = normed.to(x.dtype)
    return normed if residual is None else (normed, h)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x [..., H] (Ba et al. 2016) in float32, rounded once at the end.

    Of a `weight` [G, H], which has no `bias` beside it, row r of x takes row r % G.
    With `residual` [..., H] it returns `(norm(h), h)` where `h = x + residual`.
    """
    h = x if residual is None else x + residual
    has_groups = weight is not None and weight.dim() == 2
    normed = F.layer_norm(
        h.float(),
        (h.shape[-1],),
        None if weight is None or has_groups else weight.float(),
        None if bias is None else bias.float(),
        eps,
    )
    if weight is not None and has_groups:
        normed = (normed.view(-1, *weight.shape) * weight.float()).view(h.shape)
    normed = normed.to(x.dtype)
    return normed if residual is None else (normed, h)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotates x [T, H, rot_dim] in place by cos, sin [T, 1, rot_dim / 2] (float32)."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = first.float(), second.float()
    rotated = a * cos - b * sin, b * cos + a * sin  # both before either half is overwritten
    first.copy_(rotated[0])
    second.copy_(rotated[1])


def rotary_embedding(
    query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotates query [T, Hq, D] and key [T, Hkv, D] **in place** and returns them (Su et al. 2021).

    `cos_sin` [P, rot_dim] float32 holds the cosines in its first half and the sines in its second;
    row `positions[t]` ([T] int64) belongs to token t. Only the first rot_dim of D elements turn.
    `interleaved` pairs elements (2i, 2i + 1) as GPT-J does, otherwise (i, i + rot_dim / 2).
    """
    rot_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    _rotate(query[..., :rot_dim], cos, sin, interleaved)
    _rotate(key[..., :rot_dim], cos, sin, interleaved)
    return query, key


def rotary_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`rotary_embedding` followed by `write_kv`: one call, and in a fused backend one pass."""
    rotary_embedding(query, key, positions, cos_sin, interleaved=interleaved)
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    return query, key


def _activate(x: Tensor, kind: ActivationKind) -> Tensor:
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh" | "gelu_new" | "gelu_fast":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
    raise ValueError(f"activation kind {kind!r} is not known")


def gated_activation(x: Tensor, kind: GatedKind) -> Tensor:
    """act(gate)·up for x [..., 2·I] laid out gate first, up second -> [..., I]; one rounding.

    `clamped_swiglu` (gpt-oss) keeps gates below 7 and ups within ±7, and is
    gate·sigmoid(1.702·gate)·(up + 1).
    """
    gate, up = x.float().chunk(2, dim=-1)
    if kind == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (_activate(gate, "quick_gelu") * (up + 1)).to(x.dtype)
    return (_activate(gate, kind) * up).to(x.dtype)


def activation(x: Tensor, kind: ActivationKind) -> Tensor:
    """act(x), elementwise, computed in float32. `gelu_new` and `gelu_fast` are `gelu_tanh`."""
    return _activate(x.float(), kind).to(x.dtype)


@dataclass(frozen=True, slots=True)
class NaiveLinear:
    """A weight that is not packed at all."""

    weight: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def unpack(self) -> Tensor:
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def prepare_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Makes weight [N, K] (and bias [N]) ready for `linear`. Once per weight, at load time.

    The caller may drop its own references afterwards; `unpack` gives the weight back.
    """
    return NaiveLinear(weight, bias)


def prepare_quantised(
    weight: Tensor, bias: Tensor | None, quantization: Quantization
) -> QuantLinear:
    """As `prepare_linear`, but of a weight that is quantised here: see `quantised`.

    A backend may quantise the activations too (see the bound in its own docstring); what the
    quantised weight is does not differ between backends.
    """
    if quantization == "fp8":
        return NaiveFp8Linear(weight, bias)
    return NaiveQuantLinear(weight, bias, quantization)


def prepare_stored(weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
    """As `prepare_linear`, but of a weight that a checkpoint holds quantised: see `stored`.

    Codes stay packed; `unpack` gives the very weight that `StoredWeight.dequantise` says. `dtype`
    is that of the model's activations. A backend may round them and tables: see its own bound.
    """
    return prepare_parts(
        weight, bias, lambda part, part_bias: NaiveStoredLinear(part, part_bias, dtype)
    )


def prepare_by_head(weight: Tensor) -> HeadsLinear:
    """Weights [H, N, K], one for each head, as x [T, H, K + C] is multiplied by them.

    The first K elements of a head are; what is behind is passed on, before the products:
    [T, H, C + N]. The heads of a token of x are adjacent; K, C and N may have to be even.
    """
    return NaiveHeadsLinear(weight)


def slow_quantisation() -> str | None:
    """Every product dequantises its whole weight."""
    return "the naive kernels dequantise the whole weight at every product"


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Computes x [..., K] @ weightᵀ + bias -> [..., N] in the dtype of x, summed in float32."""
    return packed(x)


def embedding(ids: Tensor, weight: Tensor | QuantLinear) -> Tensor:
    """Rows `ids` [T] of weight [V, H] -> [T, H]. A quantised weight is a tied head."""
    return F.embedding(ids, weight) if isinstance(weight, Tensor) else weight.rows(ids)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[T, each] -> [T, all of them]."""
    return torch.cat(list(parts), dim=1)


def resolve_tokens(input_ids: Tensor, last_tokens: Tensor) -> None:
    """Replaces, in place, every id of `input_ids` [T] int64 below 0 by `last_tokens[-1 - id]`.

    So a step computes ids that only the device knows: those that the last step drew.
    """
    input_ids.copy_(
        torch.where(input_ids < 0, last_tokens[(-1 - input_ids).clamp(min=0)], input_ids)
    )


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    routing: Routing,
    kind: ExpertKind,
) -> Tensor:
    """Mixture of experts of x [T, H] by router_logits [T, E] -> [T, H] (Jiang et al. 2024).

    `routing` says which experts a token goes to and how much each counts, in float32. Expert e maps
    H -> 2·I (`gate_up[e]`), a gated activation, I -> H (`down[e]`); without gates, as `kind` says,
    the first is H -> I.
    """
    chosen, weights = route(router_logits, routing)
    activate = expert_activation(kind, gated_activation, activation)
    return chosen_experts(x, chosen, weights, gate_up, down, activate)


def chosen_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Experts of x [T, H] that a router of the caller's chose -> [T, H].

    A token goes to `chosen` [T, top_k], numbers of experts, all different, and takes what they give
    times `weights` [T, top_k], in float32. Expert e maps H -> N (`up[e]`), N -> I (`activate` of
    any rows [R, N], which asks the device for nothing), I -> H (`down[e]`).
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(len(up)):
        rows, slots = (chosen == e).nonzero(as_tuple=True)
        hidden = activate(linear(x[rows], up[e]))
        output[rows] += weights[rows, slots, None] * linear(hidden, down[e]).float()
    return output.to(x.dtype)


def add_shared_experts(chosen: Tensor, x: Tensor, gate: Tensor, shared: Tensor) -> Tensor:
    """What chosen experts gave [T, H] and sigmoid(x · gate) times what all use [T, H] -> [T, H].

    `gate` [1, H'] is multiplied by x [T, H'].
    """
    return chosen + torch.sigmoid(torch.nn.functional.linear(x, gate)) * shared


def warm_up(
    dtype: torch.dtype,
    head_size: int,
    value_head_size: int | None = None,
    block_size: int = 16,
) -> None:
    """Nothing to compile."""


def compilations() -> int:
    """Nothing is ever compiled."""
    return 0


def recorder(max_tokens: int, max_logits: int) -> None:
    """Nothing is recorded: every step runs function by function."""
