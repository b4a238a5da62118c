"""Quantised products on the GPU: every candidate kernel with the very weights of the twin."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from streamserve_kernels import QUANTIZATIONS, QuantLinear
from streamserve_kernels.grouped import AWQ_ORDER, NaiveGroupedLinear, unpack_awq, unpack_gptq
from streamserve_kernels.quantised import NaiveQuantLinear, packed_bytes
from streamserve_kernels.triton.linear import (
    PACKED_ROWS,
    prepare_awq,
    prepare_gptq,
    prepare_quantised,
)
from streamserve_kernels.triton.runtime import INTERPRETED
from streamserve_kernels.triton.tuning import LIBRARY, Config, bucket

SMALL = [(1, 1), (5, 129), (37, 100), (16, 64), (48, 896)]
LLAMA = [(6144, 4096), (4096, 14336)]
SUM = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request):
    return request.param


def dtype_for(device: torch.device) -> torch.dtype:
    """What shows every index right under the interpreter, and what a GPU is for."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def check(y, x, weight, bias, config):
    """Within float32 sums, the rounding of the result and, but for one row, of the weights."""
    x, weight = x.double(), weight.double()
    expected = x @ weight.T + (0.0 if bias is None else bias.double())
    magnitude = x.abs() @ weight.abs().T + (0.0 if bias is None else bias.double().abs())
    bound = SUM * magnitude + 1e-6
    if y.dtype != torch.float32:
        eps = torch.finfo(y.dtype).eps
        bound += eps * expected.abs()
        if config.kernel != "gemv":
            bound += eps / 2 * magnitude
        if y.dtype == torch.float16:
            bound += 1e-3  # weights below its normal numbers
    error = (y.double() - expected).abs()
    assert not error.isnan().any()
    assert (error <= bound).all(), (config, error.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_those_of_the_twin(device, quantization, dtype):
    for shape in SMALL:
        weight = torch.randn(shape, device=device).to(dtype)
        bias = torch.randn(shape[0], device=device).to(dtype)
        twin = NaiveQuantLinear(weight, bias, quantization)
        packed = prepare_quantised(weight, bias, quantization)
        assert isinstance(packed, QuantLinear)
        assert (packed.out_features, packed.in_features) == shape
        assert packed.dtype == dtype
        assert packed.quantization == quantization
        assert packed.unpack().equal(twin.unpack())
        # The interpreter cuts a float32 off where a GPU rounds it to bfloat16.
        rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
        assert packed.nbytes <= packed_bytes(quantization, *shape) + bias.nbytes
        ids = torch.randint(0, shape[0], (9,), device=device)
        torch.testing.assert_close(packed.rows(ids), twin.rows(ids), rtol=rtol, atol=0.0)
        assert packed.rows(ids[:0]).shape == (0, shape[1])


def test_every_candidate_is_the_product(device, quantization):
    dtype = dtype_for(device)
    for shape in SMALL if device.type == "cpu" else LLAMA:
        weight = torch.randn(shape, device=device).to(dtype)
        packed = prepare_quantised(weight, None, quantization)
        held = packed.unpack()
        for rows in (1, 3, 20, 100, 300):
            x = torch.randn(rows, shape[1], device=device).to(dtype)
            for config in packed.candidates(bucket(rows)):
                check(packed.run(x, config), x, held, None, config)


@pytest.mark.parametrize("rows", [1, 2, 17, 70])
def test_odd_sizes_and_a_bias(device, quantization, rows):
    dtype = dtype_for(device)
    for shape in ((37, 100), (130, 264)):
        weight = torch.randn(shape, device=device).to(dtype)
        bias = weight[:, 0]
        packed = prepare_quantised(weight, bias, quantization)
        x = torch.randn(rows, shape[1], device=device).to(dtype)
        config = packed.candidates(bucket(rows))[0]
        check(packed(x), x, packed.unpack(), bias, config)


@pytest.mark.parametrize("config", [Config("gemm", 32, 64, 16, 4, 2), Config("gemm", 64, 32, 64)])
def test_tiles_that_float32_is_not_given(device, quantization, config):
    """Only under the interpreter: the GPU's are tried as candidates."""
    if device.type != "cpu":
        pytest.skip("tried as candidates")
    weight, x = torch.randn(70, 264), torch.randn(70, 264)
    packed = prepare_quantised(weight, weight[:, 0], quantization)
    check(packed.run(x, config), x, packed.unpack(), weight[:, 0], config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(device, quantization, dtype):
    weight = torch.randn(48, 320, device=device).to(dtype)
    packed = prepare_quantised(weight, None, quantization)
    for rows in (1, 3):
        x = torch.randn(rows, 320, device=device).to(dtype)
        config = packed.candidates(bucket(rows))[0]
        check(packed(x), x, packed.unpack(), None, config)


def test_what_is_exact_stays_exact(device, quantization):
    """Integers and a scale of one: nothing is left to round, whichever kernel multiplies."""
    weight = torch.randint(-7, 8, (96, 192), device=device).float()
    if quantization == "int4":
        weight[:, ::32] = 7.5
    else:
        weight[:, 0], weight[:, 1] = -128.5, 127.5
    packed = prepare_quantised(weight, None, quantization)
    packed.dtype = dtype_for(device)
    x = torch.randint(-8, 9, (19, 192), device=device).to(packed.dtype)
    expected = (x.double() @ packed.unpack().double().T).to(packed.dtype)
    for rows in (1, 2, 19):
        config = packed.candidates(bucket(rows))[0]
        assert packed.run(x[:rows], config).equal(expected[:rows])


def test_views_and_more_dimensions(device, quantization):
    dtype = dtype_for(device)
    packed = prepare_quantised(torch.randn(40, 64, device=device).to(dtype), None, quantization)
    view = torch.randn(6, 200, device=device).to(dtype)[:, 71:135]
    expected = packed(view.contiguous())
    assert packed(view).equal(expected)
    assert packed(view.reshape(2, 3, 64)).equal(expected.view(2, 3, 40))
    assert packed(view[:0]).shape == (0, 40)
    assert packed(view.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="expected rows of 64, got 65"):
        packed(torch.zeros(64, 65, device=device, dtype=dtype))


def test_a_row_that_is_no_number_stays_alone(device, quantization):
    dtype = dtype_for(device)
    packed = prepare_quantised(torch.randn(40, 100, device=device).to(dtype), None, quantization)
    x = torch.randn(5, 100, device=device).to(dtype)
    expected = packed(x)
    x[2, 99] = torch.nan
    result = packed(x)
    assert result[2].isnan().all()
    assert result[[0, 1, 3, 4]].equal(expected[[0, 1, 3, 4]])


def test_a_large_weight_is_dequantised_in_pieces(device, quantization, monkeypatch):
    # The package has a function of that name.
    module = importlib.import_module("streamserve_kernels.triton.linear")
    monkeypatch.setattr(module, "_SCRATCH_ELEMENTS", 7 * 64)
    dtype = dtype_for(device)
    weight = torch.randn(40, 64, device=device).to(dtype)
    x = torch.randn(PACKED_ROWS + 1, 64, device=device).to(dtype)
    for bias in (None, weight[:, 0]):
        packed = prepare_quantised(weight, bias, quantization)
        check(packed(x), x, packed.unpack(), bias, LIBRARY)


def words_of(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields [A, B, 32 / bits], lowest first -> words [A, B] int32, one by one in Python."""
    rows = []
    for row in fields.tolist():
        words = [sum(field << (bits * i) for i, field in enumerate(word)) for word in row]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def awq_case(n: int, k: int, group: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(qweight, qzeros, scales) and the weight [N, K] in float64 that they mean."""
    codes, zeros = torch.randint(0, 16, (k, n)), torch.randint(0, 16, (k // group, n))
    scales = (torch.rand(k // group, n) / 50).half()
    order = torch.tensor(AWQ_ORDER)
    qweight, qzeros = (words_of(t.view(t.shape[0], -1, 8)[..., order], 4) for t in (codes, zeros))
    index = torch.arange(k) // group
    return (qweight, qzeros, scales), ((codes - zeros[index]) * scales.double()[index]).T


def gptq_case(
    n: int, k: int, group: int, bits: int, offset: int, act_order: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(qweight, qzeros, scales, g_idx) and the weight [N, K] in float64 that they mean."""
    codes = torch.randint(0, 2**bits, (k, n))
    zeros = torch.randint(offset, 2**bits, (k // group, n))
    scales = (torch.rand(k // group, n) / 50).half()
    index = torch.arange(k) // group
    if act_order:
        index = index[torch.randperm(k)]
    per = 32 // bits
    qweight = words_of(codes.view(-1, per, n).permute(0, 2, 1), bits)
    qzeros = words_of((zeros - offset).view(k // group, -1, per), bits)
    weight = ((codes - zeros[index]) * scales.double()[index]).T
    return (qweight, qzeros, scales, index.int()), weight


def check_grouped(packed, twin, weight, device, dtype):
    assert isinstance(packed, QuantLinear)
    assert isinstance(twin, QuantLinear)
    assert packed.unpack().cpu().double().sub(weight).abs().max() < 1e-7
    assert twin.unpack().equal(packed.unpack().cpu())
    ids = torch.tensor([3, 0, 3])
    torch.testing.assert_close(packed.rows(ids.to(device)).cpu(), twin.rows(ids))
    bias = None if packed.bias is None else packed.bias.cpu()
    for rows in (1, 3, 40, PACKED_ROWS + 1):
        x = torch.randn(rows, weight.shape[1]).to(dtype)
        config = packed.candidates(bucket(rows))[0]
        check(packed(x.to(device)).cpu(), x, weight, bias, config)
    torch.testing.assert_close(twin(x), packed(x.to(device)).cpu(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("k", "group"), [(96, 32), (256, 128), (192, 64), (160, -1)])
def test_awq(device, k, group):
    n = 40
    args, weight = awq_case(n, k, k if group == -1 else group)
    dtype = dtype_for(device)
    bias = torch.randn(n).to(dtype)
    packed = prepare_awq(*(t.to(device) for t in (*args, bias)), group, dtype)
    twin = NaiveGroupedLinear(unpack_awq(*args, group), bias, dtype)
    check_grouped(packed, twin, weight, device, dtype)


@pytest.mark.parametrize(
    ("k", "group", "bits", "offset", "act_order"),
    [
        (96, 32, 4, 1, False),
        (256, 128, 4, 1, True),
        (192, 64, 4, 0, True),
        (160, 160, 4, 1, False),
        (128, 32, 8, 1, True),
        (256, 128, 8, 0, False),
    ],
)
def test_gptq(device, k, group, bits, offset, act_order):
    n = 40
    args, weight = gptq_case(n, k, group, bits, offset, act_order)
    options = {"bits": bits, "zero_offset": offset}
    dtype = dtype_for(device)
    bias = torch.randn(n).to(dtype)
    packed = prepare_gptq(*(t.to(device) for t in (*args, bias)), dtype=dtype, **options)
    assert (packed.columns is not None) == act_order
    twin = NaiveGroupedLinear(unpack_gptq(*args, **options), bias, dtype)
    check_grouped(packed, twin, weight, device, dtype)


def test_a_zero_point_past_the_largest_code(device):
    """A stored 15 means 16 in the first version of GPTQ's format."""
    args, _ = gptq_case(8, 32, 32, 4, 1, False)
    args = (args[0], torch.full_like(args[1], -1), *args[2:])
    packed = prepare_gptq(*(t.to(device) for t in args), None, dtype=torch.float32)
    grouped = unpack_gptq(*args)
    assert grouped.zeros.eq(16).all()
    assert packed.unpack().cpu().equal(grouped.dequantise())


def test_what_cannot_be_a_layer_is_refused():
    (qweight, qzeros, scales, index), _ = gptq_case(8, 96, 32, 4, 1, False)
    with pytest.raises(ValueError, match="not of 3"):
        unpack_gptq(qweight, qzeros, scales, bits=3)
    with pytest.raises(ValueError, match="g_idx does not make 3 groups of 32 inputs"):
        unpack_gptq(qweight, qzeros, scales, torch.zeros_like(index))
    with pytest.raises(ValueError, match="a group must be 32 times a power of two"):
        prepare_gptq(*gptq_case(8, 96, 48, 4, 1, False)[0], None)
    awq, _ = awq_case(8, 96, 32)
    with pytest.raises(ValueError, match="3 groups of 64 are not 96 inputs"):
        prepare_awq(*awq, None, 64)
