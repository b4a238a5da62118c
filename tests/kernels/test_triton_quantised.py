"""Quantised products on the GPU: every candidate kernel with the very weights of the twin."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from streamserve_kernels import QuantLinear
from streamserve_kernels.quantised import NaiveQuantLinear, packed_bytes
from streamserve_kernels.triton.linear import (
    PACKED_ROWS,
    PackedQuantLinear,
    prepare_quantised,
)
from streamserve_kernels.triton.packed import pack
from streamserve_kernels.triton.stored import prepare_stored
from streamserve_kernels.triton.tuning import LIBRARY, Config, bucket
from tests.kernels.conftest import amid_nan, dtype_on
from tests.kernels.pretended_gpu import HAS_GPU
from tests.kernels.stored_cases import CASES

SMALL = [(1, 1), (5, 129), (37, 100), (16, 64), (48, 896)]
LLAMA = [(6144, 4096), (4096, 14336)] if HAS_GPU else [(96, 512), (64, 1792)]
SUM = 1e-5
# Of the stored kinds: in words and in planes, with zeros, minimums, tables and factored scales.
IN_FLOAT16 = ("gptq4", "act-order", "gptq3", "q4_k", "nf4", "fp8-blocks")


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
        assert packed.nbytes <= packed_bytes(quantization, *shape) + bias.nbytes
        ids = torch.randint(0, shape[0], (9,), device=device)
        assert packed.rows(ids).equal(twin.rows(ids))
        assert packed.rows(ids[:0]).shape == (0, shape[1])


def test_every_candidate_is_the_product(device, dtype, quantization):
    for shape in {torch.float32: SMALL, torch.bfloat16: LLAMA, torch.float16: LLAMA[:1]}[dtype]:
        weight = torch.randn(shape, device=device).to(dtype)
        packed = prepare_quantised(weight, None, quantization)
        held = packed.unpack()
        for rows in (1, 3, 20, 100, 300):
            x = torch.randn(rows, shape[1], device=device).to(dtype)
            for config in packed.candidates(bucket(rows)):
                check(packed.run(x, config), x, held, None, config)


@pytest.mark.parametrize("rows", [1, 2, 17, 70])
def test_odd_sizes_and_a_bias(device, quantization, rows):
    dtype = dtype_on(device)
    for shape in ((37, 100), (130, 264)):
        weight = torch.randn(shape, device=device).to(dtype)
        bias = amid_nan(weight[:, 0])
        packed = prepare_quantised(weight, bias, quantization)
        packed.packed = replace(packed.packed, scales=amid_nan(packed.packed.scales))
        x = amid_nan(torch.randn(rows, shape[1], device=device).to(dtype))
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


@pytest.mark.parametrize("splits", [1, 3])
def test_inputs_are_split_between_programs(device, quantization, splits):
    """More rows than a tile has, fewer steps than splits, and counters that are zero again."""
    if quantization == "fp8":
        pytest.skip("cuBLAS multiplies those")
    dtype = dtype_on(device)
    config = Config("split", 32, 128, 16, 4, 2, splits=splits)
    for shape in SMALL:
        weight = torch.randn(shape, device=device).to(dtype)
        for bias, rows in ((weight[:, 0], 40), (None, 3)):
            packed = prepare_quantised(weight, bias, quantization)
            x = torch.randn(rows, shape[1], device=device).to(dtype)
            y = packed.run(x, config)
            check(y, x, packed.unpack(), bias, config)
            assert packed.run(x, config).equal(y)
            assert packed.run(x[2:3], config).equal(y[2:3])  # whoever is beside it
            assert not packed.counters.any()


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
        weight[:, ::32] = -8.5
    else:
        weight[:, 0], weight[:, 1] = -128.5, 127.5
    packed = prepare_quantised(weight, None, quantization)
    packed.dtype = dtype_on(device)
    x = torch.randint(-8, 9, (19, 192), device=device).to(packed.dtype)
    expected = (x.double() @ packed.unpack().double().T).to(packed.dtype)
    for rows in (1, 2, 19):
        config = packed.candidates(bucket(rows))[0]
        assert packed.run(x[:rows], config).equal(expected[:rows])


def test_views_and_more_dimensions(device, quantization):
    dtype = dtype_on(device)
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
    dtype = dtype_on(device)
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
    dtype = dtype_on(device)
    weight = torch.randn(40, 64, device=device).to(dtype)
    x = torch.randn(PACKED_ROWS + 1, 64, device=device).to(dtype)
    stored = CASES["q4_k"](40, 64).to(device)
    for bias in (None, weight[:, 0]):
        for packed in (
            prepare_quantised(weight, bias, quantization),
            prepare_stored(stored, bias, dtype),
        ):
            check(packed(x), x, packed.unpack(), bias, LIBRARY)


@pytest.mark.parametrize("case", CASES)
def test_stored_weights_and_their_products(device, dtype, case):
    """Every kind in the layout it gets, against what its definition says."""
    if dtype == torch.float16 and case not in IN_FLOAT16:
        pytest.skip("bfloat16 tries this")
    stored, bias = CASES[case](40, 320), torch.randn(40).to(dtype)
    weight = stored.dequantise()
    packed = prepare_stored(stored.to(device), bias.to(device), dtype)
    assert isinstance(packed, QuantLinear)
    assert packed.unpack().cpu().equal(weight)
    ids = torch.tensor([3, 0, 39])
    assert packed.rows(ids.to(device)).cpu().equal(weight[ids].to(dtype))
    for rows in (1, 3, 40, PACKED_ROWS + 1):
        x = torch.randn(rows, 320).to(dtype)
        for config in packed.candidates(bucket(rows)) if rows > 1 else [packed.candidates(1)[0]]:
            check(packed.run(x.to(device), config).cpu(), x, weight, bias, config)
        if rows == 3 and isinstance(packed, PackedQuantLinear):
            # A step of as many words as a group has or fewer, and one of more.
            for words in (16, 64):
                split = Config("split", 16, 128, words, 4, 2, splits=2)
                check(packed.run(x.to(device), split).cpu(), x, weight, bias, split)
    assert packed(x.to(device)).cpu().isfinite().all()


def test_stored_weights_of_ragged_shapes(device):
    """Nothing is a multiple of anything, nor are groups as many as the words' padding has."""
    for case, shape in (
        ("q4_k", (37, 100)),
        ("gptq3", (5, 101)),
        ("q8_0", (37, 100)),
        ("gptq8", (5, 70)),
        ("act-order", (5, 70)),
        ("squeezed4", (37, 101)),
    ):
        stored = CASES[case](*shape)
        packed = prepare_stored(stored.to(device), None, torch.float32)
        assert packed.unpack().cpu().equal(stored.dequantise())
        for rows in (1, 3):
            x = amid_nan(torch.randn(rows, shape[1]))
            config = packed.candidates(bucket(rows))[0]
            check(packed(x.to(device)).cpu(), x, stored.dequantise(), None, config)


