"""Quantised weights: what they are, and that the compiled products stay within their bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve_kernels import QUANTIZATIONS, QuantLinear, load
from streamserve_kernels.native.library import why_not
from streamserve_kernels.quantised import INT4_GROUP, packed_bytes, quantise
from streamserve_kernels.routing import Routing

GROUP = 64  # of inputs that share the scale of a quantised activation
SHAPES = [(16, 64), (37, 100), (1, 1), (5, 129), (64, 128), (130, 576), (48, 896), (33, 1536)]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    exponent=st.integers(-6, 4),
    skew=st.floats(-2.0, 2.0),
    quantization=st.sampled_from(QUANTIZATIONS),
)
def test_every_weight_lies_within_half_a_step(seed, shape, exponent, skew, quantization):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) + skew
    weight = (weight * weight.abs() * 10.0**exponent).bfloat16()
    quantised = quantise(weight, quantization)
    padded = quantised.codes.shape[1]
    group = padded if quantization == "int8" else INT4_GROUP
    steps = quantised.scales.abs().repeat_interleave(group, dim=1)[:, : shape[1]]
    error = (quantised.dequantise() - weight.float()).abs()
    assert (error <= 0.5001 * steps).all()
    # The scale is worth having: no code is wasted on a range that nothing lies in.
    levels = 2 ** (8 if quantization == "int8" else 4)
    largest = weight.float().abs().max()
    assert steps.max() <= largest * 2 / (levels - 1) * 1.001 + 1e-7
    assert quantised.codes[:, shape[1] :].eq(0).all()


def test_zeros_and_single_values_come_back(quantization):
    weight = torch.zeros(3, 70)
    weight[1, 69] = 0.5
    weight[2, 0] = -3.0
    back = quantise(weight, quantization).dequantise()
    assert back[0].eq(0).all()
    torch.testing.assert_close(back, weight, rtol=0.07, atol=0)


def test_int4_takes_no_more_than_four_and_a_half_bits():
    assert packed_bytes("int4", 9728, 896) * 8 == 4.5 * 9728 * 896
    assert packed_bytes("int8", 9728, 896) == 9728 * 896 + 4 * 9728


@pytest.fixture(params=["naive", "cpu"])
def backend(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_holds_the_same_weight(backend, quantization, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed = backend.prepare_quantised(weight, torch.randn(shape[0]).to(dtype), quantization)
    assert isinstance(packed, QuantLinear)
    assert (packed.out_features, packed.in_features) == shape
    assert packed.dtype == dtype
    assert packed.quantization == quantization
    expected = quantise(weight, quantization).dequantise()
    assert packed.unpack().equal(expected)
    bias_bytes = 4 * shape[0]
    bound = packed_bytes(quantization, *shape)
    assert packed.nbytes <= bound + bias_bytes
    ids = torch.randint(0, shape[0], (9,))
    assert packed.rows(ids).equal(expected[ids].to(dtype))


def activation_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[R, N]: sum over groups of (largest |x| / 254) * (sum of |w|); see native/quant_linear.py."""
    spare = -x.shape[1] % GROUP
    x = torch.nn.functional.pad(x.double(), (0, spare)).view(x.shape[0], -1, GROUP)
    weight = torch.nn.functional.pad(weight.double(), (0, spare)).view(weight.shape[0], -1, GROUP)
    return (x.abs().amax(-1) / 254) @ weight.abs().sum(-1).T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 33])
def test_products_stay_within_the_bound_of_quantised_activations(
    naive, cpu, quantization, shape, rows
):
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x = torch.randn(rows, shape[1]) * torch.logspace(-3, 3, shape[1])
    reference = naive.prepare_quantised(weight, bias, quantization)
    packed = cpu.prepare_quantised(weight, bias, quantization)
    expected = x.double() @ reference.unpack().double().T + bias.double()
    bound = activation_bound(x, reference.unpack())
    rounding = 1e-5 * (x.abs().double() @ reference.unpack().abs().double().T) + 1e-6
    assert ((packed(x).double() - expected).abs() <= bound + rounding).all()
    assert ((reference(x).double() - expected).abs() <= rounding + 1e-5 * bias.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_int8_holds_exactly_is_multiplied_exactly(naive, cpu, quantization, dtype):
    """Small integers as activations and weights: nothing is left to round but the result."""
    weight = torch.randint(-7, 8, (96, 192)).to(dtype)
    weight[:, ::32] = 7.5 if quantization == "int4" else weight[:, ::32]
    x = torch.randint(-127, 128, (19, 192))
    x[:, ::GROUP] = 127
    bias = torch.randint(-9, 9, (96,)).to(dtype)
    packed = cpu.prepare_quantised(weight, bias, quantization)
    expected = x.double() @ packed.unpack().double().T + bias.double()
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(packed(x.to(dtype)), expected.to(dtype), rtol=rounding, atol=1e-3)


def test_a_row_does_not_depend_on_its_batch(cpu, quantization):
    packed = cpu.prepare_quantised(torch.randn(130, 600), torch.randn(130), quantization)
    x = torch.randn(37, 600).bfloat16()
    whole = packed(x)
    for start, end in ((0, 1), (1, 3), (3, 7), (7, 12), (12, 37)):
        assert packed(x[start:end]).equal(whole[start:end])


def test_views_and_more_dimensions(cpu, quantization):
    packed = cpu.prepare_quantised(torch.randn(40, 64), None, quantization)
    fused = torch.randn(6, 200).bfloat16()
    view = fused[:, 72:136]
    expected = packed(view.contiguous())
    assert packed(view).equal(expected)
    assert packed(view.reshape(2, 3, 64)).equal(expected.view(2, 3, 40))
    assert packed(view.t().contiguous().t()).equal(expected)
    assert packed(view[:0]).shape == (0, 40)


def test_a_row_that_is_no_number_stays_one(cpu, quantization):
    packed = cpu.prepare_quantised(torch.randn(40, 128), None, quantization)
    x = torch.randn(5, 128)
    expected = packed(x)
    x[2, 100] = torch.nan
    x[3] = 0.0
    result = packed(x)
    assert result[2].isnan().all()
    assert result[3].eq(0).all()
    assert result[[0, 1, 4]].equal(expected[[0, 1, 4]])


def test_experts_may_be_quantised(naive, cpu, quantization):
    experts, hidden, inner = 4, 64, 96
    gate_up = [torch.randn(2 * inner, hidden) / 8 for _ in range(experts)]
    down = [torch.randn(hidden, inner) / 8 for _ in range(experts)]
    x, logits = torch.randn(11, hidden), torch.randn(11, experts)
    outputs = [
        kernels.moe(
            x,
            logits,
            [kernels.prepare_quantised(w, None, quantization) for w in gate_up],
            [kernels.prepare_quantised(w, None, quantization) for w in down],
            routing=Routing(2, True),
            kind="silu",
        )
        for kernels in (naive, cpu)
    ]
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bad_id", [-1, 40])
def test_an_id_outside_a_quantised_table_is_refused(bad_id: int) -> None:
    """It would be read from somebody else's memory."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    packed = load("cpu", "native").prepare_quantised(torch.randn(40, 64).bfloat16(), None, "int8")
    with pytest.raises(IndexError, match="outside its embedding"):
        packed.rows(torch.tensor([3, bad_id]))
