"""Mixtures of experts on the GPU's kernels against the naive twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamserve_kernels import naive
from streamserve_kernels.routing import Routing
from tests.kernels.conftest import amid_nan
from tests.kernels.pretended_gpu import capture

pytest.importorskip("triton")
ours = pytest.importorskip("streamserve_kernels.triton")
moe = pytest.importorskip("streamserve_kernels.triton.moe")

TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    # the hidden values are rounded, and may be rounded to the other side
    torch.bfloat16: {"atol": 3e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}


class Experts:
    """Weights [E, 2 * inner, hidden] and [E, hidden, inner] as both backends hold them."""

    def __init__(
        self,
        seed: int,
        count: int,
        hidden: int,
        inner: int,
        device,
        dtype,
        *,
        bias: bool = False,
        has_gates: bool = True,
    ) -> None:
        made = 2 * inner if has_gates else inner
        self.random = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.hidden = device, dtype, hidden
        gate_up = amid_nan(self.normal(count, made, hidden) / hidden**0.5)
        down = amid_nan(self.normal(count, hidden, inner) / inner**0.5)
        biases = [[None] * count] * 2
        if bias:
            biases = [amid_nan(self.normal(count, n)) for n in (made, hidden)]
        self.ours, self.naive = (
            tuple(
                [kernels.prepare_linear(w, b) for w, b in zip(weights, some, strict=True)]
                for weights, some in zip((gate_up, down), biases, strict=True)
            )
            for kernels in (ours, naive)
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, self.dtype)

    def compare(self, tokens: int, top_k: int, *, renormalise: bool = True, kind="silu", **logits):
        """Each token's logits are those of its own, unless they are given."""
        x = self.normal(tokens, self.hidden + 8)  # rows at a stride
        x[:, self.hidden :] = torch.nan
        x = x[:, : self.hidden]
        router = self.normal(tokens, len(self.ours[0]) + 3)
        router[:, -3:] = torch.nan
        router = logits.get("router", router[:, :-3])
        found = ours.moe(x, router, *self.ours, Routing(top_k, renormalise), kind)
        expected = naive.moe(x, router, *self.naive, Routing(top_k, renormalise), kind)
        assert found.shape == (tokens, self.hidden)
        torch.testing.assert_close(found, expected, **TOLERANCE[self.dtype])


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3, 70])
def test_moe_is_naive(device, dtype, tokens, renormalise):
    Experts(1, 7, 64, 48, device, dtype).compare(tokens, 2, renormalise=renormalise)


@pytest.mark.gpu
def test_float32_on_a_gpu():
    Experts(1, 8, 64, 48, torch.device("cuda"), torch.float32).compare(70, 2)


@pytest.mark.parametrize("kind", ["gelu_tanh", "relu", "clamped_swiglu", "relu2"])
def test_other_gates_biases_and_odd_sizes(device, dtype, kind):
    """Neither the experts nor their sizes are multiples of anything, and weights lie anywhere."""
    experts = Experts(2, 5, 36, 21, device, dtype, bias=True, has_gates=kind != "relu2")
    for tokens in (1, 30):
        experts.compare(tokens, 3, kind=kind)


def test_experts_that_nobody_chose_and_one_that_all_did(device, dtype):
    experts = Experts(3, 6, 32, 32, device, dtype)
    router = torch.zeros(40, 6, device=device)
    router[:, 4], router[::3, 2], router[1::3, 5], router[2::3, 0] = 9.0, 3.0, 3.0, 3.0
    experts.compare(40, 2, router=router)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 500])
def test_realistic_sizes(tokens):
    Experts(4, 16, 1024, 704, torch.device("cuda"), torch.bfloat16).compare(tokens, 4)


def test_the_order_of_pairs(device):
    """Every pair is once in a tile of its expert; tiles past the last belong to none."""
    random = torch.Generator().manual_seed(5)
    for count, top_k, num_experts, block_m in ((50, 2, 7, 16), (600, 4, 60, 16), (1500, 1, 3, 64)):
        chosen = torch.rand(count, num_experts, generator=random).topk(top_k).indices.int()
        chosen[chosen == 2] = 1  # nobody chose this one
        pairs = chosen.numel()
        order, experts = moe._order(chosen.to(device), num_experts, block_m)
        order, experts = order.cpu().view(-1, block_m), experts.cpu()
        used = experts >= 0
        assert experts[: used.sum()].diff().ge(0).all()
        assert experts[used.sum() :].eq(-1).all()
        held = order[used].flatten()
        assert held[held < pairs].sort().values.equal(torch.arange(pairs, dtype=torch.int32))
        assert held.max() <= pairs
        for tile, expert in zip(order[used], experts[used], strict=True):
            here = tile[tile < pairs].long()
            assert len(here) > 0
            assert chosen.flatten()[here].eq(expert).all()
            assert here.diff().gt(0).all()