def test_what_words_cannot_hold_is_held_in_planes(device):
    """Zeros between two codes, zeros past all codes, an order of three-bit inputs."""
    four, three = CASES["gptq4"](5, 128), CASES["gptq3"](5, 128)
    for stored in (
        replace(four, zeros=four.zeros + 0.25),
        replace(four, zeros=four.zeros + 300),
        replace(three, inputs=torch.randperm(128)),
    ):
        packed = prepare_stored(stored.to(device), None, torch.float32)
        assert packed.unpack().cpu().equal(stored.dequantise())
        x = torch.randn(1, 128)
        config = packed.candidates(1)[0]
        check(packed(x.to(device)).cpu(), x, stored.dequantise(), None, config)


def test_many_values_beside_one_output_of_a_table(device):
    stored = CASES["squeezed4"](3, 320)
    columns = torch.randperm(320)[:300]
    beside = torch.ones(300, dtype=torch.int64), columns, torch.randn(300)
    stored = replace(stored, sparse=beside)
    packed = prepare_stored(stored.to(device), None, torch.float32)
    x = torch.randn(2, 320)
    config = packed.candidates(2)[0]
    check(packed.run(x.to(device), config).cpu(), x, stored.dequantise(), None, config)


def test_a_group_that_no_shift_finds_is_refused():
    codes = torch.zeros(2, 192, dtype=torch.uint8)
    with pytest.raises(ValueError, match="32 times a power of two inputs, got 96"):
        pack(codes, torch.ones(2, 2), None, bits=4, group_size=96, in_features=192)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("gptq2", 2.5),
        ("gptq3", 3.25),
        ("gptq4", 4.25),
        ("q4_0", 4.5),
        ("gptq8", 9.0),
        ("q4_k", 4.5 + 1),
        ("q6_k", 6.6),
        ("nf4", 4.5),
        ("fp8-blocks", 8.25),
    ],
)
def test_stored_weights_stay_packed(device, case, bits):
    stored = CASES[case](64, 1024)
    packed = prepare_stored(stored.to(device), None, torch.bfloat16)
    assert packed.nbytes * 8 <= (bits + 0.02) * 64 * 1024
