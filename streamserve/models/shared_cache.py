"""Attention of a layer without keys and values of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.models.layers import Attention
from streamserve.models.spec import AttentionSpec
from streamserve.models.weights import Weights
from streamserve_kernels import Kernels


class SharingAttention(Attention):
    """Of queries alone: the keys and values are those of an earlier layer, whose cache it reads."""

    __slots__ = ("_rotary_embedding",)

    def __init__(
        self, spec: AttentionSpec, weights: Weights, kernels: Kernels, *args: Any, **options: Any
    ) -> None:
        super().__init__(spec, weights, kernels, *args, **options)
        self._rotary_embedding = kernels.rotary_embedding

    def write(
        self, normed: Tensor, batch: ForwardBatch, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> queries [T, Hq, D], rotated. Nothing goes into the cache."""
        spec = self._spec
        query = self._qkv(normed).view(-1, spec.num_heads, spec.query_key_head_size)
        if self._q_norm is not None:
            query = self._normed(query, self._q_norm)
        if self._cos_sin is not None:
            query, no_keys = query.split_with_sizes((spec.num_heads, 0), 1)
            self._rotary_embedding(
                query, no_keys, batch.positions, self._cos_sin, interleaved=self._interleaved
            )
        return query, None
