"""The parts of a block, each bound to its weights and to the kernels it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.models.rope import alibi_slopes, query_scales
from streamserve.models.spec import (
    AttentionSpec,
    NormSpec,
)
from streamserve.models.weights import NormWeights, Weights
from streamserve_kernels import Kernels


class BoundNorm:
    """No norm at all; `bind_norm` makes the others."""

    __slots__ = ()

    def norm(self, x: Tensor) -> Tensor:
        return x

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(x + residual), x + residual)."""
        total = x + residual
        return total, total


class _RmsNorm(BoundNorm):
    __slots__ = ("_eps", "_kernel", "_offset", "_weight")

    def __init__(self, spec: NormSpec, weights: NormWeights | None, kernels: Kernels) -> None:
        assert weights is not None, "only layer norms may have none"
        self._kernel: Any = kernels.rms_norm
        self._weight, self._eps, self._offset = weights.weight, spec.eps, spec.weight_offset

    def norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self._kernel(x, self._weight, self._eps, None, self._offset)
        return normed

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self._kernel(
            x, self._weight, self._eps, residual, self._offset
        )
        return both


class _LayerNorm(BoundNorm):
    __slots__ = ("_bias", "_eps", "_kernel", "_weight")

    def __init__(self, spec: NormSpec, weights: NormWeights | None, kernels: Kernels) -> None:
        self._kernel: Any = kernels.layer_norm
        self._weight = None if weights is None else weights.weight
        self._bias = None if weights is None else weights.bias
        self._eps = spec.eps

    def norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self._kernel(x, self._weight, self._bias, self._eps)
        return normed

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self._kernel(x, self._weight, self._bias, self._eps, residual)
        return both


def bind_norm(spec: NormSpec, weights: NormWeights | None, kernels: Kernels) -> BoundNorm:
    """``weights`` are None for a spec without."""
    kind = _RmsNorm if spec.kind == "rms_norm" else _LayerNorm
    return kind(spec, weights, kernels)


BindNorm = Callable[[NormSpec, NormWeights, Kernels], BoundNorm]


