"""Stored weights: what they are, that backends hold the very same, and their products."""

from __future__ import annotations

import pytest
import torch

from streamserve_kernels import QuantLinear
from streamserve_kernels.stored import (
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    StackedWeight,
    StoredFormat,
    StoredWeight,
    TableWeight,
    concatenate,
)
from tests.kernels.stored_cases import CASES as KINDS
from tests.kernels.stored_cases import q4_k

# Units that fewer groups share than are read at a time.
CASES = {**KINDS, "short-units": lambda n, k: q4_k(n, k, per=2)}
SHAPES = [(64, 256), (37, 384), (130, 96)]
# Bits of a code, and what a group and an output take besides, as a checkpoint's header tells.
FORMATS = {
    "gptq2": StoredFormat(2, 64, 4),
    "gptq3": StoredFormat(3, 128, 4),
    "gptq4": StoredFormat(4, 128, 4),
    "gptq4-symmetric": StoredFormat(4, 128, 2),
    "gptq4-rows": StoredFormat(4, None, 4),
    "gptq8": StoredFormat(8, 32, 4),
    "act-order": StoredFormat(4, 32, 4, reordered=True),
    "q4_0": StoredFormat(4, 32, 2),
    "q8_0": StoredFormat(8, 32, 2),
    "int8-float32": StoredFormat(8, None, 4),
    "q4_k": StoredFormat(4, 32, 2 * (1 + 2 / 8)),
    "q6_k": StoredFormat(6, 16, 1 + 2 / 16),
    "nf4": StoredFormat(4, 64, 4, row_bytes=1),
    "squeezed4": StoredFormat(4, None, 0, row_bytes=64),
    "fp8-rows": StoredFormat(8, None, 4),
    "fp8-blocks": StoredFormat(8, 128, 4),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["naive", "cpu", "native"])
