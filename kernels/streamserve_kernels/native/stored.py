"""Which layout a weight gets that a checkpoint holds quantised."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from streamserve_kernels.interface import NotRecordableError, QuantLinear
from streamserve_kernels.native.execute import Instruction
from streamserve_kernels.native.library import why_not
from streamserve_kernels.native.product import Memory, NativeWeight, Product
from streamserve_kernels.native.stored_linear import prepare_lookup
from streamserve_kernels.native.stored_table import prepare_tables
from streamserve_kernels.native.symbol import as_symbol
from streamserve_kernels.stored import OneWeight, StoredWeight
from streamserve_kernels.stored_naive import NaiveStoredLinear, StackedLinear, prepare_parts


class NativeStackedLinear(StackedLinear, NativeWeight):
    """Parts that a recorded step multiplies one after the other."""

    __slots__ = ("__weakref__",)

    def instructions(self, product: Product, memory: Memory) -> list[Instruction]:
        """Those of the parts. Raises NotRecordableError for float32, and parts of other kinds."""
        if product.y_float32:
            raise NotRecordableError("a product with parts in float32")
        found: list[Instruction] = []
        for part in self.parts:
            if not isinstance(part, NativeWeight):
                raise NotRecordableError(f"a product with {type(part).__name__}")
            found += part.instructions(product, memory)
            product = product._replace(y=product.y + 2 * part.out_features)
        return found

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.linear(symbol, self))
        return super().__call__(x)


def _prepare(weight: OneWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
    if why_not() is not None:
        return NaiveStoredLinear(weight, bias, dtype)
    return (
        prepare_lookup(weight, bias, dtype)
        or prepare_tables(weight, bias, dtype)
        or NaiveStoredLinear(weight, bias, dtype)
    )


def prepare_stored(weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
    """See `naive.prepare_stored`; the naive twin itself for what the C kernels do not take."""

    def prepare(part: OneWeight, part_bias: Tensor | None) -> QuantLinear:
        return _prepare(part, part_bias, dtype)

    return prepare_parts(weight, bias, prepare, NativeStackedLinear)
