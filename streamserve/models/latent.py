"""Multi-head latent attention, in the form in which no keys and values are made for the heads."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.models.layers import bind_norm
from streamserve.models.spec import LATENT_NORM, AttentionSpec
from streamserve.models.weights import Weights
from streamserve_kernels import Kernels


class LatentAttention:
    """See `LatentSpec`. Its parts are called as those of `Attention`.

        normed ─┬─▶ query's latent ─▶ norm ─▶ [H, N + R] ─▶ heads' keys ─▶ [R | L] queries, turned
                ├─▶ R that turn ──────────────────────────────────┐
                └─▶ latent ─▶ norm ─▶ L, the value ───────────────┴▶ [R | L] key, turned

    R elements turn, N of a head do not, L are the latent's. What the heads find, L each, goes
    through their values' product.
    """

    __slots__ = (
        "_attend",
        "_cos_sin",
        "_input",
        "_interleaved",
        "_keys",
        "_norm",
        "_query",
        "_query_norm",
        "_rotary_write_kv",
        "_side_by_side",
        "_sizes",
        "_spec",
        "_values",
        "output",
    )

    def __init__(
        self, spec: AttentionSpec, weights: Weights, kernels: Kernels, cos_sin: Tensor | None
    ) -> None:
        latent = spec.latent
        assert latent is not None
        assert spec.rope is not None
        assert cos_sin is not None
        rank = spec.value_head_size
        rope_size = spec.query_key_head_size - rank
        self._spec = spec
        self._input = weights.linears["layers.latent.input"]
        self._norm = bind_norm(LATENT_NORM, weights.norms["layers.latent.norm"], kernels)
        self._query = self._query_norm = None
        width = spec.num_heads * (latent.key_size + rope_size)
        if latent.query_rank is not None:
            width = latent.query_rank
            self._query = weights.linears["layers.latent.query"]
            norm = weights.norms["layers.latent.query_norm"]
            self._query_norm = bind_norm(LATENT_NORM, norm, kernels)
        self._sizes = (width, rank, rope_size)
        self._keys = weights.by_head["layers.latent.keys"]
        self._values = weights.by_head["layers.latent.values"]
        self.output: Callable[[Tensor], Tensor] = weights.linears["layers.output"]
        self._cos_sin = cos_sin
        self._interleaved = spec.rope.interleaved
        self._side_by_side = kernels.side_by_side
        self._rotary_write_kv = kernels.rotary_write_kv
        self._attend = kernels.paged_attention

    def write(
        self, normed: Tensor, batch: ForwardBatch, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, None]:
        """[T, H] -> queries [T, Hq, R + L], turned. The step's latents go into the cache."""
        query, latent, turned = self._input(normed).split_with_sizes(self._sizes, 1)
        if self._query is not None and self._query_norm is not None:
            query = self._query(self._query_norm.norm(query))
        latent = self._norm.norm(latent)
        heads, size = self._spec.num_heads, self._spec.query_key_head_size
        query = self._keys(query.view(query.shape[0], heads, -1))
        key = self._side_by_side((turned, latent))
        query, _ = self._rotary_write_kv(
            query,
            key.view(key.shape[0], 1, size),
            latent.view(latent.shape[0], 1, -1),
            batch.positions,
            self._cos_sin,
            key_cache,
            value_cache,
            batch.slot_mapping,
            interleaved=self._interleaved,
        )
        return query, None

    def attend(
        self,
        query: Tensor,
        gate: Tensor | None,
        batch: ForwardBatch,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Tensor:
        """Queries [T, Hq, R + L] -> [T, Hq * value size], before the output projection."""
        found = self._attend(
            query,
            key_cache,
            value_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            scale=self._spec.scale,
            prefix_groups=batch.prefix_groups,
            max_query_len=batch.max_query_len,
        )
        return self._values(found).view(query.shape[0], self._spec.output_size)