class Attention:
    """q, k and v in one product, rotation and cache write in one call, then paged attention."""

    __slots__ = (
        "_alibi_slopes",
        "_attend",
        "_cos_sin",
        "_embedding",
        "_gate",
        "_head_gate",
        "_interleaved",
        "_k_norm",
        "_per_head_norm",
        "_q_norm",
        "_qkv",
        "_query_scales",
        "_rotary",
        "_rotary_write_kv",
        "_rotates_first",
        "_sinks",
        "_spec",
        "_splits",
        "_v_norm",
        "_write_kv",
        "output",
    )

    def __init__(
        self,
        spec: AttentionSpec,
        weights: Weights,
        kernels: Kernels,
        device: torch.device,
        cos_sin: Tensor | None,
        max_model_len: int,
        slopes: Sequence[float] | None = None,
        bind_wide_norm: BindNorm = bind_norm,
    ) -> None:
        """``slopes`` are ALiBi's, where the heads are not all that the model has.

        ``bind_wide_norm`` makes a norm over all heads.
        """
        self._spec = spec
        self._qkv = weights.linears[spec.product]
        self.output: Callable[[Tensor], Tensor] = weights.linears["layers.output"]
        self._attend = kernels.paged_attention
        self._embedding = kernels.embedding
        self._write_kv = kernels.write_kv
        self._rotary = kernels.rotary_embedding
        self._rotary_write_kv = kernels.rotary_write_kv
        self._cos_sin = cos_sin
        self._interleaved = spec.rope is not None and spec.rope.interleaved
        self._gate = kernels.sigmoid_gate
        self._head_gate = weights.linears.get("layers.head_gate")
        # What turns in place is the normed key, which is a copy.
        assert spec.qk_norm is not None or not spec.values_are_keys
        kv_parts = 1 if spec.values_are_keys else 2
        self._splits = (spec.num_heads, *(spec.num_kv_heads,) * kv_parts)
        self._sinks = weights.tensors.get("layers.sinks")
        self._query_scales = None
        if spec.query_scale is not None and max_model_len > spec.query_scale.trained:
            scales = query_scales(spec.query_scale, max_model_len)
            self._query_scales = scales[:, None].to(device, self._qkv.dtype)
        self._alibi_slopes = None
        if spec.alibi:
            slopes = alibi_slopes(spec.num_heads) if slopes is None else slopes
            scaled = [slope * spec.alibi_scale for slope in slopes]
            self._alibi_slopes = torch.tensor(scaled, device=device)
        self._q_norm = self._k_norm = None
        self._per_head_norm, self._rotates_first = True, False
        if spec.qk_norm is not None:
            self._rotates_first = spec.qk_norm.rotates_first
            norm, self._per_head_norm = spec.qk_norm.norm, spec.qk_norm.per_head
            bind = bind_norm if self._per_head_norm else bind_wide_norm
            size = spec.query_key_head_size if spec.qk_norm.own_weights else None
            self._q_norm = bind(norm, weights.norms["layers.q_norm"].by_head(size), kernels)
            if spec.shares_cache_of is None:
                self._k_norm = bind(norm, weights.norms["layers.k_norm"].by_head(size), kernels)
        self._v_norm = None
        if spec.value_norm is not None:
            ones = torch.ones(spec.value_head_size, dtype=self._qkv.dtype, device=device)
            self._v_norm = bind_norm(spec.value_norm, NormWeights(ones, None), kernels)

    def write(
        self, normed: Tensor, batch: ForwardBatch, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> queries [T, Hq, D], rotated, and the gate of what they find.

        That is [T, Hq * Dv], or [T, Hq] of whole heads.

        The step's keys and values go into the cache.
        """
        query, key, value, gate = self._project(normed)
        if self._head_gate is not None:
            gate = self._head_gate(normed)
        if self._rotates_first and self._cos_sin is not None:
            self._rotary(query, key, batch.positions, self._cos_sin, interleaved=self._interleaved)
        if self._q_norm is not None and self._k_norm is not None:
            query, key = self._normed(query, self._q_norm), self._normed(key, self._k_norm)
        if self._v_norm is not None:
            value = self._v_norm.norm(value.reshape(-1, value.shape[2])).view(value.shape)
        if self._query_scales is not None:
            query = query * self._embedding(batch.positions, self._query_scales).view(-1, 1, 1)
        if self._cos_sin is None or self._rotates_first:
            self._write_kv(key, value, key_cache, value_cache, batch.slot_mapping)
            return query, gate
        query, _ = self._rotary_write_kv(
            query,
            key,
            value,
            batch.positions,
            self._cos_sin,
            key_cache,
            value_cache,
            batch.slot_mapping,
            interleaved=self._interleaved,
        )
        return query, gate

    def attend(
        self,
        query: Tensor,
        gate: Tensor | None,
        batch: ForwardBatch,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Tensor:
        """Queries [T, Hq, D] -> [T, Hq * Dv], before the output projection."""
        spec, groups = self._spec, batch.prefix_groups
        if groups is not None and spec.window is not None:
            longest = batch.max_seq_len
            if longest is None or longest > spec.window:
                groups = None  # the window may cut the prefix, for each query at another place
        found: Tensor = self._attend(
            query,
            key_cache,
            value_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            scale=spec.scale,
            window=spec.window,
            alibi_slopes=self._alibi_slopes,
            soft_cap=spec.soft_cap,
            sinks=self._sinks,
            prefix_groups=groups,
            max_query_len=batch.max_query_len,
        ).view(query.shape[0], spec.output_size)
        return found if gate is None else self._gate(found, gate)

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[T, H] -> query, key and value by heads, and the gate [T, Hq * Dv]."""
        spec = self._spec
        product = self._qkv(normed)
        if spec.qkv_limit is not None:
            product = product.clamp_(-spec.qkv_limit, spec.qkv_limit)
        size = spec.query_key_head_size
        if size == spec.value_head_size and not spec.output_gate:
            heads = product.view(product.shape[0], -1, size)
            query, key, *own = heads.split_with_sizes(self._splits, 1)
            return query, key, own[0] if own else key, None
        sizes = (spec.query_size, spec.gate_size, spec.key_size, spec.value_size)
        query, gate, key, value = product.split_with_sizes(sizes, 1)
        return (
            query.view(-1, spec.num_heads, size),
            key.view(-1, spec.num_kv_heads, size),
            value.view(-1, spec.num_kv_heads, spec.value_head_size),
            gate if spec.output_gate else None,
        )

    def _normed(self, x: Tensor, norm: BoundNorm) -> Tensor:
        """[T, heads, D], a view of the fused product -> the same, normed and contiguous."""
        width = x.shape[2] if self._per_head_norm else x.shape[1] * x.shape[2]
        return norm.norm(x.reshape(-1, width)).view(x.shape)
