"""How tokens choose their experts, and the naive twin of the choice."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scoring = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """What a mixture makes of its router's logits [T, E]: `top_k` experts a token, and weights.

    An expert's score is its probability (softmax over all E), or the sigmoid of its logit. The
    highest are chosen, of equals the first. The rest is DeepSeek's (2024): `correction` [E]
    float32 is added to the scores for the choice alone; of `num_groups` equal stretches of experts
    only `top_groups` are chosen from, those whose best `group_votes` experts, one or two, add up to
    most. The weights are the scores of the chosen; with `renormalise` they are divided by `eps` and
    their sum; then `scale` multiplies them, and `expert_scales` [E] float32 each expert's own
    (Gemma 4).
    """

    top_k: int
    renormalise: bool
    scoring: Scoring = "softmax"
    correction: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    eps: float = 0.0
    scale: float = 1.0
    group_votes: int = 2
    expert_scales: Tensor | None = None

    @property
    def chooses_by_score(self) -> bool:
        """Among all experts, and by nothing else."""
        return self.correction is None and self.num_groups == 1


def route(router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Logits [T, E] -> experts [T, top_k] int64 and their weights, float32; see `Routing`."""
    scores = _scores(router_logits, routing)
    # Probabilities of unlike logits may be equal; what they are made of says more.
    found = router_logits.float() if routing.chooses_by_score else _corrected(scores, routing)
    chosen = found.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    return chosen, weigh(scores.gather(-1, chosen), chosen, routing)


def likeliest(router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """As `route` without a sort where that is possible: then it may be any of equals."""
    if not routing.chooses_by_score:
        return route(router_logits, routing)
    scores, chosen = _scores(router_logits, routing).topk(routing.top_k, dim=-1)
    return chosen, weigh(scores, chosen, routing)


def weigh(scores: Tensor, chosen: Tensor, routing: Routing) -> Tensor:
    """Scores of the chosen [T, top_k] -> their weights."""
    if routing.renormalise:
        scores = scores / (scores.sum(-1, keepdim=True) + routing.eps)
    if routing.scale != 1.0:
        scores = scores * routing.scale
    return scores if routing.expert_scales is None else scores * routing.expert_scales[chosen]


def _scores(router_logits: Tensor, routing: Routing) -> Tensor:
    logits = router_logits.float()
    return logits.sigmoid() if routing.scoring == "sigmoid" else torch.softmax(logits, dim=-1)


def _corrected(scores: Tensor, routing: Routing) -> Tensor:
    """What the choice is made by [T, E]: minus infinity outside of the best groups."""
    found = scores if routing.correction is None else scores + routing.correction
    if routing.num_groups == 1:
        return found
    grouped = found.view(found.shape[0], routing.num_groups, -1)
    worth = grouped.topk(routing.group_votes, dim=-1).values.sum(-1)
    best = worth.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_groups]
    outside = torch.ones_like(worth, dtype=torch.bool).scatter(1, best, value=False)
    return grouped.masked_fill(outside[:, :, None], -torch.inf).view_as(found)
