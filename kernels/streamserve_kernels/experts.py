"""Mixtures of experts on a CPU: only the experts that some token chose, each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamserve_kernels.interface import ExpertKind, PackedLinear
from streamserve_kernels.routing import Routing, likeliest


def expert_activation(
    kind: ExpertKind, gated: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[[Any], Any]:
    """Of what experts make first, by a backend's two functions."""
    return partial(plain if kind == "relu2" else gated, kind=kind)


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    routing: Routing,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `naive.moe`; of equally likely experts it may be any."""
    chosen, weights = likeliest(router_logits, routing)
    return chosen_experts(x, chosen, weights, gate_up, down, activate)


def chosen_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `naive.chosen_experts`."""
    output = torch.zeros(x.shape, dtype=torch.float32)
    top_k = chosen.shape[1]
    # tokens sorted by expert: each expert's rows are one slice
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(up)).tolist()
    start = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        slots = order[start : start + count]
        start += count
        rows = slots // top_k
        hidden = activate(up[e](x[rows]))
        part = down[e](hidden).float() * weights.flatten()[slots, None]
        output.index_add_(0, rows, part)
    return output.to(x.dtype)
