"""A share's weights: out of a checkpoint's files, no more than that is read."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from streamserve.models.checkpoint import WeightSource
from streamserve.models.parameters import Module, StoredQuantization
from streamserve.models.pieces import Leaf
from streamserve.models.tensor_parallel.cut import cut
from streamserve.models.tensor_parallel.share import Share
from streamserve_kernels.stored import StoredFormat, StoredWeight


class PartSource(WeightSource, Protocol):
    """A source that can fill in a part of a module."""

    def fill_part(
        self,
        module: Module,
        leaf: Leaf,
        target: Tensor,
        rows: Tensor | None,
        columns: slice,
    ) -> None:
        """As `fill` of an undivided module, of some rows (None: all) and columns only."""
        ...


class ShareSource:
    """The weights of `Share.held`. Packed ones are read module by module, and cut."""

    def __init__(self, source: PartSource, share: Share) -> None:
        self._source = source
        self._share = share

    def stored(self, module: Module) -> StoredWeight | None:
        whole = self._share.whole_module(module)
        weight = self._source.stored(whole)
        part = self._share.part(whole)
        assert part is not None
        return None if weight is None else cut(weight, part, whole, self._share.size)

    def fill(self, module: Module, leaf: Leaf, target: Tensor) -> None:
        whole = self._share.whole_module(module)
        part = self._share.part(whole, leaf)
        if part is None:
            target.zero_()
        elif part.rows is None and part.columns is None:
            self._source.fill(whole, leaf, target)
        else:
            columns = slice(None) if part.columns is None else part.columns
            self._source.fill_part(whole, leaf, target, part.rows, columns)


class ShareQuantization:
    """How the checkpoint holds what a share is a part of."""

    def __init__(self, stored: StoredQuantization, share: Share) -> None:
        self._stored = stored
        self._share = share
        self.name = stored.name

    def format(self, module: Module) -> StoredFormat | None:
        return self._stored.format(self._share.whole_module(module))
