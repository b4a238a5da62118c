"""Which experts tokens go to, in the ways that families have, by every backend."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeTopKRouter,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter

from streamserve_kernels import Kernels
from streamserve_kernels.routing import Routing, likeliest, route
from tests.kernels.routings import CORRECTION, EXPERTS, ROUTINGS, by_hand, logits

CASES = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def check(chosen: Tensor, weights: Tensor, tokens: int, routing: Routing) -> None:
    expected, shares = by_hand(logits(tokens), routing)
    assert chosen.tolist() == expected
    torch.testing.assert_close(weights, torch.tensor(shares), rtol=1e-5, atol=1e-7)


@CASES
def test_the_choice(routing: Routing) -> None:
    check(*route(logits(40), routing), 40, routing)
    check(*likeliest(logits(40), routing), 40, routing)


@CASES
def test_no_two_experts_are_nearly_equal(routing: Routing) -> None:
    """In the logits of these tests, so that rounding decides nothing."""
    scores = logits(40).double()
    scores = scores.sigmoid() if routing.scoring == "sigmoid" else scores.softmax(-1)
    if routing.correction is not None:
        scores = scores + routing.correction
    assert scores.sort().values.diff().min() > 1e-6
    worths = scores.view(40, routing.num_groups, -1).topk(2).values.sum(-1).sort().values
    assert routing.num_groups == 1 or worths.diff().min() > 1e-6


@CASES
@pytest.mark.parametrize("tokens", [1, 23])
def test_triton_chooses_alike(device, routing: Routing, tokens: int) -> None:
    pytest.importorskip("triton")
    moe = pytest.importorskip("streamserve_kernels.triton.moe")
    if routing.correction is not None:
        routing = routing._replace(correction=routing.correction.to(device))
    if routing.expert_scales is not None:
        routing = routing._replace(expert_scales=routing.expert_scales.to(device))
    chosen, weights = moe._route(logits(tokens).to(device), routing)
    check(chosen.cpu(), weights.cpu(), tokens, routing)


@CASES
@pytest.mark.parametrize("tokens", [1, 23])
def test_native_chooses_alike(native: Kernels, routing: Routing, tokens: int) -> None:
    experts = importlib.import_module("streamserve_kernels.native.experts")
    execute = importlib.import_module("streamserve_kernels.native.execute")
    routes, rows = experts.Routes(tokens, EXPERTS, routing.top_k), logits(tokens)
    execute.run_at_once(
        [experts.route(routes, rows.data_ptr(), routing)], execute.pack_step(tokens), 2
    )
    check(routes.chosen, routes.weights, tokens, routing)


def test_native_chooses_something_where_nothing_is_a_number(native: Kernels) -> None:
    """Whatever it is, it must be experts, all different: pairs are counted by them."""
    experts = importlib.import_module("streamserve_kernels.native.experts")
    execute = importlib.import_module("streamserve_kernels.native.execute")
    for routing in ROUTINGS.values():
        routes = experts.Routes(1, EXPERTS, routing.top_k)
        rows = torch.full((1, EXPERTS), torch.nan, dtype=torch.bfloat16)
        execute.run_at_once(
            [experts.route(routes, rows.data_ptr(), routing)], execute.pack_step(1), 1
        )
        assert routes.chosen[0].tolist() == list(range(routing.top_k))
        assert routes.weights.isnan().all()


@CASES
def test_backends_mix_alike(naive: Kernels, cpu: Kernels, routing: Routing) -> None:
    random = torch.Generator().manual_seed(1)
    up, down = (
        torch.randn(EXPERTS, *shape, generator=random) / 4 for shape in ((2 * 8, 16), (16, 8))
    )
    x, rows = torch.randn(9, 16, generator=random), logits(9).float()
    found, expected = (
        k.moe(
            x,
            rows,
            [k.prepare_linear(w) for w in up],
            [k.prepare_linear(w) for w in down],
            routing,
            "silu",
        )
        for k in (cpu, naive)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_glm_chooses_by_it(groups: int) -> None:
    config = Glm4MoeConfig(
        hidden_size=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=min(groups, 2),
        routed_scaling_factor=1.5,
    )
    router = Glm4MoeTopkRouter(config)
    router.weight.data, router.e_score_correction_bias = torch.eye(EXPERTS), CORRECTION
    _, weights, chosen = router(logits(23))
    routing = Routing(4, True, "sigmoid", CORRECTION, groups, min(groups, 2), 1e-20, 1.5)
    compare(*route(logits(23), routing), chosen, weights)


def test_ernie_chooses_by_it() -> None:
    config = Ernie4_5_MoeConfig(hidden_size=EXPERTS, moe_num_experts=EXPERTS, moe_k=3)
    router = Ernie4_5_MoeTopKRouter(config)
    correction = CORRECTION / 4
    router.weight.data = torch.eye(EXPERTS)
    router.moe_statics.e_score_correction_bias.data = correction[None]
    _, weights, chosen = router(logits(23).float())
    routing = Routing(3, True, correction=correction, eps=config.moe_norm_min)
    compare(*route(logits(23), routing), chosen, weights)


def compare(chosen: Tensor, weights: Tensor, theirs: Tensor, their_weights: Tensor) -> None:
    """Theirs are in no order."""
    ours, order = chosen.sort(-1)
    expected, their_order = theirs.sort(-1)
    assert ours.equal(expected)
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order))
