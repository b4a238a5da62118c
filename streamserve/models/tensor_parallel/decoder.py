"""The decoder of one rank: its own heads, widths and tokens, and sums over all ranks.

A block adds up twice, behind the attention's output and behind the MLP; where both are added to the
same residual anyway, once. Everything between is as on one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamserve.models.adapters import AdapterTables
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.block import Block
from streamserve.models.decoder import Decoder
from streamserve.models.layers import BoundNorm
from streamserve.models.mlp import bind_mlp
from streamserve.models.rope import alibi_slopes
from streamserve.models.spec import AttentionSpec, LayerSpec, NormSpec
from streamserve.models.tensor_parallel.ranks import Ranks
from streamserve.models.tensor_parallel.share import Share
from streamserve.models.weights import DecoderWeights, NormWeights, Weights
from streamserve_kernels import Kernels, QuantLinear


class ShareDecoder(Decoder):
    """One rank's part of a decoder: the same calls on every rank, and every rank has all logits."""

    def __init__(
        self,
        share: Share,
        ranks: Ranks,
        weights: DecoderWeights,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        adapters: AdapterTables | None = None,
    ) -> None:
        self._share, self._ranks = share, ranks
        super().__init__(
            share.spec,
            weights,
            kernels,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            adapters=adapters,
        )

    def record(self, kv_caches: KVCache, *, max_tokens: int, max_logits: int) -> int:
        """Nothing: a recorded step is one call that knows of no other rank."""
        return 0

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """As of a whole decoder."""
        num_rows, vocab_size = hidden_states.shape[0], self.spec.vocab_size
        if out is None:
            out = hidden_states.new_empty((num_rows, vocab_size), dtype=torch.float32)
        if num_rows == 0:
            return out
        own = hidden_states.new_empty((num_rows, self._share.held.vocab_size), dtype=out.dtype)
        found = self._ranks.all_gather(super().compute_logits(hidden_states, own))
        return out.copy_(found.transpose(0, 1).reshape(num_rows, -1)[:, :vocab_size])

    def _look_up(self, input_ids: Tensor, table: Tensor | QuantLinear) -> Tensor:
        held = self._share.held.vocab_size
        rows = input_ids - self._share.first_token
        others = (rows < 0) | (rows >= held)
        x = super()._look_up(rows.clamp_(0, held - 1), table)
        return self._ranks.all_reduce(x.masked_fill_(others[:, None], 0.0))

    def _block(self, index: int, weights: Weights) -> Block:
        layer, ranks = self.spec.layers[index], self._ranks
        spec, own = self._share.whole.layers[index].attention, layer.attention
        assert isinstance(spec, AttentionSpec)
        assert isinstance(own, AttentionSpec)
        assert layer.mlp is not None
        heads = self._share.heads(spec)
        attention = self._attention(
            own,
            weights,
            slopes=alibi_slopes(spec.num_heads)[heads.start : heads.stop] if spec.alibi else None,
            bind_wide_norm=self._wide_norm,
        )
        if _is_one_sum(layer):
            mlp = bind_mlp(layer.mlp, weights, self.kernels)
            return _SummedBlock(layer, weights, self.kernels, attention, mlp, ranks=ranks)
        output = attention.output
        attention.output = lambda x: ranks.all_reduce(output(x))
        mlp = bind_mlp(layer.mlp, weights, self.kernels, ranks.all_reduce)
        return Block(layer, weights, self.kernels, attention, mlp)

    def _wide_norm(self, spec: NormSpec, weights: NormWeights, _kernels: Kernels) -> BoundNorm:
        return _SummedRmsNorm(spec, weights.weight, self._ranks)


def _is_one_sum(layer: LayerSpec) -> bool:
    is_parallel = layer.residual == "parallel" and layer.per_layer is None and not layer.scaled
    return is_parallel and layer.attention_post_norm is None and layer.mlp_post_norm is None


class _SummedBlock(Block):
    """A parallel block: what both halves found is added up at once."""

    __slots__ = ("_ranks",)

    def __init__(self, *parts: Any, ranks: Ranks) -> None:
        super().__init__(*parts)
        self._ranks = ranks

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        caches: tuple[Tensor, ...],
        rows: Tensor | None,
        part: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x, residual = super().forward(x, residual, batch, caches, rows, part)
        # Without rows that anybody wants nothing was computed.
        return (x if x is residual else self._ranks.all_reduce(x)), residual


class _SummedRmsNorm(BoundNorm):
    """An RMS norm over the heads of all ranks.

    One that several ranks hold counts so many times, in the sum and in the number of elements.
    """

    __slots__ = ("_ranks", "_spec", "_weight", "_width")

    def __init__(self, spec: NormSpec, weight: Tensor, ranks: Ranks) -> None:
        assert spec.weight_offset == 0.0  # of families whose norms are of each head
        self._spec, self._weight, self._ranks = spec, weight, ranks
        self._width = weight.shape[0] * ranks.size

    def norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = self._ranks.all_reduce(wide.square().sum(-1, keepdim=True))
        normed = wide * torch.rsqrt(squares / self._width + self._spec.eps)
        return normed.to(x.dtype) * self._weight
