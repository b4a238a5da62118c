"""Muon: momentum whose update is orthogonalised (Jordan et al., 2024), with like shapes batched.

One optimizer step of a small model is many tiny matrix products; stacking the matrices of equal
shape makes it a dozen larger ones, which is what a CPU shared with other work is good at.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of `update` [N, R, C] with R <= C, approximately."""
    a, b, c = COEFFICIENTS
    x = update.to(torch.bfloat16)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class Muon:
    """Steps matrices in place. `state()` and `load()` carry the momentum."""

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        groups: dict[tuple[int, int], list[Tensor]] = {}
        for matrix in matrices:
            low, high = sorted(matrix.shape)
            groups.setdefault((low, high), []).append(matrix)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(group), *sorted(group[0].shape)) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradients = torch.stack([_wide(m.grad) for m in group if m.grad is not None])
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(buffer, self.momentum))
            # The scale at which an update is as large as one of AdamW (Liu et al., 2025).
            scale = 0.2 * max(group[0].shape) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                turned = change if matrix.shape[0] <= matrix.shape[1] else change.mT
                matrix.mul_(1 - rate * self.decay).add_(turned, alpha=-rate * scale)
                matrix.grad = None

    def state(self) -> list[Tensor]:
        return self.buffers

    def load(self, buffers: list[Tensor]) -> None:
        for mine, saved in zip(self.buffers, buffers, strict=True):
            mine.copy_(saved)


def _wide(gradient: Tensor) -> Tensor:
    return gradient if gradient.shape[0] <= gradient.shape[1] else gradient.mT
