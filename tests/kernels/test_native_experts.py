"""Experts as the native kernels multiply them: all in a few instructions, as one by one."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from streamserve_kernels import Kernels, PackedLinear, experts
from streamserve_kernels.routing import Routing
from streamserve_kernels.stored import StoredWeight, concatenate
from tests.kernels.conftest import threads
from tests.kernels.stored_cases import CASES
from tests.kernels.test_layers import normal

native_experts = importlib.import_module("streamserve_kernels.native.experts")
BF16 = torch.bfloat16
EXPERTS, HIDDEN, INNER = 5, 256, 192


def stacked(n: int, k: int) -> StoredWeight:
    """Two thirds of the outputs held in one way, the others in another."""
    return concatenate([CASES["q4_k"](n - n // 3, k), CASES["squeezed4"](n // 3, k)])


def stacked_order(n: int, k: int) -> StoredWeight:
    """Parts with inputs in orders of their own."""
    return concatenate([CASES["act-order"](part, k) for part in (n - n // 3, n // 3)])


STORED = {**CASES, "stacked": stacked, "stacked-order": stacked_order}
KINDS = ("bfloat16", "biased", "int8", "int4", "q4_k", "q6_k", "gptq4", "squeezed4", "fp8-blocks")
ORDERED = ("act-order", "stacked-order")


def packed(native: Kernels, kind: str, n: int, k: int) -> list[PackedLinear]:
    found: list[PackedLinear] = []
    for e in range(EXPERTS):
        torch.manual_seed(e)
        if kind in STORED:
            bias = torch.randn(n).to(BF16)
            found.append(native.prepare_stored(STORED[kind](n, k), bias, BF16))
            continue
        weight = normal(20 + e, n, k, dtype=BF16) * 0.1
        if kind in ("int8", "int4"):
            found.append(native.prepare_quantised(weight, None, kind))
        else:
            found.append(native.prepare_linear(weight, weight[:, 0] if kind == "biased" else None))
    return found


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: object) -> None:
        raise AssertionError("experts were multiplied one by one")

    monkeypatch.setattr(experts, "moe", called)
    monkeypatch.setattr(experts, "chosen_experts", called)


def exact(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """The sums in float64 of products that each expert makes of each of its rows alone."""
    out = torch.zeros(x.shape[0], down[0].out_features, dtype=torch.float64)
    for row in range(x.shape[0]):
        for e, weight in zip(chosen[row].tolist(), weights[row].double(), strict=True):
            out[row] += weight * down[e](activate(up[e](x[row : row + 1])))[0].double()
    return out


def choice(logits: Tensor, top_k: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    probabilities = logits.double().softmax(-1)
    chosen = logits.float().sort(descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) if renormalise else weights


@pytest.mark.parametrize("kind", [*KINDS, "stacked", *ORDERED])
@pytest.mark.parametrize(("top_k", "num_threads"), [(1, 3), (2, 1), (EXPERTS, 3)])
def test_all_at_once_as_one_by_one(
    native: Kernels, kind: str, top_k: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    up, down = packed(native, kind, 2 * INNER, HIDDEN), packed(native, kind, HIDDEN, INNER)
    # In one way only: with many rows, and with few.
    for tokens, renormalise in ((1, True), (2, False), (37, True)):
        wide = normal(40, tokens, HIDDEN + 6, dtype=BF16)
        x, logits = wide[:, 3:-3], normal(41, tokens, EXPERTS, dtype=BF16)
        with threads(num_threads):
            out = native.moe(x, logits, up, down, Routing(top_k, renormalise), "silu")
        assert out.dtype == BF16
        expected = exact(
            x,
            *choice(logits, top_k, renormalise=renormalise),
            up,
            down,
            lambda hidden: native.gated_activation(hidden, "silu"),
        )
        scale = expected.abs().mean().item()
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["bfloat16", "int4", "q4_k"])
def test_a_row_in_a_crowd_is_the_row_alone(native: Kernels, kind: str) -> None:
    up, down = packed(native, kind, 2 * INNER, HIDDEN), packed(native, kind, HIDDEN, INNER)
    x, logits = normal(1, 60, HIDDEN, dtype=BF16), normal(2, 60, EXPERTS, dtype=BF16)
    crowd = native.moe(x, logits, up, down, Routing(3, True), "gelu")
    for row in (0, 17, 59):
        one = slice(row, row + 1)
        assert crowd[one].equal(native.moe(x[one], logits[one], up, down, Routing(3, True), "gelu"))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_wide_experts_of_many_rows_and_of_few(native: Kernels, kind: str) -> None:
    """Their products fall into pieces of other widths: many for many rows, few for few."""
    up, down = packed(native, kind, 2 * 1536, 64), packed(native, kind, 3072, 1536)
    x, logits = normal(1, 11, 64, dtype=BF16), torch.zeros(11, EXPERTS, dtype=BF16)
    logits[:9, 1], logits[9:, 3] = 3.0, 3.0
    out = native.moe(x, logits, up, down, Routing(1, True), "silu")
    expected = exact(
        x,
        *choice(logits, 1, renormalise=True),
        up,
        down,
        lambda hidden: native.gated_activation(hidden, "silu"),
    )
    assert out.equal(expected.to(BF16))


def test_experts_that_somebody_else_chose(native: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    up, down = packed(native, "biased", INNER, HIDDEN), packed(native, "biased", 100, INNER)
    x = normal(3, 23, HIDDEN, dtype=BF16)
    chosen = torch.rand(23, EXPERTS, generator=torch.Generator().manual_seed(4)).argsort()[:, :2]
    weights = normal(5, 23, 2)
    out = native.chosen_experts(x, chosen, weights, up, down, torch.relu)
    expected = exact(x, chosen, weights, up, down, torch.relu)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)
    assert native.chosen_experts(x[:0], chosen[:0], weights[:0], up, down, torch.relu).shape == (
        0,
        100,
    )


@pytest.mark.parametrize("rows", [1, 40])
def test_what_all_tokens_use_is_added_by_a_gate(naive: Kernels, native: Kernels, rows: int) -> None:
    chosen, shared = normal(1, rows, 100, dtype=BF16), normal(2, rows, 100, dtype=BF16)
    x, gate = normal(3, rows, 70, dtype=BF16), normal(4, 1, 70, dtype=BF16) / 4
    out = native.add_shared_experts(chosen, x, gate, shared)
    expected = naive.add_shared_experts(*(t.double() for t in (chosen, x, gate, shared)))
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)


def test_of_equals_the_first_and_of_nothing_nothing(native: Kernels) -> None:
    """Which experts a row goes to shows in what it gets: each gives its own number."""
    up = [native.prepare_linear(torch.ones(2 * 16, 32, dtype=BF16)) for _ in range(20)]
    down = [native.prepare_linear(torch.full((16, 16), 2.0**-e, dtype=BF16)) for e in range(20)]
    x = torch.full((4, 32), 2.0**-5, dtype=BF16)
    logits = torch.zeros(4, 20, dtype=BF16)
    logits[1, [17, 18, 19]] = 200.0
    logits[2, 5] = float("nan")
    logits[3, :17] = float("-inf")
    out = native.moe(x, logits, up, down, Routing(2, True), "relu")
    given = [down[e](native.gated_activation(up[e](x[:1]), "relu"))[0, 0].item() for e in range(20)]
    for row, (a, b) in {0: (0, 1), 1: (17, 18), 3: (17, 18)}.items():
        expected = (given[a] + given[b]) / 2
        assert out[row, 0].item() == pytest.approx(expected, rel=2**-8)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("kinds", "together"),
    [
        (("int8", "int4"), True),
        (("q4_k", "gptq4"), False),
        (("bfloat16", "int8"), False),
        (("gptq4", "act-order"), False),
    ],
)
def test_experts_of_two_kinds(
    native: Kernels, kinds: tuple[str, str], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once if the same is made of their rows, whatever the products; else one by one."""
    up, down = (
        [*packed(native, kinds[0], *shape)[:3], *packed(native, kinds[1], *shape)[3:]]
        for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    x, logits = normal(1, 9, HIDDEN, dtype=BF16), normal(2, 9, EXPERTS, dtype=BF16)
    activate = partial(native.gated_activation, kind="silu")
    expected = experts.moe(x, logits, up, down, Routing(2, True), activate)
    one_by_one, calls = experts.moe, []

    def counted(*args: object) -> Tensor:
        calls.append(args)
        return one_by_one(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(experts, "moe", counted)
    out = native.moe(x, logits, up, down, Routing(2, True), "silu")
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-3)
    assert len(calls) == (0 if together else 1)


def test_matrix_units_multiply_experts_of_many_rows(
    native: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, where rows are many; few rows are for the dot-product units."""
    up, down = packed(native, "bfloat16", 2 * INNER, HIDDEN), packed(native, "bfloat16", 64, INNER)
    multiplied = []

    def counted(x: Tensor, *args: object) -> Tensor:
        multiplied.append(x.shape[0])
        return torch.zeros(x.shape[0], 64, dtype=BF16)

    monkeypatch.setattr(experts, "moe", counted)
    for layer in (up, down):
        for expert in layer:
            object.__setattr__(expert, "few_rows", 8)
    # 20 rows of 2 experts are 8 for each of 5.
    for tokens in (1, 20, 21):
        x, logits = normal(1, tokens, HIDDEN, dtype=BF16), normal(2, tokens, EXPERTS, dtype=BF16)
        native.moe(x, logits, up, down, Routing(2, True), "silu")
    assert multiplied == [21]


def test_a_layer_that_is_gone_is_forgotten(native: Kernels) -> None:
    known = native_experts._known
    before = len(known)
    up, down = packed(native, "bfloat16", 2 * INNER, HIDDEN), packed(native, "int4", HIDDEN, INNER)
    x, logits = normal(1, 2, HIDDEN, dtype=BF16), normal(2, 2, EXPERTS, dtype=BF16)
    native.moe(x, logits, up, down, Routing(2, True), "silu")
    native.moe(x, logits, up, down, Routing(2, True), "silu")
    assert len(known) == before + 2
    gone = weakref.ref(up[0])
    del up, down
    gc.collect()
    assert gone() is None
    assert len(known) == before
