"""What the mended interpreter remembers of operands holds for their types and numbers alone."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from streamserve_kernels.triton.runtime import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
DTYPES = (torch.int32, torch.int64, torch.float16, torch.float32)


@triton.jit
def _sums_kernel(columns, rows, sums):
    column, row = tl.load(columns + tl.arange(0, 2)), tl.load(rows + tl.arange(0, 4))
    places = tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)
    tl.store(sums + places, column[:, None] + row)
    tl.store(sums + 8 + places, column[:, None] + tl.load(rows))
    tl.store(sums + 16 + places, tl.load(columns) + row[None, :])


@triton.jit
def _numbers_kernel(values, results, NUMBER: tl.constexpr):
    places = tl.arange(0, 4)
    value = tl.load(values + places)
    tl.store(results + places, value * NUMBER)
    tl.store(results + 4 + places, NUMBER - value)


def test_each_pair_of_types_is_promoted_as_itself():
    for of_column, of_row in [*permutations(DTYPES, 2), *zip(DTYPES, DTYPES, strict=True)]:
        to = torch.promote_types(of_column, of_row)
        column = torch.tensor([2**9, -3.5]).to(of_column)
        row = torch.tensor([5.5, -7, 2**10, 0]).to(of_row)
        sums = torch.zeros(3, 2, 4, dtype=to)
        _sums_kernel[(1,)](column, row, sums)
        column, row = column.to(to), row.to(to)
        expected = column[:, None] + row, column[:, None] + row[0].expand(4), column[0] + row
        assert torch.equal(sums, torch.stack([x.expand(2, 4) for x in expected])), to


def test_each_number_is_taken_as_itself():
    for dtype in (torch.int32, torch.float32):
        values = torch.tensor([1, -2, 3, 2**20], dtype=dtype)
        for number in (4096, 4096.0, 0.5):
            results = torch.zeros(2, 4)
            _numbers_kernel[(1,)](values, results, number)
            expected = torch.stack([values * number, number - values]).float()
            assert torch.equal(results.view(torch.int32), expected.view(torch.int32)), number


def test_a_number_that_a_type_does_not_hold_is_refused_every_time():
    values = torch.ones(4, dtype=torch.int8)
    _numbers_kernel[(1,)](values, torch.zeros(2, 4), 100)
    for _ in range(2):
        with pytest.raises(InterpreterError, match="300 is out of range for type int8"):
            _numbers_kernel[(1,)](values, torch.zeros(2, 4), 300)
