"""A first half of a block that is two: attention and a state space that read the same input."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.models.latent import LatentAttention
from streamserve.models.layers import Attention
from streamserve.models.recurrent import StateSpace
from streamserve.models.spec import SideBySideSpec


class _Found(NamedTuple):
    """What each of them found for a row, before its output projection."""

    attention: Tensor
    space: Tensor

    def index_select(self, dim: int, rows: Tensor) -> _Found:
        return _Found(*(part.index_select(dim, rows) for part in self))


class SideBySide:
    """Its parts are called as those of `Attention`, with the caches of both, one behind the other.

    What it hands on between them are pairs: the attention's, and the state space's.
    """

    __slots__ = ("_attention", "_space", "_spec")

    def __init__(
        self, spec: SideBySideSpec, attention: Attention | LatentAttention, space: StateSpace
    ) -> None:
        self._spec, self._attention, self._space = spec, attention, space

    def write(
        self,
        normed: Tensor,
        batch: ForwardBatch,
        key_cache: Tensor,
        value_cache: Tensor,
        conv_states: Tensor,
        matrices: Tensor,
    ) -> tuple[Any, Any]:
        queries = self._attention.write(normed, batch, key_cache, value_cache)
        return queries, self._space.write(normed, batch, conv_states, matrices)

    def attend(
        self,
        queries: Any,
        found: Any,
        batch: ForwardBatch,
        key_cache: Tensor,
        value_cache: Tensor,
        conv_states: Tensor,
        matrices: Tensor,
    ) -> Any:
        (query, gate), (remembered, space_gate) = queries, found
        return _Found(
            self._attention.attend(query, gate, batch, key_cache, value_cache),
            self._space.attend(remembered, space_gate, batch, conv_states, matrices),
        )

    def output(self, found: Any) -> Tensor:
        """The sum of both products, each times its scale: [T, H]."""
        attended, remembered = (
            self._attention.output(found.attention),
            self._space.output(found.space),
        )
        spec = self._spec
        if spec.attention_scale != 1.0:
            attended = attended * spec.attention_scale
        if spec.space_scale != 1.0:
            remembered = remembered * spec.space_scale
        return attended + remembered