def test_routing_chooses_the_first_of_equals_and_survives_nan(device):
    router = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [float("nan")] * 5], device=device)
    chosen, weights = moe._route(router, Routing(2, True))
    assert chosen[0].tolist() == [1, 2]
    torch.testing.assert_close(weights[0].cpu(), torch.tensor([0.5, 0.5]))
    assert chosen[1].ge(0).all()
    assert chosen[1].lt(5).all()
    assert weights[1].isnan().all()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_experts(device, dtype, quantization):
    random = torch.Generator().manual_seed(6)
    shapes = (4, 64, 64), (4, 64, 32)
    weights = [(torch.randn(*s, generator=random) / 8).to(device, dtype) for s in shapes]
    x, router = (torch.randn(9, n, generator=random).to(device, dtype) for n in (64, 4))
    router[:, 3] = -torch.inf  # nobody's, and no number
    for some in weights:
        some[3] = torch.nan
    results = [
        kernels.moe(
            x,
            router,
            *([kernels.prepare_quantised(w, None, quantization) for w in some] for some in weights),
            Routing(2, True),
            "silu",
        )
        for kernels in (ours, naive)
    ]
    torch.testing.assert_close(results[0], results[1], **TOLERANCE[dtype])


def test_a_capture_follows_the_routing(device, dtype):
    """A graph captured with one routing gives another's result: nothing of it was the host's."""
    experts = Experts(7, 8, 64, 64, device, dtype)
    x, router = experts.normal(40, 64), experts.normal(40, 8)
    ours.moe(x, router, *experts.ours, Routing(2, True), "silu")
    replay, found = capture(lambda: ours.moe(x, router, *experts.ours, Routing(2, True), "silu"))
    router.copy_(experts.normal(40, 8))
    replay()
    expected = naive.moe(x, router, *experts.naive, Routing(2, True), "silu")
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


class Chosen:
    """By a router of somebody else's: int64, and weights of the model's dtype, at a stride."""

    def __init__(self, experts: Experts, tokens: int, top_k: int) -> None:
        scores = experts.normal(tokens, len(experts.ours[0]))
        self.experts = scores.float().topk(top_k).indices
        self.weights = scores.sigmoid()[:, : 2 * top_k : 2]


def in_turns(rows: Tensor) -> Tensor:
    """A gate that no kind is: values and gates take turns, and the result has gaps."""
    return (rows[:, ::2].tanh() * rows[:, 1::2]).repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_experts_that_were_chosen_elsewhere_with_an_activation_of_the_callers(
    device, dtype, tokens
):
    experts = Experts(10, 6, 36, 24, device, dtype, bias=True)
    x, chosen = experts.normal(tokens, 36), Chosen(experts, tokens, 3)
    found, expected = (
        kernels.chosen_experts(x, chosen.experts, chosen.weights, *some, in_turns)
        for kernels, some in ((ours, experts.ours), (naive, experts.naive))
    )
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_capture_follows_what_was_chosen_elsewhere(device, dtype, quantization):
    experts = Experts(11, 6, 64, 32, device, dtype)
    some = experts.ours
    if quantization is not None:
        some = tuple(
            [ours.prepare_quantised(layer.weight, None, quantization) for layer in layers]
            for layers in some
        )
    x, chosen, other = experts.normal(12, 64), *(Chosen(experts, 12, 2) for _ in range(2))
    args = x, chosen.experts, chosen.weights, *some, in_turns
    ours.chosen_experts(*args)
    replay, found = capture(lambda: ours.chosen_experts(*args))
    chosen.experts.copy_(other.experts)
    chosen.weights.copy_(other.weights)
    replay()
    weights = tuple(
        [naive.prepare_linear(layer.unpack().to(dtype)) for layer in layers] for layers in some
    )
    expected = naive.chosen_experts(x, other.experts, other.weights, *weights, in_turns)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def test_experts_of_a_layer_are_alike(device):
    experts = Experts(8, 3, 32, 32, device, torch.float32)
    other = Experts(9, 3, 32, 48, device, torch.float32)
    mixed = [*experts.ours[0][:2], other.ours[0][0]]
    x = experts.normal(2, 32)
    with pytest.raises(ValueError, match="alike"):
        ours.moe(x, experts.normal(2, 3), mixed, experts.ours[1], Routing(1, True), "silu")
    with pytest.raises(ValueError, match="'sine'"):
        ours.moe(x, experts.normal(2, 3), *experts.ours, Routing(1, True), "sine")
