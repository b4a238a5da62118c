"""A product for each head, against the naive twin."""

from __future__ import annotations

import pytest
import torch

from streamserve_kernels import Kernels, by_head
from tests.kernels.conftest import threads
from tests.kernels.test_layers import normal

BF16 = torch.bfloat16
# One rounding: the twin's sums are in another order.
TIGHT = {"atol": 4e-6, "rtol": 8e-3}


def heads_of(rows: int, num_heads: int, size: int) -> torch.Tensor:
    """[rows, H, size] in bfloat16, a view between columns that are no numbers."""
    width = num_heads * size
    wide = torch.full((rows, width + 12), torch.nan, dtype=BF16)
    wide[:, 6 : 6 + width] = normal(1, rows, width)
    return wide[:, 6 : 6 + width].view(rows, num_heads, size)


@pytest.mark.parametrize("rows", [0, 1, 5, 13, 130])
@pytest.mark.parametrize(
    ("num_heads", "num_inputs", "num_passed", "num_outputs"),
    [(1, 2, 0, 16), (3, 8, 4, 16), (5, 16, 0, 10), (2, 192, 64, 512), (4, 36, 2, 130)],
)
def test_native_products_by_head_are_naive(
    naive: Kernels,
    native: Kernels,
    rows: int,
    num_heads: int,
    num_inputs: int,
    num_passed: int,
    num_outputs: int,
) -> None:
    x = heads_of(rows, num_heads, num_inputs + num_passed)
    weight = normal(2, num_heads, num_outputs, num_inputs, dtype=BF16)
    expected = naive.prepare_by_head(weight)(x)
    packed = native.prepare_by_head(weight)
    alone = packed(x[:1])
    for count in (1, 2, 3):
        with threads(count):
            found = packed(x)
        assert found.shape == (rows, num_heads, num_passed + num_outputs)
        torch.testing.assert_close(found, expected, **TIGHT)
        assert torch.equal(found[:1], alone), "a row depends on its batch"
    assert torch.equal(expected[..., :num_passed], x[..., num_inputs:])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_all_heads_at_once_are_naive(naive: Kernels, dtype: torch.dtype) -> None:
    x = heads_of(7, 3, 12).to(dtype)
    weight = normal(2, 3, 20, 8, dtype=dtype)
    prepared = by_head.prepare_by_head(weight)
    assert prepared.nbytes == naive.prepare_by_head(weight).nbytes == weight.nbytes
    found, expected = prepared(x), naive.prepare_by_head(weight)(x)
    torch.testing.assert_close(found, expected, atol=4e-6, rtol=8e-3 if dtype == BF16 else 1e-5)


def test_what_the_native_products_cannot_read_is_refused(native: Kernels) -> None:
    with pytest.raises(TypeError, match="even number of inputs, got 7"):
        native.prepare_by_head(normal(1, 2, 16, 7, dtype=BF16))
    with pytest.raises(TypeError, match="float32"):
        native.prepare_by_head(normal(1, 2, 16, 8))
    packed = native.prepare_by_head(normal(1, 2, 16, 8, dtype=BF16))
    with pytest.raises(ValueError, match="2 heads of 8 bfloat16 or more, got 3 of 8"):
        packed(normal(1, 4, 3, 8, dtype=BF16))
    with pytest.raises(ValueError, match="got 2 of 6"):
        packed(normal(1, 4, 2, 6, dtype=BF16))
    with pytest.raises(ValueError, match="adjacent"):
        packed(normal(1, 4, 2, 16, dtype=BF16)[..., ::2])
