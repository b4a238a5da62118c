"""A product for each head, as latent attention has them for its queries and for what they find.

`naive.prepare_by_head` says what they are; others than the native backend multiply all heads at
once with torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadsLinear:
    """See `interface.HeadsLinear`. The products run in the dtype of the weight [H, N, K]."""

    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        num_heads, num_outputs, num_inputs = self.weight.shape
        num_passed = x.shape[2] - num_inputs
        y = x.new_empty(x.shape[0], num_heads, num_passed + num_outputs)
        y[..., :num_passed] = x[..., num_inputs:]
        product = torch.bmm(x[..., :num_inputs].transpose(0, 1), self.weight.transpose(1, 2))
        y[..., num_passed:] = product.transpose(0, 1)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class NaiveHeadsLinear:
    """The same with products in float32."""

    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        num_inputs = self.weight.shape[2]
        multiplied, passed = x[..., :num_inputs], x[..., num_inputs:]
        product = torch.einsum("thk,hnk->thn", multiplied.float(), self.weight.float())
        return torch.cat((passed, product.to(x.dtype)), dim=2)


def prepare_by_head(weight: Tensor) -> HeadsLinear:
    """See `naive.prepare_by_head`."""
    return HeadsLinear(weight.contiguous())
