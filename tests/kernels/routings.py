"""Ways of choosing experts that some family has, for twelve experts; and one that goes by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from streamserve_kernels.routing import Routing

EXPERTS = 12
CORRECTION = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3)) / 4
ROUTINGS = {
    "sigmoid": Routing(3, True, "sigmoid", eps=0.25),
    "sigmoid-scaled": Routing(2, False, "sigmoid", scale=2.5),
    "corrected": Routing(3, True, correction=CORRECTION / 4, eps=1e-12),
    "corrected-sigmoid": Routing(4, True, "sigmoid", CORRECTION, eps=1e-20, scale=1.5),
    "groups": Routing(4, True, "sigmoid", CORRECTION, num_groups=4, top_groups=2, eps=1e-20),
    "own-scales": Routing(3, True, scale=0.5, expert_scales=1 + CORRECTION),
    "groups-of-probabilities": Routing(2, False, num_groups=3, top_groups=1, scale=16.0),
    "groups-by-their-best": Routing(3, False, num_groups=4, top_groups=2, group_votes=1),
}


def by_hand(logits: Tensor, routing: Routing) -> tuple[list[list[int]], list[list[float]]]:
    """Row by row and expert by expert, in Python's numbers."""
    chosen, weights = [], []
    for row in logits.double():
        scores = (row.sigmoid() if routing.scoring == "sigmoid" else row.softmax(-1)).tolist()
        correction = [0.0] * len(scores) if routing.correction is None else routing.correction
        merits = [score + float(c) for score, c in zip(scores, correction, strict=True)]
        size = len(scores) // routing.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(routing.num_groups)]
        groups.sort(
            key=lambda group: -sum(sorted(merits[e] for e in group)[-routing.group_votes :])
        )
        left = [e for group in groups[: routing.top_groups] for e in group]
        left.sort(key=lambda e: (-merits[e], e))
        found = [scores[e] for e in left[: routing.top_k]]
        divisor = sum(found) + routing.eps if routing.renormalise else 1.0
        chosen.append(left[: routing.top_k])
        own = [1.0] * len(scores) if routing.expert_scales is None else routing.expert_scales
        factors = [routing.scale * float(own[e]) for e in left[: routing.top_k]]
        weights.append([score / divisor * f for score, f in zip(found, factors, strict=True)])
    return chosen, weights


def logits(tokens: int) -> Tensor:
    """[T, 12] in bfloat16 such that nothing is nearly equal, by whatever routing: see the test."""
    random = torch.Generator().manual_seed(tokens)
    rows = torch.stack([torch.randperm(EXPERTS, generator=random) for _ in range(tokens)])
    return ((rows - 5.5) / 2).bfloat16()
