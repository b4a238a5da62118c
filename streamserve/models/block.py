"""One layer of a decoder: its two halves, their norms and residuals."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.models.latent import LatentAttention
from streamserve.models.layers import Attention, BoundNorm, bind_norm
from streamserve.models.per_layer import PerLayerGate
from streamserve.models.recurrent import DeltaNet, ShortConv, StateSpace
from streamserve.models.side_by_side import SideBySide
from streamserve.models.spec import LayerSpec
from streamserve.models.weights import Weights
from streamserve_kernels import Kernels

Mixing = Attention | LatentAttention | DeltaNet | StateSpace | ShortConv | SideBySide
"""What brings a token together with those before it: the first half of a block."""


class Block:
    """One layer. Takes what the last one left, (x, residual) whose sum is the hidden state.

    Or x alone is, and the residual None.
    """

    __slots__ = (
        "_attention",
        "_attention_norm",
        "_attention_post_norm",
        "_mlp",
        "_mlp_norm",
        "_mlp_post_norm",
        "_parallel",
        "_per_layer",
        "_plain",
        "_residual_scale",
        "_scalar",
    )

    def __init__(
        self,
        spec: LayerSpec,
        weights: Weights,
        kernels: Kernels,
        attention: Mixing,
        mlp: Callable[[Tensor], Tensor] | None,
    ) -> None:
        def norm(name: str) -> BoundNorm | None:
            named = getattr(spec, name)
            if named is None:
                return None
            return bind_norm(named, weights.norm(f"layers.{name}", named), kernels)

        self._attention = attention
        self._mlp = mlp
        self._attention_norm = norm("attention_norm") or BoundNorm()
        self._mlp_norm = norm("mlp_norm")
        self._attention_post_norm = norm("attention_post_norm")
        self._mlp_post_norm = norm("mlp_post_norm")
        self._parallel = spec.residual == "parallel"
        self._residual_scale = spec.residual_scale
        self._per_layer: PerLayerGate | None = None
        if spec.per_layer is not None:
            self._per_layer = PerLayerGate(spec.per_layer, weights, kernels)
        self._scalar = weights.tensors["layers.scalar"].item() if spec.scaled else 1.0
        self._plain = (
            not self._parallel
            and self._mlp_norm is not None
            and self._attention_post_norm is None
            and self._mlp_post_norm is None
            and spec.residual_scale == 1.0
            and self._per_layer is None
            and self._scalar == 1.0
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        caches: tuple[Tensor, ...],
        rows: Tensor | None,
        part: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the next (x, residual), of ``rows`` only where given.

        x, residual: [T, H] -> [T, H] or [L, H]; ``caches`` are the layer's keys and values or
        states, or both, one pair behind the other; ``part`` [T, P] is the layer's own of each
        token's embedding, where there are such. The last layer is given the rows that need logits:
        every token must leave its key and value, or its mark on a state, but only those rows are
        worth finishing.
        """
        if residual is None:
            normed, residual = self._attention_norm.norm(x), x
        else:
            normed, residual = self._attention_norm.add_norm(x, residual)
        attention = self._attention
        query, gate = attention.write(normed, batch, *caches)
        if rows is None:
            attended = attention.attend(query, gate, batch, *caches)
        else:
            residual = residual.index_select(0, rows)
            if rows.shape[0] == 0:
                return residual, residual
            attended = attention.attend(query, gate, batch, *caches)
            attended = attended.index_select(0, rows)
            if self._parallel:
                normed = normed.index_select(0, rows)
            if part is not None:
                part = part.index_select(0, rows)
        x = attention.output(attended)
        if self._mlp is None:
            return x, residual
        if self._plain:
            normed, residual = self._mlp_norm.add_norm(x, residual)  # type: ignore[union-attr]
            return self._mlp(normed), residual
        x, residual = self._finish(x, normed, residual)
        if self._per_layer is None and self._scalar == 1.0:
            return x, residual
        x = x + residual
        if self._per_layer is not None:
            assert part is not None
            x = x + self._per_layer(x, part)
        return (x if self._scalar == 1.0 else x * self._scalar), None

    def _finish(self, x: Tensor, normed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of a block that is parallel, post-normed or scaled."""
        if self._attention_post_norm is not None:
            x = self._attention_post_norm.norm(x)
        if self._parallel:
            if self._mlp_norm is not None:
                normed = self._mlp_norm.norm(residual)
        else:
            if self._residual_scale != 1.0:
                x = x * self._residual_scale
            if self._mlp_norm is not None:
                normed, residual = self._mlp_norm.add_norm(x, residual)
            else:
                normed = residual = x + residual
        assert self._mlp is not None
        mlp = self._mlp(normed)
        if self._mlp_post_norm is not None:
            mlp = self._mlp_post_norm.norm(mlp)
        if self._parallel:
            mlp = mlp + x
        if self._residual_scale != 1.0:
            mlp = mlp * self._residual_scale
        return mlp, residual


class MlpBlock:
    """A layer that is a second half alone; called as a `Block`."""

    __slots__ = ("_mlp", "_norm")

    def __init__(
        self,
        spec: LayerSpec,
        weights: Weights,
        kernels: Kernels,
        mlp: Callable[[Tensor], Tensor],
    ) -> None:
        self._mlp, self._norm = mlp, BoundNorm()
        if spec.mlp_norm is not None:
            held = weights.norm("layers.mlp_norm", spec.mlp_norm)
            self._norm = bind_norm(spec.mlp_norm, held, kernels)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        caches: tuple[Tensor, ...],
        rows: Tensor | None,
        part: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if rows is not None:
            x = x.index_select(0, rows)
            residual = None if residual is None else residual.index_select(0, rows)
            if rows.shape[0] == 0:
                return x, residual
        if residual is None:
            normed, residual = self._norm.norm(x), x
        else:
            normed, residual = self._norm.add_norm(x, residual)
        return self._mlp(normed), residual
