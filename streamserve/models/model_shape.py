"""What planning memory and making a KV cache need to know of a model, whatever runs it."""

from __future__ import annotations

from typing import Protocol

from streamserve.models.spec import AttentionSpec, CacheSpec


class ModelShape(Protocol):
    """A `DecoderSpec`, or what tells the same of another model."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def tied_head(self) -> bool: ...

    def caches(self) -> tuple[CacheSpec, ...]:
        """One for each pair of caches, in their order."""
        ...

    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Those of them that are keys and values."""
        ...

    def head_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes of (query and key, value) heads that its layers have."""
        ...

    def row_width(self) -> int:
        """Elements alive per token at the widest layer's widest place, the residual among them."""
        ...
