"""Fp8: the twin against what it says it is, and the GPU's products against the twin."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from streamserve_kernels import QuantLinear
from streamserve_kernels.fp8 import FP8, FP8_MAX, NaiveFp8Linear, quantise_fp8
from streamserve_kernels.quantised import packed_bytes
from streamserve_kernels.triton.fp8 import Fp8Linear
from streamserve_kernels.triton.linear import prepare_quantised
from streamserve_kernels.triton.tuning import bucket
from tests.kernels.pretended_gpu import HAS_GPU

SMALL = [(1, 1), (5, 129), (37, 100), (48, 896)]
LLAMA = [(6144, 4096), (4096, 14336)] if HAS_GPU else [(96, 512), (64, 1792)]


def test_codes_lie_within_half_a_step():
    x = torch.randn(50, 300) * torch.logspace(-3, 3, 50)[:, None]
    codes, scales = quantise_fp8(x)
    assert codes.dtype == FP8
    assert codes.float().abs().amax(1).eq(FP8_MAX).all()
    back = codes.float() * scales[:, None]
    # Four bits of mantissa, and below the least normal number (2**-6) steps of 2**-9.
    bound = torch.maximum(x.abs() * 2**-4, scales[:, None] * 2**-10) * 1.001
    assert ((back - x).abs() <= bound).all()


def test_rows_of_zeros_and_of_no_numbers():
    x = torch.randn(3, 40)
    x[0], x[1, 7] = 0.0, torch.nan
    codes, scales = quantise_fp8(x)
    assert codes[0].float().eq(0).all()
    assert (codes[1].float() * scales[1]).isnan().all()
    assert (codes[2].float() * scales[2]).isfinite().all()


def test_the_twin_is_a_quant_linear(naive):
    weight, bias = torch.randn(37, 100).bfloat16(), torch.randn(37).bfloat16()
    packed = naive.prepare_quantised(weight, bias, "fp8")
    assert isinstance(packed, QuantLinear)
    assert packed.quantization == "fp8"
    ids = torch.tensor([3, 0, 3])
    assert packed.rows(ids).equal(packed.unpack()[ids].bfloat16())
    x = torch.randn(2, 3, 100).bfloat16()
    expected = x.float() @ weight.float().T + bias.float()
    assert ((packed(x).float() - expected).abs() <= 0.1 * expected.abs() + 2.0).all()


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize("shape", [(130, 96), (37, 100), (5, 129)])
def test_a_cpu_holds_the_weight_of_the_twin(request, backend, shape):
    kernels = request.getfixturevalue(backend)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    packed, twin = kernels.prepare_quantised(weight, bias, "fp8"), NaiveFp8Linear(weight, bias)
    assert isinstance(packed, QuantLinear)
    assert packed.quantization == "fp8"
    # A scale times 256 over 256 is the scale: not a bit is lost.
    assert packed.unpack().equal(twin.unpack())
    assert packed.nbytes <= packed_bytes("fp8", *shape) + 4 * shape[0]
    x = torch.randn(9, shape[1]).bfloat16()
    expected = x.double() @ packed.unpack().double().T + bias.double()
    # What is no multiple of four inputs is left to the twin, which quantises activations.
    share = 2**-8 if shape[1] % 4 == 0 else 2**-3
    bound = share * (x.abs().double() @ packed.unpack().abs().double().T) + 0.02
    assert ((packed(x).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_quantised_as_the_twin_does_it(device, dtype):
    for rows, width in ((3, 100), (2, 2050), (5, 64)):
        x = (torch.randn(rows, width, device=device) * 7).to(dtype)
        x[0] = 0.0
        x[-1, -1] = 100.0  # the largest is in the last block
        if rows > 2:
            x[1, 7] = torch.nan
        expected, expected_scales = quantise_fp8(x)
        codes, scales = Fp8Linear(torch.ones(1, width, device=device), None).quantise(x)
        # A GPU divides by a constant by multiplying.
        torch.testing.assert_close(scales, expected_scales, rtol=2e-7, atol=0.0, equal_nan=True)
        known = scales.isfinite()  # what the codes of the others are does not matter
        assert codes[:, :width].float()[known].equal(expected.float()[known])
        assert codes[:, width:].float()[known].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_candidate_is_the_product(device, dtype):
    for shape in SMALL if device.type == "cpu" else SMALL[2:] + LLAMA:
        weight = torch.randn(shape, device=device).to(dtype)
        bias = torch.randn(shape[0], device=device).to(dtype)
        packed, twin = prepare_quantised(weight, bias, "fp8"), NaiveFp8Linear(weight, bias)
        assert isinstance(packed, QuantLinear)
        assert packed.unpack().equal(twin.unpack())
        assert packed.nbytes <= packed_bytes("fp8", *shape) + (shape[0] + 15) * bias.itemsize
        ids = torch.randint(0, shape[0], (4,), device=device)
        assert packed.rows(ids).equal(twin.rows(ids))
        for rows in (1, 3, 40):
            x = torch.randn(rows, shape[1], device=device).to(dtype)
            expected = twin(x).float()
            codes, scales = quantise_fp8(x)
            magnitude = (codes.float() * scales[:, None]).abs() @ packed.unpack().abs().T
            # Matrix units keep fewer bits of a sum than float32; and the result is rounded.
            bound = 2**-10 * magnitude + torch.finfo(dtype).eps * expected.abs() + 1e-5
            for config in packed.candidates(bucket(rows)):
                y = packed.run(x, config)
                assert y.dtype == dtype
                assert ((y.float() - expected).abs() <= bound).all(), config
    assert packed(x[:0]).shape == (0, shape[0])
    assert packed(x.view(2, -1, shape[1])).shape == (2, 20, shape[0])