def backend(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def by_hand(weight: StoredWeight, n: int, k: int) -> float:
    """One weight, from the definition: column k of the codes."""

    def number(numbers, group: int) -> float:
        if isinstance(numbers, FactoredNumbers):
            code, unit = numbers.codes[n, k // group], numbers.units[n, k // group // numbers.per]
            return float(torch.tensor(float(unit)) * float(code))
        return float(numbers[n, k // group])

    one = torch.tensor
    if isinstance(weight, Float8Weight):
        rows, columns = weight.block or (1, weight.shape[1])
        row = 0 if weight.scales.shape[0] == 1 else n // rows
        return float(one(float(weight.values[n, k])) * weight.scales[row, k // columns])
    code = float(weight.codes[n, k])
    if isinstance(weight, TableWeight):
        value = one(float(weight.table[n % weight.table.shape[0], int(code)]))
        if weight.scales is not None:
            value = value * one(number(weight.scales, weight.group))
        for row, column, beside in (
            zip(*(weight.sparse or ()), strict=True) if weight.sparse else ()
        ):
            if (row, column) == (n, k):
                value = value + beside
        return float(value)
    scale = one(number(weight.scales, weight.group))
    if weight.minimums is not None:
        return float(one(code) * scale - one(number(weight.minimums, weight.group)))
    zero = weight.zeros if isinstance(weight.zeros, float) else number(weight.zeros, weight.group)
    return float(one(code - zero) * scale)


def test_a_weight_is_what_its_definition_says(case: str) -> None:
    weight = CASES[case](7, 200)
    dense = weight.dequantise()
    inputs = getattr(weight, "inputs", None)
    for n in range(7):
        for k in (0, 1, 31, 32, 63, 100, 127, 128, 192, 199):
            assert dense[n, k if inputs is None else inputs[k]] == by_hand(weight, n, k)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_holds_the_very_same_weight(backend, case: str, shape) -> None:
    weight, bias = CASES[case](*shape), torch.randn(shape[0])
    expected = weight.dequantise()
    packed = backend.prepare_stored(weight, bias, torch.bfloat16)
    assert isinstance(packed, QuantLinear)
    assert (packed.out_features, packed.in_features) == shape
    assert packed.dtype == torch.bfloat16
    assert packed.unpack().equal(expected)
    ids = torch.randint(0, shape[0], (9,))
    assert packed.rows(ids).equal(expected[ids].bfloat16())
    if case in FORMATS:
        assert packed.nbytes <= FORMATS[case].nbytes(*shape) + bias.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_naive_product_is_that_of_the_weight(naive, case: str, rows: int, dtype) -> None:
    weight, bias = CASES[case](37, 384), torch.randn(37)
    x = torch.randn(2, rows, 384).to(dtype)
    y = naive.linear(x, naive.prepare_stored(weight, bias, dtype))
    expected = x.double() @ weight.dequantise().double().T + bias.double()
    torch.testing.assert_close(y, expected.to(dtype), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("case", sorted({*CASES} - {"act-order"}))
def test_parts_become_one_weight(case: str) -> None:
    parts = [CASES[case](n, 256) for n in (64, 128, 37)]
    expected = torch.cat([part.dequantise() for part in parts])
    assert concatenate(parts).dequantise().equal(expected)
    assert concatenate(parts[:1]) is parts[0]


def test_float8_blocks_that_end_within_a_part_become_rows() -> None:
    parts = [CASES["fp8-blocks"](n, 256) for n in (100, 200)]
    expected = torch.cat([part.dequantise() for part in parts])
    assert concatenate(parts).dequantise().equal(expected)


def test_parts_in_one_order_of_inputs_keep_it() -> None:
    first = CASES["act-order"](8, 64)
    assert isinstance(first, GroupedWeight)
    assert concatenate([first, first]).dequantise().equal(first.dequantise().repeat(2, 1))
    assert isinstance(concatenate([first, CASES["act-order"](8, 64)]), StackedWeight)


@pytest.mark.parametrize("other", ["q8_0", "nf4", "q4_1", "gptq4", "fp8-rows", "act-order"])
def test_parts_that_are_held_otherwise_stay_as_they_are(backend, other: str) -> None:
    parts = [CASES[name](n, 256) for name, n in (("q4_0", 64), (other, 37), ("q4_0", 40))]
    weight, bias = concatenate(parts), torch.randn(141)
    assert isinstance(weight, StackedWeight)
    assert weight.shape == (141, 256)
    packed = backend.prepare_stored(weight.to(torch.device("cpu")), bias, torch.bfloat16)
    assert isinstance(packed, QuantLinear)
    dense = torch.cat([part.dequantise() for part in parts])
    assert packed.unpack().equal(dense)
    assert packed.rows(torch.tensor([100, 3])).equal(dense[[100, 3]].bfloat16())
    x = torch.randn(3, 256).bfloat16()
    expected = x.double() @ dense.double().T + bias.double()
    torch.testing.assert_close(packed(x), expected.bfloat16(), rtol=2**-6, atol=2**-6)


def test_a_weight_goes_to_a_device_whole(case: str) -> None:
    weight = CASES[case](37, 256)
    moved = weight.to(torch.device("cpu"))
    assert type(moved) is type(weight)
    assert moved.dequantise().equal(weight.dequantise())


def test_numbers_that_do_not_fit_the_codes_are_refused() -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales of \(4, 3\).*groups of 32"):
        GroupedWeight(codes, 4, torch.ones(4, 3), 8.0, 32)
    with pytest.raises(ValueError, match="7 bits"):
        GroupedWeight(codes, 7, torch.ones(4, 2), 8.0, 32)
    with pytest.raises(ValueError, match="either zeros or minimums"):
        GroupedWeight(codes, 4, torch.ones(4, 2), None, 32)
    with pytest.raises(ValueError, match="a table"):
        TableWeight(codes, torch.ones(2, 16), 4)


ROUNDED = ("nf4", "squeezed4", "squeezed3")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(64, 640), (130, 96), (5, 384)])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_compiled_products_stay_within_their_bound(native, case, shape, num_threads) -> None:
    """Each number of rows takes another way: tiles of rows, pieces that are looked up once."""
    torch.set_num_threads(num_threads)
    weight, bias = CASES[case](*shape), torch.randn(shape[0])
    packed = native.prepare_stored(weight, bias, torch.bfloat16)
    assert type(packed).__name__ == (
        "NativeTableLinear" if case.startswith("squeezed") else "NativeStoredLinear"
    )
    x = (torch.randn(101, shape[1]) * torch.logspace(-2, 2, shape[1])).bfloat16()
    dense = weight.dequantise().double()
    expected = x.double() @ dense.T + bias.double()
    # A table may be rounded to bfloat16; other codes are exact, and sums run in float32.
    share = 2.0**-8 if case in ROUNDED else 2.0**-18
    bound = share * (x.abs().double() @ dense.abs().T + bias.abs().double()) + 1e-30
    for dtype in (torch.bfloat16, torch.float32):
        whole = packed(x.to(dtype))
        rounding = 2.0**-8 * expected.abs() if dtype == torch.bfloat16 else 0.0
        assert ((whole.double() - expected).abs() <= bound + rounding).all()
        for start, end in ((0, 1), (1, 3), (3, 7), (7, 20), (20, 60)):
            assert packed(x[start:end].to(dtype)).equal(whole[start:end])


def test_views_and_rows_that_are_no_number(native) -> None:
    packed = native.prepare_stored(CASES["act-order"](40, 64), None, torch.bfloat16)
    fused = torch.randn(6, 200).bfloat16()
    view = fused[:, 71:135]
    expected = packed(view.contiguous())
    assert packed(view).equal(expected)
    assert packed(view.reshape(2, 3, 64)).equal(expected.view(2, 3, 40))
    assert packed(view[:0]).shape == (0, 40)
    view[2, 5] = torch.nan
    assert packed(view)[2].isnan().all()
    assert packed(view)[[0, 1, 3]].equal(expected[[0, 1, 3]])


def test_float8_that_is_no_number_stays_one(native) -> None:
    weight = CASES["fp8-rows"](40, 64)
    assert isinstance(weight, Float8Weight)
    weight.values.view(torch.uint8)[7, 3] = 0x7F
    y = native.prepare_stored(weight, None, torch.bfloat16)(torch.randn(2, 64).bfloat16())
    assert y[:, 7].isnan().all()
    assert y[:, :7].isfinite().all()


@pytest.mark.parametrize("bad_id", [-1, 40])
def test_an_id_outside_a_stored_table_is_refused(native, bad_id: int) -> None:
    packed = native.prepare_stored(CASES["q6_k"](40, 64), None, torch.bfloat16)
    with pytest.raises(IndexError, match="outside its embedding"):
        packed.rows(torch.tensor([3, bad_id]))


def test_what_has_no_whole_steps_is_multiplied_by_the_twin(native) -> None:
    weight = CASES["q4_0"](40, 100)
    packed = native.prepare_stored(weight, None, torch.bfloat16)
    x = torch.randn(3, 100).bfloat16()
    expected = x.double() @ weight.dequantise().double().T
    torch.testing.assert_close(packed(x), expected.bfloat16(), rtol=2**-7, atol=1e-4)
