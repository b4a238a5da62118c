"""What small kernels ask for of the next product's weight: how much, when, and of which product."""

from __future__ import annotations

import pytest
import torch

from streamserve.models import Decoder
from streamserve_kernels import naive
from tests.models.paged import PagedHarness, Sequence
from tests.runner.tiny_llama import tiny_llama

pytest.importorskip("triton")

from streamserve_kernels.triton import ahead
from streamserve_kernels.triton.linear import DenseLinear, prepare_linear
from streamserve_kernels.triton.tuning import LIBRARY, Config

IN, OUT = 256, 48


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> DenseLinear:
    """Rows of four lines, of which a small kernel has time for one and a half."""
    monkeypatch.setattr(ahead, "AHEAD_BYTES", OUT * 128 * 3 // 2)
    made = prepare_linear(torch.zeros(OUT, IN, dtype=torch.bfloat16))
    assert isinstance(made, DenseLinear)
    made.choices = {64: LIBRARY}
    return made


def test_whole_lines_of_each_row_once(product):
    x = torch.zeros(64, IN, dtype=torch.bfloat16)
    product.announce()
    asked = ahead.taken(x, 64)
    assert asked.weight is product.weight
    assert asked[1:] == (IN, 1, OUT)
    assert ahead.taken(x, 64).total == 0


def test_a_small_weight_whole(product, monkeypatch):
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 2**20)
    product.announce()
    assert ahead.taken(product.weight, 64)[1:] == (IN, 4, 4 * OUT)


@pytest.mark.parametrize(
    ("rows", "config"),
    [(1, LIBRARY), (16, LIBRARY), (257, LIBRARY), (64, Config("split", overlap=True))],
)
def test_nothing_where_the_product_asks_for_itself_or_is_bound_by_arithmetic(product, rows, config):
    product.choices = {64: config}
    product.announce()
    assert ahead.taken(product.weight, rows).total == 0
    assert ahead.taken(product.weight, 64).total == 0  # it was announced for that one call


def test_nothing_of_a_weight_with_more_rows_than_there_is_time_for(product, monkeypatch):
    monkeypatch.setattr(ahead, "AHEAD_BYTES", OUT * 128 - 1)
    product.announce()
    assert ahead.taken(product.weight, 64).total == 0


def test_each_product_of_a_layer_is_announced_before_the_kernel_before_it(tmp_path, monkeypatch):
    events: list[tuple[str, int]] = []
    multiply = naive.NaiveLinear.__call__

    def announce(self: naive.NaiveLinear) -> None:
        events.append(("announced", id(self)))

    def product(self: naive.NaiveLinear, x: torch.Tensor) -> torch.Tensor:
        events.append(("product", id(self)))
        return multiply(self, x)

    monkeypatch.setattr(naive.NaiveLinear, "announce", announce, raising=False)
    monkeypatch.setattr(naive.NaiveLinear, "__call__", product)
    for name in ("rms_norm", "gated_activation", "paged_attention"):
        kernel = getattr(naive, name)

        def small(*args, kernel=kernel, **options):
            events.append(("small", 0))
            return kernel(*args, **options)

        monkeypatch.setattr(naive, name, small)
    decoder = tiny_llama(tmp_path, backend="naive")
    assert isinstance(decoder, Decoder)
    PagedHarness(decoder).step([(Sequence([3, 1, 4]), 3), (Sequence([1, 5]), 2)])
    products = [index for index, (what, _) in enumerate(events) if what == "product"]
    assert len(products) == 4 * len(decoder.spec.layers) + 1
    for index in products[:-1]:  # all but the head
        of = events[index][1]
        assert events[index - 2 : index] == [("announced", of), ("small", 0)]
